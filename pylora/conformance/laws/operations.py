"""Laws of single operations, for who has them apart: RMSNorm, SwiGLU, rotary embedding, the loss,
the optimizer. Their bounds are those of bounds/ops.py."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from pylora.conformance.bounds import layer, ops
from pylora.conformance.bounds.running import Running
from pylora.conformance.laws.law import Law
from pylora.conformance.laws.session import turn
from pylora.conformance.problems.operations import (
    DTYPES,
    adapter_steps,
    beyond_losses,
    beyond_norms,
    gates,
    losses,
    norms,
    rotations,
    several_gradients,
    steps,
)
from pylora.conformance.protocol import AttentionShape
from pylora.conformance.testcase import Problem, Trial
from pylora.reference import Reference
from pylora.types import AdamW, Array

WIDE = ("float32", "float64")
_REFERENCE = Reference()


def _f64(a: Array) -> Array:
    return np.asarray(a).astype(np.float64)


def _accumulated(a: Array) -> str:
    """The dtype that sums over such an array are accumulated in."""
    return "float32" if layer.kind(a) in layer.NARROW else layer.kind(a)


def _stored(bound: Array, magnitude: Array, like: Array, n: int) -> Array:
    """The bound where n results on the way may be stored in 16 bits, and twice it in float64, where
    what is exact here is rounded too."""
    kind = layer.kind(like)
    if kind == "float64":
        return 2 * bound
    if kind not in layer.NARROW:
        return bound * (1 + 2.0**-20)
    off = bound + ops.gamma(n, layer.NARROW[kind]) * (np.abs(magnitude) + bound)
    off = off + 2 * n * layer.smallest(kind) * (1 + np.abs(magnitude))
    return layer.ends(off, np.abs(magnitude) * 2, kind)


def _rms_norm(t: Trial, p: Problem) -> None:
    y = t.rms_norm(p.x, p.w, p.eps)
    x, w = _f64(p.x), _f64(p.w)
    want = x / np.sqrt((x * x).mean(axis=1, keepdims=True) + p.eps) * w
    bound = ops.rms_norm_forward(x, w, p.eps, _accumulated(p.x))[0] + ops.tiny(_accumulated(p.x))
    # Squares below the normal numbers may be lost: they are nothing beside eps.
    t.expect("y", y, want, _stored(bound, want, p.x, 3))


def _swiglu(t: Trial, p: Problem) -> None:
    y = t.swiglu(p.gate, p.up)
    gate, up = _f64(p.gate), _f64(p.up)
    want = _REFERENCE.swiglu_forward(gate, up)
    bound = ops.swiglu_forward(gate, up, _accumulated(p.gate))
    size = np.abs(gate) * (1 + np.abs(up))  # of σ near 0 and of products, in 16 bits
    t.expect("y", y, want, _stored(bound, want, p.gate, 4) + _subnormal(size, p.gate))


def _subnormal(size: Array, like: Array) -> Array | float:
    """What a factor that is stored below float16's normal numbers loses, times the others."""
    return 2.0**-24 * (1 + size) if layer.kind(like) == "float16" else 0.0


def _swiglu_backward(t: Trial, p: Problem) -> None:
    got = t.swiglu_backward(p.dy, p.gate, p.up)
    dy, gate, up = _f64(p.dy), _f64(p.gate), _f64(p.up)
    want = _REFERENCE.swiglu_backward(dy, gate, up)
    limits = ops.swiglu_backward(dy, gate, up, _accumulated(p.gate))
    s, D = _REFERENCE._sigmoid(gate), np.abs(dy)
    sizes = (
        D * np.abs(up) * s * (1 + np.abs(gate) * _REFERENCE._sigmoid(-gate)),
        D * np.abs(gate) * s,
    )
    factors = (1 + D) * (1 + np.abs(up)) * (1 + np.abs(gate))
    for name, g, w, bound, size in zip(("dgate", "dup"), got, want, limits, sizes):
        off = _stored(bound, size, p.gate, 6) + 6 * _subnormal(factors, p.gate)
        t.expect(name, g, w, off)


