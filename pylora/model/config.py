"""The shape of a Llama-type model: its settings, its tensors and the modules that can take LoRA.

One dataclass serves Llama, Mistral (sliding window), Qwen2 (q/k/v biases) and Qwen3 (RMS norms of
each q and k head). Names of tensors and modules are those of Hugging Face and PEFT. Nothing here
reads a file or allocates an array.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from pylora.errors import ConfigError, UnsupportedError, wrong_type
from pylora.model import hfconfig
from pylora.model.hfconfig import (
    ARCHITECTURES,
    MAX_LAYERS,
    MAX_SIZE,
    check_int,
    check_positive,
    check_scaling,
)
from pylora.types import brief


@dataclass(frozen=True)
class ModuleSpec:
    """A module that can take LoRA: A [r, k], B [d, r]. An embedding's k is the vocabulary."""

    kind: str  # "linear" or "embedding"
    d: int
    k: int
    bias: bool = False  # whether the module has a bias of its own


@dataclass(frozen=True)
class LlamaConfig:
    """Settings of a model. Construction checks them: ConfigError, UnsupportedError."""

    __repr__ = brief

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None  # {"rope_type": "llama3" or "linear", ...}
    tie_word_embeddings: bool = False
    attention_bias: bool = False  # of q, k and v
    attention_out_bias: bool = False  # of o
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None  # how many keys a query sees, itself included
    max_window_layers: int = 0  # layers below this one see all keys (Qwen2)
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.model_type not in ARCHITECTURES:
            raise UnsupportedError(
                f"model_type {self.model_type!r} is not supported; "
                f"supported are {', '.join(ARCHITECTURES)}"
            )
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            check_int(name, getattr(self, name), 1, MAX_SIZE)
        check_int("num_hidden_layers", self.num_hidden_layers, 1, MAX_LAYERS)
        check_int("max_window_layers", self.max_window_layers, 0, MAX_SIZE)
        if self.sliding_window is not None:
            check_int("sliding_window", self.sliding_window, 1, MAX_SIZE)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim must be even for rotary embedding, got {self.head_dim}")
        check_positive("rms_norm_eps", self.rms_norm_eps)
        check_positive("rope_theta", self.rope_theta)
        check_scaling(self.rope_scaling)
        for token in (*self.eos_token_ids, self.bos_token_id):
            if token is not None:
                check_int("bos_token_id / eos_token_ids", token, 0, self.vocab_size - 1)

    # ---- making one ---------------------------------------------------------------------------

    @classmethod
    def tiny(cls, **over: Any) -> LlamaConfig:
        """A model small enough for tests and docs; any field may be overridden."""
        base: dict[str, Any] = {
            "model_type": "llama",
            "vocab_size": 61,
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 6,
            "max_position_embeddings": 128,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
        }
        unknown = sorted(set(over) - {f.name for f in fields(cls)})
        if unknown:
            raise ConfigError(f"LlamaConfig has no field {', '.join(unknown)}")
        return cls(**(base | over))

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> LlamaConfig:
        """From the content of a Hugging Face `config.json`, with Hugging Face's defaults.

        Raises UnsupportedError for settings that change the result and are not implemented, and
        ConfigError for missing or impossible ones.
        """
        if not isinstance(config, Mapping):
            wrong_type("LlamaConfig.from_hf", "the fields of a config.json as a dict", config)
        return cls(**hfconfig.read(config))

    def to_hf(self) -> dict[str, Any]:
        """The content of a Hugging Face `config.json` that `from_hf` reads back unchanged.

        Raises UnsupportedError where the architecture of `model_type` has no such model.
        """
        return hfconfig.write(asdict(self))

    # ---- what is in it ------------------------------------------------------------------------

    @property
    def q_size(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_key_value_heads * self.head_dim

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.tensors().values())

    def window(self, layer: int) -> int:
        """How many keys a query of this layer sees; 0 for all."""
        return self.sliding_window or 0 if layer >= self.max_window_layers else 0

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Hugging Face tensor name -> shape, every tensor of the model in order."""
        out: dict[str, tuple[int, ...]] = {}
        hidden = self.hidden_size
        out["model.embed_tokens.weight"] = (self.vocab_size, hidden)
        for path, spec in self.modules().items():
            name = path.rsplit(".", 1)[-1]
            if name == "q_proj":
                out[path.replace("self_attn.q_proj", "input_layernorm.weight")] = (hidden,)
                if self.qk_norm:
                    for norm in ("q_norm", "k_norm"):
                        out[path.replace("q_proj", f"{norm}.weight")] = (self.head_dim,)
            elif name == "gate_proj":
                norm = "post_attention_layernorm.weight"
                out[path.replace("mlp.gate_proj", norm)] = (hidden,)
            if spec.kind == "linear" and path != "lm_head":
                out[f"{path}.weight"] = (spec.d, spec.k)
                if spec.bias:
                    out[f"{path}.bias"] = (spec.d,)
        out["model.norm.weight"] = (hidden,)
        if not self.tie_word_embeddings:
            out["lm_head.weight"] = (self.vocab_size, hidden)
        return out

    def modules(self) -> dict[str, ModuleSpec]:
        """Module path -> shape, for every module that can take LoRA, in the order of forward."""
        hidden, inner = self.hidden_size, self.intermediate_size
        per_layer = {
            "self_attn.q_proj": ModuleSpec("linear", self.q_size, hidden, self.attention_bias),
            "self_attn.k_proj": ModuleSpec("linear", self.kv_size, hidden, self.attention_bias),
            "self_attn.v_proj": ModuleSpec("linear", self.kv_size, hidden, self.attention_bias),
            "self_attn.o_proj": ModuleSpec("linear", hidden, self.q_size, self.attention_out_bias),
            "mlp.gate_proj": ModuleSpec("linear", inner, hidden, self.mlp_bias),
            "mlp.up_proj": ModuleSpec("linear", inner, hidden, self.mlp_bias),
            "mlp.down_proj": ModuleSpec("linear", hidden, inner, self.mlp_bias),
        }
        out = {"model.embed_tokens": ModuleSpec("embedding", hidden, self.vocab_size)}
        for i in range(self.num_hidden_layers):
            out |= {f"model.layers.{i}.{name}": spec for name, spec in per_layer.items()}
        return out | {"lm_head": ModuleSpec("linear", self.vocab_size, hidden)}
