"""GGUF checkpoints, as Hugging Face names and layout, dequantized on load.

What differs from a Hugging Face file is undone here: llama.cpp's converter interleaves the rows of
q and k of some architectures (for the other rotary layout), adds 1 to the norms of those that
multiply by 1 + their weight, and stacks the experts of a layer; the configuration is in the
metadata (gguf_config.py). What holds of which family is in its page (model/families/).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pylora.errors import FileFormatError, UnsupportedError
from pylora.extras import need
from pylora.files.mapped import let_go
from pylora.formats.base import Array, Checkpoint, Shape, check_tensors, read_config, widen
from pylora.formats.ggml import BY_NAME
from pylora.formats.gguf_config import NO_WEIGHTS, hf_config
from pylora.formats.gguf_header import GGUFHeader
from pylora.formats.gguf_split import read_gguf
from pylora.model import families
from pylora.model.config import LlamaConfig
from pylora.numbers.blocks import BLOCKS
from pylora.numbers.ggml_decode import DECODERS
from pylora.numbers.precision import Stored

if TYPE_CHECKING:
    from pylora.text.tokenizer import Tokenizer

_CHUNK = 1 << 22  # bytes of float32 dequantized at a time, so that temporaries stay small

# GGUF's stems -> roles (families.family.Names).
TOP_ROLES = {
    "token_embd": "embedding",
    "position_embd": "positions",
    "output_norm": "norm",
    "output": "head",
}
BLOCK_ROLES = {
    "attn_norm": "input_norm",
    "attn_qkv": "qkv",
    "attn_q": "q",
    "attn_k": "k",
    "attn_v": "v",
    "attn_output": "o",
    "attn_q_norm": "q_norm",
    "attn_k_norm": "k_norm",
    "post_attention_norm": "after_attention",
    "ffn_norm": "mid_norm",
    "ffn_gate": "gate",
    "ffn_up": "up",
    "ffn_down": "down",
    "ffn_gate_inp": "router",
    "post_ffw_norm": "after_mlp",
}
EXPERT_ROLES = {
    "ffn_gate_exps": "expert_gate",
    "ffn_up_exps": "expert_up",
    "ffn_down_exps": "expert_down",
}
_NORMS = ("input_norm", "mid_norm", "after_attention", "after_mlp", "q_norm", "k_norm")


class GGUFCheckpoint(Checkpoint):
    """A GGUF file as a Checkpoint. Raises FileFormatError or UnsupportedError on opening."""

    def __init__(self, path: Path) -> None:
        self.path = path
        header = read_gguf(path)
        self._header: GGUFHeader | None = header
        self.config = read_config(path, hf_config(header))
        # Hugging Face's name -> the file's, and which of the stacked experts or norms it is.
        self._stored: dict[str, tuple[str, int | None]] = {}
        for name in header.tensors:
            if self._add_experts(name) or self._add_norms(name):
                continue
            if (hf := hf_name(name, self.config)) is None:
                raise UnsupportedError(f"{path}: no meaning is known for the tensor {name[:200]!r}")
            if hf:
                self._stored[hf] = name, None
        shapes = {hf: self.shape(hf) for hf in self._stored}
        self._names = check_tensors(path, self.config, shapes)
        for name in header.tensors:
            tensor = header.tensors[name]
            if len(tensor.shape) == 1 and tensor.kind not in ("F32", "F16", "BF16"):
                raise UnsupportedError(f"{path}: tensor {name!r} is a vector of type {tensor.kind}")
        family = self.config.family
        self._permuted = family.gguf is not None and family.gguf.permuted
        names = self.config.names
        ends = tuple(f".{getattr(names, role)}.weight" for role in _NORMS)
        self._above_one = ends if family.unit_offset else ()
        self._last_norm = f"{names.norm}.weight" if family.unit_offset else ""

    def _add_experts(self, name: str) -> bool:
        """Takes a tensor that is the stack of a layer's experts apart."""
        match = re.fullmatch(r"blk\.(0|[1-9]\d{0,4})\.(ffn_[a-z]+_exps)\.weight", name)
        if match is None or match[2] not in EXPERT_ROLES:
            return False
        shape, names, count = (
            self._open().tensors[name].shape,
            self.config.names,
            self.config.experts,
        )
        if not count:
            raise UnsupportedError(
                f"{self.path}: no meaning is known for the tensor {name[:200]!r}: the metadata "
                "name no experts"
            )
        if len(shape) != 3 or shape[0] != count:
            raise FileFormatError(
                f"{self.path}: tensor {name!r} has shape {shape}, but the configuration says "
                f"{count} experts"
            )
        at = f"{names.layer}.{match[1]}.{names.experts}"
        for e in range(count):
            self._stored[f"{at}.{e}.{getattr(names, EXPERT_ROLES[match[2]])}.weight"] = name, e
        return True

    def _add_norms(self, name: str) -> bool:
        """Takes the norms of q's or k's heads apart, where Hugging Face has a tensor for each."""
        match = re.fullmatch(r"blk\.(0|[1-9]\d{0,4})\.attn_([qk])_norm\.weight", name)
        if match is None or not self.config.family.listed_norms:
            return False
        names, shape = self.config.names, self._open().tensors[name].shape
        at = f"{names.layer}.{match[1]}.{names.q_norm if match[2] == 'q' else names.k_norm}"
        for h in range(shape[0] if len(shape) == 2 else 0):
            self._stored[f"{at}.norms.{h}.weight"] = name, h
        return len(shape) == 2

    def _open(self) -> GGUFHeader:
        if self._header is None:
            raise FileFormatError(f"{self.path}: the checkpoint is closed")
        return self._header

    @property
    def header(self) -> GGUFHeader:
        """The file's metadata and the places of its tensors, by the names that it has for them."""
        return self._open()

    def places(self) -> dict[str, tuple[str, int | None]]:
        """Hugging Face's name -> the file's, and which of the stacked experts it is."""
        return dict(self._stored)

    def names(self) -> tuple[str, ...]:
        return self._names

    def _find(self, name: str) -> tuple[str, int | None]:
        try:
            return self._stored[name]
        except KeyError:
            raise FileFormatError(f"{self.path}: there is no tensor {name!r}") from None

    def shape(self, name: str) -> Shape:
        there, expert = self._find(name)
        shape = self._open().tensors[there].shape
        return shape if expert is None else shape[1:]

    def dtype(self, name: str) -> str:
        return self._open().tensors[self._find(name)[0]].kind.lower()

    def load(self, name: str) -> Array:
        kind = self.dtype(name)
        if kind in ("f32", "f16", "bf16"):
            return widen(*self.raw(name))
        flat = dequantize(self._rows(name), kind, f"{self.path}: tensor {name!r}")
        return flat.reshape(self.shape(name))

    def raw(self, name: str) -> tuple[Array, str]:
        kind = self.dtype(name)
        dtype = {"f32": "<f4", "f16": "<f2", "bf16": "<u2"}.get(kind)
        if dtype is None:
            raise UnsupportedError(
                f"{self.path}: tensor {name!r} is quantized ({kind}); it can only be loaded as f32"
            )
        array = self._rows(name).view(dtype).reshape(self.shape(name))
        if self._holds_one(name) and kind == "f32":
            array = array - np.float32(1)
        return array, kind

    def _holds_one(self, name: str) -> bool:
        """Whether this is a norm that the converter added 1 to."""
        return bool(self._above_one) and (name.endswith(self._above_one) or name == self._last_norm)

    def stored(self, name: str) -> Stored | None:
        """Blocks lie along a row, so the converter's order of rows is undone without decoding."""
        kind, shape = self.dtype(name), self.shape(name)
        if kind not in BLOCKS or len(shape) != 2:
            return super().stored(name)
        return Stored(kind, self._rows(name), (shape[0], shape[1]))

    def parts(self, name: str) -> Iterator[Array]:
        kind, rows, (_, k) = self.dtype(name), self._rows(name), self.shape(name)
        if kind in ("f32", "f16", "bf16"):
            yield self.load(name)
            return
        step = max(1, _CHUNK // (4 * k))
        for i in range(0, len(rows), step):
            yield dequantize(rows[i : i + step], kind, f"{self.path}: tensor {name!r}")

    def _rows(self, name: str) -> Array:
        """The stored bytes, one row of uint8 per row of the tensor, in Hugging Face's row order."""
        header, (there, expert) = self._open(), self._find(name)
        rows = header.rows(there)
        if expert is not None:
            each = rows.shape[0] // header.tensors[there].shape[0]
            rows = rows[expert * each : (expert + 1) * each]
        if self._permuted:
            names, heads = self.config.names, 0
            for role, n in (
                (names.q, self.config.num_attention_heads),
                (names.k, self.config.num_key_value_heads),
            ):
                heads = n if name.rpartition(".")[0].endswith(f".{role}") else heads
            if heads:
                mapped, rows = rows, deinterleave(self._one_each(rows, name), heads)
                let_go(mapped)
        if self.config.fused_qkv == "groups" and (
            name.rpartition(".")[0].endswith(f".{self.config.names.qkv}")
        ):
            rows = head_by_head(self._one_each(rows, name), self.config.num_attention_heads)
        return rows

    def _one_each(self, rows: Array, name: str) -> Array:
        """`rows` with one row for each output: a bias is stored as one row of many numbers, which
        are unquantized, as checked."""
        return rows.reshape(self.shape(name)[0], -1) if name.endswith(".bias") else rows

    def tokenizer(self) -> Tokenizer:
        from pylora.text.gguf_vocabulary import tokenizer_from_gguf

        return tokenizer_from_gguf(self.path, self._open().metadata, self.config.vocab_size)

    def close(self) -> None:
        self._header = None


def deinterleave(rows: Array, heads: int) -> Array:
    """Undoes the converter's order: within each head, rows 0, n/2, 1, n/2 + 1, ... become 0, 1, ...

    `rows` is [heads * n, anything]; returns a copy. Inverse of convert_hf_to_gguf's `permute`.
    """
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, -1)
    ordered: Array = np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)
    return ordered


