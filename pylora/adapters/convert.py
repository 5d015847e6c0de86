"""Adapters from one form into another: PEFT's directory, GGUF (llama.cpp), mlx-lm's folder.

The base model says the names, the order of rows and the shapes; its weights are not read. An
adapter that was converted there and back has the same settings and the same bits.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from pylora.adapters import gguf_writing, mlx_writing
from pylora.adapters.adapter import Adapter
from pylora.adapters.carry import carry
from pylora.adapters.locate import GGUF, MLX, PEFT, SPOKEN, find_adapter, form_of
from pylora.adapters.own_tokenizer import has_own
from pylora.errors import ConfigError, UnsupportedError, WrongTypeError, describe, expect
from pylora.formats import Checkpoint, open_checkpoint
from pylora.model.config import LlamaConfig
from pylora.types import brief

__all__ = ["Conversion", "convert", "read_adapter", "write_adapter"]

FORMS = (PEFT, GGUF, MLX)


@dataclass(frozen=True)
class Conversion:
    """What a conversion wrote."""

    __repr__ = brief

    path: Path
    source: str  # the form that was read: "peft", "gguf" or "mlx"
    form: str  # the form that was written
    modules: int
    rounded: tuple[str, ...]  # modules whose scale is folded into B, by a factor that rounds
    notes: tuple[str, ...] = ()


def read_adapter(path: str | os.PathLike[str], model: Checkpoint | LlamaConfig) -> Adapter:
    """The adapter at `path`, in any of the three forms, for a model: a checkpoint, or its
    LlamaConfig. Errors: see `Adapter.load`."""
    if isinstance(model, LlamaConfig):
        return Adapter.load(path, model)
    if not isinstance(model, Checkpoint):
        raise WrongTypeError(
            f"read_adapter(path, model) takes an open checkpoint or a LlamaConfig, got "
            f"{describe(model)}"
        )
    return Adapter.load(path, model.config, base=model.load)


def write_adapter(
    path: str | os.PathLike[str], adapter: Adapter, model: LlamaConfig, form: str
) -> None:
    """Writes an adapter of a model as "peft", "gguf" or "mlx", whole or not at all.

    Raises ConfigError for another form, and UnsupportedError, naming the module, for what the form
    cannot say.
    """
    expect("whole adapter", adapter, "write_adapter(path, adapter, model, form)")
    if adapter.whole is not None and form in (GGUF, MLX):
        some = next(iter(adapter.whole.tensors))
        raise UnsupportedError(
            f"the adapter brings {some!r} whole (modules_to_save, trainable_token_indices, a "
            f"resized vocabulary), which {SPOKEN[form]} cannot say; merge it instead (pylora merge"
            f"{' --to model.gguf' if form == GGUF else ''})"
        )
    where, loras = Path(path), dict(adapter)
    if form == PEFT:
        adapter.save(where)
    elif form == GGUF:
        gguf_writing.write(where, adapter.config, adapter.plan, loras, model, name=where.stem)
    elif form == MLX:
        mlx_writing.write(where, adapter.config, adapter.plan, loras, model)
    else:
        raise ConfigError(f"there is no form {form!r}; choose one of {', '.join(FORMS)}")


def form_for(path: Path, source: str, form: str | None = None) -> str:
    """The form to write: the one that is asked for, or the one that the name says. ConfigError
    where the two contradict each other, or nothing is said."""
    ending = path.suffix.lower() == ".gguf"
    if form is None:
        if ending:
            return GGUF
        if source == PEFT:
            raise ConfigError(
                f"{path}: say what to write, --to mlx, or a name that ends in .gguf for llama.cpp"
            )
        return PEFT
    if form not in FORMS:
        raise ConfigError(f"there is no form {form!r}; choose one of {', '.join(FORMS)}")
    if ending != (form == GGUF):
        raise ConfigError(
            f"{path}: {SPOKEN[form]} is "
            + ("a file whose name ends in .gguf" if form == GGUF else "a folder, no .gguf file")
        )
    return form


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    base: str | os.PathLike[str],
    form: str | None = None,
) -> Conversion:
    """Converts the adapter at `source` for the model `base` into `out`.

    form: "peft", "gguf" or "mlx"; by default GGUF where `out` ends in .gguf, else PEFT. Raises what
    reading and writing raise, and ConfigError where `out` is the adapter that is read.
    """
    expect("path", out, "convert(source, out, base)")
    place, target = find_adapter(source), Path(out)
    given = form_of(place)
    wanted = form_for(target, given, form)
    if target.resolve() == place.resolve():
        raise ConfigError(f"{target} is the adapter that is read here; name another place")
    with open_checkpoint(base) as checkpoint:
        adapter = read_adapter(place, checkpoint)
        config = checkpoint.config
    write_adapter(target, adapter, config, wanted)
    notes: list[str] = []
    if place.is_dir() and has_own(place):
        notes.append(
            f"{place} has a tokenizer or chat template of its own, which is not carried over"
        )
    return Conversion(target, given, wanted, len(adapter), _rounded(adapter, wanted), tuple(notes))


def _rounded(adapter: Adapter, form: str) -> tuple[str, ...]:
    if form == PEFT:
        return ()
    return carry(adapter.plan.entries, over_rank=form == GGUF).inexact
