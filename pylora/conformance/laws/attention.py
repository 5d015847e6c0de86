"""Laws of the attention block with adapters on its projections.

The bound is a running error analysis of the whole block (block.py), forward and backward: every
intermediate result carries how far it may be off.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pylora.conformance.laws.block import Block
from pylora.conformance.laws.law import Law
from pylora.conformance.problems.layers import DTYPES, attention_problems
from pylora.conformance.testcase import Problem, Trial


def _block(t: Trial, p: Problem) -> Block:
    weights = {name: t.weight(W) for name, W in p.weights.items()}
    return Block(weights, p.adapters, p.shape, t.precision)


def forward_agrees(t: Trial, p: Problem, block: Any) -> None:
    """y is that of the block, which is in `Running` arithmetic, within its bound."""
    y = t.attention(p.x, p.weights, p.adapters, p.shape)
    want = block.forward(p.x)
    t.expect("y", y, want.value, within(p) * want.error)


def backward_agrees(t: Trial, p: Problem, block: Any) -> None:
    """So are dx and the gradients of each projection's A and B."""
    dx, grads = t.attention_backward(p.dy, p.x, p.weights, p.adapters, p.shape)
    block.forward(p.x)
    want, wants = block.backward(p.dy)
    t.expect("dx", dx, want.value, within(p) * want.error)
    for name, pair in wants.items():
        for j, (letter, w) in enumerate(zip("AB", pair)):
            what = f"d{letter} of {name}"
            t.expect(what, grads, w.value, within(p) * w.error, item=(name, j))


def _forward(t: Trial, p: Problem) -> None:
    forward_agrees(t, p, _block(t, p))


def _backward(t: Trial, p: Problem) -> None:
    backward_agrees(t, p, _block(t, p))


def _both(t: Trial, p: Problem) -> None:
    _forward(t, p)
    _backward(t, p)


def within(p: Problem) -> float:
    """Of how much of its bound: what is exact here is computed in float64, and is off itself."""
    return 2.0 if p.x.dtype == np.float64 else 1.0 + 2.0**-20


def _causal(t: Trial, p: Problem) -> None:
    """Rows after a cut of a sequence, and other sequences, are exchanged: earlier rows stay."""
    rng = np.random.default_rng(p.seed)
    which = int(rng.integers(len(p.shape.lengths)))
    start, n = sum(p.shape.lengths[:which]), p.shape.lengths[which]
    seen = int(rng.integers(1, n + 1))
    kept = np.arange(start, start + seen)
    x = rng.normal(size=p.x.shape).astype(p.x.dtype)
    x[kept] = p.x[kept]
    before = t.attention(p.x, p.weights, p.adapters, p.shape)
    after = t.attention(x, p.weights, p.adapters, p.shape)
    bound = 2 * _block(t, p).forward(p.x).error[kept]
    t.expect("rows whose past is the same", after, before[kept], bound, at=kept)


LAWS = (
    Law(
        "A1",
        "The attention block with adapters agrees with the formulas.",
        "softmax(q kᵀ / sqrt(D)) v with rotary q and k, each projection x Wᵀ + s (x Aᵀ) Bᵀ; "
        "running error analysis",
        "an adapter on the wrong projection, a wrong rotation, mask, or head",
        ("A-3", "A-4", "F-1"),
        ("attention",),
        attention_problems,
        _forward,
        ("x",),
        dtypes=("float32", "bfloat16"),
    ),
    Law(
        "A2",
        "The gradients of the attention block agree with the formulas.",
        "A-5 of the specification, and B1 for each projection; running error analysis",
        "a path of the gradient is missing: dx lacks one projection, a key head one query head",
        ("A-5", "B-1"),
        ("attention_backward",),
        attention_problems,
        _backward,
        ("x", "dy"),
        dtypes=("float32", "bfloat16"),
    ),
    Law(
        "A3",
        "The attention block and its gradients agree with the formulas (float64).",
        "as A1 and A2, with u = 2⁻⁵³",
        "as A1 and A2, and anything computed in float32",
        ("A-4", "A-5"),
        ("attention", "attention_backward", "float64"),
        lambda: attention_problems(dtype="float64"),
        _both,
        ("x", "dy"),
    ),
    Law(
        "A4",
        "A token does not see later tokens or other sequences.",
        "rows whose own past is unchanged stay within twice A1's bound when all others change",
        "the causal mask is off by one, or packed sequences leak into each other",
        ("A-4", "A-7"),
        ("attention",),
        attention_problems,
        _causal,
        (),
        dtypes=DTYPES,
    ),
)
