"""Laws of what families of models order otherwise than Llama: where norms lie, both sublayers side
by side, norms of q and k, multipliers. All in `Running` arithmetic, as A19 is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from pylora.conformance.bounds import adapted
from pylora.conformance.bounds import layer as bounds
from pylora.conformance.bounds.ops import gamma
from pylora.conformance.bounds.running import Running
from pylora.conformance.laws.attention import within
from pylora.conformance.laws.law import Law
from pylora.conformance.laws.session import Block, rms_norm, run, swiglu
from pylora.conformance.problems.adapted import ALL_DTYPES, embeddings
from pylora.conformance.problems.attending import Arrays, blocks
from pylora.conformance.problems.layers import SEEDS, pick, st
from pylora.conformance.protocol import LayerOrder
from pylora.conformance.testcase import Problem, Trial
from pylora.types import Array


class Ordered(Block):
    """A block of any LayerOrder."""

    def __init__(self, p: Problem, weights: Mapping[str, Array], precision: str) -> None:
        linear = {n: W for n, W in weights.items() if W.ndim == 2}
        super().__init__(linear, p.adapters, p.shape, precision)
        self.order, self.eps = p.order, p.eps
        self.norms = {n: w for n, w in weights.items() if w.ndim == 1}

    def norm(self, x: Running, name: str) -> Running:
        w = bounds.wide(self.norms[name])
        if not self.order.plus_one:
            return rms_norm(x, w, self.eps)
        y = rms_norm(x, 1 + w, self.eps)
        # The sum 1 + w is rounded once: relative to itself, which the product carries over.
        return Running(y.value, y.error + gamma(1, x.sums) * np.abs(y.value), x.dtype)

    def turned(self, name: str, a: Running, position: Array) -> Running:
        if self.order.qk_norm:
            wide = a.value.shape
            D = self.s.head_dim if self.order.qk_norm == "head" else wide[1]
            rows = Running(a.value.reshape(-1, D), a.error.reshape(-1, D), a.dtype)
            y = self.norm(rows, f"{name[0]}_norm")
            a = Running(y.value.reshape(wide), y.error.reshape(wide), a.dtype)
        return super().turned(name, a, position)

    def added(
        self, x: Running, sublayer: Callable[[Running], Running], before: str, behind: str
    ) -> Running:
        y = sublayer(x if self.order.norms == "behind" else self.norm(x, before))
        if self.order.norms != "before":
            y = self.norm(y, behind)
        return y if self.order.multiplier == 1 else y * self.order.multiplier

    def fed(self, x: Running) -> Running:
        product = swiglu(self.project("gate_proj", x), self.project("up_proj", x))
        return self.project("down_proj", product)

    def all(self, x: Array) -> Running:
        X = run(x, x.dtype)
        first = self.added(X, self.forward, "norm1", "norm3")
        if self.order.parallel:
            before = "norm2" if "norm2" in self.norms else "norm1"
            return X + first + self.added(X, self.fed, before, "norm4")
        x1 = X + first
        return x1 + self.added(x1, self.fed, "norm2", "norm4")


def _layer(t: Trial, p: Problem) -> None:
    y = t.layer(p.x, p.weights, p.adapters, p.shape, p.eps, p.order)
    weights = {n: t.weight(W) if W.ndim == 2 else W for n, W in p.weights.items()}
    want = Ordered(p, weights, t.precision).all(p.x)
    # Three terms are added in any order where both sublayers read x.
    sizes = gamma(3, want.sums) * (np.abs(bounds.wide(p.x)) + np.abs(want.value))
    t.expect("y", y, want.value, within(p) * (want.error + sizes * p.order.parallel))


def _orders(**choices: tuple[Any, ...]) -> Any:
    """Problems of `blocks` with the norms that the order has; what is not chosen is A-1's."""

    @st.composite  # type: ignore[untyped-decorator]
    def drawn(draw: Any, dtype: str = "float32") -> Problem:
        p = draw(blocks(dtype))
        order = LayerOrder(**{name: draw(pick(of)) for name, of in choices.items()})
        make, s = Arrays(np.random.default_rng(draw(SEEDS)), dtype), p.shape
        hidden = p.x.shape[1]
        sizes = {"norm1": hidden, "norm2": hidden, "norm3": hidden, "norm4": hidden}
        if order.parallel and draw(st.booleans()):
            del sizes["norm2"]
        if order.qk_norm:
            heads = (1, 1) if order.qk_norm == "head" else (s.heads, s.kv_heads)
            sizes |= {"q_norm": heads[0] * s.head_dim, "k_norm": heads[1] * s.head_dim}
        weights = {n: W for n, W in p.weights.items() if W.ndim == 2}
        for name, size in sizes.items():
            w = make.rows(1, size)[0]
            weights[name] = w if order.plus_one else w + make.dtype.type(1)
        made: Problem = p.replaced(weights=weights, order=order)
        return made

    return drawn


