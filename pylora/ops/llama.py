"""The operation `llama`: a whole model in one call, for inference, with a KV cache and adapters.

`Backend.llama(weights)` gives an object with the methods of `LlamaOp`. `Composed` (composed.py) is
its reference: the backend's own operations one after the other, each row with its segment's
adapter. A backend that has the loop in compiled code (the C core) gives the same bits and saves the
time between them; what that code does not know yet (`LlamaWeights.plain`) runs composed.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from pylora.ops.features import Features
from pylora.types import Array, Attn, LoRA, Norm, Rotation, Seqs

# Only feed products; q and k are rounded once they are rotated.
NARROW = ("v", "gate", "up", "gate_up")
EXPERT = ("gate", "up", "down")


@dataclass(frozen=True, eq=False)
class Experts:
    """The mixture of one layer: each token goes to `top_k` experts, weighed by the router."""

    router: Any  # packed [experts, hidden]
    count: int
    top_k: int
    normalize: bool  # the chosen weights are divided by their sum


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """One layer. `W` and `bias` are in the order of `Features.modules`; where there are experts, in
    that of `Features.attention_modules` and then `EXPERT` of each expert."""

    input_norm: Norm | None  # before attention; None: there is none
    mid_norm: Norm | None  # before mlp; None in a parallel layer: input_norm serves both
    W: tuple[Any, ...]
    bias: tuple[Array | None, ...]
    q_norm: Norm | None  # both or neither
    k_norm: Norm | None
    window: int
    after_attention: Norm | None = None  # of what attention gives, before it is added
    after_mlp: Norm | None = None
    rope: int = 0  # which of the step's rotations; -1: none
    qk_norm_of: str = "shared"  # how q_norm and k_norm are meant: heads.HEADS
    experts: Experts | None = None
    scale: float = 0.0  # of scores; 0: that of `LlamaWeights.attn`


@dataclass(frozen=True, eq=False)
class LlamaWeights:
    """A model as the operation takes it. Modules have numbers: those of a layer follow each other
    in the order of its `W`, the layers follow each other, the head is last. Nothing is copied."""

    embedding: Any  # packed [vocab, hidden]
    head: Any  # packed [vocab, hidden]; may be the same
    norm: Norm
    layers: tuple[LayerWeights, ...]
    attn: Attn  # its window does not count
    dtype: Any  # of activations that only feed products: precision.BF16, or None
    features: Features = Features()
    positions: Any = None  # packed [positions, hidden]: learned ones, added to the embedding
    by_length: bool = False  # whether a step brings rotary tables of its own rows (longrope)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The number of each layer's first module, and of the head."""
        out = [0]
        for layer in self.layers:
            out.append(out[-1] + len(layer.W))
        return tuple(out)

    @property
    def head_number(self) -> int:
        return self.starts[-1]

    def place(self, number: int) -> tuple[int, int]:
        """(layer, place in its W) of a module that is not the head."""
        layer = bisect_right(self.starts, number) - 1
        return layer, number - self.starts[layer]

    def module(self, number: int) -> tuple[Any, Array | None]:
        """(packed weight, bias) of a linear module."""
        if number == self.head_number:
            return self.head, None
        layer, place = self.place(number)
        return self.layers[layer].W[place], self.layers[layer].bias[place]

    def role(self, number: int) -> str:
        """What a module does: "q", "down", ..., "head"."""
        if number == self.head_number:
            return "head"
        layer, place = self.place(number)
        roles = self.features.attention_modules
        if place < len(roles):
            return roles[place]
        if self.layers[layer].experts is not None:
            return EXPERT[(place - len(roles)) % len(EXPERT)]
        return self.features.mlp_modules[place - len(roles)]

    @property
    def eps(self) -> float:
        return self.norm.eps

    @cached_property
    def plain(self) -> bool:
        """Whether this is the structure that Llama has, with nothing that a family adds."""
        return (
            self.features == Features()
            and self.positions is None
            and not self.by_length
            and not self.attn.softcap
            and self.norm.kind == "rms"
            and all(_plain(layer, self.norm.eps) for layer in self.layers)
        )


def _plain(layer: LayerWeights, eps: float) -> bool:
    norms = layer.input_norm, layer.mid_norm
    heads = () if layer.q_norm is None else (layer.q_norm, layer.k_norm)
    return (
        all(n is not None and n.kind == "rms" and n.eps == eps for n in (*norms, *heads))
        and layer.after_attention is None
        and layer.after_mlp is None
        and layer.rope == 0
        and (layer.q_norm is None or layer.qk_norm_of == "shared")
        and not layer.scale
        and layer.experts is None
    )


@dataclass(eq=False)
class Step:
    """m new tokens of some sequences; int64 arrays, which may be changed between two calls."""

    ids: np.ndarray  # [m]
    position: np.ndarray  # [m]
    rows: np.ndarray  # [m]: the row of the KV cache that a token's k and v go to
    seqs: Seqs  # keys: rows of the cache, the new ones included
    output: np.ndarray  # [n]: the tokens whose logits are wanted, ascending
    start: np.ndarray  # [segments + 1]: tokens start[i] .. start[i+1]-1 use adapters[i]
    adapters: tuple[Any, ...]  # of `LlamaOp.adapter`, or None for the base
    rotations: tuple[Rotation, ...]  # by the number that layers name; () if none rotates
    native: Any = field(default=None, repr=False)  # what a backend keeps of it; see `changed`
    # Asked for before the first call: `normed` is then, after each, float32 [n, hidden]: the wanted
    # rows behind the last norm, of which logits are made.
    want_normed: bool = False
    normed: Any = field(default=None, repr=False)

    @property
    def cos(self) -> Array:
        """The tables of the first rotation [rows, rotated / 2]."""
        return self.rotations[0].cos

    @property
    def sin(self) -> Array:
        return self.rotations[0].sin

    def changed(self) -> None:
        """To be called when a field was given another array; new numbers in the same are seen."""
        self.native = None


class Runs(Protocol):
    """What steps run on: one model's operation, or several (model/mixed.py)."""

    def cache(self, k: Sequence[Array], v: Sequence[Array]) -> Any:
        """Of each layer k and v [rows, kv_heads * head_dim], for `forward` to write and read."""

    def forward(self, cache: Any, step: Step) -> Array:
        """Stores the tokens' keys and values and gives logits [n, vocab] of the wanted ones."""


class LlamaOp(Runs, Protocol):
    """What `Backend.llama` returns. Threads may share it; a `Step` and a cache belong to one."""

    def adapter(self, modules: Mapping[int, LoRA], embedding: LoRA | None) -> Any:
        """An adapter of the modules with these numbers, ready for use; it has .nbytes.

        A copy: later changes of the arrays are not seen. The caller has checked that they fit.
        """


# ---- what an adapter's biases come to ------------------------------------------------------------


def bias_of(lora: LoRA, own: Array | None) -> Array | None:
    """The bias in effect where it is not the module's `own`; None where it is."""
    bias = own if lora.base_bias is None else lora.base_bias
    if lora.bias is not None and bool((lora.bias != 0).any()):
        more = lora.bias * lora.bias.dtype.type(lora.scale)
        bias = more if bias is None else bias + more
    return None if bias is own else bias


def embedding_bias(lora: LoRA) -> Array | None:
    """What is added to each row that the embedding gives, apart from A and B."""
    if lora.bias is None or not bool((lora.bias != 0).any()):
        return None
    return lora.bias.dtype.type(lora.scale) * lora.bias
