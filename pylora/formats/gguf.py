"""GGUF checkpoints of Llama-type models, as Hugging Face names and layout, dequantized on load.

Dequantization is gguf-py's own. Two things differ from a Hugging Face file and are undone here:
llama.cpp's converter interleaves the rows of q_proj and k_proj of the architecture "llama" (for
the other rotary layout), and it folds Llama 3's rope scaling into a tensor of frequency factors.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pylora.config import LlamaConfig
from pylora.errors import ConfigError, FileFormatError, UnsupportedError
from pylora.extras import need
from pylora.formats.base import Array, Checkpoint, Shape, check_tensors, widen
from pylora.formats.gguf_header import GGUFHeader, read_header

if TYPE_CHECKING:
    from pylora.text import Tokenizer

ARCHITECTURES = ("llama", "qwen2", "qwen3")
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
_ROPE_FACTORS = "rope_freqs.weight"
# Settings that change the result and that no supported architecture has.
_REFUSED = (
    "attention.scale",
    "attention.clamp_kqv",
    "attention.max_alibi_bias",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "embedding_scale",
    "logit_scale",
    "residual_scale",
)


class GGUFCheckpoint(Checkpoint):
    """A GGUF file as a Checkpoint. Raises FileFormatError or UnsupportedError on opening."""

    def __init__(self, path: Path) -> None:
        self.path = path
        header = read_header(path)
        self._header: GGUFHeader | None = header
        try:
            self.config = LlamaConfig.from_hf(hf_config(header))
        except ConfigError as error:
            raise FileFormatError(
                f"{path}: the metadata describe no valid model: {error}"
            ) from error
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
        return dequantize(self._rows(name), kind, f"{self.path}: tensor {name!r}").reshape(
            self.shape(name)
        )

    def raw(self, name: str) -> tuple[Array, str]:
        kind = self.dtype(name)
        dtype = {"f32": "<f4", "f16": "<f2", "bf16": "<u2"}.get(kind)
        if dtype is None:
            raise UnsupportedError(
                f"{self.path}: tensor {name!r} is quantized ({kind}); it can only be loaded as f32"
            )
        return self._rows(name).view(dtype).reshape(self.shape(name)), kind

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
        from pylora.text_gguf import tokenizer_from_gguf

        return tokenizer_from_gguf(self.path, self._open().metadata, self.config.vocab_size)

    def close(self) -> None:
        self._header = None


def deinterleave(rows: Array, heads: int) -> Array:
    """Undoes the converter's order: within each head, rows 0, n/2, 1, n/2 + 1, ... become 0, 1, ...

    `rows` is [heads * n, anything]; returns a copy. Inverse of convert_hf_to_gguf's `permute`.
    """
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, -1)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


def dequantize(rows: Array, kind: str, where: str) -> Array:
    """float32 [rows, elements] of uint8 [rows, bytes] in a ggml block format such as "q4_1"."""
    constants, quants = need("gguf.constants"), need("gguf.quants")
    qtype = constants.GGMLQuantizationType[kind.upper()]
    block, size = constants.GGML_QUANT_SIZES[qtype]
    width = rows.shape[1] // size * block
    out = np.empty((rows.shape[0], width), np.float32)
    step = max(1, _CHUNK // (4 * width))
    try:
        with np.errstate(all="ignore"):  # a scale may be infinite or NaN: values are not judged
            for i in range(0, len(rows), step):
                out[i : i + step] = quants.dequantize(rows[i : i + step], qtype)
    except NotImplementedError as error:
        raise UnsupportedError(f"{where}: no way is known to dequantize {kind}") from error
    return out


def hf_name(name: str) -> str | None:
    """The Hugging Face name of a GGUF tensor; "" if it carries no weights; None if unknown."""
    if name == _ROPE_FACTORS or re.fullmatch(r"blk\.\d{1,5}\.attn_rot_embd", name):
        return ""
    match = re.fullmatch(r"(?:blk\.(0|[1-9]\d{0,4})\.)?([a-z_]+)\.(weight|bias)", name)
    if match is None:
        return None
    layer, stem, ending = match.groups()
    if layer is None:
        return f"{_TOP[stem]}.{ending}" if stem in _TOP else None
    return f"model.layers.{layer}.{_BLOCK[stem]}.{ending}" if stem in _BLOCK else None


def hf_config(header: GGUFHeader) -> dict[str, Any]:
    """The `config.json` content that the metadata stand for.

    Raises UnsupportedError for architectures and settings that change the result and are not read.
    """
    meta = _Settings(header)
    heads, width = meta.int("attention.head_count"), meta.int("embedding_length")
    head_dim = meta.int("attention.key_length", width // heads if heads > 0 else 0)
    only = {"attention.value_length": head_dim, "rope.dimension_count": head_dim, "expert_count": 0}
    for key, expected in only.items():
        if (value := meta.int(key, expected)) != expected:
            raise UnsupportedError(
                f"{header.path}: {meta.arch}.{key} is {value}; only {expected} is supported"
            )
    for key in _REFUSED:
        if f"{meta.arch}.{key}" in header.metadata:
            raise UnsupportedError(f"{header.path}: {meta.arch}.{key} is set; it is not supported")
    theta = meta.float("rope.freq_base", 10000.0)
    window = meta.int("attention.sliding_window", 0)
    if window and meta.arch != "llama":
        raise UnsupportedError(f"{header.path}: a sliding window in the architecture {meta.arch}")
    embedding = header.tensors.get("token_embd.weight")
    return {
        # llama.cpp has no architecture of Mistral's own; its window is all that tells it apart.
        "model_type": "mistral" if window else meta.arch,
        "vocab_size": embedding.shape[0] if embedding else meta.int("vocab_size"),
        "hidden_size": width,
        "intermediate_size": meta.int("feed_forward_length"),
        "num_hidden_layers": meta.int("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": meta.int("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": meta.int("context_length"),
        "rms_norm_eps": meta.float("attention.layer_norm_rms_epsilon"),
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(header, meta, head_dim, theta),
        "sliding_window": window or None,
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in header.tensors,
        "bos_token_id": header.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": header.metadata.get("tokenizer.ggml.eos_token_id"),
    }


class _Settings:
    """The metadata under the architecture's prefix, each value checked for its type."""

    def __init__(self, header: GGUFHeader) -> None:
        self._header = header
        arch = header.metadata.get("general.architecture")
        if not isinstance(arch, str) or arch not in ARCHITECTURES:
            raise UnsupportedError(
                f"{header.path}: the architecture is {str(arch)[:80]!r}; supported are "
                f"{', '.join(ARCHITECTURES)}"
            )
        self.arch = arch

    def get(self, key: str, default: Any = None) -> Any:
        value = self._header.metadata.get(f"{self.arch}.{key}", default)
        if value is None:
            raise FileFormatError(f"{self._header.path}: the metadata lack {self.arch}.{key}")
        return value

    def _wrong(self, key: str, kind: str) -> UnsupportedError:
        return UnsupportedError(
            f"{self._header.path}: {self.arch}.{key} is not one {kind}; "
            "values that differ from layer to layer are not supported"
        )

    def int(self, key: str, default: Any = None) -> int:
        value = self.get(key, default)
        if type(value) is not int:
            raise self._wrong(key, "whole number")
        return value

    def float(self, key: str, default: Any = None) -> float:
        value = self.get(key, default)
        if type(value) not in (int, float):
            raise self._wrong(key, "number")
        # The file holds float32; the shortest decimal that gives it is what the author wrote.
        with np.errstate(over="ignore"):
            return float(str(np.float32(value)))

    def text(self, key: str, default: Any = None) -> str:
        value = self.get(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, "text")
        return value