def head_by_head(rows: Array, heads: int) -> Array:
    """The rows of all heads' q, then k, then v, as q, k and v of each head. Returns a copy."""
    apart = rows.reshape(3, heads, rows.shape[0] // heads // 3, -1)
    ordered: Array = np.ascontiguousarray(apart.swapaxes(0, 1)).reshape(rows.shape)
    return ordered


def dequantize(rows: Array, kind: str, where: str) -> Array:
    """float32 [rows, elements] of uint8 [rows, bytes] in a ggml block format such as "q4_1".

    IQ1, IQ2 and IQ3 need the package gguf: MissingExtraError without. UnsupportedError for a type
    that nothing here decodes."""
    block = BY_NAME[kind.upper()]
    decode = DECODERS.get(block.name) or _by_gguf(block.name, where)
    width = rows.shape[1] // block.size * block.numbers
    out = np.empty((rows.shape[0], width), np.float32)
    step = max(1, _CHUNK // max(4 * width, 1))
    with np.errstate(all="ignore"):  # a scale may be infinite or NaN: values are not judged
        for i in range(0, len(rows), step):
            some = np.ascontiguousarray(rows[i : i + step]).reshape(-1, block.size)
            out[i : i + step] = decode(some).reshape(-1, width)
    return out


def _by_gguf(name: str, where: str) -> Callable[[Array], Array]:
    """The decoder of the package gguf for a type whose tables are not in pylora."""
    if not name.startswith(("IQ1", "IQ2", "IQ3")):
        raise UnsupportedError(f"{where}: no way is known to dequantize {name.lower()}")
    constants, quants = need("gguf.constants"), need("gguf.quants")
    qtype = constants.GGMLQuantizationType[name]
    return lambda blocks: np.asarray(quants.dequantize(blocks, qtype), np.float32)


def hf_name(name: str, config: LlamaConfig | None = None) -> str | None:
    """The Hugging Face name of a GGUF tensor in a model of `config`, or in one with Llama's names;
    "" if it carries no weights; None if unknown."""
    if name in NO_WEIGHTS or re.fullmatch(r"blk\.\d{1,5}\.attn_rot_embd", name):
        return ""
    match = re.fullmatch(r"(?:blk\.(0|[1-9]\d{0,4})\.)?([a-z_]+)\.(weight|bias)", name)
    if match is None:
        return None
    layer, stem, ending = match.groups()
    family = families.of("llama") if config is None else config.family
    own = family.gguf.stems if family.gguf is not None else {}
    role = own.get(stem) or (TOP_ROLES if layer is None else BLOCK_ROLES).get(stem)
    if role == "up" and config is not None and config.fused_gate_up:
        role = "gate_up"
    if role is None or not (path := getattr(family.names, role)):
        return None
    return f"{path}.{ending}" if layer is None else f"{family.names.layer}.{layer}.{path}.{ending}"
