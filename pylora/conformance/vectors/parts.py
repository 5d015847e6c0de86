"""Golden vectors of a transformer's parts: norm, rotation, attention, SwiGLU, the loss.

Beside ordinary numbers each has those at which implementations part: scores that overflow an
exponential, a sequence of one token, none, rows of zeros, far positions, labels that are ignored.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pylora.conformance.bounds import ops as bounds
from pylora.conformance.vectors.cases import Case
from pylora.conformance.vectors.ops import angles, draw, wide
from pylora.reference import IGNORE, Reference
from pylora.types import Array, Attn, Seqs

_ref = Reference()


def cases() -> list[Case]:
    """All cases of this file."""
    return [*_norms(), *_rotations(), *_tables(), *_attentions(), *_swiglus(), *_losses()]


# ---- RMSNorm -----------------------------------------------------------------------------------


def _norms() -> list[Case]:
    edges = np.stack([np.zeros(6), *(draw("norm/edges", (4, 6)))]).astype(np.float32)
    edges *= np.array([0, 1e15, 1e-20, 1e-3, 1], np.float32)[:, None]
    return [
        _rms_norm("rms-norm", draw("norm/x", (4, 10)), 1e-5),
        _rms_norm("rms-norm-edges", edges, 1e-5),  # a row of zeros, a large one, tiny ones
        _rms_norm("rms-norm-eps", draw("norm/eps", (3, 7), 0.1), 0.5),
        _rms_norm("rms-norm-one", draw("norm/one", (3, 1)), 1e-6),
    ]


def _rms_norm(name: str, x: Array, eps: float) -> Case:
    case = Case(name, "rms_norm", ("A-2",), {"eps": eps})
    case.inputs |= {"x": x, "w": draw(f"{name}/w", (x.shape[1],))}
    case.inputs["dy"] = draw(f"{name}/dy", x.shape)
    x, w, dy = (wide(a) for a in case.inputs.values())
    y, rstd = _ref.rms_norm_forward(x, w, eps)
    y_bound, rstd_bound = bounds.rms_norm_forward(x, w, eps)
    dx, _ = _ref.rms_norm_backward(dy, x, w, rstd)
    dx_bound, _ = bounds.rms_norm_backward(dy, x, w, rstd)
    # rstd's own error, relative to |dx| at first order: dx is a sum of r and r³ terms.
    r = rstd[:, None]
    spread = (rstd_bound[:, None] / r) * (
        r * np.abs(dy * w) + 3 * r**3 * np.abs(x) * np.abs(dy * w * x).mean(axis=1)[:, None]
    )
    tiny = bounds.tiny() * (1 + np.abs(dy * w))
    case.expect("rstd", rstd, rstd_bound, "bounds.rms_norm_forward")
    case.expect("y", y, y_bound + tiny, "bounds.rms_norm_forward")
    rule = "bounds.rms_norm_backward, and rstd's error"
    case.expect("dx", dx, dx_bound + 1.01 * spread + tiny, rule)
    return case


# ---- rotary embedding --------------------------------------------------------------------------


def _rotations() -> list[Case]:
    near, later = np.array([0, 1, 7, 11]), np.array([37, 5, 5, 36])
    return [
        _rope("rope-half", "half", 6, near),
        _rope("rope-interleaved", "interleaved", 6, near),
        _rope("rope-half-later", "half", 8, later, 500000.0),
        _rope("rope-interleaved-later", "interleaved", 2, later),
        _rope("rope-none", "half", 4, np.zeros(0)),
    ]


def _rope(name: str, layout: str, D: int, position: Array, theta: float = 10000.0) -> Case:
    """`position` is a token's row of the tables, which begin with position 0."""
    case = Case(name, "rope", ("A-3",), {"head_dim": D, "theta": theta, "layout": layout})
    position = position.astype(np.int64)
    cos, sin = angles(D, np.arange(int(position.max(initial=11)) + 1), theta)
    x = draw(f"rope/{name}", (len(position), 2 * D))
    case.inputs |= {"x": x, "position": position}
    case.inputs |= {"cos": cos.astype(np.float32), "sin": sin.astype(np.float32)}
    rule = "bounds.rope: gamma_2 (|a| + |b|), and u (|a| + |b|) for the tables' rounding"
    bound = 2 * bounds.rope(wide(x), D)
    case.expect("y", _ref.rope(wide(x), cos, sin, position, D, layout), bound, rule)
    back = _ref.rope(wide(x), cos, sin, position, D, layout, inverse=True)
    case.expect("inverse", back, bound, rule)
    return case


