"""Output files and directories appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from pylora.errors import ConfigError
from pylora.files.whole import atomic_dir, atomic_write


def test_a_written_file_replaces_the_older_one(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "a.png"
    for content in ("one", "two"):
        with atomic_write(target) as beside:
            assert beside.suffix == ".png"
            beside.write_text(content)
        assert target.read_text() == content
    assert [p.name for p in target.parent.iterdir()] == ["a.png"]


def test_an_error_leaves_the_older_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    target.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_write(target) as beside:
        beside.write_text("half")
        raise KeyboardInterrupt
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_block_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "a"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_directory_appears_whole_and_again(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    for content in ("one", "two"):
        with atomic_dir(target) as beside:
            (beside / "sub").mkdir()
            (beside / "sub" / "x").write_text(content)
            (beside / "y").write_text(content)
            assert not target.exists() or (target / "y").read_text() == "one"
        assert (target / "sub" / "x").read_text() == (target / "y").read_text() == content
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_a_failed_directory_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError), atomic_dir(tmp_path / "adapter") as beside:
        (beside / "x").write_text("half")
        raise ValueError
    assert not list(tmp_path.iterdir())


def test_a_directory_with_other_files_is_not_replaced_unless_asked(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=r"thesis\.tex"), atomic_dir(target) as beside:
        (beside / "x").write_text("new")
    assert (target / "thesis.tex").read_text() == "years of work"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    with atomic_dir(target, replace=True) as beside:
        (beside / "x").write_text("new")
    assert [p.name for p in target.iterdir()] == ["x"]


def test_a_file_in_the_place_of_a_directory_and_the_reverse(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "dir").mkdir()
    with pytest.raises(ConfigError, match="file"), atomic_dir(tmp_path / "file"):
        pass
    with pytest.raises(ConfigError, match="dir"), atomic_write(tmp_path / "dir"):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dir", "file"]
