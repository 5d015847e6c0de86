"""The configuration of a GGUF model: metadata to the content of a Hugging Face config.json.

Settings that change the result and that pylora does not run are refused by name. The file's
tensors say what the metadata do not: tied embeddings, biases, and Llama 3's rope scaling, which
the converter folds into a tensor of frequency factors.
"""

from __future__ import annotations

import difflib
import math
from typing import Any

import numpy as np

from pylora.errors import FileFormatError, UnsupportedError
from pylora.formats.gguf_header import GGUFHeader
from pylora.model import families
from pylora.model.families.family import Family, Gguf

ROPE_FACTORS = "rope_freqs.weight"
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
    "use_parallel_residual",
    "expert_count",
    "expert_shared_count",
    "expert_weights_scale",
)
_NEUTRAL = {"expert_count": (0,), "expert_shared_count": (0,), "use_parallel_residual": (False,)}
_LONG, _SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
NO_WEIGHTS = (ROPE_FACTORS, _LONG, _SHORT)  # they say what the configuration is


def hf_config(header: GGUFHeader) -> dict[str, Any]:
    """The `config.json` content that the metadata stand for.

    Raises UnsupportedError for architectures and settings that change the result and are not read.
    """
    meta = _Settings(header)
    family = _family(meta)
    own = family.gguf or Gguf(meta.arch)
    heads, width = meta.int("attention.head_count"), meta.int("embedding_length")
    head_dim = meta.int("attention.key_length", width // heads if heads > 0 else 0)
    only = {"attention.value_length": head_dim, "rope.dimension_count": head_dim}
    for key, expected in only.items():
        if key in own.knows:
            continue
        if (found := meta.int(key, expected)) != expected:
            raise UnsupportedError(
                f"{header.path}: {meta.arch}.{key} is {found}; only {expected} is supported"
            )
    for key in _REFUSED:
        value = header.metadata.get(f"{meta.arch}.{key}")
        if key not in own.knows and value is not None and value not in _NEUTRAL.get(key, ()):
            raise UnsupportedError(f"{header.path}: {meta.arch}.{key} is set; it is not supported")
    theta = meta.float("rope.freq_base", 10000.0)
    window = meta.int("attention.sliding_window", 0)
    if window and "attention.sliding_window" not in own.knows:
        raise UnsupportedError(f"{header.path}: a sliding window in the architecture {meta.arch}")
    eps = "attention.layer_norm_rms_epsilon"
    if f"{meta.arch}.{eps}" not in header.metadata:
        eps = "attention.layer_norm_epsilon"
    embedding = header.tensors.get("token_embd.weight")
    settings: dict[str, Any] = {
        "model_type": family.model_type,
        "vocab_size": embedding.shape[0] if embedding else meta.int("vocab_size"),
        "hidden_size": width,
        "intermediate_size": meta.int("feed_forward_length"),
        "num_hidden_layers": meta.int("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": meta.int("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": meta.int("context_length"),
        "rms_norm_eps": meta.float(eps),
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(header, meta, head_dim, theta),
        "sliding_window": window or None,
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in header.tensors,
        "bos_token_id": header.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": header.metadata.get("tokenizer.ggml.eos_token_id"),
    }
    if own.settings is not None:
        settings |= own.settings(meta)
    return settings


def _family(meta: _Settings) -> Family:
    """The family of the file's architecture. llama.cpp has one for Llama, Mistral and Mixtral:
    experts and a window are all that tells them apart."""
    if meta.arch == "llama":
        kind = "mixtral" if meta.int("expert_count", 0) else "llama"
        return families.of("mistral" if meta.int("attention.sliding_window", 0) else kind)
    if meta.arch == "olmo2" and meta.int("attention.sliding_window", 0):
        return families.of("olmo3")
    return next(f for f in families.ALL.values() if f.gguf and f.gguf.arch == meta.arch)


class _Settings:
    """The metadata under the architecture's prefix, each value checked for its type."""

    def __init__(self, header: GGUFHeader) -> None:
        self._header = header
        arch = header.metadata.get("general.architecture")
        known = dict.fromkeys(f.gguf.arch for f in families.ALL.values() if f.gguf is not None)
        if not isinstance(arch, str) or arch not in known:
            close = difflib.get_close_matches(str(arch)[:80], known, n=1, cutoff=0.5)
            nearest = f"the nearest that is supported is {close[0]!r}; " if close else ""
            raise UnsupportedError(
                f"{header.path}: the architecture is {str(arch)[:80]!r}; {nearest}supported are "
                f'{", ".join(known)}; "Add a family" in {families.PAGE} says how to add one'
            )
        self.arch = arch

    def has(self, key: str) -> bool:
        return f"{self.arch}.{key}" in self._header.metadata

    def tensor(self, name: str) -> bool:
        """Whether the file has this tensor."""
        return name in self._header.tensors

    def either(self, key: str) -> Any:
        """A value of any type, or None: one number, or a list with one for each layer."""
        return self._header.metadata.get(f"{self.arch}.{key}")

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
    if _LONG in header.tensors and _SHORT in header.tensors:
        return _longrope(header, meta)
    if kind == "yarn":
        original = meta.int("rope.scaling.original_context_length")
        yarn = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        for key, name in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
            if meta.has(f"rope.scaling.{key}"):
                yarn[name] = meta.float(f"rope.scaling.{key}")
        return yarn
    if kind not in ("none", "linear"):
        raise UnsupportedError(f"{header.path}: rope scaling of type {kind[:40]!r}")
    if ROPE_FACTORS not in header.tensors:
        return {"rope_type": "linear", "factor": factor} if kind == "linear" else None
    if kind == "linear":
        raise UnsupportedError(f"{header.path}: linear rope scaling together with {ROPE_FACTORS}")
    return _llama3(header, head_dim, theta)


def _longrope(header: GGUFHeader, meta: _Settings) -> dict[str, Any]:
    """LongRoPE, whose factors the file holds as tensors."""
    out: dict[str, Any] = {"rope_type": "longrope"}
    for name, key in ((_SHORT, "short_factor"), (_LONG, "long_factor")):
        if header.tensors[name].kind != "F32" or len(header.tensors[name].shape) != 1:
            raise FileFormatError(f"{header.path}: tensor {name!r} must be a vector of F32")
        values = header.rows(name).view("<f4").reshape(-1)
        out[key] = [float(str(v)) for v in values]
    out["original_max_position_embeddings"] = meta.int("rope.scaling.original_context_length")
    if meta.has("rope.scaling.attn_factor"):
        out["attention_factor"] = meta.float("rope.scaling.attn_factor")
    return out


def _llama3(header: GGUFHeader, head_dim: int, theta: float) -> dict[str, Any] | None:
    """Llama 3's rope scaling, recovered from the frequency factors that the converter stored.

    The file does not keep the settings, only what they give for each frequency, so settings are
    tried (the published low 1, high 4 and every power of two of original positions) and must give
    the stored factors. Formula: transformers' `_compute_llama3_parameters`.
    """
    stored = header.tensors[ROPE_FACTORS]
    where = f"{header.path}: tensor {ROPE_FACTORS!r}"
    if stored.kind != "F32" or stored.shape != (head_dim // 2,):
        raise FileFormatError(f"{where} must be F32 of shape ({head_dim // 2},)")
    factors = header.rows(ROPE_FACTORS).view("<f4").reshape(-1).astype(np.float64)
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
