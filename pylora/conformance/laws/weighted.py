"""Laws of DoRA: weight-decomposed LoRA (Liu et al. 2024)."""

from __future__ import annotations

from typing import Any

import numpy as np

from pylora.conformance.bounds import layer
from pylora.conformance.bounds import weighted as bounds
from pylora.conformance.bounds.layer import wide
from pylora.conformance.laws.law import Law
from pylora.conformance.problems.layers import lora_problems, st
from pylora.conformance.testcase import Problem, Trial
from pylora.conformance.tracing import formula
from pylora.types import Array

WIDE = ("float32", "float64")


@formula
def lengths(W: Array, A: Array, B: Array, scale: float) -> Array:
    """n [d]: the lengths of the rows of W + s B A (spec W-1)."""
    V = wide(W) + scale * (wide(B) @ wide(A))
    return np.asarray(np.sqrt((V * V).sum(axis=1)))


@formula
def rescaled(
    x: Array, W: Array, A: Array, B: Array, m: Array, scale: float, bias: Array | None = None
) -> Array:
    """y = f (x Wᵀ + s (x Aᵀ) Bᵀ) + bias with f = m / n, 1 where both are 0 (spec W-1, W-4)."""
    V = wide(W) + scale * (wide(B) @ wide(A))
    n = np.sqrt((V * V).sum(axis=1))
    f = np.where(n == 0, 1, wide(m) / np.where(n == 0, 1, n))
    y = f * (wide(x) @ V.T)
    return y if bias is None else y + wide(bias)


@formula
def gradients(
    dy: Array, x: Array, W: Array, A: Array, B: Array, m: Array, scale: float
) -> tuple[Array, Array, Array, Array]:
    """dx, dA, dB of plain LoRA for f dy, and dm = sum of dy (x Vᵀ) / n (spec W-3)."""
    V = wide(W) + scale * (wide(B) @ wide(A))
    n = np.sqrt((V * V).sum(axis=1))
    D, X = wide(dy) * np.where(n == 0, 1, wide(m) / np.where(n == 0, 1, n)), wide(x)
    g = D @ wide(B)
    dm = np.where(n == 0, 0, (wide(dy) * (X @ V.T)).sum(axis=0) / np.where(n == 0, 1, n))
    return D @ V, scale * (g.T @ X), scale * (D.T @ (X @ wide(A).T)), dm


@formula
def merged(W: Array, A: Array, B: Array, m: Array, scale: float) -> Array:
    """f (W + s B A), not rounded (spec W-5)."""
    V = wide(W) + scale * (wide(B) @ wide(A))
    n = np.sqrt((V * V).sum(axis=1))
    f: Array = np.where(n == 0, 1, wide(m) / np.where(n == 0, 1, n))[:, None]
    return f * V


def _norm(t: Trial, p: Problem) -> None:
    n = t.dora_norm(p.W, p.A, p.B, p.scale)
    want = lengths(p.W, p.A, p.B, p.scale)
    t.expect("n", n, want, bounds.norm(p.W, p.A, p.B, p.scale))


def _forward(t: Trial, p: Problem) -> None:
    y = t.dora_forward(p.x, p.W, p.A, p.B, p.m, p.scale, p.bias)
    want = rescaled(p.x, p.W, p.A, p.B, p.m, p.scale, p.bias)
    t.expect("y", y, want, bounds.forward(p.x, p.W, p.A, p.B, p.m, p.scale, p.bias))


def _fresh(t: Trial, p: Problem) -> None:
    B = np.zeros_like(p.B)
    m = t.dora_norm(p.W, p.A, B, p.scale)
    y = t.dora_forward(p.x, p.W, p.A, B, m, p.scale, p.bias)
    want = t.base(p.x, p.W, p.bias)
    bound: Array | float = 0.0
    if not t.bitwise:
        bound = bounds.forward(p.x, p.W, p.A, B, np.asarray(m), p.scale, p.bias)
        bound = bound + layer.forward(p.x, p.W, [], p.bias)
    t.expect("y with B = 0 and m = n against the base", y, want, bound, signs=t.bitwise)


