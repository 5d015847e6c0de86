"""Laws of the operations that families of models add to Llama's, for who has them apart. Their
bounds are those of bounds/features.py."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from pylora.conformance.bounds import features, ops
from pylora.conformance.bounds.running import Running
from pylora.conformance.laws.law import Law
from pylora.conformance.laws.operations import _accumulated, _f64, _stored, _subnormal
from pylora.conformance.laws.session import turn
from pylora.conformance.problems.families import (
    DTYPES,
    activations,
    caps,
    choices,
    layer_norms,
    parts,
    scalings,
)
from pylora.conformance.protocol import AttentionShape
from pylora.conformance.testcase import Problem, Trial
from pylora.reference import Reference
from pylora.types import Array

_REFERENCE = Reference()


def _layer_norm(t: Trial, p: Problem) -> None:
    y = t.layer_norm(p.x, p.w, p.b, p.eps)
    x, w = _f64(p.x), _f64(p.w)
    b = None if p.b is None else _f64(p.b)
    c = x - x.mean(axis=1, keepdims=True) if x.size else x
    part = c / np.sqrt((c * c).mean(axis=1, keepdims=True) + p.eps) * w if x.size else x
    want = part if b is None else part + b
    bound = features.layer_norm_forward(x, w, b, p.eps, _accumulated(p.x))[0] if x.size else x
    size = np.abs(part) + (0 if b is None else np.abs(b))
    t.expect("y", y, want, _stored(bound + ops.tiny(_accumulated(p.x)), size, p.x, 4))


def _layer_norm_backward(t: Trial, p: Problem) -> None:
    dx = t.layer_norm_backward(p.dy, p.x, p.w, p.eps)
    dy, x, w, kind = _f64(p.dy), _f64(p.x), _f64(p.w), _accumulated(p.x)
    if not x.size:
        t.expect("dx", dx, x)
        return
    _, rstd = _REFERENCE.layer_norm_forward(x, w, None, p.eps)
    want = _REFERENCE.layer_norm_backward(dy, x, w, rstd)
    bound = features.layer_norm_backward(dy, x, w, rstd, None, kind)
    r, g = rstd[:, None], np.abs(dy * w)
    n = np.abs(x - x.mean(axis=1, keepdims=True)) * r
    size = r * (g + g.mean(axis=1, keepdims=True) + n * (g * n).mean(axis=1, keepdims=True))
    # rstd is the implementation's own: dx is of third degree in it, at most.
    off = features.layer_norm_forward(x, w, None, p.eps, kind)[1] / rstd
    bound = bound + (np.expm1(3.3 * off)[:, None] + 2 * ops.gamma(3, kind)) * size
    t.expect("dx", dx, want, _stored(bound + ops.tiny(kind), size, p.x, 6))


def _activation(t: Trial, p: Problem) -> None:
    y = t.activation(p.kind, p.x, p.up)
    x, up = _f64(p.x), None if p.up is None else _f64(p.up)
    want = _REFERENCE.activation_forward(x, up, p.kind)
    bound = features.activation_forward(x, up, p.kind, _accumulated(p.x))
    size = np.abs(x) * (1 + (1 if up is None else np.abs(up)))
    t.expect("y", y, want, _stored(bound, want, p.x, 4) + _subnormal(size, p.x))


def _activation_backward(t: Trial, p: Problem) -> None:
    got = t.activation_backward(p.kind, p.dy, p.x, p.up)
    dy, x, up = _f64(p.dy), _f64(p.x), None if p.up is None else _f64(p.up)
    want = _REFERENCE.activation_backward(dy, x, up, p.kind)
    limits = features.activation_backward(dy, x, up, p.kind, _accumulated(p.x))
    D, U = np.abs(dy), np.ones_like(x) if up is None else np.abs(up)
    y, slope, _, _ = features._act(x, p.kind, "float64")
    factors = (1 + D) * (1 + U) * (1 + np.abs(x)) ** 2
    for i, (name, size) in enumerate((("dx", D * U * slope), ("dup", D * y))):
        if i and up is None:
            continue
        off = _stored(limits[i], size, p.x, 6) + 6 * _subnormal(factors, p.x)
        t.expect(name, got, want[i], off, item=(i,))


def _soft_cap(t: Trial, p: Problem) -> None:
    y = t.soft_cap(p.x, p.multiplier, p.cap)
    x = _f64(p.x)
    want = _REFERENCE.soft_cap_forward(x, p.multiplier, p.cap)
    bound = features.soft_cap_forward(x, p.multiplier, p.cap, _accumulated(p.x))
    # z tanh'(z) <= tanh(z): what the argument loses in 16 bits is no more than its result does.
    t.expect("y", y, want, _stored(bound, want, p.x, 4))


def _soft_cap_backward(t: Trial, p: Problem) -> None:
    dx = t.soft_cap_backward(p.dy, p.x, p.multiplier, p.cap)
    dy, x, kind = _f64(p.dy), _f64(p.x), _accumulated(p.x)
    y = _REFERENCE.soft_cap_forward(x, p.multiplier, p.cap)
    want = _REFERENCE.soft_cap_backward(dy, y, p.multiplier, p.cap)
    size = np.abs(dy * p.multiplier)  # 1 - (y / c)² is off by what its terms are, not by a share
    bound = ops.gamma(10 + 2 * (features.TANH + 4), kind) * size + ops.tiny(kind)
    t.expect("dx", dx, want, _stored(bound, 3 * size, p.x, 4))


def _rope_part(t: Trial, p: Problem) -> None:
    y = t.rope_part(p.x, p.position, p.head_dim, p.rotary_dim, p.theta, p.layout, p.inverse)
    m, D, R = len(p.x), p.head_dim, p.rotary_dim
    heads = p.x.reshape(m, -1, D)
    part = np.ascontiguousarray(heads[..., :R]).reshape(m, -1)
    shape = AttentionShape(heads.shape[1], heads.shape[1], R, (), p.theta, 0, p.layout)
    sign = -1.0 if p.inverse else 1.0
    turned = turn(Running(_f64(part), 0.0, p.x.dtype), p.position, shape, sign)
    want, off = _f64(heads), np.zeros(heads.shape)
    want[..., :R] = turned.value.reshape(m, -1, R)
    off[..., :R] = turned.error.reshape(m, -1, R) * (2.0 if p.x.dtype == np.float64 else 1.0)
    t.expect("y", y, want.reshape(p.x.shape), off.reshape(p.x.shape))


def _turns(R: int, theta: float, s: Mapping[str, Any], length: int, trained: int) -> Array:
    """Radians per position of each pair, by the papers' formulas, a pair at a time."""
    kind, factor, original = s["rope_type"], s["factor"], trained
    if kind == "dynamic" and length > trained:
        theta *= (factor * length / trained - factor + 1) ** (R / (R - 2))
    out = []
    for i in range(R // 2):
        f = theta ** (-2 * i / R)
        wave = 2 * math.pi / f
        if kind == "linear":
            f /= factor
        elif kind == "longrope":
            f /= s["long_factor" if length > original else "short_factor"][i]
        elif kind == "llama3":
            low, high = s["low_freq_factor"], s["high_freq_factor"]
            kept = min(max((original / wave - low) / (high - low), 0.0), 1.0)
            f = kept * f + (1 - kept) * f / factor
        elif kind == "yarn":
            ends: list[float] = []
            for turns in (s.get("beta_fast", 32), s.get("beta_slow", 1)):
                at = R * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))
                whole = math.floor if not ends else math.ceil
                ends.append(whole(at) if s.get("truncate", True) else at)
            first, last = max(ends[0], 0), min(ends[1], R - 1)
            width = last - first if last != first else 0.001
            stretched = min(max((i - first) / width, 0.0), 1.0)
            f = f * (1 - stretched) + f / factor * stretched
        out.append(f)
    return np.array(out)


