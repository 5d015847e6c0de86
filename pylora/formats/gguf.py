"""GGUF checkpoints of Llama-type models, as Hugging Face names and layout, dequantized on load.

Two things differ from a Hugging Face file and are undone here:
llama.cpp's converter interleaves the rows of q_proj and k_proj of the architecture "llama" (for
the other rotary layout), and the configuration is in the metadata (gguf_config.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pylora.errors import FileFormatError, UnsupportedError
from pylora.extras import need
from pylora.formats.base import Array, Checkpoint, Shape, check_tensors, read_config, widen
from pylora.formats.ggml import BY_NAME
from pylora.formats.ggml_decode import DECODERS
from pylora.formats.gguf_config import ROPE_FACTORS, hf_config
from pylora.formats.gguf_header import GGUFHeader
from pylora.formats.gguf_split import read_gguf
from pylora.numbers.precision import Stored
from pylora.numbers.quantize import BLOCK_BYTES

if TYPE_CHECKING:
    from pylora.text.tokenizer import Tokenizer

_PERMUTED = ("llama",)  # architectures whose q and k rows the converter interleaves
_CHUNK = 1 << 22  # bytes of float32 dequantized at a time, so that temporaries stay small

_TOP = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class GGUFCheckpoint(Checkpoint):
    """A GGUF file as a Checkpoint. Raises FileFormatError or UnsupportedError on opening."""

    def __init__(self, path: Path) -> None:
        self.path = path
        header = read_gguf(path)
        self._header: GGUFHeader | None = header
        self.config = read_config(path, hf_config(header))
        self._stored: dict[str, str] = {}
        for name in header.tensors:
            if (hf := hf_name(name)) is None:
                raise UnsupportedError(f"{path}: no meaning is known for the tensor {name[:200]!r}")
            if hf:
                self._stored[hf] = name
        shapes = {hf: header.tensors[name].shape for hf, name in self._stored.items()}
        self._names = check_tensors(path, self.config, shapes)
        for name in header.tensors:
            tensor = header.tensors[name]
            if len(tensor.shape) == 1 and tensor.kind not in ("F32", "F16", "BF16"):
                raise UnsupportedError(f"{path}: tensor {name!r} is a vector of type {tensor.kind}")
        self._permuted = header.metadata["general.architecture"] in _PERMUTED

    def _open(self) -> GGUFHeader:
        if self._header is None:
            raise FileFormatError(f"{self.path}: the checkpoint is closed")
        return self._header

    def names(self) -> tuple[str, ...]:
        return self._names

    def _find(self, name: str) -> str:
        try:
            return self._stored[name]
        except KeyError:
            raise FileFormatError(f"{self.path}: there is no tensor {name!r}") from None

    def shape(self, name: str) -> Shape:
        return self._open().tensors[self._find(name)].shape

    def dtype(self, name: str) -> str:
        return self._open().tensors[self._find(name)].kind.lower()

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
        return self._rows(name).view(dtype).reshape(self.shape(name)), kind

    def stored(self, name: str) -> Stored | None:
        """Blocks lie along a row, so the converter's order of rows is undone without decoding."""
        kind, shape = self.dtype(name), self.shape(name)
        if kind not in BLOCK_BYTES or len(shape) != 2:
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

    def blocks(self, name: str) -> Array:
        if self.dtype(name) in ("f32", "f16", "bf16"):
            return super().blocks(name)
        return self._rows(name)

    def _rows(self, name: str) -> Array:
        """The stored bytes, one row of uint8 per row of the tensor, in Hugging Face's row order."""
        header = self._open()
        rows = header.rows(self._find(name))
        if self._permuted and ".self_attn." in name:
            heads = {
                "q_proj": self.config.num_attention_heads,
                "k_proj": self.config.num_key_value_heads,
            }.get(name.split(".")[-2])
            if heads:
                if name.endswith(".bias"):  # one row of many numbers: unquantized, as checked
                    rows = rows.reshape(self.shape(name)[0], -1)
                rows = deinterleave(rows, heads)
        return rows

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


def hf_name(name: str) -> str | None:
    """The Hugging Face name of a GGUF tensor; "" if it carries no weights; None if unknown."""
    if name == ROPE_FACTORS or re.fullmatch(r"blk\.\d{1,5}\.attn_rot_embd", name):
        return ""
    match = re.fullmatch(r"(?:blk\.(0|[1-9]\d{0,4})\.)?([a-z_]+)\.(weight|bias)", name)
    if match is None:
        return None
    layer, stem, ending = match.groups()
    if layer is None:
        return f"{_TOP[stem]}.{ending}" if stem in _TOP else None
    return f"model.layers.{layer}.{_BLOCK[stem]}.{ending}" if stem in _BLOCK else None
