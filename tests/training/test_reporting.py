"""Reports: TensorBoard reads what is written, the others are given it, and none ends a run."""

from __future__ import annotations

import math
import struct
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from pylora.errors import ConfigError, MissingExtraError
from pylora.training.reporting import Reports, TensorBoard, check_names, crc32c


def test_the_checksum_is_castagnolis() -> None:
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA  # of RFC 3720, B.4


def written(folder: Path) -> list[bytes]:
    """The records of a folder's one file, whose checksums must be right."""
    [file] = folder.iterdir()
    data, found = file.read_bytes(), []

    def masked(part: bytes) -> int:
        crc = crc32c(part)
        return ((crc >> 15 | crc << 17 & 0xFFFFFFFF) + 0xA282EAD8) & 0xFFFFFFFF

    while data:
        [n] = struct.unpack("<Q", data[:8])
        assert struct.unpack("<I", data[8:12])[0] == masked(data[:8])
        found.append(data[12 : 12 + n])
        assert struct.unpack("<I", data[12 + n : 16 + n])[0] == masked(found[-1])
        data = data[16 + n :]
    return found


def test_a_file_is_whole_records(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    board.add(1, {"loss": 2.5})
    board.add(300, {"loss": 1.5, "eval_loss": 1.25})
    first, start, one, two = written(tmp_path)
    assert b"brain.Event:2" in first and b"train/loss" in one and b"eval/loss" in two
    assert struct.pack("<f", 1.25) in two and len(start) < len(one)


@pytest.mark.parity
def test_tensorboard_reads_it(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    reports = Reports(["tensorboard"], tmp_path, {}, pytest.fail)
    for step in range(1, 5):
        reports.add({"step": step, "loss": 1 / step, "precision": "fp32", "eta": math.nan})
    reports.add({"step": 4, "eval_loss": 0.125})
    reports.__exit__()
    again = Reports(["tensorboard"], tmp_path, {}, pytest.fail)  # resumed from step 2
    again.add({"step": 3, "loss": 7.0})
    files = sorted((tmp_path / "tensorboard").iterdir())
    seen = accumulator.EventAccumulator(str(files[0]) if len(files) == 1 else str(files[0].parent))
    seen.Reload()
    assert seen.Tags()["scalars"] == ["train/loss", "eval/loss"]
    found = {e.step: e.value for e in seen.Scalars("train/loss")}
    assert found[1] == 1 and found[2] == 0.5 and found[3] == 7.0 and 4 not in found


def service(name: str, calls: list[Any], fails: bool = False) -> types.ModuleType:
    """A stand-in for wandb or trackio."""
    module = types.ModuleType(name)

    def log(figures: dict[str, float], step: int) -> None:
        if fails:
            raise OSError("the server is away")
        calls.append((step, figures))

    module.init = lambda **given: calls.append(given)  # type: ignore[attr-defined]
    module.log = log  # type: ignore[attr-defined]
    module.finish = lambda: calls.append("finished")  # type: ignore[attr-defined]
    return module


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_service_is_given_the_figures(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    monkeypatch.setitem(sys.modules, name, service(name, calls))
    reports = Reports([name], tmp_path / "tone", {"rank": 8}, pytest.fail)
    reports.add({"step": 2, "loss": 0.5, "samples": [], "precision": "fp32"})
    reports.__exit__()
    given, logged, ended = calls
    assert given["name"] == "tone" and given["config"] == {"rank": 8} and given["project"]
    assert logged == (2, {"loss": 0.5}) and ended == "finished"


def test_one_that_fails_is_told_of_once_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    notes: list[str] = []
    monkeypatch.setitem(sys.modules, "wandb", service("wandb", calls, fails=True))
    reports = Reports(["wandb,tensorboard"], tmp_path, {}, notes.append)
    for step in (1, 2):
        reports.add({"step": step, "loss": 1.0})
    assert notes == ["nothing more goes to wandb: the server is away"]
    assert len(written(tmp_path / "tensorboard")) == 4


def test_bad_names(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_names(["none"]) == [] and check_names([]) == []
    with pytest.raises(ConfigError, match="'tensorbord'.*tensorboard, wandb, trackio"):
        check_names(["tensorbord"])
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(MissingExtraError, match="trackio"):
        check_names(["trackio"])
