"""Merging an adapter into its base model, so that it can be undone bit for bit.

W' = round(W + scale B A), the delta in float64, rounded once; with DoRA each row is brought to its
magnitude before. Rounding loses information, so
subtracting the delta does not always give W back; the merge keeps the few original elements where
it would not (residue.py), and unmerging (unmerge.py) verifies a SHA-256 of every tensor. The base
checkpoint and the adapter are only read. Weights that the adapter brings whole take the place of
the base's, which are kept for unmerging as they are. Merging into a quantized format is not done:
see to_gguf.py.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pylora import backends
from pylora.adapters.adapter import Adapter
from pylora.adapters.locate import find_adapter
from pylora.adapters.own_tokenizer import has_own, tokenizer_for
from pylora.errors import ConfigError, UnsupportedError, expect
from pylora.files.whole import atomic_dir
from pylora.formats import Checkpoint, narrow, open_checkpoint, widen
from pylora.formats.hfdir import Spec, check_output, write_config, write_tokenizer, write_weights
from pylora.formats.hfnames import as_stored
from pylora.merging.residue import FILE, Digests, Record
from pylora.merging.unmerge import UnmergeReport, unmerge_checkpoint
from pylora.merging.weight import digest, max_delta, merge_weight, unmerge_weight
from pylora.model.config import LlamaConfig
from pylora.model.expert_lora import parts_of
from pylora.model.whole import grown, replaced
from pylora.ops.protocol import Backend
from pylora.types import LoRA, brief

__all__ = [
    "MergeReport",
    "MergedModule",
    "UnmergeReport",
    "merge_adapter",
    "merge_checkpoint",
    "merge_weight",
    "unmerge_checkpoint",
    "unmerge_weight",
]

Array = np.ndarray[Any, Any]

_FLOATS = ("f32", "f16", "bf16")


@dataclass(frozen=True)
class MergedModule:
    """One merged weight: its shape and dtype, the residue that was kept, the largest |delta|."""

    __repr__ = brief

    path: str
    shape: tuple[int, ...]
    dtype: str
    positions: int  # elements of W that subtraction would not have restored
    bytes: int  # that this module takes in the residue file, its A and B included
    max_delta: float


@dataclass(frozen=True)
class MergeReport:
    """What a merge wrote."""

    __repr__ = brief

    directory: Path
    modules: tuple[MergedModule, ...]
    weight_bytes: int
    residue_bytes: int
    tokenizer: str  # what was done about it, in words
    notes: tuple[str, ...] = ()  # of files that lie beside the base model's weights
    whole: tuple[str, ...] = ()  # the base's tensors that are the adapter's own

    @property
    def positions(self) -> int:
        """Residue elements of all modules."""
        return sum(m.positions for m in self.modules)


def merge_checkpoint(
    model_path: str | os.PathLike[str],
    adapter_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    backend: str | Backend | None = None,
) -> MergeReport:
    """Merges the PEFT adapter in `adapter_dir` into the GGUF or Hugging Face model at `model_path`.

    `out_dir` becomes a Hugging Face directory that transformers loads, with the file that undoes
    the merge; a tokenizer or chat template that lies beside the adapter goes with it. `dtype`
    ("f32", "f16", "bf16") converts the base first; by default weights keep the dtype they are
    stored in, those of a GGUF file become f32, and quantized ones are written plain, in 16 bits.
    Where the adapter targets one of two tied embeddings, they are untied. Nothing is left behind if
    it fails. ConfigError for an `out_dir` that holds anything else than an earlier merge: no model
    is overwritten by mistake.
    """
    expect("path", out_dir, "merge_checkpoint(model, adapter, out)")
    with open_checkpoint(model_path) as checkpoint:
        adapter = Adapter.load(adapter_dir, checkpoint.config, base=checkpoint.load)
        folder = find_adapter(adapter_dir)
        own = folder if has_own(folder) else None
        if own is not None:
            tokenizer_for(checkpoint, own)  # refuses one that does not fit
        return merge_adapter(
            checkpoint, adapter, out_dir, dtype=dtype, backend=backend, tokenizer=own
        )


def check_merge_output(
    model_path: str | os.PathLike[str], out_dir: str | os.PathLike[str], dtype: str | None = None
) -> None:
    """ConfigError for a dtype that there is not, and for an `out_dir` that `merge_checkpoint` would
    refuse; to be asked before a model is opened."""
    if dtype is not None and dtype not in _FLOATS:
        raise ConfigError(f"dtype = {dtype!r}: expected one of {', '.join(_FLOATS)}")
    check_output(Path(out_dir), Path(model_path), FILE)


def merge_adapter(
    checkpoint: Checkpoint,
    adapter: Adapter,
    out_dir: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    backend: str | Backend | None = None,
    tokenizer: Path | None = None,
) -> MergeReport:
    """`merge_checkpoint` for a checkpoint and an adapter that are open already. `tokenizer` is a
    directory whose tokenizer's files take the place of the base model's."""
    expect("checkpoint", checkpoint, "merge_adapter(checkpoint, adapter, out)")
    expect("whole adapter", adapter, "merge_adapter(checkpoint, adapter, out)")
    expect("path", out_dir, "merge_adapter(checkpoint, adapter, out)")
    target = Path(out_dir)
    check_merge_output(checkpoint.path, target, dtype)
    merge = _Merge(checkpoint, adapter, dtype, backends.get(backend))
    with atomic_dir(target) as beside:
        write_config(beside, merge.config, merge.specs, checkpoint.settings)
        size = write_weights(beside, *as_stored(merge.config, merge.specs, merge.tensor))
        merge.record.write(beside)
        said = write_tokenizer(beside, checkpoint, tokenizer)
    order = list(merge.parts)
    modules = tuple(sorted(merge.modules, key=lambda m: order.index(m.path)))
    kept = sum(m.bytes for m in modules)
    notes = checkpoint.notes + unquantized(checkpoint, merge.specs)
    whole = tuple(merge.whole)
    kept += sum(a.size * a.dtype.itemsize for a in merge.originals.values())
    return MergeReport(target, modules, size, kept, said, notes, whole)


def unquantized(checkpoint: Checkpoint, specs: Mapping[str, Spec]) -> tuple[str, ...]:
    """What to say where the weights of a quantized checkpoint were written as plain ones."""
    names = [name for name in checkpoint.names() if checkpoint.dequantizes(name)]
    if not names:
        return ()
    dtypes = ", ".join(sorted({specs[name][1] for name in names}))
    return (
        f"the merged model is not quantized: the {len(names)} weights that are in "
        f"{checkpoint.path} are written in {dtypes}, and config.json has no quantization_config",
    )


class _Merge:
    """One merge: produces the merged tensors by name and remembers how to undo them."""

    def __init__(
        self, checkpoint: Checkpoint, adapter: Adapter, dtype: str | None, ops: Backend
    ) -> None:
        self.checkpoint, self.adapter, self.dtype, self.ops = checkpoint, adapter, dtype, ops
        base = grown(checkpoint.config, adapter.whole)
        self.kinds = {e.path: e.kind for e in adapter.plan.entries}
        # By the paths that weights have: those of experts lie in files one by one.
        self.parts: dict[str, LoRA] = {}
        for path, lora in adapter.items():
            if self.kinds.get(path) == "experts":
                own = parts_of(base, path, lora)
                self.parts |= own
                self.kinds |= dict.fromkeys(own, "linear")
            else:
                self.parts[path] = lora
        embedding, head = base.names.embedding, base.names.head
        untie = base.tie_word_embeddings and (embedding in adapter or head in adapter)
        resized = base.vocab_size != checkpoint.config.vocab_size
        self.config: LlamaConfig = dataclasses.replace(
            base, tie_word_embeddings=base.tie_word_embeddings and not untie
        )
        self.whole = replaced(self.config, adapter.whole)
        shapes = self.config.tensors()
        self.specs: dict[str, Spec] = {n: (s, self._stored_dtype(n)) for n, s in shapes.items()}
        self.record = Record(
            tied=checkpoint.config.tie_word_embeddings,
            vocab=checkpoint.config.vocab_size if resized else None,
        )
        self.modules: list[MergedModule] = []
        self.originals: dict[str, Array] = {}  # of what the adapter brings whole
        for path, lora in adapter.items():
            replaces = lora.bias is not None or lora.base_bias is not None
            if replaces and f"{path}.bias" not in shapes:
                raise UnsupportedError(
                    f"{path}: the adapter has a bias (lora_bias), but this module of a "
                    f"{base.model_type} model has none to merge it into; keep the adapter unmerged"
                )

    def _source(self, name: str) -> str:
        config = self.checkpoint.config
        tied = config.tie_word_embeddings and name == f"{config.names.head}.weight"
        return f"{config.names.embedding}.weight" if tied else name

    def _stored_dtype(self, name: str) -> str:
        if self.dtype is not None:
            return self.dtype
        if not self.checkpoint.path.is_dir():  # a GGUF mixes types as suits its size
            return "f32"
        source = self._source(name)
        stored = self.checkpoint.dtype(source)
        if stored == "f32" and self.checkpoint.dequantizes(source):
            settings = self.checkpoint.settings
            said = settings.get("dtype", settings.get("torch_dtype"))
            return "f16" if said == "float16" else "bf16"
        return stored if stored in _FLOATS else "f32"  # a packed model's blocks

    def base(self, name: str) -> Array:
        """A tensor of the base model, in the dtype that it will be written in."""
        source, dtype = self._source(name), self.specs[name][1]
        if self.checkpoint.dtype(source) == dtype:
            return self.checkpoint.raw(source)[0]
        wide = self.checkpoint.load(source)
        stored = narrow(wide, dtype)
        self._check_finite(name, wide, stored, dtype)
        return stored

    def _check_finite(self, name: str, before: Array, after: Array, dtype: str) -> None:
        """`before` is float32, `after` stored. What was finite must stay so."""
        with np.errstate(all="ignore"):
            lost = np.isfinite(before) & ~np.isfinite(widen(after, dtype))
        if bool(lost.any()):
            raise ConfigError(
                f"tensor {name!r}: {int(lost.sum())} values are too large for {dtype}; "
                "merge with dtype='bf16' or 'f32'"
            )

    def tensor(self, name: str) -> Array:
        """The merged tensor of this name; its digests and residue go into the record."""
        path, _, part = name.rpartition(".")
        W, dtype, lora = self.base(name), self.specs[name][1], self.parts.get(path)
        before = digest(W)
        if name in self.whole:  # the original is kept as it is: nothing else would restore it
            self.record.original(name, W, dtype)
            self.originals[name] = W
            wide = self.whole[name]
            W = narrow(wide, dtype)
            self._check_finite(name, wide, W, dtype)
        merged = W
        if lora is not None and part == "bias":
            merged = self._bias(name, W, lora, dtype)
        elif lora is not None and lora.rank:
            kind = self.kinds[path]
            merged, lost = merge_weight(self.ops, W, lora, dtype, kind=kind)
            self._check_finite(name, widen(W, dtype), merged, dtype)
            used = self.record.add(path, kind, lora, dtype, W, lost)
            delta = max_delta(lora, kind)
            if lora.magnitude is not None:
                moved = widen(merged, dtype).astype(np.float64) - widen(W, dtype)
                delta = float(np.abs(moved).max(initial=0.0))
            self.modules.append(MergedModule(path, W.shape, dtype, lost.position.size, used, delta))
        same = merged is W and name not in self.whole
        self.record.digests[name] = Digests(before, before if same else digest(merged))
        return merged

    def _bias(self, name: str, b: Array, lora: LoRA, dtype: str) -> Array:
        """The bias in effect: base_bias where the adapter has one, plus scale * bias of B."""
        if lora.bias is None and lora.base_bias is None:
            return b
        wide = widen(b, dtype) if lora.base_bias is None else lora.base_bias
        total = wide.astype(np.float64)
        if lora.bias is not None:
            total = total + float(np.float32(lora.scale)) * lora.bias.astype(np.float64)
        merged = narrow(total.astype(np.float32), dtype)
        self._check_finite(name, wide, merged, dtype)
        if name not in self.whole:
            self.record.original(name, b, dtype)
        return merged
