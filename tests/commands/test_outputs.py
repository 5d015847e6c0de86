"""What a verb is to write is looked at before anything is read; a full disk is named."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("typer")

from pylora.commands import cli
from pylora.commands.outputs import check_file, check_folder
from pylora.errors import ConfigError


def places(where: Path) -> dict[str, tuple[Path, str]]:
    """Places where nothing can be written, and what is said about each."""
    (where / "file.png").write_text("no folder")
    (where / "dangling.png").symlink_to(where / "gone" / "x")
    (where / "loop.png").symlink_to(where / "loop.png")
    return {
        "below a file": (where / "file.png" / "out.png", "is a file, not a folder"),
        "a link to nothing": (where / "dangling.png", "does not exist"),
        "a link to itself": (where / "loop.png", "symbolic links"),
        "a name too long": (where / ("x" * 300 + ".png"), "too long"),
        "no place for files": (Path("/proc/nothing.png"), "cannot be written"),
    }


KINDS = ("below a file", "a link to nothing", "a link to itself", "a name too long")
KINDS += ("no place for files",) * (sys.platform == "linux")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "verb", ["train", "merge", "unmerge", "pack", "vectors", "demo", "inspect", "check"]
)
def test_each_verb_refuses_before_it_reads(
    verb: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, says = places(tmp_path)[kind]
    args = {
        "train": ["train", "/no/model", "/no/data", out],
        "merge": ["merge", "/no/model", "/no/adapter", out],
        "unmerge": ["unmerge", "/no/model", out],
        "pack": ["pack", "/no/model", out, "--precision", "int8"],
        "vectors": ["vectors", "--out", out],
        "demo": ["demo", "--model", "/no/model", "--out", out],
        "inspect": ["inspect", "/no/adapter", "--picture", out],
        "check": ["check", "/no/model", "--json", out],
    }[verb]
    assert cli.main([str(a) for a in args]) == 1
    message = capsys.readouterr().err
    assert str(out) in message and says in message and "/no/" not in message
    assert message.count("\n") == 1 and message.startswith("pylora: ")


def test_a_file_in_place_of_a_folder_and_the_other_way_round(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="is a file; name a folder"):
        check_folder(tmp_path / "file")
    with pytest.raises(ConfigError, match="is a folder; name a file in it"):
        check_file(tmp_path, what="--json")
    with pytest.raises(ConfigError, match=r"must end in \.png"):
        check_file(tmp_path / "x.jpg", what="--picture", suffix=".png")
    with pytest.raises(ConfigError, match="no ordinary file"):
        check_file(Path(os.devnull), what="--json")


def test_what_can_be_written_passes_and_nothing_is_left(tmp_path: Path) -> None:
    check_folder(tmp_path / "a" / "b" / "c")
    check_folder(tmp_path)
    check_file(tmp_path / "a" / "b.json", what="--json")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="everything may be written")
def test_a_folder_of_somebody_else(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir(mode=0o500)
    with pytest.raises(ConfigError, match="Permission denied"):
        check_folder(tmp_path / "theirs" / "out")
    with pytest.raises(ConfigError, match="Permission denied"):
        check_folder(tmp_path / "theirs")


@pytest.mark.parametrize("limit", [100, 5_000])
def test_a_full_disk_is_an_error_that_names_what_was_to_be_written(
    limit: int, tmp_path: Path
) -> None:
    pytest.importorskip("tokenizers")
    from tiny_model import write_tiny_model

    model, data = write_tiny_model(tmp_path / "model"), tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    train = ["train", str(model), str(data), str(tmp_path / "run"), "--steps", "1"]
    assert cli.main(train) == 0
    adapter = tmp_path / "run" / "adapter"
    for args, out in (
        ([*train[:3], str(tmp_path / "new"), "--steps", "1"], tmp_path / "new"),
        (["merge", str(model), str(adapter), str(tmp_path / "merged")], tmp_path / "merged"),
        (["vectors", "--out", str(tmp_path / "vectors")], tmp_path / "vectors"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "pylora", *args],
            capture_output=True,
            text=True,
            check=False,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        )
        last = done.stderr.splitlines()[-1]
        assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
        named = last.startswith((f"pylora: {out}", "pylora: the folder for temporary files"))
        assert named and "File too large" in last
        assert not list(tmp_path.rglob(".*")), "what was half written is still there"
        assert args[0] == "train" or not out.exists()
