"""The suite's base models: one of every family that pylora has, and one with a tied head.

A family is picked up from the table of architectures; what it needs beside the settings that all
share stands in `_OWN`. Weights are numbers that float32, bfloat16 and float16 all hold exactly, so
that storing them in any of these changes nothing. Nothing here knows adapters.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pylora.conformance.suite import tokenizer
from pylora.conformance.suite.gguf_writer import write_gguf
from pylora.errors import ConfigError, PyloraError
from pylora.formats.base import narrow, widen
from pylora.formats.gguf import hf_name
from pylora.formats.safetensors import Bf16, save
from pylora.model.config import LlamaConfig
from pylora.model.families import ALL
from pylora.numbers.random import normal, stream

# What the suite's adapters are for; a family that calls them otherwise needs cases of its own.
MODULES = frozenset(
    "embed_tokens q_proj k_proj v_proj o_proj gate_proj up_proj down_proj lm_head".split()
)
Arrays = dict[str, np.ndarray[Any, Any]]

# Heads of 32 and rows of whole blocks of 32, so that every format and every kernel takes them.
_SHARED: dict[str, Any] = {
    "vocab_size": tokenizer.SIZE,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "sliding_window": None,
    "bos_token_id": tokenizer.START_ID,
    "eos_token_id": tokenizer.END_ID,
}
# What a family has beside these, as its config.json says it.
_OWN: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    **dict.fromkeys(("gemma2", "gemma3_text", "olmo3"), {"sliding_window": 512}),
}
_SCORED = ("q_proj.weight", "k_proj.weight")  # smaller: sharp attention magnifies roundings
_STEMS = ("token_embd", "output_norm", "output")
_NEVER_TIED = ("olmo2",)  # architectures that llama.cpp wants a head of its own in
_BEFORE, _AFTER = ("attn_norm", "ffn_norm"), ("post_attention_norm", "post_ffw_norm")
_BLOCK = (
    "attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "attn_q_norm", "attn_k_norm",
    "ffn_norm", "ffn_gate", "ffn_up", "ffn_down", "post_attention_norm", "post_ffw_norm",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Base:
    """A base model: its name, its configuration, its weights (float32, Hugging Face's names)."""

    name: str
    family: str
    config: LlamaConfig
    weights: Arrays

    @property
    def tied(self) -> bool:
        return self.config.tie_word_embeddings

    @property
    def gguf_arch(self) -> str | None:
        """The architecture in GGUF; None where pylora knows of none, or of one whose metadata or
        tensors are not those that all have in common, which are what is written here."""
        page = ALL[self.family]
        if page.gguf is None or page.gguf.settings is not None or page.unit_offset:
            return None
        return None if self.tied and page.gguf.arch in _NEVER_TIED else page.gguf.arch

    @property
    def _permuted(self) -> bool:
        page = ALL[self.family].gguf
        return page is not None and page.permuted

    def heads(self, path: str) -> int:
        """How many heads the rows of a module are, where GGUF stores them in another order; 0."""
        count = {
            "q_proj": self.config.num_attention_heads,
            "k_proj": self.config.num_key_value_heads,
        }
        return count.get(path.rsplit(".", 1)[-1], 0) if self._permuted else 0


def families(wanted: Iterable[str] = ()) -> list[str]:
    """The families to write; if none is named, all whose modules the suite's adapters name.

    ConfigError for a family that pylora has not, or whose modules have other names.
    """
    fit = [name for name in ALL if not _lacks(name)]
    for name in wanted:
        if name not in ALL:
            raise ConfigError(f"there is no family {name!r}; there are {', '.join(fit)}")
        if name not in fit:
            raise ConfigError(f"the suite has no adapters for {name!r}: {_lacks(name)}")
    return list(dict.fromkeys(wanted)) or fit


def _lacks(family: str) -> str:
    """Why the suite's adapters do not fit a family; "" where they do."""
    try:
        modules = _config(family, False).modules()
    except PyloraError as error:
        return str(error)
    missing = MODULES - {path.rsplit(".", 1)[-1] for path in modules}
    return f"it has no module {', '.join(sorted(missing))}" if missing else ""


def _config(family: str, tied: bool) -> LlamaConfig:
    content = {"model_type": family, **_SHARED, **_OWN.get(family, {}), "tie_word_embeddings": tied}
    return LlamaConfig.from_hf(content)


def make(family: str, tied: bool, seed: int) -> Base:
    """A base of this family. Its bits are a function of its name and the seed."""
    name = f"{family}-tied" if tied else family
    config = _config(family, tied)
    offset = ALL[family].unit_offset
    weights = {t: _tensor(name, t, shape, seed, offset) for t, shape in config.tensors().items()}
    return Base(name, family, config, weights)


def grid(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """float32 x to numbers of bfloat16 that float16 holds exactly, too; the least are 0."""
    kept = widen(narrow(x, "bf16"), "bf16")
    out: np.ndarray[Any, Any] = np.where(np.abs(kept) < 2.0**-14, np.float32(0), kept)
    return out


def _tensor(
    base: str, name: str, shape: tuple[int, ...], seed: int, unit_offset: bool
) -> np.ndarray[Any, Any]:
    """Matrices keep the size of what they multiply; the head's logits have a deviation of about 3,
    so that tokens are told apart. Tokens that some engine cannot name are all alike, and unlikely.
    """
    number = stream("suite", base, name)
    if len(shape) == 1:
        centre = 0.0 if unit_offset or not name.endswith("norm.weight") else 1.0
        return grid(normal(shape, 0.2, seed=seed, stream=number) + np.float32(centre))
    outer = name in ("model.embed_tokens.weight", "lm_head.weight")
    std = 3.0 if outer else 1.0 if name.endswith(_SCORED) else 1.4
    W = normal(shape, std / shape[1] ** 0.5, seed=seed, stream=number)
    if outer:
        W *= np.array(tokenizer.readable(), np.float32)[:, None]
    return grid(W)


# ---- files ---------------------------------------------------------------------------------------


def write_hf(base: Base, folder: Path) -> None:
    """The model as a Hugging Face directory: bfloat16, which holds its numbers exactly."""
    folder.mkdir(parents=True)
    # A family's own id of padding may be beyond this vocabulary.
    content = {**base.config.to_hf(), "dtype": "float32", "pad_token_id": tokenizer.SIZE - 1}
    _json(folder / "config.json", content)
    _json(folder / "tokenizer.json", tokenizer.tokenizer_json())
    _json(folder / "tokenizer_config.json", tokenizer.settings_json())
    tensors: dict[str, Any] = {n: Bf16(narrow(w, "bf16")) for n, w in base.weights.items()}
    save(folder / "model.safetensors", tensors, {"format": "pt"})


def write_gguf_model(base: Base, path: Path) -> None:
    """The model as a GGUF file of float32 numbers."""
    c, arch = base.config, base.gguf_arch
    metadata: dict[str, Any] = {
        "general.architecture": arch,
        "general.name": base.name,
        "general.file_type": 0,
        f"{arch}.vocab_size": c.vocab_size,
        f"{arch}.context_length": c.max_position_embeddings,
        f"{arch}.embedding_length": c.hidden_size,
        f"{arch}.block_count": c.num_hidden_layers,
        f"{arch}.feed_forward_length": c.intermediate_size,
        f"{arch}.attention.head_count": c.num_attention_heads,
        f"{arch}.attention.head_count_kv": c.num_key_value_heads,
        f"{arch}.attention.key_length": c.head_dim,
        f"{arch}.attention.value_length": c.head_dim,
        f"{arch}.attention.layer_norm_rms_epsilon": float(c.rms_norm_eps),
        f"{arch}.rope.freq_base": float(c.rope_theta),
        f"{arch}.rope.dimension_count": c.head_dim,
        **tokenizer.gguf_metadata(),
    }
    tensors: Arrays = {}
    for name, w in base.weights.items():
        heads = base.heads(name.rsplit(".", 1)[0])
        tensors[gguf_name(name, c)] = interleave(w, heads) if heads else w
    write_gguf(path, metadata, tensors)


def gguf_name(name: str, config: LlamaConfig) -> str:
    """GGUF's name of a tensor of such a model. KeyError where none is known."""
    stem, ending = name.rsplit(".", 1)
    if not stem.startswith("model.layers."):
        return f"{_names(config)[stem]}.{ending}"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{_names(config)[rest]}.{ending}"


def _names(config: LlamaConfig) -> dict[str, str]:
    """Hugging Face's names of modules -> GGUF's, from the reader's own table."""
    top = {hf_name(f"{s}.weight", config): s for s in _STEMS}
    # Norms before and after a sublayer may have one name, of which a family has one.
    without = {"before": _AFTER, "after": _BEFORE, "both": ()}[config.norm_places]
    stems = [s for s in _BLOCK if s not in without]
    block = {hf_name(f"blk.0.{s}.weight", config): s for s in stems}
    out = {hf.removesuffix(".weight"): s for hf, s in top.items() if hf}
    begin = "model.layers.0."
    return out | {h[len(begin) :].removesuffix(".weight"): s for h, s in block.items() if h}


def interleave(rows: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows 0, 1, ... of each head in GGUF's order for "llama": 0, n/2, 1, n/2 + 1, ..."""
    half = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    out: np.ndarray[Any, Any] = np.ascontiguousarray(half.swapaxes(1, 2)).reshape(rows.shape)
    return out


def _json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
