"""Reading base models: a GGUF file, a Hugging Face directory, a directory with one GGUF file, or a
packed model."""

from __future__ import annotations

import os

from pylora.errors import FileFormatError
from pylora.formats.base import Checkpoint, narrow, widen
from pylora.formats.locate import FURTHER_PART, find_model
from pylora.formats.panels import FILE as PANELS

__all__ = ["Checkpoint", "narrow", "open_checkpoint", "widen"]


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Opens the base model at `path`: its configuration is read and every tensor's place checked.

    `path` is a GGUF file, a directory with config.json and safetensors weights, one that
    `pylora pack` wrote, one whose only model is one GGUF file, or the id of a model in the Hugging
    Face Hub's cache (`pylora.formats.locate.find_model`). Raises FileFormatError for what is
    missing, damaged or hostile, UnsupportedError for models that pylora does not run,
    WrongTypeError for no path.
    """
    where = find_model(path)
    if where.is_dir():
        ggufs = sorted(where.glob("*.gguf"))
        ggufs = [f for f in ggufs if not FURTHER_PART.search(f.name)]
        if (where / PANELS).exists():
            from pylora.formats.packed import PackedCheckpoint

            return PackedCheckpoint(where)
        if (where / "config.json").exists():
            from pylora.formats.huggingface import HuggingFaceCheckpoint

            return HuggingFaceCheckpoint(where)
        if len(ggufs) != 1:
            raise FileFormatError(
                f"{where}: this directory has no config.json and "
                + (f"{len(ggufs)} GGUF files; name one of them" if ggufs else "no GGUF file")
            )
        where = ggufs[0]
    if where.name == PANELS:
        raise FileFormatError(
            f"{where} is the weights of a packed model; give the directory that it is in"
        )
    if where.suffix == ".safetensors":
        raise FileFormatError(
            f"{where}: a safetensors file has no configuration; give the directory it is in"
        )
    from pylora.formats.gguf import GGUFCheckpoint

    return GGUFCheckpoint(where)