def _rope_frequencies(t: Trial, p: Problem) -> None:
    got = t.rope_frequencies(p.rotary_dim, p.theta, p.scaling, p.length, p.trained)
    want = _turns(p.rotary_dim, p.theta, p.scaling, p.length, p.trained)
    # In float64, as A-3 wants tables; a power is off by its exponent's rounding, times log(theta).
    off = ops.gamma(12 + 2 * math.log(p.theta), "float64") * want
    t.expect("radians per position", got, want, off * p.scaling["factor"], item=(0,))
    kind, factor = p.scaling["rope_type"], p.scaling["factor"]
    grown = 1.0
    if kind == "yarn":
        grown = 0.1 * math.log(factor) + 1
    if kind == "longrope":
        grown = math.sqrt(1 + math.log(factor) / math.log(p.trained))
    grown = p.scaling.get("attention_factor", grown)
    off = ops.gamma(2 * ops.EXP + 4, "float64") * grown
    t.expect("factor of cos and sin", got, np.float64(grown), off, item=(1,))


def _experts(t: Trial, p: Problem) -> None:
    weights = t.experts(p.logits, p.k, p.normalize)
    logits = _f64(p.logits)
    want = np.zeros(logits.shape)
    for row, out in zip(logits, want):
        share = np.exp(row - row.max())
        share /= share.sum()
        chosen = sorted(range(len(row)), key=lambda e: (-row[e], e))[: p.k]
        out[chosen] = share[chosen] / (share[chosen].sum() if p.normalize else 1)
    n = 3 * ops.EXP + 2 * logits.shape[1] + 12
    t.expect("weights", weights, want, _stored(ops.gamma(n, _accumulated(p.logits)) * want,
             want, p.logits, 3) * (want > 0))  # fmt: skip