def _backward(t: Trial, p: Problem) -> None:
    got = t.dora_backward(p.dy, p.x, p.W, p.A, p.B, p.m, p.scale)
    want = gradients(p.dy, p.x, p.W, p.A, p.B, p.m, p.scale)
    limits = bounds.backward(p.dy, p.x, p.W, p.A, p.B, p.m, p.scale)
    for name, g, w, bound in zip(("dx", "dA", "dB", "dm"), got, want, limits):
        t.expect(name, g, w, bound)


def _of_its_forward(t: Trial, p: Problem) -> None:
    """y is linear in x and in m, which n does not hang on: a step of 1 is the derivative. A step
    of A or B, with m made as much longer as n becomes, holds the lengths."""
    rng = np.random.default_rng(p.seed)
    V = wide(p.W) + float(p.scale) * (wide(p.B) @ wide(p.A))
    none = (V == 0).all(axis=1)  # |V| has no slope at 0
    dy = np.where(none, p.dy.dtype.type(0), p.dy)
    dx, dA, dB, dm = t.dora_backward(dy, p.x, p.W, p.A, p.B, p.m, p.scale)
    y = t.dora_forward(p.x, p.W, p.A, p.B, p.m, p.scale)
    n = lengths(p.W, p.A, p.B, p.scale)
    limits = bounds.backward(dy, p.x, p.W, p.A, p.B, p.m, p.scale)
    at = bounds.forward(p.x, p.W, p.A, p.B, p.m, p.scale)
    for i, (name, grad) in enumerate(zip(("x", "A", "B", "m"), (dx, dA, dB, dm))):
        v = rng.integers(-1, 2, grad.shape).astype(p.x.dtype)
        v = np.where(none, v.dtype.type(0), v) if name == "m" else v
        moved = {"x": p.x, "A": p.A, "B": p.B, "m": p.m}
        moved[name] = moved[name] + v
        if name in "AB":
            longer = lengths(p.W, moved["A"], moved["B"], p.scale)
            moved["m"] = (wide(p.m) * longer / np.where(n == 0, 1, n)).astype(p.x.dtype)
        x, A, B, m = moved.values()
        ahead = t.dora_forward(x, p.W, A, B, m, p.scale)
        slope = (wide(dy) * (wide(ahead) - wide(y))).sum()
        along = (wide(grad) * wide(v)).sum()
        both = at + bounds.forward(x, p.W, A, B, m, p.scale)
        off = (np.abs(wide(dy)) * both).sum() + (limits[i] * np.abs(wide(v))).sum()
        t.expect(f"<d{name}, v> against <dy, y({name} + v) - y({name})>", along, slope, off)


def _merge(t: Trial, p: Problem) -> None:
    W, _ = t.dora_merge(p.W, p.A, p.B, p.m, p.scale)
    want = merged(p.W, p.A, p.B, p.m, p.scale)
    t.expect("W'", W, want, bounds.merged(p.W, p.A, p.B, p.m, p.scale))


def _merge_fresh(t: Trial, p: Problem) -> None:
    B = np.zeros_like(p.B)
    m = t.dora_norm(p.W, p.A, B, p.scale)
    W, _ = t.dora_merge(p.W, p.A, B, m, p.scale)
    t.expect("W' with B = 0 and m = n", W, p.W)


def _back(t: Trial, p: Problem) -> None:
    W, state = t.dora_merge(p.W, p.A, p.B, p.m, p.scale)
    back = t.dora_unmerge(W, p.A, p.B, p.m, p.scale, state)
    t.expect("unmerge(merge(W)), promised to be W,", back, p.W, signs=True)


