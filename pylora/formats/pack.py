"""Writes a packed model (formats/packed.py): any base model's weights in the kernels' order.

One tensor is in memory at a time. What the model's precision makes of a weight is what loading
would make of it (model/weights.py), so that both have the same bits. Norms, biases, routers and
learned positions, which no precision rounds, stay numbers.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pylora import backends
from pylora.errors import ConfigError, UnsupportedError, expect
from pylora.files.whole import atomic_dir
from pylora.formats import open_checkpoint
from pylora.formats.base import Checkpoint
from pylora.formats.hfdir import check_output, write_config, write_tokenizer
from pylora.formats.packed import as_numbers
from pylora.formats.panels import FILE, NUMBERS, PanelsWriter
from pylora.model.weights import FromCheckpoint, is_norm
from pylora.numbers.precision import check_precision, weights_of


@dataclass(frozen=True)
class PackReport:
    """What was written: bytes of the weights' file, matrices by kind, the tokenizer in words."""

    directory: Path
    precision: str
    nbytes: int
    kinds: dict[str, int]
    tokenizer: str
    notes: tuple[str, ...] = ()


def pack_model(
    model_path: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    precision: str,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> PackReport:
    """Packs the base model at `model_path` into the new directory `out_dir`.

    precision: "fp32", "fp32x3" (on a machine with AMX), "bf16", "int8" or "int4". `progress` is
    told how many tensors are done, and of how many. Whole or not at all. Raises ConfigError for
    another precision and for an `out_dir` that holds anything else than an earlier packed model,
    and what opening the model raises.
    """
    expect("path", out_dir, "pack_model(model, out, precision)")
    check_packing(precision)
    with open_checkpoint(model_path) as checkpoint:
        return pack_checkpoint(checkpoint, out_dir, precision, progress=progress)


def check_packing(precision: str) -> None:
    """ConfigError or UnsupportedError for a precision that no model is packed in, or none here."""
    if weights_of(check_precision(precision)) != precision:
        raise ConfigError(
            f"pack in {weights_of(precision)}: {precision} has the same weights, and is chosen "
            "when the packed model is loaded"
        )
    if (computed := backends.get("c").computes(precision)) != precision:
        raise UnsupportedError(
            f"this machine computes {precision} as {computed}, having no bfloat16 tiles (AMX); "
            f"pack in {computed}"
        )


def pack_checkpoint(
    checkpoint: Checkpoint,
    out_dir: str | os.PathLike[str],
    precision: str,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> PackReport:
    """`pack_model` of a checkpoint that is open already."""
    check_packing(precision)
    if (earlier := getattr(checkpoint, "packed_as", None)) is not None:
        raise ConfigError(
            f"{checkpoint.path} is packed already, in {earlier}; pack the model that it was made of"
        )
    target = Path(out_dir)
    check_output(target, checkpoint.path, FILE)
    config, names = checkpoint.config, checkpoint.names()
    specs = {name: (checkpoint.shape(name), "f32") for name in names}
    ops: Any = backends.get("c")
    weights = FromCheckpoint(checkpoint, precision)
    roles = config.names
    exact = tuple(f"{n}.weight" for n in (roles.router, roles.positions) if n)
    kinds: dict[str, int] = {}
    with atomic_dir(target, replace=True) as beside:
        write_config(beside, config, specs, checkpoint.settings)
        with open(beside / FILE, "wb") as file:
            out = PanelsWriter(file, precision, checkpoint.path.name)
            for done, name in enumerate(names):
                shape = checkpoint.shape(name)
                if len(shape) != 2 or is_norm(config, name) or name.endswith(exact):
                    out.add(name, NUMBERS, shape, as_numbers(checkpoint.load(name)))
                else:
                    kind, data = ops.panels_of(ops.pack(weights(name), precision))
                    kinds[kind] = kinds.get(kind, 0) + 1
                    out.add(name, kind, shape, data)
                if progress is not None:
                    progress(done + 1, len(names))
            nbytes = out.finish()
        said = write_tokenizer(beside, checkpoint)
    return PackReport(target, precision, nbytes, kinds, said, checkpoint.notes)