LAWS = (
    Law(
        "A30",
        "LayerNorm takes the mean off, divides by the deviation, and multiplies by w and adds b.",
        "y = c / sqrt(mean(c²) + eps) w + b, c = x - mean(x); rows of equal numbers give b",
        "RMSNorm in its place, b left out, n - 1 in place of n, eps outside the root",
        ("A-20", "N-1", "N-2"),
        ("layer_norm",),
        layer_norms,
        _layer_norm,
        ("x", "w", "b"),
        dtypes=DTYPES,
    ),
    Law(
        "A31",
        "LayerNorm's gradient goes through the mean and the deviation.",
        "dx = rstd (g - mean(g) - n mean(g n)), g = dy w, n = c rstd",
        "the mean's or the deviation's part is left out, or w is",
        ("A-20",),
        ("layer_norm_backward",),
        layer_norms,
        _layer_norm_backward,
        ("x", "w", "dy"),
        dtypes=DTYPES,
    ),
    Law(
        "A32",
        "An activation is the one that is named, times `up` where there is one.",
        "SiLU, GELU by tanh and by erf, squared ReLU; |x| up to some hundreds",
        "one GELU for the other, x and up exchanged, max(x, 0) not squared, or inf for large x",
        ("A-23", "N-5"),
        ("activation",),
        activations,
        _activation,
        ("x", "up"),
        dtypes=DTYPES,
    ),
    Law(
        "A33",
        "An activation's gradients are those of its formula.",
        "dx = dy up act'(x), dup = dy act(x)",
        "the slope of another kind, a factor of 2 left out, or NaN where x³ overflows",
        ("A-23",),
        ("activation_backward",),
        activations,
        _activation_backward,
        ("x", "up", "dy"),
        dtypes=DTYPES,
    ),
    Law(
        "A34",
        "A cap is a tanh of what was multiplied before.",
        "y = c tanh(s x / c); s x without a cap",
        "numbers are cut at c, or multiplied behind the cap",
        ("A-27",),
        ("soft_cap",),
        caps,
        _soft_cap,
        ("x",),
        dtypes=DTYPES,
    ),
    Law(
        "A35",
        "The gradient of a cap has its slope and its multiplier.",
        "dx = s dy (1 - (y / c)²)",
        "the slope is left out, or taken at x in place of y",
        ("A-27",),
        ("soft_cap_backward",),
        caps,
        _soft_cap_backward,
        ("x", "dy"),
        dtypes=DTYPES,
    ),
    Law(
        "A36",
        "Of a head of which a part is rotated, the first R numbers turn as a head of R does.",
        "frequencies theta^(-2i/R), pairs within the first R; the others keep their bits",
        "frequencies of D, the last R numbers, pairs i and i + D/2, or all of the head",
        ("A-24", "A-3"),
        ("rope_part",),
        parts,
        _rope_part,
        ("x",),
        dtypes=DTYPES,
    ),
    Law(
        "A37",
        "Scaled angles are those of the papers, and YaRN and LongRoPE have a factor besides.",
        "linear, dynamic NTK, Llama 3, YaRN, LongRoPE, before and beyond the trained length",
        "no factor of cos and sin, one of LongRoPE's sets alone, a base that never grows",
        ("A-25",),
        ("rope_frequencies",),
        scalings,
        _rope_frequencies,
        (),
    ),
    Law(
        "A38",
        "The k likeliest experts are chosen, of equal ones the first, with their softmax's shares.",
        "softmax over all experts; divided by the chosen ones' sum where the model says so",
        "a softmax over the chosen alone, weights that always add up to 1, the last of equal ones",
        ("A-29",),
        ("experts",),
        choices,
        _experts,
        (),
        dtypes=DTYPES,
    ),
)
