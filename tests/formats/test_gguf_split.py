"""Split GGUF models: written by gguf-py, read as one; every way in which a part is wrong."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from small_models import CONFIG, write_gguf

from pylora.errors import FileFormatError
from pylora.formats import open_checkpoint


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Path], Any]:
    """A model in several files, and its weights."""
    plain = gguf.GGUFWriter
    monkeypatch.setattr(gguf, "GGUFWriter", lambda p, a: plain(p, a, split_max_tensors=7))
    expected = write_gguf(tmp_path / "m.gguf", kind="Q8_0")
    files = sorted(tmp_path.glob("m-*.gguf"))
    assert len(files) == 3
    return files, expected


@pytest.mark.parametrize("which", [0, 1, 2, "directory"])
def test_every_part_opens_the_whole_model(parts: Any, which: Any) -> None:
    files, expected = parts
    with open_checkpoint(files[0].parent if which == "directory" else files[which]) as checkpoint:
        assert checkpoint.config.hidden_size == CONFIG.hidden_size
        assert set(checkpoint.names()) == set(expected)
        for name, want in expected.items():
            np.testing.assert_array_equal(checkpoint.load(name), want)


def test_a_part_that_is_missing_is_named(parts: Any) -> None:
    files, _ = parts
    files[1].unlink()
    with pytest.raises(FileFormatError, match="1 of them are not beside it: m-00002-of-00003.gguf"):
        open_checkpoint(files[0])


def test_a_part_without_its_name_is_explained(parts: Any) -> None:
    files, _ = parts
    with pytest.raises(FileFormatError, match="must end in -NNNNN-of-00003.gguf"):
        open_checkpoint(files[0].rename(files[0].with_name("model.gguf")))


def test_parts_that_are_mixed_up_are_named(parts: Any) -> None:
    files, _ = parts
    shutil.copyfile(files[2], files[1])
    with pytest.raises(FileFormatError, match="part 2 of 3.*its name says 1 of 3"):
        open_checkpoint(files[0])


def test_a_part_that_is_cut_off_is_named(parts: Any) -> None:
    files, _ = parts
    files[2].write_bytes(files[2].read_bytes()[:-100])
    with pytest.raises(FileFormatError, match="00003-of-00003.gguf.*truncated or damaged"):
        open_checkpoint(files[0])


@pytest.mark.parametrize("name", ["a.gguf", "model.safetensors"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        (b"<!doctype html><html><body></body></html>", "web page"),
    ],
)
def test_what_stands_in_place_of_weights_is_named(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    from small_models import write_hf

    write_hf(tmp_path / "hf")
    file = tmp_path / "hf" / name
    file.write_bytes(content)
    with pytest.raises(FileFormatError, match=message):
        open_checkpoint(file if name.endswith("gguf") else file.parent)