def _rope(t: Trial, p: Problem) -> None:
    y = t.rope(p.x, p.position, p.head_dim, p.theta, p.layout, p.inverse)
    heads = p.x.shape[1] // p.head_dim
    shape = AttentionShape(heads, heads, p.head_dim, (), p.theta, 0, p.layout)
    want = turn(Running(_f64(p.x), 0.0, p.x.dtype), p.position, shape, -1.0 if p.inverse else 1.0)
    twice = 2.0 if p.x.dtype == np.float64 else 1.0
    t.expect("y", y, want.value, twice * want.error)


def _cross_entropy(t: Trial, p: Problem) -> None:
    nll, grad = t.cross_entropy(p.logits, p.labels)
    logits, counted = _f64(p.logits), p.labels != -100
    weight = np.full(len(p.labels), 1 / max(1, int(counted.sum())))
    want, lse = _REFERENCE.cross_entropy_forward(logits, p.labels)
    off, off_lse = ops.cross_entropy_forward(logits, p.labels, p.logits.dtype)
    t.expect("nll", nll, want, _stored(off, want, p.logits, 1))
    d = _REFERENCE.cross_entropy_backward(logits, p.labels, lse, weight)
    off_d = ops.cross_entropy_backward(logits, p.labels, lse, weight, p.logits.dtype)
    # The log of the sum is off by off_lse, and each share by so much of itself; the weight once.
    share = np.exp(logits - lse[:, None]) * (np.expm1(off_lse) * weight)[:, None]
    off_d = off_d + share + ops.gamma(2, p.logits.dtype) * np.abs(d)
    t.expect("dlogits", grad, d, np.where(counted[:, None], _stored(off_d, d, p.logits, 1), 0.0))


def _step(p: Array, g: Array, m: Array, v: Array, o: AdamW) -> tuple[Array, Array, Array]:
    """p, m and v after a step, in float64."""
    p, g, m, v = (_f64(a).copy() for a in (p, g, m, v))
    _REFERENCE.adamw_step(p, g, m, v, o)
    return p, m, v


def _adamw(t: Trial, p: Problem) -> None:
    got = t.adamw(p.p, p.g, p.m, p.v, p.settings)
    want = _step(p.p, p.g, p.m, p.v, p.settings)
    limits = ops.adamw_step(p.p, p.g, p.m, p.v, p.settings, p.p.dtype)
    for name, g, w, bound in zip(("p", "m", "v"), got, want, limits):
        t.expect(f"{name} after step {p.settings.step}", g, w, _stored(bound, w, p.p, 1))


def _clip(t: Trial, p: Problem) -> None:
    got = t.clip(p.grads, p.limit)
    total = sum(float((_f64(g) ** 2).sum()) for g in p.grads)
    norm, n = math.sqrt(total), sum(g.size for g in p.grads)
    factor = min(1.0, p.limit / norm) if norm else 1.0
    kind = p.grads[0].dtype
    # The sum of squares and its root, a quotient, its rounding; and PyTorch adds 1e-6 to the norm.
    off = ops.gamma(n / 2 + 6, kind) + (1.1e-6 / norm if norm else 0.0)
    off = 0.0 if factor == 1 else off
    for i, g in enumerate(p.grads):
        want = factor * _f64(g)
        what = f"gradient {i} of {len(p.grads)}, of norm {norm:.4g} together, limit {p.limit:.4g}"
        t.expect(what, got, want, off * np.abs(want) + 2 * ops.tiny(kind) * (off > 0), item=(i,))


