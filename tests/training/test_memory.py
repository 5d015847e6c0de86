"""What is free: the least of the machine's and the cgroups', of either version."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from pylora.training.memory import cgroup_bytes, free_bytes, held_bytes, peak_rss_bytes


def put(folder: Path, **files: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n")
    return folder


def test_the_least_of_the_groups_above_counts(tmp_path: Path) -> None:
    mine = tmp_path / "cgroup"
    mine.write_text("0::/job/step\n")
    put(tmp_path / "job", memory__max=1000, memory__current=400)
    put(tmp_path / "job" / "step", memory__max="max", memory__current=300)
    assert cgroup_bytes(tmp_path, mine) == 600
    put(tmp_path / "job" / "step", memory__max=500, memory__stat="inactive_file 150\nanon 1")
    assert cgroup_bytes(tmp_path, mine) == 350  # the files' pages can be given up
    put(tmp_path / "job" / "step", memory__current=900)
    assert cgroup_bytes(tmp_path, mine) == 0


def test_version_one(tmp_path: Path) -> None:
    where = put(tmp_path / "memory")
    (where / "memory.limit_in_bytes").write_text("900\n")
    (where / "memory.usage_in_bytes").write_text("200\n")
    assert cgroup_bytes(tmp_path, tmp_path / "none") == 700
    (where / "memory.limit_in_bytes").write_text(f"{2**63 - 4096}\n")
    assert math.isinf(cgroup_bytes(tmp_path, tmp_path / "none"))


def test_this_process() -> None:
    held, peak = held_bytes(), peak_rss_bytes()
    if held is None or peak is None:
        pytest.skip("the system does not say")
    assert 1 << 20 < held <= 1.1 * peak and free_bytes() > 0
