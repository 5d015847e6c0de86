"""Reading base models: a GGUF file, a Hugging Face directory, or a directory with one GGUF file."""

from __future__ import annotations

import os
import re
from pathlib import Path

from pylora.errors import FileFormatError
from pylora.formats.base import Checkpoint, narrow, widen

__all__ = ["Checkpoint", "narrow", "open_checkpoint", "widen"]


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Opens the base model at `path`: its configuration is read and every tensor's place checked.

    `path` is a GGUF file, a directory with config.json and safetensors weights, or a directory
    whose only model is one GGUF file. Raises FileFormatError for what is missing, damaged or
    hostile, and UnsupportedError for models that pylora does not run.
    """
    where = Path(path)
    if not where.exists():
        raise FileFormatError(f"{where}: there is no such file or directory")
    if where.is_dir():
        ggufs = sorted(where.glob("*.gguf"))
        ggufs = [f for f in ggufs if not re.search(r"-(?!00001)\d{5}-of-\d{5}\.gguf$", f.name)]
        if (where / "config.json").exists():
            from pylora.formats.huggingface import HuggingFaceCheckpoint

            return HuggingFaceCheckpoint(where)
        if len(ggufs) != 1:
            raise FileFormatError(
                f"{where}: this directory has no config.json and "
                + (f"{len(ggufs)} GGUF files; name one of them" if ggufs else "no GGUF file")
            )
        where = ggufs[0]
    if where.suffix == ".safetensors":
        raise FileFormatError(
            f"{where}: a safetensors file has no configuration; give the directory it is in"
        )
    from pylora.formats.gguf import GGUFCheckpoint

    return GGUFCheckpoint(where)
