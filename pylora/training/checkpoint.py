"""Checkpoints of a training run: directories that appear whole or not at all.

    <out>/checkpoint-000012/
        adapter_config.json, adapter_model.safetensors    the adapter, as PEFT writes it
        optimizer.safetensors                             AdamW's moments, "m.<name>", "v.<name>"
        state.json                                        where the run is, what it is a run of

state.json also has the sha256 of the other files, so that damage is noticed before it is trained
on. Dropout and the order of the examples are functions of the seed and the step, so there is no
generator state to keep. No pickle is written or read.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pylora.errors import ConfigError, FileFormatError, PlanError
from pylora.files.bounded import read_text
from pylora.files.whole import atomic_dir
from pylora.formats.safetensors import SafeTensors, save
from pylora.types import brief

_FORMAT = 1
_NAME = re.compile(r"checkpoint-(\d{6,})")
_LEFTOVER = re.compile(r"\.checkpoint-\d{6,}\.[0-9a-f]+")  # what a killed process was writing
_LATER = {"best", "best_step", "stale"}  # of Progress: older checkpoints have none of these
_EXTENDS = {"steps", "epochs"}  # a run may be made longer: what was done stays as it is
_MAX_STATE = 2**28  # bytes of state.json
_FILES = ("adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors")


@dataclass
class Progress:
    """How far a run is. `position` is the number of steps done in `epoch` (0, 1, ...)."""

    __repr__ = brief

    step: int = 0
    epoch: int = 0
    position: int = 0
    tokens: int = 0  # input tokens seen
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    best: float | None = None  # the best evaluation so far, of what TrainConfig.best_by names
    best_step: int = 0
    stale: int = 0  # evaluations since then


def checkpoints(out_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    if not out_dir.is_dir():
        return []
    found = [(int(m[1]), p) for p in out_dir.iterdir() if (m := _NAME.fullmatch(p.name))]
    return [path for _, path in sorted(found)]


def path_of(out_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return out_dir / f"checkpoint-{step:06d}"


def remove(paths: Iterable[Path]) -> None:
    """Removes checkpoints. Each is renamed first, so that none is ever half there."""
    for path in paths:
        hidden = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
        path.rename(hidden)
        shutil.rmtree(hidden)


def write(
    out_dir: Path,
    adapter: Any,
    moments: Mapping[str, np.ndarray],
    progress: Progress,
    identity: Mapping[str, Any],
    keep: int,
) -> Path:
    """Writes the checkpoint of progress.step, then removes all but the `keep` newest.

    `identity` says, in JSON values, what this is a run of; reading compares it. An error while
    writing leaves the older checkpoints as they were.
    """
    path = path_of(out_dir, progress.step)
    with atomic_dir(path, replace=True) as beside:
        adapter.save(beside)
        save(beside / "optimizer.safetensors", moments)
        state = {
            "format": _FORMAT,
            "progress": asdict(progress),
            "identity": identity,
            "sha256": {name: _sha256(beside / name) for name in _FILES},
        }
        (beside / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
    remove(checkpoints(out_dir)[:-keep])
    for entry in out_dir.iterdir():
        if _LEFTOVER.fullmatch(entry.name):
            shutil.rmtree(entry, ignore_errors=True)
    return path


def read(path: Path) -> tuple[Progress, dict[str, Any]]:
    """Progress and identity of a checkpoint whose files are undamaged, else FileFormatError."""
    file = path / "state.json"
    try:
        state = json.loads(read_text(file, limit=_MAX_STATE))
    except (ValueError, RecursionError) as error:
        if isinstance(error, FileFormatError):
            raise
        raise FileFormatError(f"{file}: not JSON ({error}); {_ADVICE}") from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise FileFormatError(f"{file}: not a checkpoint of format {_FORMAT}; {_ADVICE}")
    sums, identity = state.get("sha256"), state.get("identity")
    if not isinstance(sums, dict) or not isinstance(identity, dict):
        raise FileFormatError(f"{file}: 'sha256' or 'identity' is missing; {_ADVICE}")
    for name in _FILES:
        if not (path / name).is_file():
            raise FileFormatError(f"{path / name}: the file is missing; {_ADVICE}")
        if _sha256(path / name) != sums.get(name):
            raise FileFormatError(f"{path / name}: not what was written there; {_ADVICE}")
    return _progress(file, state.get("progress")), identity


_ADVICE = "the checkpoint is damaged: remove its directory to continue from the one before it"


def _progress(file: Path, value: Any) -> Progress:
    blank = asdict(Progress())
    known = isinstance(value, dict) and blank.keys() - _LATER <= value.keys() <= blank.keys()
    if not known:
        raise FileFormatError(f"{file}: 'progress' does not have the fields of a run; {_ADVICE}")
    value = blank | value
    for name in ("step", "epoch", "position", "tokens", "best_step", "stale"):
        if type(value[name]) is not int or value[name] < 0:
            raise FileFormatError(f"{file}: {name} is {value[name]!r}, not a count; {_ADVICE}")
    losses, seconds = value["losses"], value["seconds"]
    if value["best"] is not None and type(value["best"]) not in (int, float):
        raise FileFormatError(f"{file}: best is {value['best']!r}, not a number; {_ADVICE}")
    if not isinstance(losses, list) or not all(type(x) in (int, float) for x in losses):
        raise FileFormatError(f"{file}: 'losses' is not a list of numbers; {_ADVICE}")
    if len(losses) != value["step"] or type(seconds) not in (int, float):
        raise FileFormatError(f"{file}: {len(losses)} losses after step {value['step']}; {_ADVICE}")
    return Progress(**value)


def fingerprint(model: Any) -> str:
    """sha256 (hex) of the base model: its configuration, and of each weight the shape and up to
    65536 evenly spaced elements. Equal on every backend; the adapter does not count."""
    ops, model = model.ops, model.home
    h = hashlib.sha256(json.dumps(model.config.to_hf(), sort_keys=True).encode())
    seen: set[int] = set()  # a tied head is the embedding's weight

    def take(name: str, array: Any) -> None:
        flat = ops.to_numpy(array).reshape(-1)
        h.update(f"{name} {array.shape} {array.dtype}".encode())
        h.update(np.ascontiguousarray(flat[:: max(1, flat.size // 65536)]).tobytes())

    for path, module in model.modules.items():
        if not hasattr(module, "W"):  # experts: below
            continue
        if id(module.W) not in seen:
            take(path, ops.unpack(module.W))
        seen.add(id(module.W))
        if getattr(module, "bias", None) is not None:
            take(f"{path}.bias", module.bias)
    for i, block in enumerate(model.blocks):
        for name, norm in block.norms.items():
            take(f"{i}.{name}", norm.w)
            if norm.b is not None:
                take(f"{i}.{name}.bias", norm.b)
        if block.router is not None:
            take(f"{i}.router", ops.unpack(block.router))
            for n, expert in enumerate(block.mlp.numbered):
                take(f"{i}.experts.{n}", ops.unpack(expert.W))
    if model.trunk.positions is not None:
        take("positions", ops.unpack(model.trunk.positions))
    take("norm", model.norm.w)
    return h.hexdigest()


def refuse_another_run(path: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """ConfigError naming everything in which the checkpoint's identity differs from this run's,
    but for how long the run is."""
    different = [
        f"{name} was {_short(there.get(name))} and is {_short(here.get(name))}"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name) and name not in _EXTENDS
    ]
    if different:
        more = f"; and {len(different) - 5} more" if len(different) > 5 else ""
        raise ConfigError(
            f"{path} is a checkpoint of another run, which cannot be continued here: "
            f"{'; '.join(different[:5])}{more}. Use what it was started with, or start a new run "
            "elsewhere"
        )


def _short(value: Any) -> str:
    text = "not set" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def restore_moments(path: Path, moments: Mapping[str, np.ndarray]) -> None:
    """Copies the checkpoint's moments into these arrays. Names and shapes must be the same."""
    with SafeTensors(path / "optimizer.safetensors") as stored:
        if set(stored.tensors) != set(moments):
            odd = sorted(set(stored.tensors) ^ set(moments))
            raise PlanError(f"{stored.path}: {odd[0]!r} is missing or does not belong to this run")
        for name, array in moments.items():
            _copy(f"{stored.path}: {name}", stored.view(name), array)


def restore_arrays(
    where: str, stored: Mapping[str, np.ndarray], into: Mapping[str, np.ndarray]
) -> None:
    """Copies an adapter's arrays into those of the same names and shapes."""
    if set(stored) != set(into):
        odd = sorted(set(stored) ^ set(into))
        raise PlanError(f"{where}: {odd[0]!r} is missing or does not belong to this adapter")
    for name, array in into.items():
        _copy(f"{where}: {name}", stored[name], array)


def _copy(what: str, source: np.ndarray, target: np.ndarray) -> None:
    if source.shape != target.shape or source.dtype != target.dtype:
        raise PlanError(
            f"{what} is {source.dtype} {source.shape}, expected {target.dtype} {target.shape}"
        )
    target[...] = source


def _sha256(path: Path) -> str:
    h = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            h.update(block)
    return h.hexdigest()
