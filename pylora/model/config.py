"""The shape of a model: its settings, its tensors and the modules that can take LoRA.

One dataclass serves every family (families/): the fields below are features, and the default of
each is what Llama does. Names of tensors and modules are those of Hugging Face and PEFT. Nothing
here reads a file or allocates an array.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cached_property
from typing import Any

from pylora.errors import ConfigError, UnsupportedError, wrong_type
from pylora.model import families, hfconfig
from pylora.model.checks import (
    MAX_LAYERS,
    MAX_SIZE,
    check_int,
    check_positive,
    check_scaling,
    is_number,
)
from pylora.model.families.family import Family, Names
from pylora.model.tensors import ModuleSpec, Shape, expert_parameters, layer_modules, tensors_of
from pylora.ops.features import ACTIVATIONS, QKV, Features
from pylora.ops.heads import HEADS
from pylora.types import brief

__all__ = ["LlamaConfig", "ModuleSpec"]

_NORMS = ("rms", "layer")
_PLACES = ("before", "after", "both")


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
    rms_norm_eps: float = 1e-6  # of every norm, LayerNorm too
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None  # {"rope_type": one of checks.SCALINGS, ...}
    tie_word_embeddings: bool = False
    attention_bias: bool = False  # of q, k and v
    attention_out_bias: bool = False  # of o
    mlp_bias: bool = False
    qk_norm: bool = False  # norms of q and k heads
    qk_norm_of: str = "shared"  # how: ops.heads.HEADS; those of "each" are LayerNorms
    sliding_window: int | None = None  # how many keys a query sees, itself included
    max_window_layers: int = 0  # layers below this one see all keys (Qwen2)
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    # ---- what families differ in ----
    activation: str = "silu"  # ops.features.ACTIVATIONS
    gated: bool = True  # down(act(gate x) * up x); without: down(act(up x))
    norm: str = "rms"  # or "layer"
    norm_bias: bool = False  # of LayerNorms
    norm_places: str = "before"  # the sublayers; "after" them, or "both"
    parallel: str = ""  # attention and mlp read the same x: through "one" norm, or "two"
    fused_qkv: str = ""  # how one projection holds q, k and v: ops.features.QKV
    fused_gate_up: bool = False
    windows: tuple[int, ...] | None = None  # of each layer, 0: all keys; instead of sliding_window
    ropes: tuple[int, ...] | None = None  # rotary tables of each layer: 0, 1 (local) or -1 (none)
    local_rope_theta: float | None = None  # of the layers whose `ropes` is 1
    local_rope_scaling: dict[str, Any] | None = None
    partial_rotary: float = 1.0  # the part of a head that is rotated
    rope_layout: str = "half"  # or "interleaved"
    learned_positions: bool = False  # a table that is added to the embedding
    attention_scale: float | None = None  # of scores; None: head_dim ** -0.5
    attention_scales: tuple[float, ...] | None = None  # that of each layer, where they differ
    attention_softcap: float = 0.0  # 0: none
    logit_softcap: float = 0.0
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logit_multiplier: float = 1.0
    # ---- experts ----
    experts: int = 0  # of each layer that has any
    experts_per_token: int = 0
    expert_size: int = 0  # their intermediate size
    norm_expert_weights: bool = False  # the chosen experts' weights add up to 1
    dense_layers: tuple[int, ...] = ()  # layers without experts

    def __post_init__(self) -> None:
        families.of(self.model_type)
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
        self._check_rotary()
        self._check_features()
        self._check_experts()
        for token in (*self.eos_token_ids, self.bos_token_id):
            if token is not None:
                check_int("bos_token_id / eos_token_ids", token, 0, self.vocab_size - 1)

    def _check_rotary(self) -> None:
        if self.head_dim % 2 and self.rotated:
            raise ConfigError(f"head_dim must be even for rotary embedding, got {self.head_dim}")
        check_positive("rms_norm_eps", self.rms_norm_eps)
        check_positive("rope_theta", self.rope_theta)
        if not 0 < self.partial_rotary <= 1 or (self.rotated and self.rotary_dim < 2):
            raise ConfigError(
                f"partial_rotary_factor must leave 2 to {self.head_dim} numbers of a head to "
                f"rotate, got {self.partial_rotary!r}"
            )
        turned = int(self.head_dim * self.partial_rotary)
        if self.rotated and turned % 2:
            raise UnsupportedError(
                f"partial_rotary_factor {self.partial_rotary!r} of head_dim {self.head_dim} "
                f"rotates {turned} numbers of a head, which are no pairs"
            )
        check_scaling(self.rope_scaling, self.rotary_dim // 2)
        check_scaling(self.local_rope_scaling, self.rotary_dim // 2)
        if self.ropes is not None and 1 in self.ropes:
            check_positive("local_rope_theta", self.local_rope_theta)
        for name, allowed in (("windows", range(MAX_SIZE)), ("ropes", range(-1, 2))):
            values = getattr(self, name)
            if values is None:
                continue
            if len(values) != self.num_hidden_layers or any(v not in allowed for v in values):
                raise ConfigError(
                    f"{name} must have a value from {allowed[0]} to {allowed[-1]} for each of the "
                    f"{self.num_hidden_layers} layers"
                )

    def _check_features(self) -> None:
        for name, allowed in (
            ("activation", ACTIVATIONS),
            ("norm", _NORMS),
            ("norm_places", _PLACES),
            ("parallel", ("", "one", "two")),
            ("fused_qkv", QKV),
            ("rope_layout", ("half", "interleaved")),
            ("qk_norm_of", HEADS),
        ):
            if getattr(self, name) not in allowed:
                said = ", ".join(repr(a) for a in allowed)
                raise ConfigError(f"{name} must be one of {said}, got {getattr(self, name)!r}")
        if self.parallel and self.norm_places != "before":
            raise UnsupportedError("a parallel residual has its norms before the sublayers")
        for name in ("embedding_multiplier", "residual_multiplier", "logit_multiplier"):
            value = getattr(self, name)
            if not is_number(value) or not math.isfinite(value) or value == 0:
                raise ConfigError(f"{name} must be a finite number other than 0, got {value!r}")
        for name in ("attention_softcap", "logit_softcap"):
            if getattr(self, name) != 0:
                check_positive(name, getattr(self, name))
        if self.attention_scale is not None:
            check_positive("attention_scale", self.attention_scale)
        if self.attention_scales is not None:
            if len(self.attention_scales) != self.num_hidden_layers:
                raise ConfigError(
                    f"attention_scales must have a number for each of the {self.num_hidden_layers} "
                    "layers"
                )
            for scale in self.attention_scales:
                check_positive("attention_scales", scale)

    def _check_experts(self) -> None:
        if not self.experts:
            return
        check_int("experts", self.experts, 1, 65536)
        check_int("experts_per_token", self.experts_per_token, 1, self.experts)
        check_int("expert_size", self.expert_size, 1, MAX_SIZE)
        for layer in self.dense_layers:
            check_int("dense_layers", layer, 0, MAX_LAYERS)

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
        defaults = {f.name: f.default for f in fields(self) if f.default is not MISSING}
        return hfconfig.write(asdict(self), defaults)

    def top(self, first: int) -> LlamaConfig:
        """The layers from `first` on, as a model of their own."""
        return dataclasses.replace(
            self,
            num_hidden_layers=self.num_hidden_layers - first,
            max_window_layers=max(0, self.max_window_layers - first),
            windows=None if self.windows is None else self.windows[first:],
            ropes=None if self.ropes is None else self.ropes[first:],
            attention_scales=self.attention_scales and self.attention_scales[first:],
            dense_layers=tuple(i - first for i in self.dense_layers if i >= first),
        )

    # ---- what is in it ------------------------------------------------------------------------

    @property
    def family(self) -> Family:
        """The page of data that says what the model's files mean."""
        return families.of(self.model_type)

    @property
    def names(self) -> Names:
        """What Hugging Face calls the modules."""
        return self.family.names

    @cached_property
    def features(self) -> Features:
        """What the layers compute, as the operations take it."""
        own = {f.name: getattr(self, f.name) for f in fields(Features) if f.name != "parallel"}
        return Features(**own, parallel=bool(self.parallel))

    @property
    def q_size(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_key_value_heads * self.head_dim

    @property
    def rotary_dim(self) -> int:
        """How many numbers of a head are rotated."""
        return int(self.head_dim * self.partial_rotary) // 2 * 2

    @property
    def rotated(self) -> bool:
        """Whether any layer has a rotary embedding."""
        return self.ropes is None or any(kind >= 0 for kind in self.ropes)

    @property
    def max_positions(self) -> int:
        """The longest sequence: further than max_position_embeddings where the rotation is meant
        to stretch by itself (dynamic); not so far where queries grow behind the original length
        (llama_4_scaling_beta), which is not carried out."""
        for scaling in (self.rope_scaling, self.local_rope_scaling):
            if scaling is not None and scaling.get("llama_4_scaling_beta"):
                original = int(scaling["original_max_position_embeddings"])
                return min(self.max_position_embeddings, original)
            if scaling is not None and scaling["rope_type"] == "dynamic":
                return int(self.max_position_embeddings * max(1.0, float(scaling["factor"])))
        return self.max_position_embeddings

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.tensors().values())

    def window(self, layer: int) -> int:
        """How many keys a query of this layer sees; 0 for all."""
        if self.windows is not None:
            return self.windows[layer]
        return self.sliding_window or 0 if layer >= self.max_window_layers else 0

    def scale(self, layer: int) -> float:
        """What this layer's scores are multiplied by."""
        if self.attention_scales is not None:
            return self.attention_scales[layer]
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    def rope_of(self, layer: int) -> int:
        """The number of the layer's rotary tables (0; 1 are the local ones); -1: none."""
        return 0 if self.ropes is None else self.ropes[layer]

    def has_experts(self, layer: int) -> bool:
        """Whether the layer's feed-forward part is a mixture of experts."""
        return self.experts > 0 and layer not in self.dense_layers

    def tensors(self) -> dict[str, Shape]:
        """Hugging Face tensor name -> shape, every tensor of the model in order."""
        return tensors_of(self)

    def modules(self) -> dict[str, ModuleSpec]:
        """Module path -> shape, for every module that can take LoRA, in the order of forward."""
        names = self.names
        out = {names.embedding: ModuleSpec("embedding", self.hidden_size, self.vocab_size)}
        for i in range(self.num_hidden_layers):
            for role, spec in layer_modules(self, i).items():
                out[f"{names.layer}.{i}.{getattr(names, role)}"] = spec
            out |= expert_parameters(self, i)
        return out | {names.head: ModuleSpec("linear", self.vocab_size, self.hidden_size)}