def _adapter_step(t: Trial, p: Problem) -> None:
    got = t.adapter_step(p.params, p.grads, p.lr, p.weight_decay, p.ratio)
    base = AdamW(lr=p.lr, step=1, weight_decay=p.weight_decay)
    for name, value in p.params.items():
        o = replace(base, lr=p.lr * p.ratio) if name == "B" else base
        o = replace(o, weight_decay=0.0) if name == "bias" else o
        zeros = np.zeros_like(value)
        want = _step(value, p.grads[name], zeros, zeros, o)[0]
        off = ops.adamw_step(value, p.grads[name], zeros, zeros, o, value.dtype)[0]
        what = f"{name} after a step (lr {p.lr}, decay {p.weight_decay}, ratio {p.ratio})"
        t.expect(what, got, want, _stored(off, want, value, 1), item=(name,))


LAWS = (
    Law(
        "A20",
        "RMSNorm divides by the root of the mean square and multiplies by w.",
        "y = x / sqrt(mean(x²) + eps) w, gamma of the sum's length; rows of zeros give zeros",
        "eps outside the root, a sum for a mean, or 1 + w; sums in 16 bits",
        ("A-2", "N-1", "N-2"),
        ("rms_norm",),
        norms,
        _rms_norm,
        ("x", "w"),
        dtypes=DTYPES,
        covering=beyond_norms,
    ),
    Law(
        "A21",
        "SwiGLU is gate σ(gate) up.",
        "within gamma_12; gates of ±600, where a plain exp overflows",
        "gate and up are exchanged, the tanh form, or NaN for large negative gates",
        ("A-6", "N-5"),
        ("swiglu",),
        gates,
        _swiglu,
        ("gate", "up"),
        dtypes=DTYPES,
    ),
    Law(
        "A22",
        "SwiGLU's gradients are those of the formulas.",
        "dgate = dy up σ (1 + gate (1 - σ)), dup = dy gate σ",
        "the slope of σ is left out, or taken of the product",
        ("A-6",),
        ("swiglu_backward",),
        gates,
        _swiglu_backward,
        ("gate", "up", "dy"),
        dtypes=DTYPES,
    ),
    Law(
        "A23",
        "Rotary embedding turns each pair by position × theta^(-2i/D).",
        "both layouts, forward and back, positions beyond 8, 11 and 16 bits in any order, within "
        "the running error of a table in the dtype of the sums",
        "positions or angles in 16 bits, the other layout, D/2 in place of D, the other direction",
        ("A-3",),
        ("rope",),
        rotations,
        _rope,
        ("x",),
        dtypes=DTYPES,
    ),
    Law(
        "A24",
        "The loss is the log of the softmax's denominator less the label's logit.",
        "nll = lse - logits[label], 0 for -100; dlogits = (softmax - onehot) / counted, rows of "
        "-100 exactly zero; vocabularies past every limit, logits of ±10⁴",
        "a mean over all rows, a label of -100 that counts, or exp that overflows",
        ("O-2", "O-1"),
        ("cross_entropy",),
        losses,
        _cross_entropy,
        ("logits",),
        dtypes=WIDE,
        covering=beyond_losses,
    ),
    Law(
        "A25",
        "A step of AdamW is that of the formulas.",
        "p, m and v of O-3, at the first step and late ones; the moments' bias is corrected, the "
        "decay is decoupled",
        "Adam with L2 in the gradient, eps inside the root, or no correction of the bias",
        ("O-3",),
        ("adamw",),
        steps,
        _adamw,
        ("p", "g"),
        dtypes=WIDE,
    ),
    Law(
        "A26",
        "Clipping is by the norm of all gradients together.",
        "gᵢ min(1, limit / norm), norm of all; below the limit the gradients' own bits",
        "each array is clipped by its own norm, or small gradients are scaled up",
        ("O-4",),
        ("clip",),
        several_gradients,
        _clip,
        (),
        dtypes=WIDE,
    ),
    Law(
        "A27",
        "A step decays A and B, not biases, and B has its own rate.",
        "AdamW of A at lr, of B at lora_plus_ratio × lr, of a bias at lr without decay",
        "biases decay, or LoRA+ speeds up A or the bias",
        ("O-5", "O-6", "O-3"),
        ("adapter_step",),
        adapter_steps,
        _adapter_step,
        (),
        dtypes=WIDE,
    ),
)