# ---- the embedding's multiplier and positions ----------------------------------------------------


@st.composite  # type: ignore[untyped-decorator]
def _placed(draw: Any, dtype: str = "float32") -> Problem:
    """An embedding's problem, a multiplier, and learned positions of each row, or none."""
    p = draw(embeddings(dtype))
    rng, m = np.random.default_rng(draw(SEEDS)), len(p.ids)
    P = rng.normal(size=(m + 3, p.W.shape[1])).astype(p.W.dtype)
    made: Problem = p.replaced(
        multiplier=draw(pick((12.0, 1.0, 0.5, 3.25))),
        position=rng.integers(0, m + 3, m).astype(np.int64),
        P=P if draw(st.booleans()) else None,
    )
    return made


def _embed(t: Trial, p: Problem) -> None:
    got = t.embed(p.ids, p.W, p.A, p.B, p.scale, p.multiplier, p.position, p.P)
    W, wide = t.weight(p.W), bounds.wide
    base, h = wide(W)[p.ids], wide(p.A)[:, p.ids].T
    want = p.multiplier * (base + float(p.scale) * (h @ wide(p.B).T))
    size = p.multiplier * (np.abs(base) + abs(p.scale) * (np.abs(h) @ np.abs(wide(p.B)).T))
    if p.P is not None:
        want, size = want + wide(p.P)[p.position], size + np.abs(wide(p.P)[p.position])
    off = p.multiplier * adapted.embedding(p.ids, W, p.A, p.B, p.scale)
    kind = np.float32 if p.W.dtype.itemsize == 2 else p.W.dtype
    more = gamma(3, kind) * size
    if p.W.dtype.itemsize == 2:
        more = more + gamma(3, {"float16": "f16"}.get(str(p.W.dtype), "bf16")) * size
        more = more + (2.0**-24 if p.W.dtype == np.float16 else 0.0)
    t.expect("y", got, want, off + more)


_ONLY = ("x", "weights")
LAWS = (
    Law(
        "A40",
        "Norms lie before the sublayers, behind them, or both; a weight may stand for 1 + w.",
        "x + norm₃(attention(norm₁ x)), and so the feed-forward part; RMSNorm by 1 + w where the "
        "family has it; running error analysis",
        "the norm behind is of the sum in place of what is added, is left out, or w is for 1 + w",
        ("A-21", "A-2"),
        ("layer",),
        _orders(norms=("both", "behind", "before"), plus_one=(True, False)),
        _layer,
        _ONLY,
        dtypes=ALL_DTYPES,
    ),
    Law(
        "A41",
        "Where the residual is parallel both sublayers read x, and three terms are added.",
        "y = x + attention(norm₁ x) + mlp(norm₂ x), norm₂ may be norm₁; running error analysis",
        "the second sublayer reads what the first gave, or its own norm is passed over",
        ("A-22", "A-21"),
        ("layer",),
        _orders(parallel=(True,), norms=("before", "both")),
        _layer,
        _ONLY,
        dtypes=ALL_DTYPES,
    ),
    Law(
        "A42",
        "Norms of q and k come before the rotation, of each head or of the whole row.",
        "q = turn(norm_q(W_q x)), w of head_dim or of all heads; running error analysis",
        "the norm is behind the rotation, of k alone, or over all heads where it is of each",
        ("A-26", "A-3"),
        ("layer",),
        _orders(qk_norm=("head", "whole"), plus_one=(False, True)),
        _layer,
        _ONLY,
        dtypes=ALL_DTYPES,
    ),
    Law(
        "A43",
        "What a sublayer adds is multiplied, behind its norm.",
        "y = x₁ + c norm₄(mlp(norm₂ x₁)), x₁ = x + c norm₃(attention(norm₁ x))",
        "x is multiplied too, one sublayer alone is, or the multiplier is before the norm, which "
        "takes it away",
        ("A-28", "A-21"),
        ("layer",),
        _orders(multiplier=(0.25, 3.0), norms=("before", "both", "behind")),
        _layer,
        _ONLY,
        dtypes=ALL_DTYPES,
    ),
    Law(
        "A44",
        "The embedding's multiplier is of base and adapter, and positions are added behind it.",
        "y[i] = c (W[ids[i]] + s A[:, ids[i]]ᵀ Bᵀ) + P[position[i]]",
        "the adapter's part is not multiplied, positions are, or a row's number is its position",
        ("A-28", "F-5"),
        ("embed",),
        _placed,
        _embed,
        ("W", "A", "B", "P"),
        dtypes=ALL_DTYPES,
    ),
)