def _tables() -> list[Case]:
    """The angle is computed in float64: in float32 the far positions are off by more than u."""
    out = []
    for name, D, theta in (("rope-tables", 8, 10000.0), ("rope-tables-long", 4, 500000.0)):
        case = Case(name, "rope_tables", ("A-3",), {"head_dim": D, "theta": theta})
        position = np.array([0, 1, 2, 77, 4095, 131071], np.int64)
        case.inputs["position"] = position
        # One rounding to float32, and the angle's error in float64: four roundings of it.
        off = bounds.gamma(4, np.float64) * position[:, None]
        for key, value in zip(("cos", "sin"), angles(D, position, theta)):
            limit = bounds.gamma(1) * np.abs(value) + off + bounds.gamma(4, np.float64)
            case.expect(
                key, value, limit, "one rounding to float32; gamma_4 of the angle in float64"
            )
        out.append(case)
    return out


# ---- attention ---------------------------------------------------------------------------------


def _attentions() -> list[Case]:
    return [
        attention_case("attention", 4, 2, 6, [5, 1, 3], window=4),
        attention_case("attention-no-window", 2, 2, 4, [6]),
        attention_case("attention-one-key", 2, 1, 4, [1, 1, 1]),
        attention_case("attention-window-1", 2, 1, 4, [4], window=1),
        attention_case("attention-window-wider", 2, 2, 2, [3], window=7),
        attention_case("attention-shared-key", 3, 1, 2, [0, 4, 0, 2]),
        attention_case("attention-none", 2, 1, 4, [0]),
        attention_case("attention-large", 1, 1, 2, [4], large=True),
    ]


def attention_case(
    name: str,
    heads: int,
    kv_heads: int,
    D: int,
    lengths: list[int],
    *,
    window: int = 0,
    large: bool = False,
    scale: float | None = None,
    softcap: float = 0.0,
) -> Case:
    """Forward and backward. `scale` and `softcap`: what some models have in place of
    1 / sqrt(D) and of no cap. `large`: scores of about ±750, which only a softmax that subtracts
    the largest survives, in float64, too: exp(-750) is 0, exp(750) infinity."""
    attn = Attn(heads, kv_heads, D, D**-0.5 if scale is None else scale, window, softcap)
    seqs, m = Seqs.of(lengths), sum(lengths)
    params: dict[str, Any] = {"heads": heads, "kv_heads": kv_heads, "head_dim": D}
    params |= {"scale": attn.scale}
    params |= {"window": window, "lengths": lengths}
    own: tuple[str, ...] = () if scale is None else ("A-10",)
    if softcap:
        params["softcap"], own = softcap, (*own, "A-27")
    case = Case(name, "attention", ("A-4", "A-5", "A-7", *own), params)
    sizes = (("q", heads * D), ("k", kv_heads * D), ("v", kv_heads * D), ("do", heads * D))
    for key, columns in sizes:
        case.inputs[key] = draw(f"{name}/{key}", (m, columns))
    if large:
        q, k = case.inputs["q"], case.inputs["k"]
        q *= np.float32(0.01)
        k *= np.float32(0.01)
        q[:, 0], k[:, 0] = (-38, -38, 38, -38), (28, -28, 28.0625, 28)
    q, k, v, do = (wide(a) for a in case.inputs.values())
    o, lse = _ref.attention_forward(q, k, v, seqs, attn)
    o_bound, lse_bound = bounds.attention_forward(q, k, v, seqs, attn)
    front, back = ("A-4", "A-7", *own), ("A-5", "A-7", *own)
    rule = "bounds.attention_forward"
    case.expect("o", o, o_bound, rule, spec=front)
    case.expect("lse", lse, lse_bound, rule, spec=front)
    grads = _ref.attention_backward(do, q, k, v, o, lse, seqs, attn)
    limits = bounds.attention_backward(do, q, k, v, o, lse, seqs, attn)
    # o and lse are rounded too: P is off by the factor exp(lse_bound), dS by |do| o_bound more.
    more = _attention_spread(do, q, k, v, o, lse, o_bound, lse_bound, seqs, attn)
    rule = "bounds.attention_backward, and o's and lse's error"
    for key, value, limit, extra in zip(("dq", "dk", "dv"), grads, limits, more):
        case.expect(key, value, limit + extra, rule, spec=back)
    return case


