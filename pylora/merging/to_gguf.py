"""A model with an adapter merged into it, as one GGUF file of any type that is written here.

W' = round(W + scale B A) in float32, the delta in float64, and then once into the type that
llama.cpp would give the tensor: the bytes are those of its own quantizer. Metadata and tokenizer go
with it; tensors that stay what they are, are copied. Quantizing rounds far more than merging does,
so a report says of each module how much of its delta is left. A merge into a quantized file cannot
be undone.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pylora import backends
from pylora.adapters.adapter import Adapter
from pylora.adapters.locate import find_adapter
from pylora.adapters.own_tokenizer import TOKENIZER, has_own, tokenizer_for
from pylora.errors import ConfigError, UnsupportedError, expect
from pylora.files.whole import atomic_write
from pylora.formats import Checkpoint, open_checkpoint
from pylora.formats.base import Shape
from pylora.formats.encode import BLOCKS, FLOATS, decode, encode
from pylora.formats.gguf import GGUFCheckpoint
from pylora.formats.gguf_metadata import extra_tensors, model_metadata
from pylora.formats.gguf_names import as_gguf, places
from pylora.formats.gguf_types import choose, mixture, quantized
from pylora.formats.gguf_write import Raw, tensor_bytes, write_gguf
from pylora.merging.weight import merge_weight, oriented
from pylora.model.config import LlamaConfig
from pylora.model.expert_lora import parts_of
from pylora.model.whole import grown, replaced
from pylora.ops.protocol import Backend
from pylora.text.gguf_save import tokenizer_metadata
from pylora.text.tokenizer import chat_templates
from pylora.types import LoRA, brief

Array = np.ndarray[Any, Any]
SWALLOWED = 0.5  # a module of whose delta less than this is left is named
_VERSION = 2  # general.quantization_version: of ggml's block types
_FILE_TYPE, _VERSION_KEY = "general.file_type", "general.quantization_version"


@dataclass(frozen=True)
class Rounded:
    """What a type leaves of one module's delta."""

    __repr__ = brief

    path: str
    kind: str  # ggml's type, such as "Q4_K"
    delta: float  # its norm, as a share of the weight's
    kept: float  # of the delta: the share along it of what merging changes in this type; 1 is all
    noise: float  # the rest of what changes, as a share of the delta

    @property
    def swallowed(self) -> bool:
        """Whether most of the delta is lost in rounding."""
        return not self.kept >= SWALLOWED


@dataclass(frozen=True)
class GGUFReport:
    """What a merge writes, known before the file is there."""

    __repr__ = brief

    path: Path
    type: str  # "q4_k_m"; "as stored"
    kinds: Mapping[str, int]  # ggml's type -> how many tensors
    weight_bytes: int
    modules: tuple[Rounded, ...]
    tokenizer: str  # what was done about it, in words
    notes: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()  # the base's tensors that are the adapter's own

    @property
    def swallowed(self) -> tuple[str, ...]:
        """The modules of whose delta most is lost."""
        return tuple(m.path for m in self.modules if m.swallowed)


def merge_to_gguf(
    model_path: str | os.PathLike[str],
    adapter_path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    type_: str | None = None,
    *,
    look: Callable[[GGUFReport], None] | None = None,
    dry: bool = False,
    backend: str | Backend | None = None,
) -> GGUFReport:
    """Merges an adapter into a GGUF or Hugging Face model and writes one GGUF file.

    type_: "f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q2_k", "q3_k_s",
    "q3_k_m", "q3_k_l", "q4_k_m", "q4_k_s", "q5_k_m", "q5_k_s", "q6_k"; by default each tensor keeps
    the type that the base stores it in. `look` gets the report before the file is there, and may
    raise to leave it unwritten; with `dry` nothing is written. Raises ConfigError for an `out` that
    is the base, UnsupportedError for what a GGUF file cannot hold, and what reading the two raises.
    """
    expect("path", out, "merge_to_gguf(model, adapter, out)")
    target = Path(out)
    with open_checkpoint(model_path) as checkpoint:
        check_output(target, checkpoint.path)
        adapter = Adapter.load(adapter_path, checkpoint.config, base=checkpoint.load)
        folder = find_adapter(adapter_path)
        own = folder if folder.is_dir() and has_own(folder) else None
        if own is not None:
            tokenizer_for(checkpoint, own)  # refuses one that does not fit
        merge = _Merge(checkpoint, adapter, type_, backends.get(backend), own)
        if dry:
            for name in merge.specs:
                merge.tensor(name)
            report = merge.report(target)
            if look is not None:
                look(report)
            return report
        with atomic_write(target) as beside:
            write_gguf(beside, merge.metadata, merge.specs, merge.tensor)
            report = merge.report(target)
            if look is not None:
                look(report)
    return report


