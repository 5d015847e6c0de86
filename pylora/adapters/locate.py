"""Where an adapter lies: a folder, a GGUF file, a run's folder, an id of the Hub's cache.

Nothing is downloaded, and no tensor is read; pylora/adapters/peft.py reads.
"""

from __future__ import annotations

import os
from pathlib import Path

from pylora.errors import FileFormatError, PyloraError
from pylora.files.kinds import what_is
from pylora.formats.gguf_header import read_header
from pylora.formats.locate import as_path, as_text, in_hub_cache, not_there

CONFIG = "adapter_config.json"
PEFT, GGUF, MLX = "peft", "gguf", "mlx"  # the forms that adapters have
SPOKEN = {PEFT: "a PEFT adapter", GGUF: "a GGUF adapter", MLX: "an adapter of mlx-lm"}
_MLX = "adapters.safetensors"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def find_adapter(path_or_id: str | os.PathLike[str]) -> Path:
    """Where an adapter is: the directory of PEFT's or mlx-lm's, or the GGUF file (`form_of`).

    `path_or_id` is that, one of the directory's two files, a folder whose only model is a GGUF
    adapter, the folder of a training run (its adapter/ is taken), or a Hub id whose adapter is in
    the Hub's cache. Raises FileFormatError for what is not there, and for what is no adapter (a
    base model, a run that has not ended), saying what it is and what to give; WrongTypeError for no
    path.
    """
    text = as_text(path_or_id, "an adapter")
    where = as_path(text)
    if not os.path.exists(where):
        found = in_hub_cache(text)
        if found is None:
            raise FileFormatError(not_there(text, where, "adapter"))
        return _in_folder(found) if found.is_dir() else _refuse_file(found)
    return _in_folder(where) if where.is_dir() else _refuse_file(where)


def form_of(place: Path) -> str:
    """PEFT, GGUF or MLX: the form of the adapter at a place that `find_adapter` gave."""
    if place.is_file():
        return GGUF
    peft = any((place / name).is_file() for name in _WEIGHTS)
    return MLX if (place / _MLX).is_file() and not peft else PEFT


def is_gguf_adapter(file: Path) -> bool:
    """Whether a file is GGUF and says that it is an adapter; of a damaged one, False."""
    try:
        return read_header(file).metadata.get("general.type") == "adapter"
    except PyloraError:
        return False


def _in_folder(folder: Path) -> Path:
    has_mlx = (folder / _MLX).is_file()
    has_weights = any((folder / name).is_file() for name in _WEIGHTS)
    if has_mlx and has_weights:
        raise FileFormatError(
            f"{folder} holds {_MLX} of mlx-lm and {_WEIGHTS[0]} of PEFT; take away the one that is "
            "not meant"
        )
    if has_weights or (folder / CONFIG).is_file():
        return folder
    ggufs = sorted(folder.glob("*.gguf"))
    if len(ggufs) == 1 and is_gguf_adapter(ggufs[0]):
        return ggufs[0]
    if (folder / "adapter" / CONFIG).is_file():
        return folder / "adapter"
    if (folder / "config.json").is_file() or any(folder.glob("*.gguf")):
        raise FileFormatError(
            f"{folder} is a base model, not an adapter; an adapter is a folder with {CONFIG} and "
            f"{_WEIGHTS[0]}, such as the one that training writes"
        )
    if has_mlx:
        raise FileFormatError(f"{folder} holds {_MLX} of mlx-lm, but no {CONFIG} beside it")
    checkpoints = sorted(p for p in folder.glob("checkpoint-*") if (p / CONFIG).is_file())
    if checkpoints:
        raise FileFormatError(
            f"{folder} is a training run that has not ended, so it has no adapter yet; its newest "
            f"checkpoint is one too: {checkpoints[-1]}"
        )
    raise FileFormatError(
        f"{folder}: there is no {CONFIG}; an adapter is a folder with {CONFIG} and {_WEIGHTS[0]}, "
        "or the folder of a training run"
    )


def _refuse_file(file: Path) -> Path:
    if file.name in (CONFIG, _MLX, *_WEIGHTS):
        return _in_folder(file.parent)
    if is_gguf_adapter(file):
        return file
    raise FileFormatError(
        f"{file} is {what_is(file) or 'a file'}, not an adapter; an adapter is a folder with "
        f"{CONFIG} and {_WEIGHTS[0]}"
    )
