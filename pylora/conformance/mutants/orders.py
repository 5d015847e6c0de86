"""Blocks of families that order norms, residuals and multipliers otherwise; an embedding's
multiplier; biases of the base that a file replaces."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from pylora.conformance.correct.plain import Correct
from pylora.conformance.mutants.registry import wrong
from pylora.conformance.protocol import AttentionShape, LayerOrder
from pylora.types import Array

Weights = Mapping[str, Array]


@wrong(
    "layer-norm-behind-the-sum",
    "gross",
    "The norm behind a sublayer is of x and what is added, not of what is added.",
    "The first transformer of 2017 had it there.",
)
class BehindTheSum(Correct):
    def added(
        self,
        x: Array,
        sublayer: Callable[[Array], Array],
        norms: tuple[str, str],
        weights: Weights,
        eps: float,
        order: LayerOrder,
    ) -> Array:
        if order.norms == "before":
            return super().added(x, sublayer, norms, weights, eps, order)
        y = super().added(x, sublayer, norms, weights, eps, replace(order, norms="before"))
        return self.normed(x + y, weights[norms[1]], eps, order) - x


@wrong(
    "layer-norm-behind-left-out",
    "gross",
    "Where a family has norms on both sides those behind are left out.",
    "The loader knew the names of two norms.",
)
class BehindLeftOut(Correct):
    def added(
        self,
        x: Array,
        sublayer: Callable[[Array], Array],
        norms: tuple[str, str],
        weights: Weights,
        eps: float,
        order: LayerOrder,
    ) -> Array:
        if order.norms == "both":
            order = replace(order, norms="before")
        return super().added(x, sublayer, norms, weights, eps, order)


@wrong(
    "layer-one-plus-w-forgotten",
    "gross",
    "A norm's weight that stands for 1 + w is multiplied as it is.",
    "Gemma's files keep it so, and Llama's do not.",
)
class PlusOneForgotten(Correct):
    def normed(self, x: Array, w: Array, eps: float, order: LayerOrder) -> Array:
        return super().normed(x, w, eps, replace(order, plus_one=False))


@wrong(
    "layer-parallel-in-turn",
    "gross",
    "Of a parallel residual the second sublayer reads what the first one gave.",
    "Every other family has it so.",
)
class InTurn(Correct):
    def layer(
        self,
        x: Array,
        weights: Weights,
        adapters: Any,
        shape: AttentionShape,
        eps: float,
        order: LayerOrder,
    ) -> Array:
        if order.parallel and "norm2" in weights:
            order = replace(order, parallel=False)
        return super().layer(x, weights, adapters, shape, eps, order)


@wrong(
    "layer-parallel-one-norm",
    "subtle",
    "Of a parallel residual both sublayers read the first norm, also where there are two.",
    "Some families have one norm there, some two.",
)
class OneNorm(Correct):
    def layer(
        self,
        x: Array,
        weights: Weights,
        adapters: Any,
        shape: AttentionShape,
        eps: float,
        order: LayerOrder,
    ) -> Array:
        if order.parallel:
            weights = {name: W for name, W in weights.items() if name != "norm2"}
        return super().layer(x, weights, adapters, shape, eps, order)


@wrong(
    "layer-qk-norm-behind-the-rotation",
    "subtle",
    "q and k are normed after they were turned.",
    "The norm does not change lengths of pairs by much; its weight is of places, though.",
)
class NormBehindRotation(Correct):
    def ordered_attention(
        self,
        x: Array,
        weights: Weights,
        adapters: Any,
        shape: AttentionShape,
        eps: float,
        order: LayerOrder,
    ) -> Array:
        self.waiting: list[Any] = []
        return super().ordered_attention(x, weights, adapters, shape, eps, order)

    def of_heads(
        self, a: Array, w: Array, shape: AttentionShape, eps: float, order: LayerOrder
    ) -> Array:
        self.waiting.append((w, eps, order))
        return a

    def _turned(
        self, x: Array, position: Array, shape: AttentionShape, inverse: bool = False
    ) -> Array:
        y = super()._turned(x, position, shape, inverse)
        if not getattr(self, "waiting", None):
            return y
        w, eps, order = self.waiting.pop(0)
        return super().of_heads(y, w, shape, eps, order)


@wrong(
    "layer-norm-of-q-alone",
    "subtle",
    "Only q is normed, not k.",
    "k was thought to be normed where it is written to the cache.",
)
class NormOfQ(Correct):
    def of_heads(
        self, a: Array, w: Array, shape: AttentionShape, eps: float, order: LayerOrder
    ) -> Array:
        wide = order.qk_norm == "whole" and shape.heads == shape.kv_heads
        if a.shape[1] == shape.kv_heads * shape.head_dim and not wide:
            return a
        return super().of_heads(a, w, shape, eps, order)


@wrong(
    "layer-qk-norm-of-each-head",
    "subtle",
    "A norm of the whole row of q is taken of each head, with its part of the weight.",
    "OLMo 2 norms the row, Qwen 3 each head.",
)
class EachHead(Correct):
    def of_heads(
        self, a: Array, w: Array, shape: AttentionShape, eps: float, order: LayerOrder
    ) -> Array:
        if order.qk_norm == "head":
            return super().of_heads(a, w, shape, eps, order)
        D = shape.head_dim
        parts = [
            self.normed(a[:, i : i + D], w[i : i + D], eps, order) for i in range(0, len(w), D)
        ]
        return np.concatenate(parts, axis=1)


@wrong(
    "layer-multiplier-before-the-norm",
    "subtle",
    "What a sublayer adds is multiplied before its norm, which takes the multiplier away.",
    "It was folded into the last projection's weight.",
)
class MultiplierBefore(Correct):
    def added(
        self,
        x: Array,
        sublayer: Callable[[Array], Array],
        norms: tuple[str, str],
        weights: Weights,
        eps: float,
        order: LayerOrder,
    ) -> Array:
        if order.norms == "before":
            return super().added(x, sublayer, norms, weights, eps, order)
        scaled = lambda y: sublayer(y) * y.dtype.type(order.multiplier)
        return super().added(x, scaled, norms, weights, eps, replace(order, multiplier=1.0))


@wrong(
    "layer-multiplier-of-attention-alone",
    "gross",
    "Of the two sublayers only what attention adds is multiplied.",
    "The feed-forward part was written first, for a family without it.",
)
class MultiplierOnce(Correct):
    def added(
        self,
        x: Array,
        sublayer: Callable[[Array], Array],
        norms: tuple[str, str],
        weights: Weights,
        eps: float,
        order: LayerOrder,
    ) -> Array:
        if norms[1] == "norm4":
            order = replace(order, multiplier=1.0)
        return super().added(x, sublayer, norms, weights, eps, order)


# ---- the embedding -------------------------------------------------------------------------------


@wrong(
    "embed-multiplies-the-base-alone",
    "subtle",
    "The embedding's multiplier is of the base's rows and not of the adapter's.",
    "It is folded into the table when that is loaded.",
)
class BaseAlone(Correct):
    def embed(
        self,
        ids: Array,
        W: Array,
        A: Array,
        B: Array,
        scale: float,
        multiplier: float,
        position: Array,
        P: Array | None,
    ) -> Array:
        return super().embed(ids, W, A, B, scale / multiplier, multiplier, position, P)


@wrong(
    "embed-positions-by-row",
    "subtle",
    "Learned positions are added by the number of the row in the batch.",
    "With one sequence in the batch the two are the same.",
)
class ByRow(Correct):
    def embed(
        self,
        ids: Array,
        W: Array,
        A: Array,
        B: Array,
        scale: float,
        multiplier: float,
        position: Array,
        P: Array | None,
    ) -> Array:
        return super().embed(ids, W, A, B, scale, multiplier, np.arange(len(ids)), P)


@wrong(
    "embed-multiplies-positions",
    "subtle",
    "The embedding's multiplier is of the positions too.",
    "It is applied to what goes into the first layer.",
)
class PositionsToo(Correct):
    def embed(
        self,
        ids: Array,
        W: Array,
        A: Array,
        B: Array,
        scale: float,
        multiplier: float,
        position: Array,
        P: Array | None,
    ) -> Array:
        more = None if P is None else (P * P.dtype.type(multiplier)).astype(P.dtype)
        return super().embed(ids, W, A, B, scale, multiplier, position, more)


# ---- replaced biases -----------------------------------------------------------------------------


@wrong(
    "biases-of-adapted-modules-alone",
    "subtle",
    'Of a file with bias = "all" only the biases of adapted modules are read.',
    'Its reader was written for "lora_only".',
)
class AdaptedAlone(Correct):
    def load_biases(self, directory: str, modules: Any) -> dict[str, Array]:
        found = super().load_biases(directory, modules)
        adapted = {path for path in found if self._has_lora(directory, path)}
        return {path: b for path, b in found.items() if path in adapted}

    def _has_lora(self, directory: str, path: str) -> bool:
        from safetensors.numpy import load_file

        return f"base_model.model.{path}.lora_A.weight" in load_file(
            f"{directory}/adapter_model.safetensors"
        )


@wrong(
    "biases-missing-are-zeros",
    "subtle",
    "A replaced bias that is not in the file is taken for zeros.",
    "Every other missing tensor has a value to begin with.",
)
class MissingIsZero(Correct):
    def load_biases(self, directory: str, modules: Any) -> dict[str, Array]:
        try:
            return super().load_biases(directory, modules)
        except Exception as error:
            if "biases of the base model were trained" not in str(error):
                raise
            return {path: np.zeros(d, np.float32) for path, (d, _) in modules.items()}


@wrong(
    "biases-written-without-the-wrapper",
    "subtle",
    "A replaced bias of an adapted module is written as ….bias.",
    "PEFT before 0.6 did so, and still reads it.",
)
class WithoutWrapper(Correct):
    def save_biases(self, directory: str, adapters: Any, biases: Any, config: Any) -> None:
        from safetensors.numpy import load_file, save_file

        super().save_biases(directory, adapters, biases, config)
        file = f"{directory}/adapter_model.safetensors"
        plain = {k.replace(".base_layer.bias", ".bias"): a for k, a in load_file(file).items()}
        save_file(plain, file, {"format": "pt"})


@wrong(
    "biases-in-16-bits",
    "subtle",
    "Replaced biases are written in bfloat16.",
    "The base model's biases are.",
)
class Narrow(Correct):
    def save_biases(self, directory: str, adapters: Any, biases: Any, config: Any) -> None:
        cut = {
            path: (np.ascontiguousarray(b).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
            for path, b in biases.items()
        }
        super().save_biases(directory, adapters, cut, config)
