"""Where an adapter lies: a PEFT directory, a run's folder, or the id of one in the Hub's cache.

Nothing is downloaded, and no tensor is read; pylora/adapters/peft.py reads.
"""

from __future__ import annotations

import os
from pathlib import Path

from pylora.errors import FileFormatError, UnsupportedError
from pylora.files.kinds import what_is
from pylora.formats.locate import as_path, as_text, in_hub_cache, not_there

CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def find_adapter(path_or_id: str | os.PathLike[str]) -> Path:
    """The PEFT directory of an adapter.

    `path_or_id` is that directory, one of its two files, the folder of a training run (its
    adapter/ is taken), or a Hub id whose adapter is in the Hub's cache. Raises FileFormatError for
    what is not there, and for what is no adapter (a base model, a run that has not ended), saying
    what it is and what to give; WrongTypeError for no path.
    """
    text = as_text(path_or_id, "an adapter")
    where = as_path(text)
    if not os.path.exists(where):
        found = in_hub_cache(text)
        if found is None:
            raise FileFormatError(not_there(text, where, "adapter"))
        return _in_folder(found) if found.is_dir() else _refuse_file(found)
    return _in_folder(where) if where.is_dir() else _refuse_file(where)


def _in_folder(folder: Path) -> Path:
    mlx = (folder / "adapters.safetensors").is_file()
    has_weights = any((folder / name).is_file() for name in _WEIGHTS)
    if has_weights or ((folder / CONFIG).is_file() and not mlx):
        return folder
    if (folder / "adapter" / CONFIG).is_file():
        return folder / "adapter"
    if (folder / "config.json").is_file() or any(folder.glob("*.gguf")):
        raise FileFormatError(
            f"{folder} is a base model, not an adapter; an adapter is a folder with {CONFIG} and "
            f"{_WEIGHTS[0]}, such as the one that training writes"
        )
    if mlx:
        raise UnsupportedError(
            f"{folder} is an adapter of mlx-lm (adapters.safetensors), which has names and an "
            "order of its own; pylora reads PEFT's form"
        )
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
    if file.name in (CONFIG, *_WEIGHTS):
        return file.parent
    raise FileFormatError(
        f"{file} is {what_is(file) or 'a file'}, not an adapter; an adapter is a folder with "
        f"{CONFIG} and {_WEIGHTS[0]}"
    )
