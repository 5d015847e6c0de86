"""What a decoder computes, as plain data: the default is Llama, a family differs in some fields.

Layers, the whole-model operation and the compiled cores take these, and none of them knows the
name of a family. What differs from layer to layer (norms, windows, rotary tables, experts) is in
`LayerWeights` (ops/llama.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from pylora.types import brief

ACTIVATIONS = ("silu", "gelu_tanh", "gelu_erf", "relu2")
# How the rows of a fused q, k, v projection lie: all of q, then of k, then of v ("blocks"); or for
# each kv head its queries' heads, its key and its value ("groups"; GPT-NeoX, Falcon).
QKV = ("", "blocks", "groups")


@dataclass(frozen=True)
class Features:
    """The structure of a decoder, the same in each of its layers."""

    __repr__ = brief

    activation: str = "silu"  # one of ACTIVATIONS
    gated: bool = True  # down(act(gate x) * up x); without: down(act(up x))
    parallel: bool = False  # x + attention(norm x) + mlp(norm x), both of the layer's input
    fused_qkv: str = ""  # one of QKV; "" is three projections
    fused_gate_up: bool = False  # one projection whose first half of rows is gate
    rope_layout: str = "half"  # or "interleaved"
    embedding_multiplier: float = 1.0  # of what the embedding and its adapter give
    residual_multiplier: float = 1.0  # of what attention and mlp add
    logit_multiplier: float = 1.0
    logit_softcap: float = 0.0  # after the multiplier; 0: none

    @property
    def attention_modules(self) -> tuple[str, ...]:
        """The roles of a layer's attention projections, in the order of their numbers."""
        return (*(("qkv",) if self.fused_qkv else ("q", "k", "v")), "o")

    @property
    def mlp_modules(self) -> tuple[str, ...]:
        """Those of a layer's feed-forward part, without experts."""
        if not self.gated:
            return "up", "down"
        return ("gate_up", "down") if self.fused_gate_up else ("gate", "up", "down")

    @property
    def modules(self) -> tuple[str, ...]:
        return self.attention_modules + self.mlp_modules