def _attention_spread(
    do: Array,
    q: Array,
    k: Array,
    v: Array,
    o: Array,
    lse: Array,
    o_bound: Array,
    lse_bound: Array,
    seqs: Seqs,
    attn: Attn,
) -> tuple[Array, Array, Array]:
    """What errors of o and lse within their bounds add to dq, dk, dv, at first order (x 1.01)."""
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for t, h, S, _, V, (a, b, K, kv), out in bounds._each_query(q, k, v, seqs, attn):
        P = np.exp(S - lse[t, h])
        dP = V @ do[t, out]
        off_P = P * lse_bound[t, h]
        off_S = attn.scale * (
            off_P * np.abs(dP - do[t, out] @ o[t, out]) + P * (np.abs(do[t, out]) @ o_bound[t, out])
        )
        dq[t, out] += off_S @ np.abs(K)
        dk[a:b, kv] += off_S[:, None] * np.abs(q[t, out])
        dv[a:b, kv] += off_P[:, None] * np.abs(do[t, out])
    return 1.01 * dq, 1.01 * dk, 1.01 * dv


# ---- SwiGLU ------------------------------------------------------------------------------------


def _swiglus() -> list[Case]:
    edge = [-90.0, 90.0, -1.2784645]  # both tails, and where dgate cancels
    far = [0.0, -0.0, 1e4, -1e4, 1e-30, -1e-30, 800.0, -800.0, 88.8, -88.8, -104.0, 20.0]
    return [_swiglu("swiglu", (3, 8), edge), _swiglu("swiglu-extremes", (2, 12), far)]


def _swiglu(name: str, shape: tuple[int, int], first: list[float]) -> Case:
    case = Case(name, "swiglu", ("A-6",))
    for key in ("gate", "up", "dy"):
        case.inputs[key] = draw(f"{name}/{key}", shape, 2.0)
    case.inputs["gate"][0, : len(first)] = first
    gate, up, dy = (wide(a) for a in case.inputs.values())
    y, bound = _ref.swiglu_forward(gate, up), bounds.swiglu_forward(gate, up)
    case.expect("y", y, bound, "bounds.swiglu_forward")
    grads, limits = _ref.swiglu_backward(dy, gate, up), bounds.swiglu_backward(dy, gate, up)
    for key, value, limit in zip(("dgate", "dup"), grads, limits):
        case.expect(key, value, limit, "bounds.swiglu_backward")
    return case


# ---- the loss ----------------------------------------------------------------------------------


def _losses() -> list[Case]:
    large = draw("loss/large", (4, 6), 1000.0)
    large[3] = -900.0 + np.arange(6)
    none = np.full(3, IGNORE)
    return [
        _loss("cross-entropy", draw("loss/logits", (5, 9), 3.0), [2, IGNORE, 8, 0, IGNORE]),
        _loss("cross-entropy-large", large, [1, 0, 5, 2]),
        _loss("cross-entropy-none", draw("loss/none", (3, 4)), none, [1.0, 1.0, 1.0]),
        _loss("cross-entropy-weights", draw("loss/w", (4, 5)), [0, 4, IGNORE, 2], [0.5, 0, 9, 2]),
        _loss("cross-entropy-one-word", draw("loss/one", (2, 1)), [0, IGNORE]),
    ]


def loss_parts(logits: Array, labels: Array, weight: Array) -> list[tuple[Array, Array]]:
    """nll, lse and dlogits, each with its bound; that of dlogits allows for one's own lse."""
    nll, lse = _ref.cross_entropy_forward(logits, labels)
    nll_bound, lse_bound = bounds.cross_entropy_forward(logits, labels)
    d = _ref.cross_entropy_backward(logits, labels, lse, weight)
    off = weight[:, None] * np.exp(logits - lse[:, None]) * lse_bound[:, None]
    off[labels == IGNORE] = 0
    d_bound = bounds.cross_entropy_backward(logits, labels, lse, weight) + 1.01 * off
    return [(nll, nll_bound), (lse, lse_bound), (d, d_bound)]


def _loss(name: str, logits: Array, labels: Any, weights: list[float] | None = None) -> Case:
    """`weight` of a row is what its gradient is multiplied by; nll and lse have none."""
    case = Case(name, "cross_entropy", ("O-2",), {"ignore": IGNORE})
    labels = np.asarray(labels, np.int64)
    counted = int((labels != IGNORE).sum())
    case.inputs |= {"logits": logits, "labels": labels}
    given = np.full(len(labels), 1 / max(counted, 1)) if weights is None else np.array(weights)
    case.inputs["weight"] = given.astype(np.float32)
    logits, weight = wide(case.inputs["logits"]), wide(case.inputs["weight"])
    (nll, nll_bound), (lse, lse_bound), (d, d_bound) = loss_parts(logits, labels, weight)
    case.expect("nll", nll, nll_bound, "bounds.cross_entropy_forward")
    case.expect("lse", lse, lse_bound, "bounds.cross_entropy_forward")
    case.expect("dlogits", d, d_bound, "bounds.cross_entropy_backward, and lse's error")
    return case
