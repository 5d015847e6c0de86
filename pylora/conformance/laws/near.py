"""How far a result of a method of problems/every.py may be from the exact one.

Sums of products of small integers are exact. Where an implementation's dtype or precision does not
hold them, the bound is made of the same method on magnitudes: the methods are sums of products, so
with M what the method gives for |x|, |W|, |A|, ..., a term of the result is at most its share of M,
and n roundings on its way make it wrong by gamma_n of that (Higham, lemmas 3.1 and 3.3). A factor
that the precision moves by E (bounds/moves.py) moves the result by what M with |x| + E is larger.

The operations one by one have the bounds of their own laws (bounds/ops.py, bounds/features.py).
Whole blocks and decoders have none here: theirs is an analysis of every step (laws/block.py), which
their own laws make; here they are near at `_COARSE` of their size, which what is wrong beyond a
size, in a layout or in another call is far from.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from pylora.conformance.bounds import features, layer, moves, ops
from pylora.conformance.bounds.running import Running
from pylora.conformance.correct.plain import Correct
from pylora.conformance.laws.operations import _accumulated, _f64, _stored, _subnormal
from pylora.conformance.laws.session import turn
from pylora.conformance.problems.every import KINDS, Path, leaves, mapped
from pylora.conformance.protocol import AttentionShape
from pylora.conformance.testcase import Trial
from pylora.reference import Reference
from pylora.types import AdamW, Array

Args = dict[str, Any]
Bounds = list[Array]
_COARSE = {"wide": 2.0**-9, "narrow": 2.0**-4}
_CORRECT, _REFERENCE = Correct(), Reference()


def bounds(t: Trial, method: str, args: Args, wants: list[Array]) -> Bounds:
    """Of each array of the result, at elements that are finite. NaN and infinity in an argument do
    not reach these, and count as 1."""
    kind = KINDS[method]
    first = next(a for _, a in leaves(args) if a.dtype.kind not in "iub")
    narrow = layer.kind(first) in layer.NARROW
    if kind.exact and t.exact and not narrow:
        return [np.zeros(want.shape) for want in wants]
    if not all(np.isfinite(a).all() for _, a in leaves(args)):
        args = mapped(args, lambda _, a: _finite(a))
    wants = [_finite(want) for want in wants]
    with np.errstate(all="ignore"):
        if kind.exact:
            found = _of_magnitudes(t, method, args, layer.kind(first))
        elif method in _OPERATIONS:
            found = _OPERATIONS[method](args, wants)
        else:
            found = _coarse(t, args, wants, narrow)
    return [np.where(np.isnan(bound), 0.0, bound) for bound in found]


def _finite(a: Array) -> Array:
    return a if np.isfinite(a).all() else np.where(np.isfinite(a), a, a.dtype.type(1))


# ---- sums of products ----------------------------------------------------------------------------


def _of_magnitudes(t: Trial, method: str, args: Args, dtype: str) -> Bounds:
    n = 8 + moves.roundings(t.precision)
    n += sum(sum(a.shape) for _, a in leaves(args) if a.dtype.kind not in "iub")
    stored = layer.STORED["gradient"] + 1 + len(args.get("adapters", ()))
    if "rows" in args:  # each row has one adapter
        stored = layer.STORED["gradient"] + 1
    plain = _magnitudes(t, method, args, "fp32", dtype)
    moved = plain
    if t.precision != "fp32":
        moved = _magnitudes(t, method, args, t.precision, dtype)
    share, least = layer.relative(n, dtype, stored), layer.smallest(dtype)
    return [
        layer.ends(share * b + (b - a) + n * least * (1 + b), b, dtype)
        for a, b in zip(plain, moved)
    ]


def _magnitudes(t: Trial, method: str, args: Args, precision: str, dtype: str) -> list[Array]:
    """What the method gives for magnitudes, moved as the precision moves them."""

    def one(path: Path, a: Array) -> Array:
        if a.dtype.kind in "iub":
            return a
        name = _name(path)
        stored = name == "W" and not method.endswith("merge")
        size = np.abs(_f64(t.weight(a) if stored else a))
        if stored:
            return moves.size(size, precision)
        if dtype == "bfloat16" and precision == "bf16":  # it is bfloat16 already
            return size
        if name == "x":
            return size + moves.of_x(size, precision)
        if name == "dy":
            return size + np.maximum(moves.of_dy(size, precision), moves.of_low(size, precision))
        return size + moves.of_low(size, precision) if name in "AB" else size

    return [a for _, a in leaves(_invoked(method, _positive(mapped(args, one))))]


def _name(path: Path) -> str:
    """The argument; of adapters A and B are told apart by their place."""
    name = path[-1]
    return str(name) if isinstance(name, str) else ("A", "B")[name] if name in (0, 1) else "?"


def _positive(value: Any) -> Any:
    """The same with every number that is no array, a scale or a multiplier, without its sign."""
    if isinstance(value, float):
        return abs(value)
    if isinstance(value, dict):
        return {name: _positive(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_positive(inner) for inner in value)
    return value


def _invoked(method: str, args: Args) -> Any:
    return getattr(_CORRECT, method)(*args.values())


# ---- operations one by one -----------------------------------------------------------------------


def _rms_norm(p: Args, wants: list[Array]) -> Bounds:
    kind = _accumulated(p["x"])
    bound = ops.rms_norm_forward(_f64(p["x"]), _f64(p["w"]), p["eps"], kind)[0]
    return [_stored(bound + ops.tiny(kind), wants[0], p["x"], 3)]


def _layer_norm(p: Args, wants: list[Array]) -> Bounds:
    kind, b = _accumulated(p["x"]), _f64(p["b"])
    bound = features.layer_norm_forward(_f64(p["x"]), _f64(p["w"]), b, p["eps"], kind)[0]
    size = np.abs(wants[0] - b) + np.abs(b)
    return [_stored(bound + ops.tiny(kind), size, p["x"], 4)]


def _layer_norm_backward(p: Args, wants: list[Array]) -> Bounds:
    dy, x, w, kind = _f64(p["dy"]), _f64(p["x"]), _f64(p["w"]), _accumulated(p["x"])
    rstd = _REFERENCE.layer_norm_forward(x, w, None, p["eps"])[1]
    r, g = rstd[:, None], np.abs(dy * w)
    n = np.abs(x - x.mean(axis=1, keepdims=True)) * r
    size = r * (g + g.mean(axis=1, keepdims=True) + n * (g * n).mean(axis=1, keepdims=True))
    off = features.layer_norm_forward(x, w, None, p["eps"], kind)[1] / rstd
    bound = features.layer_norm_backward(dy, x, w, rstd, None, kind)
    bound = bound + (np.expm1(3.3 * off)[:, None] + 2 * ops.gamma(3, kind)) * size
    return [_stored(bound + ops.tiny(kind), size, p["x"], 6)]


def _swiglu(p: Args, wants: list[Array]) -> Bounds:
    gate, up = _f64(p["gate"]), _f64(p["up"])
    bound = ops.swiglu_forward(gate, up, _accumulated(p["gate"]))
    more = _subnormal(np.abs(gate) * (1 + np.abs(up)), p["gate"])
    return [_stored(bound, wants[0], p["gate"], 4) + more]


def _swiglu_backward(p: Args, wants: list[Array]) -> Bounds:
    dy, gate, up = _f64(p["dy"]), _f64(p["gate"]), _f64(p["up"])
    s, D = _REFERENCE._sigmoid(gate), np.abs(dy)
    sizes = (
        D * np.abs(up) * s * (1 + np.abs(gate) * _REFERENCE._sigmoid(-gate)),
        D * np.abs(gate) * s,
    )
    more = 6 * _subnormal((1 + D) * (1 + np.abs(up)) * (1 + np.abs(gate)), p["gate"])
    limits = ops.swiglu_backward(dy, gate, up, _accumulated(p["gate"]))
    return [_stored(b, size, p["gate"], 6) + more for b, size in zip(limits, sizes)]


def _activation(p: Args, wants: list[Array]) -> Bounds:
    x, up = _f64(p["x"]), _f64(p["up"])
    bound = features.activation_forward(x, up, p["kind"], _accumulated(p["x"]))
    more = _subnormal(np.abs(x) * (1 + np.abs(up)), p["x"])
    return [_stored(bound, wants[0], p["x"], 4) + more]


def _activation_backward(p: Args, wants: list[Array]) -> Bounds:
    dy, x, up = _f64(p["dy"]), _f64(p["x"]), _f64(p["up"])
    limits = features.activation_backward(dy, x, up, p["kind"], _accumulated(p["x"]))
    y, slope, _, _ = features._act(x, p["kind"], "float64")
    D, U = np.abs(dy), np.abs(up)
    more = 6 * _subnormal((1 + D) * (1 + U) * (1 + np.abs(x)) ** 2, p["x"])
    sizes = D * U * slope, D * y
    return [_stored(b, size, p["x"], 6) + more for b, size in zip(limits, sizes)]


def _soft_cap(p: Args, wants: list[Array]) -> Bounds:
    bound = features.soft_cap_forward(_f64(p["x"]), p["multiplier"], p["cap"], _accumulated(p["x"]))
    return [_stored(bound, wants[0], p["x"], 4)]


def _soft_cap_backward(p: Args, wants: list[Array]) -> Bounds:
    kind, size = _accumulated(p["x"]), np.abs(_f64(p["dy"]) * p["multiplier"])
    bound = ops.gamma(10 + 2 * (features.TANH + 4), kind) * size + ops.tiny(kind)
    return [_stored(bound, 3 * size, p["x"], 4)]


def _rope(p: Args, wants: list[Array]) -> Bounds:
    x, D = p["x"], int(p["head_dim"])
    R = int(p.get("rotary_dim", D))
    heads = _f64(x).reshape(len(x), -1, D)
    part = np.ascontiguousarray(heads[..., :R]).reshape(len(x), -1)
    shape = AttentionShape(heads.shape[1], heads.shape[1], R, (), p["theta"], 0, p["layout"])
    sign = -1.0 if p["inverse"] else 1.0
    turned = turn(Running(part, 0.0, x.dtype), p["position"], shape, sign)
    off = np.zeros(heads.shape)
    off[..., :R] = turned.error.reshape(len(x), -1, R) * (2.0 if x.dtype == np.float64 else 1.0)
    return [off.reshape(x.shape)]


def _experts(p: Args, wants: list[Array]) -> Bounds:
    logits, want = p["logits"], wants[0]
    n = 3 * ops.EXP + 2 * logits.shape[1] + 12
    bound = ops.gamma(n, _accumulated(logits)) * want
    return [_stored(bound, want, logits, 3) * (want > 0)]


def _cross_entropy(p: Args, wants: list[Array]) -> Bounds:
    logits, labels, like = _f64(p["logits"]), np.asarray(p["labels"]), p["logits"]
    counted = labels != -100
    weight = np.full(len(labels), 1 / max(1, int(counted.sum())))
    _, lse = _REFERENCE.cross_entropy_forward(logits, labels)
    off, off_lse = ops.cross_entropy_forward(logits, labels, like.dtype)
    off_d = ops.cross_entropy_backward(logits, labels, lse, weight, like.dtype)
    share = np.exp(logits - lse[:, None]) * (np.expm1(off_lse) * weight)[:, None]
    off_d = off_d + share + ops.gamma(2, like.dtype) * np.abs(wants[1])
    return [
        _stored(off, wants[0], like, 1),
        np.where(counted[:, None], _stored(off_d, wants[1], like, 1), 0.0),
    ]


def _adamw(p: Args, wants: list[Array]) -> Bounds:
    limits = ops.adamw_step(p["p"], p["g"], p["m"], p["v"], p["settings"], p["p"].dtype)
    return [_stored(bound, want, p["p"], 1) for bound, want in zip(limits, wants)]


def _adapter_step(p: Args, wants: list[Array]) -> Bounds:
    found, base = [], AdamW(lr=p["lr"], step=1, weight_decay=p["weight_decay"])
    for (name, value), want in zip(p["params"].items(), wants):
        o = replace(base, lr=p["lr"] * p["ratio"]) if name == "B" else base
        o = replace(o, weight_decay=0.0) if name == "bias" else o
        zeros = np.zeros(value.shape)
        off = ops.adamw_step(value, p["grads"][name], zeros, zeros, o, value.dtype)[0]
        found.append(_stored(off, want, value, 1))
    return found


def _clip(p: Args, wants: list[Array]) -> Bounds:
    grads, kind = p["grads"], p["grads"][0].dtype
    norm = math.sqrt(sum(float((_f64(g) ** 2).sum()) for g in grads))
    off = ops.gamma(sum(g.size for g in grads) / 2 + 6, kind) + 1.1e-6 / norm  # as A26
    if p["limit"] >= norm:
        return [np.zeros(want.shape) for want in wants]
    return [off * np.abs(want) + 2 * ops.tiny(kind) for want in wants]


_OPERATIONS: dict[str, Callable[[Args, list[Array]], Bounds]] = {
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "layer_norm_backward": _layer_norm_backward,
    "swiglu": _swiglu,
    "swiglu_backward": _swiglu_backward,
    "activation": _activation,
    "activation_backward": _activation_backward,
    "soft_cap": _soft_cap,
    "soft_cap_backward": _soft_cap_backward,
    "rope": _rope,
    "rope_part": _rope,
    "experts": _experts,
    "cross_entropy": _cross_entropy,
    "adamw": _adamw,
    "adapter_step": _adapter_step,
    "clip": _clip,
}


# ---- whole blocks --------------------------------------------------------------------------------


def _coarse(t: Trial, args: Args, wants: list[Array], narrow: bool) -> Bounds:
    floats = [a for _, a in leaves(args) if a.dtype.kind not in "iub"]
    narrow |= t.precision != "fp32"  # what it keeps between products may have 8 bits
    longest = max(max(a.shape, default=1) for a in floats)
    share = _COARSE["narrow"]
    if not narrow:
        share = _COARSE["wide"] + (0.0 if floats[0].dtype == np.float64 else 2 * longest * 2.0**-24)
    sizes = [np.abs(np.where(np.isfinite(want), want, 0.0)) for want in wants]
    return [
        share * (size + size.max(initial=0.0) * (1.0 if narrow else 2.0**-3)) + 1e-30
        for size in sizes
    ]