def magnified(dtype: str = "float32") -> Any:
    """lora_problems with m [d]: lengths of their rows, longer, shorter or turned round. Some have
    a row that is all zeros."""

    def more(p: Problem, seed: int) -> Problem:
        rng, W, B = np.random.default_rng(seed), np.array(p.W), np.array(p.B)
        if rng.random() < 0.3:  # a row of zeros, such as of a padded vocabulary
            W[seed % len(W)], B[seed % len(W)] = 0, 0
        V = wide(W) + float(p.scale) * (wide(B) @ wide(p.A))
        n = np.sqrt((V * V).sum(axis=1))
        turned = np.where(rng.random(n.size) < 0.2, -1.0, 1.0) * rng.uniform(0.4, 1.6, n.size)
        return p.replaced(W=W, B=B, m=(n * turned).astype(W.dtype), seed=seed)

    kinds = ("normal", "integers", "positive", "ones", "zeros")
    drawn = lora_problems(dtype, features=(1, 2, 3, 7, 16, 33, 64), kinds=kinds)
    return st.builds(more, drawn, st.integers(0, 2**16))


_FIELDS = ("x", "dy", "bias")  # m belongs to W, A and B

LAWS = (
    Law(
        "W1",
        "DoRA's lengths are those of the rows of W + s B A.",
        "|n - |W + s B A|| <= gamma_{k+r+6} S² / n, S = |W| + |s| Σ |B_p| |A_p| by rows",
        "lengths of W alone, of columns, or lengths that cancel into noise",
        ("W-1", "W-6"),
        ("dora_norm",),
        magnified,
        _norm,
        _FIELDS,
        dtypes=WIDE,
    ),
    Law(
        "W2",
        "DoRA's forward pass agrees with the formula.",
        "y = m / n (x Wᵀ + s (x Aᵀ) Bᵀ) + bias, within the bounds of n and of F1",
        "run as plain LoRA, divided by the base's lengths, or the bias rescaled",
        ("W-1", "W-4", "F-3"),
        ("dora_forward",),
        magnified,
        _forward,
        _FIELDS,
        dtypes=WIDE,
    ),
    Law(
        "W3",
        "A fresh adapter of DoRA (B = 0, m = n) is the base, bit for bit where bits are promised.",
        "B = 0 and m = n imply that y has the bits of base(x); without the promise, within bounds",
        "m and n are computed in two ways, so that their quotient is not 1",
        ("W-2", "F-2"),
        ("dora_forward", "dora_norm", "base"),
        magnified,
        _fresh,
        _FIELDS,
        dtypes=WIDE,
    ),
    Law(
        "W4",
        "DoRA's gradients agree with the formulas; the lengths have no part in them.",
        "dx, dA, dB are B1's for f dy; dm = Σ dy (x Vᵀ) / n",
        "n is not detached, or f is missing in one of the gradients",
        ("W-3", "W-4"),
        ("dora_backward",),
        magnified,
        _backward,
        _FIELDS,
        dtypes=WIDE,
    ),
    Law(
        "W5",
        "DoRA's gradients are those of its own forward pass with the lengths held.",
        "<dy, y(A + V, m n' / n) - y(A, m)> = <dA, V>, so of B; also of x and m, without n",
        "forward and backward disagree, whatever the formula is",
        ("W-3",),
        ("dora_forward", "dora_backward"),
        magnified,
        _of_its_forward,
        _FIELDS,
        dtypes=WIDE,
    ),
    Law(
        "W6",
        "A merged weight of DoRA is m / n (W + s B A).",
        "|W' - f (W + s B A)| within the bounds of n and of M1",
        "merged as plain LoRA, or divided by the lengths of W",
        ("W-5",),
        ("dora_merge", "float32"),
        magnified,
        _merge,
        _FIELDS,
    ),
    Law(
        "W7",
        "Merging a fresh adapter of DoRA changes nothing.",
        "B = 0 and m = n imply W' = W",
        "the merge computes its lengths in another way than m was",
        ("W-2", "W-5"),
        ("dora_merge", "dora_norm", "float32"),
        magnified,
        _merge_fresh,
        _FIELDS,
    ),
    Law(
        "W8",
        "Where exact unmerging is promised, DoRA's gives back every bit.",
        "unmerge(merge(W)) has the bits of W",
        "the lengths are computed again from W', or what rounding lost is not put back",
        ("W-5", "M-3"),
        ("dora_merge", "dora_unmerge", "exact_unmerge", "float32"),
        magnified,
        _back,
        _FIELDS,
    ),
)
