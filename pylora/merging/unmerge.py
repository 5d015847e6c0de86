"""Undoing a merge bit for bit, with the file that the merge left beside the weights (residue.py).

Every tensor is compared with its recorded SHA-256, before and after: a merged model that was
altered since is an error, never a wrong base.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pylora import backends
from pylora.errors import FileFormatError, expect
from pylora.files.whole import atomic_dir
from pylora.formats import Checkpoint, open_checkpoint
from pylora.formats.hfdir import Spec, check_output, write_config, write_tokenizer, write_weights
from pylora.formats.hfnames import as_stored
from pylora.merging.residue import Reader
from pylora.merging.weight import digest, unmerge_weight
from pylora.model.tensors import ModuleSpec
from pylora.ops.protocol import Backend
from pylora.types import brief

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class UnmergeReport:
    """What an unmerge restored: module paths, and how many tensors were verified in all."""

    __repr__ = brief

    directory: Path
    modules: tuple[str, ...]
    tensors: int
    tokenizer: str


def unmerge_checkpoint(
    merged_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    backend: str | Backend | None = None,
) -> UnmergeReport:
    """Restores the base model that was merged into `merged_dir`, bit for bit, as `out_dir`.

    Every tensor is compared with the SHA-256 that the merge recorded, before and after. Raises
    FileFormatError naming the module that was altered since; then nothing is written. ConfigError
    for an `out_dir` that holds files already.
    """
    expect("path", merged_dir, "unmerge_checkpoint(merged, out)")
    expect("path", out_dir, "unmerge_checkpoint(merged, out)")
    target = Path(out_dir)
    check_output(target, Path(merged_dir))
    ops, reader = backends.get(backend), Reader(Path(merged_dir))
    with open_checkpoint(merged_dir) as checkpoint:
        tied = checkpoint.config.tie_word_embeddings or reader.record.tied
        vocab = reader.record.vocab or checkpoint.config.vocab_size
        config = dataclasses.replace(checkpoint.config, tie_word_embeddings=tied, vocab_size=vocab)
        specs: dict[str, Spec] = {
            name: (shape, checkpoint.dtype(name)) for name, shape in config.tensors().items()
        }
        _check_record(reader, checkpoint)
        restore = _restorer(reader, checkpoint, ops, vocab)
        with atomic_dir(target) as beside:
            write_config(beside, config, specs, checkpoint.settings)
            write_weights(beside, *as_stored(config, specs, restore))
            for name in checkpoint.names():  # an output layer that is tied again is checked too
                if name not in specs:
                    restore(name)
            said = write_tokenizer(beside, checkpoint)
    return UnmergeReport(target, tuple(reader.record.dtypes), len(checkpoint.names()), said)


def _modules(checkpoint: Checkpoint) -> dict[str, ModuleSpec]:
    """The modules by the paths that weights have, the experts' one by one."""
    modules, inside = checkpoint.config.modules(), f".{checkpoint.config.names.experts}."
    for name, shape in checkpoint.config.tensors().items():
        if inside in name and len(shape) == 2:
            modules[name.removesuffix(".weight")] = ModuleSpec("linear", *shape)
    return modules


def _check_record(reader: Reader, checkpoint: Checkpoint) -> None:
    """Every tensor has its digests, and every merged module is one of the model."""
    record, modules = reader.record, _modules(checkpoint)
    for name in checkpoint.names():
        if name not in record.digests:
            raise FileFormatError(f"{reader.path}: there is no digest of tensor {name!r}")
    for path, dtype in record.dtypes.items():
        weight = f"{path}.weight"
        if path not in modules or weight not in checkpoint.names():
            raise FileFormatError(f"{reader.path}: the model has no module {path[:200]!r}")
        if checkpoint.dtype(weight) != dtype or modules[path].kind != record.kinds[path]:
            raise FileFormatError(
                f"{reader.path}: {path} was merged as {dtype} ({record.kinds[path]}), but "
                f"the model has it as {checkpoint.dtype(weight)} ({modules[path].kind})"
            )


def _restorer(
    reader: Reader, checkpoint: Checkpoint, ops: Backend, vocab: int
) -> Callable[[str], Array]:
    """A function from tensor name to the base model's tensor, verified."""
    record, modules = reader.record, _modules(checkpoint)
    untied = dataclasses.replace(checkpoint.config, tie_word_embeddings=False, vocab_size=vocab)
    shapes = untied.tensors()

    def restore(name: str) -> Array:
        path, _, part = name.rpartition(".")
        W, dtype = checkpoint.raw(name)
        if digest(W) != record.digests[name].merged:
            raise FileFormatError(
                f"{checkpoint.path}: {path} was altered after the merge: {name!r} does not have "
                "the SHA-256 that was recorded, so the original cannot be restored from it"
            )
        original = reader.original(name, shapes[name], dtype)
        if original is not None:
            W = original
        elif part == "weight" and path in record.dtypes:
            lora = reader.lora(path, modules[path].d, modules[path].k)
            lost = reader.residue(path, W.shape)
            W = unmerge_weight(ops, W, lora, lost, dtype, kind=record.kinds[path])
        if digest(W) != record.digests[name].base:
            raise FileFormatError(
                f"{reader.path}: unmerging {path} does not give the recorded SHA-256 of {name!r}; "
                "the file that undoes the merge is damaged or belongs to another merge"
            )
        return W

    return restore