def check_output(target: Path, base: Path) -> None:
    """ConfigError unless a GGUF file made from `base` may be written there."""
    if target.suffix.lower() != ".gguf":
        raise ConfigError(f"{target}: the name of a GGUF file must end in .gguf")
    if target.resolve() == base.resolve():
        raise ConfigError(
            f"{target} is the model that is read here, and would be lost; name another file"
        )


class _Merge:
    """One merge: what the file will hold, and its tensors by name."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        adapter: Adapter,
        type_: str | None,
        ops: Backend,
        own: Path | None,
    ) -> None:
        """own: a directory whose tokenizer or chat template takes the place of the base's."""
        self.checkpoint, self.ops, self.own = checkpoint, ops, own
        self.wanted = None if type_ is None else mixture(type_)[0]
        base, names = grown(checkpoint.config, adapter.whole), checkpoint.config.names
        self.resized = base.vocab_size != checkpoint.config.vocab_size
        untie = base.tie_word_embeddings and (names.embedding in adapter or names.head in adapter)
        self.config: LlamaConfig = dataclasses.replace(
            base, tie_word_embeddings=base.tie_word_embeddings and not untie
        )
        self.whole = replaced(self.config, adapter.whole)
        self.kinds = {e.path: e.kind for e in adapter.plan.entries}
        self.parts = self._parts(adapter)
        self.rounded: dict[str, Rounded] = {}
        # GGUF's name -> Hugging Face's, one or as many as there are experts.
        self.sources: dict[str, list[str]] = {}
        there = places(self.config)
        if isinstance(checkpoint, GGUFCheckpoint):
            there |= checkpoint.places()
        for hf in self.config.tensors():
            self.sources.setdefault(there[hf][0], []).append(hf)
        self.extra = {} if self._from_gguf else extra_tensors(self.config)
        self.specs = self._specs()
        self.metadata, self.said = self._metadata()

    @property
    def _from_gguf(self) -> bool:
        return isinstance(self.checkpoint, GGUFCheckpoint)

    def _parts(self, adapter: Adapter) -> dict[str, LoRA]:
        """By the paths that weights have: those of experts are stored one by one."""
        out: dict[str, LoRA] = {}
        shapes = self.config.tensors()
        for path, lora in adapter.items():
            if self.kinds.get(path) == "experts":
                own = parts_of(self.config, path, lora)
                out |= own
                self.kinds |= dict.fromkeys(own, "linear")
                continue
            if (lora.bias is not None or lora.base_bias is not None) and (
                f"{path}.bias" not in shapes
            ):
                raise UnsupportedError(
                    f"{path}: the adapter has a bias (lora_bias), but this module of a "
                    f"{self.config.model_type} model has none to merge it into; keep the adapter "
                    "unmerged"
                )
            out[path] = lora
        return out

    # ---- what the file holds --------------------------------------------------------------------

    def _specs(self) -> dict[str, tuple[str, Shape]]:
        shapes, stored = self._stored()
        if self.wanted is not None:
            kinds = choose(shapes, stored, self.wanted, self.config)
        else:
            kinds = stored
        for name, hf in self.sources.items():
            writable = kinds[name] in (*FLOATS, *BLOCKS)
            if self._touched(hf) and not writable:
                raise UnsupportedError(
                    f"{self.checkpoint.path}: tensor {name!r} is {kinds[name]}, which pylora reads "
                    "and does not write, and the adapter changes it; choose a --type"
                )
        return {name: (kinds[name], shapes[name]) for name in shapes}

    def _stored(self) -> tuple[dict[str, Shape], dict[str, str]]:
        """Shapes and types of all tensors, in order, before a type is chosen."""
        shapes: dict[str, Shape] = {}
        stored: dict[str, str] = {}
        if isinstance(self.checkpoint, GGUFCheckpoint):
            for name, tensor in self.checkpoint.header.tensors.items():
                shapes[name], stored[name] = tensor.shape, tensor.kind
        own = self.config.tensors()
        for name, hf in self.sources.items():
            if name in shapes:
                if hf[0] in self.whole:  # a table may have another number of rows
                    shapes[name] = own[hf[0]]
                continue
            one = own[hf[0]]
            stacked = len(hf) > 1 or "_exps" in name
            shapes[name] = (len(hf), *one) if stacked else one
            kind = self.checkpoint.dtype(self._source(hf[0])).upper()
            stored[name] = kind if quantized(name, shapes[name]) else "F32"
        for name, array in self.extra.items():
            shapes[name], stored[name] = array.shape, "F32"
        return shapes, stored

    def _metadata(self) -> tuple[dict[str, Any], str]:
        number = 0 if self.wanted is None else mixture(self.wanted)[1].number
        if isinstance(self.checkpoint, GGUFCheckpoint):
            header = self.checkpoint.header
            out: dict[str, Any] = {
                key: Raw(header.value(key))
                for key in header.metadata
                if not key.startswith("split.")
            }
            if self.wanted is not None:
                out |= {_FILE_TYPE: number, _VERSION_KEY: _VERSION}
            said = "that of the GGUF file"
        else:
            out = {"general.type": "model", "general.name": self.checkpoint.path.name}
            out |= model_metadata(self.config)
            most = max((kind for kind, _ in self.specs.values()), key=self._share)
            plain = {"F32": 0, "F16": 1, "BF16": 32}
            out[_FILE_TYPE] = plain.get(most, 0) if self.wanted is None else number
            out[_VERSION_KEY] = _VERSION
            said = ""
        return self._with_tokenizer(out, said)

    def _with_tokenizer(self, out: dict[str, Any], said: str) -> tuple[dict[str, Any], str]:
        size = self.config.vocab_size
        whole = self.own is not None and (self.own / TOKENIZER).is_file()
        if self.resized and said:
            out |= {key: size for key in out if key.endswith(".vocab_size")}
            if not whole:
                raise UnsupportedError(
                    f"the adapter has a vocabulary of {size} tokens and no {TOKENIZER} beside it, "
                    f"and that of {self.checkpoint.path} has {self.checkpoint.config.vocab_size}: "
                    "save the tokenizer that it was trained with in the adapter's folder"
                )
        if whole or not said:
            folder = self.own if whole and self.own is not None else self.checkpoint.path
            tokens = tokenizer_metadata(folder, size)
            out = {k: v for k, v in out.items() if not k.startswith("tokenizer.")} | tokens
            rule = tokens["tokenizer.ggml.pre"]
            said = f"{tokens['tokenizer.ggml.model']} with the rule {rule!r}, from {folder}"
        if self.own is not None and (template := chat_templates(self.own).get("default")):
            out["tokenizer.chat_template"] = template
            said += ", with the adapter's chat template"
        return out, said

    def _share(self, kind: str) -> int:
        return sum(tensor_bytes(k, s) for k, s in self.specs.values() if k == kind)

    # ---- tensors --------------------------------------------------------------------------------

    def _source(self, name: str) -> str:
        config = self.checkpoint.config
        tied = config.tie_word_embeddings and name == f"{config.names.head}.weight"
        return f"{config.names.embedding}.weight" if tied else name

    def _touched(self, names: list[str]) -> bool:
        for name in names:
            path, _, part = name.rpartition(".")
            lora = self.parts.get(path)
            if name in self.whole:
                return True
            if lora is None:
                continue
            if part == "weight" and lora.rank:
                return True
            if part == "bias" and (lora.bias is not None or lora.base_bias is not None):
                return True
        return False

    def tensor(self, name: str) -> Array:
        """The bytes of a tensor of the file."""
        kind, shape = self.specs[name]
        if name in self.extra:
            return self.extra[name]
        hf = self.sources.get(name)
        if isinstance(self.checkpoint, GGUFCheckpoint):
            header = self.checkpoint.header
            there = header.tensors.get(name)
            if there is not None and there.kind == kind and not (hf and self._touched(hf)):
                return header.rows(name)
            if hf is None:  # a table of the rotation, which no type changes
                return header.rows(name)
        assert hf is not None
        rows = [self._merged(one, kind) for one in hf]
        whole = rows[0].reshape(shape) if len(rows) == 1 else np.stack(rows)
        return encode(np.ascontiguousarray(whole, np.float32), kind, f"tensor {name!r}")

    def _merged(self, name: str, kind: str) -> Array:
        """One tensor with the adapter in it, float32, in the order of GGUF files."""
        path, _, part = name.rpartition(".")
        W, lora = self.whole.get(name), self.parts.get(path)
        if W is None:
            W = self.checkpoint.load(self._source(name))
        if self.config.family.unit_offset and self._is_norm(name):
            raised: Array = W + np.float32(1)
            return raised
        if lora is not None and part == "bias":
            W = _bias(W, lora)
        elif lora is not None and part == "weight" and lora.rank:
            merged = np.array(W, np.float32, order="C")
            own = oriented(lora, self.kinds[path])
            if lora.magnitude is None:
                self.ops.merge_in_place(merged, own, "f32")
            else:
                merged, _ = merge_weight(self.ops, merged, lora, kind=self.kinds[path])
            self.rounded[path] = self._compare(path, name, W, merged, own, kind)
            W = merged
        return as_gguf(W, path, self.config)

    def _is_norm(self, name: str) -> bool:
        names = self.config.names
        roles = ("input_norm", "mid_norm", "after_attention", "after_mlp", "q_norm", "k_norm")
        ends = tuple(f".{getattr(names, role)}.weight" for role in roles)
        return name.endswith(ends) or name == f"{names.norm}.weight"

    def _compare(
        self, path: str, name: str, W: Array, merged: Array, lora: LoRA, kind: str
    ) -> Rounded:
        """What the type leaves of the delta: the merged weight in it beside the base in it."""
        before = self._as(W, kind, name, base=True)
        change = self._as(merged, kind, name).astype(np.float64) - before
        delta = lora.scale * (lora.B.astype(np.float64) @ lora.A.astype(np.float64))
        if self.parts[path].magnitude is not None:  # rescaling is a part of it
            delta = merged.astype(np.float64) - W
        size = float(np.vdot(delta, delta))
        whole = float(np.vdot(W.astype(np.float64), W))
        if not size:
            return Rounded(path, kind, 0.0, 1.0, 0.0)
        kept = float(np.vdot(change, delta)) / size
        rest = max(float(np.vdot(change, change)) / size - kept * kept, 0.0)
        share = (size / whole) ** 0.5 if whole else float("inf")
        return Rounded(path, kind, share, kept, rest**0.5)

    def _as(self, x: Array, kind: str, name: str, *, base: bool = False) -> Array:
        source = self._source(name)
        base = base and name not in self.whole
        if kind == "F32" or (base and self.checkpoint.dtype(source).upper() == kind):
            return x
        flat = np.ascontiguousarray(x, np.float32)
        stored = encode(flat, kind, f"tensor {name!r}")
        values: Array = decode(stored, kind, name).reshape(x.shape)
        return values

    def report(self, path: Path) -> GGUFReport:
        """What was made of the tensors so far."""
        kinds: dict[str, int] = {}
        for kind, _ in self.specs.values():
            kinds[kind] = kinds.get(kind, 0) + 1
        size = sum(tensor_bytes(kind, shape) for kind, shape in self.specs.values())
        order = {path: i for i, path in enumerate(self.parts)}
        modules = sorted(self.rounded.values(), key=lambda m: order[m.path])
        type_ = self.wanted or "as stored"
        notes = self.checkpoint.notes
        whole = tuple(self.whole)
        return GGUFReport(path, type_, kinds, size, tuple(modules), self.said, notes, whole)


def _bias(b: Array, lora: LoRA) -> Array:
    """The bias in effect: the adapter's where it has one, plus scale times the bias of B."""
    total = (b if lora.base_bias is None else lora.base_bias).astype(np.float64)
    if lora.bias is not None:
        total = total + float(np.float32(lora.scale)) * lora.bias.astype(np.float64)
    rounded: Array = total.astype(np.float32)
    return rounded
