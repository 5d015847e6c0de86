"""Which modules and tensors a configuration implies, under Hugging Face's names.

Shapes are those of the decoder: [outputs, inputs]. A family whose files store projections the
other way around says so (`Family.transposed`), and the readers turn them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

LlamaConfig = Any  # config.py imports this

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ModuleSpec:
    """A module that can take LoRA: A [r, k], B [d, r]. An embedding's k is the vocabulary.

    "experts" is a parameter of transformers 5 that holds the weights [d, k] of a layer's experts:
    A [experts * r, k] has a block of r rows for each, column j * experts + e of B [d, r * experts]
    is column j of expert e (PEFT's target_parameters).
    """

    kind: str  # "linear", "embedding" or "experts"
    d: int
    k: int
    bias: bool = False  # whether the module has a bias of its own
    transposed: bool = False  # whether files store it [k, d]: PEFT's fan_in_fan_out
    experts: int = 1  # how many weights of this shape it is


def layer_modules(c: LlamaConfig, layer: int) -> dict[str, ModuleSpec]:
    """Role -> shape of a layer's linear modules that can take LoRA, in the order of forward."""
    hidden, inner = c.hidden_size, c.intermediate_size
    bias = c.attention_bias
    specs = {
        "q": ModuleSpec("linear", c.q_size, hidden, bias),
        "k": ModuleSpec("linear", c.kv_size, hidden, bias),
        "v": ModuleSpec("linear", c.kv_size, hidden, bias),
        "qkv": ModuleSpec("linear", c.q_size + 2 * c.kv_size, hidden, bias),
        "o": ModuleSpec("linear", hidden, c.q_size, c.attention_out_bias),
        "gate": ModuleSpec("linear", inner, hidden, c.mlp_bias),
        "up": ModuleSpec("linear", inner, hidden, c.mlp_bias),
        "gate_up": ModuleSpec("linear", 2 * inner, hidden, c.mlp_bias),
        "down": ModuleSpec("linear", hidden, inner, c.mlp_bias),
    }
    roles = c.features.attention_modules
    roles += () if c.has_experts(layer) else c.features.mlp_modules
    if not c.family.transposed:
        return {role: specs[role] for role in roles}
    return {role: replace(specs[role], transposed=True) for role in roles}


def expert_parameters(c: LlamaConfig, layer: int) -> dict[str, ModuleSpec]:
    """Path -> shape of the parameters that hold a layer's experts; {} where it has none."""
    if not c.has_experts(layer):
        return {}
    at = f"{c.names.layer}.{layer}.{c.names.parameters}"
    return {
        f"{at}.gate_up_proj": ModuleSpec(
            "experts", 2 * c.expert_size, c.hidden_size, experts=c.experts
        ),
        f"{at}.down_proj": ModuleSpec("experts", c.hidden_size, c.expert_size, experts=c.experts),
    }


def norm_roles(c: LlamaConfig, layer: int) -> tuple[str, ...]:
    """The roles of a layer's norms of the residual stream and of what is added to it."""
    if c.parallel:
        return ("input_norm",) if c.parallel == "one" else ("input_norm", "mid_norm")
    if c.norm_places == "before":
        return "input_norm", "mid_norm"
    if c.norm_places == "after":
        return "after_attention", "after_mlp"
    return "input_norm", "after_attention", "mid_norm", "after_mlp"


def tensors_of(c: LlamaConfig) -> dict[str, Shape]:
    """Tensor name -> shape, every tensor of the model in order."""
    names, hidden = c.names, c.hidden_size
    out: dict[str, Shape] = {f"{names.embedding}.weight": (c.vocab_size, hidden)}
    if c.learned_positions:
        out[f"{names.positions}.weight"] = (c.max_position_embeddings, hidden)

    def norm(path: str) -> None:
        out[f"{path}.weight"] = (hidden,)
        if c.norm_bias:
            out[f"{path}.bias"] = (hidden,)

    for i in range(c.num_hidden_layers):
        layer, norms = f"{names.layer}.{i}", norm_roles(c, i)
        modules = layer_modules(c, i)
        if "input_norm" in norms:
            norm(f"{layer}.{names.input_norm}")
        if c.qk_norm:
            _head_norms(c, layer, out)
        for role, spec in modules.items():
            if role == c.features.mlp_modules[0]:
                _between(c, layer, norms, norm)
            path = f"{layer}.{getattr(names, role)}"
            out[f"{path}.weight"] = (spec.d, spec.k)
            if spec.bias:
                out[f"{path}.bias"] = (spec.d,)
        if c.has_experts(i):
            _between(c, layer, norms, norm)
            _experts(c, layer, out)
        if "after_mlp" in norms:
            norm(f"{layer}.{names.after_mlp}")
    norm(names.norm)
    if not c.tie_word_embeddings:
        out[f"{names.head}.weight"] = (c.vocab_size, hidden)
    return out


def _head_norms(c: LlamaConfig, layer: str, out: dict[str, Shape]) -> None:
    """The norms of q's and k's heads."""
    sides = ("q_norm", c.num_attention_heads), ("k_norm", c.num_key_value_heads)
    for role, heads in sides:
        path = f"{layer}.{getattr(c.names, role)}"
        if c.qk_norm_of != "each":
            size = heads * c.head_dim if c.qk_norm_of == "whole" else c.head_dim
            out[f"{path}.weight"] = (size,)
        elif c.family.listed_norms:
            out |= {f"{path}.norms.{h}.weight": (c.head_dim,) for h in range(heads)}
        else:
            out[f"{path}.weight"] = (heads, c.head_dim)


def _between(c: LlamaConfig, layer: str, norms: tuple[str, ...], norm: object) -> None:
    """The norms between attention and mlp."""
    for role in ("after_attention", "mid_norm"):
        if role in norms:
            norm(f"{layer}.{getattr(c.names, role)}")  # type: ignore[operator]


def _experts(c: LlamaConfig, layer: str, out: dict[str, Shape]) -> None:
    names = c.names
    out[f"{layer}.{names.router}.weight"] = (c.experts, c.hidden_size)
    for e in range(c.experts):
        path = f"{layer}.{names.experts}.{e}"
        out[f"{path}.{names.expert_gate}.weight"] = (c.expert_size, c.hidden_size)
        out[f"{path}.{names.expert_up}.weight"] = (c.expert_size, c.hidden_size)
        out[f"{path}.{names.expert_down}.weight"] = (c.hidden_size, c.expert_size)
