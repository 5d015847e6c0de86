"""Pages of a mapped file are given back, and come again; other memory is left alone."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import pytest

from pylora.files.mapped import let_go
from pylora.formats.safetensors import map_file

PAGES = 64


def resident(array: np.ndarray) -> int:
    """Bytes of the mapping that an array lies in that count as this process's memory (Linux)."""
    address, found = array.__array_interface__["data"][0], False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            start, end = (int(part, 16) for part in first.split("-"))
            found = start <= address < end
        elif found and first == "Rss:":
            return int(line.split()[1]) * 1024
    raise AssertionError("the array lies in no mapping")


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="counts pages as Linux does")
def test_what_is_let_go_of_takes_no_memory_and_can_be_read_again(tmp_path: Path) -> None:
    size = PAGES * mmap.PAGESIZE
    content = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    content.tofile(tmp_path / "f")
    data = map_file(tmp_path / "f")
    assert np.array_equal(data, content) and resident(data) == size
    let_go(data[mmap.PAGESIZE // 2 :].reshape(-1, mmap.PAGESIZE // 2)[:20])
    # Half a page is left at either end: 9 whole ones in between.
    assert resident(data) == size - 9 * mmap.PAGESIZE
    let_go(data[:0])
    let_go(data[::2])
    assert resident(data) == size - 9 * mmap.PAGESIZE
    let_go(data)
    assert resident(data) == 0
    assert np.array_equal(data, content)


def test_other_memory_is_left_alone() -> None:
    ordinary = np.arange(10 * mmap.PAGESIZE, dtype=np.uint8)
    anonymous = np.frombuffer(mmap.mmap(-1, 4 * mmap.PAGESIZE), np.uint8)
    anonymous[:] = 7
    guarded = anonymous[:]
    guarded.flags.writeable = False
    for array in (ordinary, ordinary.view(), anonymous, anonymous[5:], guarded):
        before = array.copy()
        let_go(array)
        assert np.array_equal(array, before)