def _rope_scaling(
    header: GGUFHeader, meta: _Settings, head_dim: int, theta: float
) -> dict[str, Any] | None:
    factor = meta.float("rope.scaling.factor", meta.float("rope.scale_linear", 1.0))
    kind = meta.text("rope.scaling.type", "none" if factor == 1 else "linear")
    if kind not in ("none", "linear"):
        raise UnsupportedError(f"{header.path}: rope scaling of type {kind[:40]!r}")
    if _ROPE_FACTORS not in header.tensors:
        return {"rope_type": "linear", "factor": factor} if kind == "linear" else None
    if kind == "linear":
        raise UnsupportedError(f"{header.path}: linear rope scaling together with {_ROPE_FACTORS}")
    return _llama3(header, head_dim, theta)


def _llama3(header: GGUFHeader, head_dim: int, theta: float) -> dict[str, Any] | None:
    """Llama 3's rope scaling, recovered from the frequency factors that the converter stored.

    The file does not keep the settings, only what they give for each frequency, so settings are
    tried (the published low 1, high 4 and every power of two of original positions) and must give
    the stored factors. Formula: transformers' `_compute_llama3_parameters`.
    """
    stored = header.tensors[_ROPE_FACTORS]
    where = f"{header.path}: tensor {_ROPE_FACTORS!r}"
    if stored.kind != "F32" or stored.shape != (head_dim // 2,):
        raise FileFormatError(f"{where} must be F32 of shape ({head_dim // 2},)")
    factors = header.rows(_ROPE_FACTORS).view("<f4").reshape(-1).astype(np.float64)
    if not np.isfinite(factors).all() or factors.min() < 0.5 or factors.max() > 1e4:
        raise UnsupportedError(f"{where} holds factors outside 0.5 to 10000")
    if np.all(factors == 1):
        return None
    largest = float(factors.max())
    factor = float(round(largest)) if abs(largest - round(largest)) < 1e-5 * largest else largest
    wavelength = 2 * math.pi * abs(theta) ** (np.arange(0, head_dim, 2) / head_dim)
    for original in (1 << n for n in range(9, 21)):
        smooth = np.clip((original / wavelength - 1.0) / (4.0 - 1.0), 0.0, 1.0)
        if np.allclose(1 / ((1 - smooth) / factor + smooth), factors, rtol=1e-4, atol=0):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": original,
            }
    raise UnsupportedError(f"{where} holds factors that are not those of Llama 3's rope scaling")
