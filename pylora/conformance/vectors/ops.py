"""Golden vectors of single operations: LoRA, merge, random streams, the parts of a transformer.

Inputs are drawn from pylora's own streams, so any language can draw them too. The reference runs
in float64 on the float32 inputs.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pylora.conformance.bounds import ops as bounds
from pylora.conformance.vectors.cases import Case
from pylora.numbers import random
from pylora.reference import IGNORE, Reference
from pylora.types import AdamW, Array, Attn, Drop, LoRA, Seqs

SEED = 2021
_ref = Reference()
_LORA = "bounds.lora_forward, lora_backward: gamma_n times the summed magnitudes (N-1)"


def draw(name: str, shape: tuple[int, ...], std: float = 1.0) -> Array:
    """float32 normal numbers of the stream vectors/<name>."""
    return random.normal(shape, std, seed=SEED, stream=random.stream("vectors", name))


def wide(a: Array) -> Array:
    return a.astype(np.float64)


def cases() -> list[Case]:
    """All cases of this file."""
    return [*_lora(), *_merge(), *_random(), *_transformer(), _adamw()]


# ---- LoRA --------------------------------------------------------------------------------------


def _lora() -> list[Case]:
    usual: dict[str, Any] = {"m": 5, "d": 7, "k": 11, "r": 3, "alpha": 6.0}
    rank9: dict[str, Any] = {"d": 5, "k": 4, "r": 9, "alpha": 9.0}
    return [
        lora_case("lora-plain", ("S-1", "F-1", "B-1"), **usual),
        lora_case("lora-bias", ("F-3",), bias=True, **usual),
        lora_case("lora-rslora", ("S-1",), use_rslora=True, **usual),
        lora_case("lora-negative", ("S-4",), **usual | {"alpha": -1.5}),
        lora_case("lora-rank-above-sizes", ("F-6",), **usual | rank9),
        lora_case("lora-one-token", ("F-6",), **usual | {"m": 1}),
        lora_case("lora-no-tokens", ("F-6", "B-3"), **usual | {"m": 0}),
        lora_case("lora-fresh", ("I-1", "F-2", "B-4"), fresh=True, **usual),
        lora_case("lora-dropout", ("D-1", "D-2", "D-3"), p=0.25, **usual),
        _embedding(),
    ]


def lora_case(
    name: str,
    spec: tuple[str, ...],
    *,
    m: int,
    d: int,
    k: int,
    r: int,
    alpha: float,
    use_rslora: bool = False,
    bias: bool = False,
    fresh: bool = False,
    p: float = 0.0,
) -> Case:
    """Forward and backward of one layer, with h and g. Each bound is that of the whole chain from
    the inputs: dB's includes what the rounding of h adds to it."""
    scale = alpha / math.sqrt(r) if use_rslora else alpha / r
    params: dict[str, Any] = {"r": r, "alpha": alpha, "use_rslora": use_rslora, "scale": scale}
    drop = None
    if p:
        path, step, row0 = "model.layers.0.mlp.up_proj", 3, 2
        drop = Drop(p, 7, random.stream("dropout", path, str(step)), row0)
        params |= {"p": p, "seed": "7", "path": path, "step": step, "row0": row0}
        params["stream"] = str(drop.stream)
    case = Case(name, "lora", spec, params)
    inputs = case.inputs
    inputs["x"] = draw(f"{name}/x", (m, k))
    inputs["W"] = draw(f"{name}/W", (d, k), k**-0.5)
    if bias:
        inputs["bias"] = draw(f"{name}/bias", (d,))
    inputs["A"] = draw(f"{name}/A", (r, k), k**-0.5)
    B = draw(f"{name}/B", (d, r), r**-0.5)
    inputs["B"] = np.zeros_like(B) if fresh else B
    inputs["dy"] = draw(f"{name}/dy", (m, d))

    x, W, A, B, dy = (wide(inputs[n]) for n in ("x", "W", "A", "B", "dy"))
    b = wide(inputs["bias"]) if bias else None
    lora = LoRA(A, B, scale)
    y, h = _ref.lora_forward(x, W, b, lora, drop)
    dx, dA, dB = _ref.lora_backward(dy, x, h, W, lora, drop)
    y_bound, h_bound = bounds.lora_forward(x, W, b, lora, p=p)
    dx_bound, dA_bound, dB_bound = bounds.lora_backward(dy, x, h, W, lora, p=p)
    case.expect("h", h, h_bound, _LORA)
    case.expect("y", y, y_bound, _LORA)
    case.expect("g", dy @ B, bounds.matmul(dy, B), "bounds.matmul: gamma_d |dy| |B|")
    case.expect("dx", dx, dx_bound, _LORA)
    case.expect("dA", dA, dA_bound, _LORA)
    case.expect("dB", dB, dB_bound + abs(scale) * np.abs(dy).T @ h_bound, _LORA)
    return case


def _embedding() -> Case:
    vocab, hidden, r, scale = 9, 5, 2, 1.5
    case = Case("lora-embedding", "embedding", ("F-5", "B-6"), {"scale": scale})
    ids = np.array([3, 0, 3, 8, 1], np.int64)
    case.inputs |= {
        "ids": ids,
        "W": draw("embedding/W", (vocab, hidden)),
        "A": draw("embedding/A", (r, vocab)),
        "B": draw("embedding/B", (hidden, r)),
        "dy": draw("embedding/dy", (len(ids), hidden)),
    }
    W, A, B, dy = (wide(case.inputs[n]) for n in ("W", "A", "B", "dy"))
    h, s = A[:, ids].T, scale
    g = dy @ B
    dA = _ref.embedding_backward(ids, s * g, vocab).T
    magnitude = np.abs(W)[ids] + s * np.abs(h) @ np.abs(B).T
    case.expect("y", W[ids] + s * h @ B.T, bounds.gamma(r + 4) * magnitude, "gamma_{r+4}")
    g_abs = _ref.embedding_backward(ids, s * np.abs(dy) @ np.abs(B), vocab).T
    chain = hidden + len(ids) + 3
    case.expect("dA", dA, bounds.gamma(chain) * g_abs, "gamma_{hidden+m+3} of the chain")
    dB_bound = bounds.gamma(len(ids) + 2) * s * np.abs(dy).T @ np.abs(h)
    case.expect("dB", s * dy.T @ h, dB_bound, "gamma_{m+2} s |dy|ᵀ |h|")
    return case


# ---- merge -------------------------------------------------------------------------------------


def _merge() -> list[Case]:
    out = []
    for dtype in ("f32", "f16", "bf16"):
        name, scale = f"merge-{dtype}", 2.0 / 3.0
        case = Case(name, "merge", ("M-1", "M-3", "M-7", "M-8"), {"dtype": dtype, "scale": scale})
        W = _ref._narrow(wide(draw(f"{name}/W", (6, 10), 0.1)), dtype)
        A, B = draw(f"{name}/A", (3, 10)), draw(f"{name}/B", (6, 3), 0.2)
        merged, residue = _ref.merge(W, LoRA(A, B, scale), dtype)
        case.inputs |= {"W": _ref._bits(W), "A": A, "B": B}
        case.exact("merged", _ref._bits(merged))
        case.exact("position", residue.position)
        case.exact("bits", residue.bits)
        out.append(case)
    return out


# ---- random streams ----------------------------------------------------------------------------


def _random() -> list[Case]:
    out = []
    params: dict[str, Any]
    for i, (seed, stream, first) in enumerate(
        [(0, 0, 0), (0x0123456789ABCDEF, 0xFEDCBA9876543210, 5), (1, 2, 4 * 2**32 - 2)]
    ):
        # 64-bit numbers as text: JSON's numbers are float64 in many languages
        params = {"seed": str(seed), "stream": str(stream), "first": str(first)}
        case = Case(f"philox-{i}", "philox", ("R-1",), params)
        case.exact("words", _ref.philox(seed, stream, first, 11))
        out.append(case)
    path, shape = "model.layers.1.self_attn.q_proj", (4, 25)
    stream = random.stream("init", path)
    params = {"seed": "7", "name": f"init/{path}", "stream": str(stream)}
    case = Case("unit", "unit", ("R-2", "R-3"), params)
    case.exact("u", random.unit(7, stream, 0, 8))
    out.append(case)
    for method, values in (
        ("kaiming", random.uniform(shape, 1 / math.sqrt(shape[1]), seed=7, stream=stream)),
        ("gaussian", random.normal(shape, 1 / shape[0], seed=7, stream=stream)),
    ):
        params = {"method": method, "seed": "7", "path": path}
        case = Case(f"init-{method}", "init", ("I-1", "I-2", "I-3", "R-4", "R-5"), params)
        case.exact("A", values)
        case.exact("B", np.zeros((6, shape[0]), np.float32))
        out.append(case)
    drop = Drop(0.3, 11, random.stream("dropout", path, "1"), row0=3)
    params = {"p": drop.p, "seed": "11", "path": path, "step": 1, "row0": drop.row0}
    params["stream"] = str(drop.stream)
    case = Case("dropout", "dropout", ("D-2", "D-7", "D-8"), params)
    case.inputs["x"] = draw("dropout/x", (4, 9))
    dropped = _ref.dropout(case.inputs["x"], drop)
    case.exact("kept", (dropped != 0).astype(np.uint8))
    case.exact("y", dropped)
    return [*out, case]


# ---- the parts of a transformer ----------------------------------------------------------------


def _transformer() -> list[Case]:
    return [_rms_norm(), _rope("half"), _rope("interleaved"), _attention(), _swiglu(), _loss()]


def _rms_norm() -> Case:
    case = Case("rms-norm", "rms_norm", ("A-2",), {"eps": 1e-5})
    case.inputs |= {"x": draw("norm/x", (4, 10)), "w": draw("norm/w", (10,))}
    case.inputs["dy"] = draw("norm/dy", (4, 10))
    x, w, dy = (wide(a) for a in case.inputs.values())
    y, rstd = _ref.rms_norm_forward(x, w, 1e-5)
    y_bound, rstd_bound = bounds.rms_norm_forward(x, w, 1e-5)
    dx, _ = _ref.rms_norm_backward(dy, x, w, rstd)
    dx_bound, _ = bounds.rms_norm_backward(dy, x, w, rstd)
    # rstd's own error, relative to |dx| at first order: dx is a sum of r and r³ terms.
    r = rstd[:, None]
    spread = (rstd_bound[:, None] / r) * (
        r * np.abs(dy * w) + 3 * r**3 * np.abs(x) * np.abs(dy * w * x).mean(axis=1)[:, None]
    )
    case.expect("rstd", rstd, rstd_bound, "bounds.rms_norm_forward")
    case.expect("y", y, y_bound, "bounds.rms_norm_forward")
    case.expect("dx", dx, dx_bound + 1.01 * spread, "bounds.rms_norm_backward, and rstd's error")
    return case


def tables(head_dim: int, positions: int, theta: float = 10000.0) -> tuple[Array, Array]:
    """cos and sin [positions, head_dim/2] of rotary embedding, float64."""
    frequency = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    angle = np.arange(positions)[:, None] * frequency
    return np.cos(angle), np.sin(angle)


def _rope(layout: str) -> Case:
    params = {"head_dim": 6, "theta": 10000.0, "layout": layout}
    case = Case(f"rope-{layout}", "rope", ("A-3",), params)
    cos, sin = tables(6, 12)
    position = np.array([0, 1, 7, 11], np.int64)
    x = draw(f"rope/{layout}", (4, 12))
    case.inputs |= {"x": x, "position": position}
    case.inputs |= {"cos": cos.astype(np.float32), "sin": sin.astype(np.float32)}
    rule = "bounds.rope: gamma_2 (|a| + |b|), and u (|a| + |b|) for the tables' rounding"
    bound = 2 * bounds.rope(wide(x), 6)
    case.expect("y", _ref.rope(wide(x), cos, sin, position, 6, layout), bound, rule)
    back = _ref.rope(wide(x), cos, sin, position, 6, layout, inverse=True)
    case.expect("inverse", back, bound, rule)
    return case


def _attention() -> Case:
    attn = Attn(4, 2, 6, 6**-0.5, window=4)
    lengths = [5, 1, 3]
    seqs, m = Seqs.of(lengths), sum(lengths)
    params = {"heads": 4, "kv_heads": 2, "head_dim": 6, "scale": attn.scale, "window": 4}
    case = Case("attention", "attention", ("A-4", "A-5", "A-7"), params | {"lengths": lengths})
    q, k, v = (draw(f"attention/{n}", (m, c)) for n, c in (("q", 24), ("k", 12), ("v", 12)))
    do = draw("attention/do", (m, 24))
    case.inputs |= {"q": q, "k": k, "v": v, "do": do}
    q, k, v, do = wide(q), wide(k), wide(v), wide(do)
    o, lse = _ref.attention_forward(q, k, v, seqs, attn)
    o_bound, lse_bound = bounds.attention_forward(q, k, v, seqs, attn)
    case.expect("o", o, o_bound, "bounds.attention_forward")
    case.expect("lse", lse, lse_bound, "bounds.attention_forward")
    grads = _ref.attention_backward(do, q, k, v, o, lse, seqs, attn)
    limits = bounds.attention_backward(do, q, k, v, o, lse, seqs, attn)
    # o and lse are rounded too: P is off by the factor exp(lse_bound), dS by |do| o_bound more.
    more = _attention_spread(do, q, k, v, o, lse, o_bound, lse_bound, seqs, attn)
    for name, value, limit, extra in zip(("dq", "dk", "dv"), grads, limits, more):
        case.expect(
            name, value, limit + extra, "bounds.attention_backward, and o's and lse's error"
        )
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


def _swiglu() -> Case:
    case = Case("swiglu", "swiglu", ("A-6",))
    for name in ("gate", "up", "dy"):
        case.inputs[name] = draw(f"swiglu/{name}", (3, 8), 2.0)
    case.inputs["gate"][0, :3] = (-90.0, 90.0, -1.2784645)  # both tails, and where dgate cancels
    gate, up, dy = (wide(a) for a in case.inputs.values())
    case.expect(
        "y", _ref.swiglu_forward(gate, up), bounds.swiglu_forward(gate, up), "bounds.swiglu"
    )
    grads, limits = _ref.swiglu_backward(dy, gate, up), bounds.swiglu_backward(dy, gate, up)
    for name, value, limit in zip(("dgate", "dup"), grads, limits):
        case.expect(name, value, limit, "bounds.swiglu_backward")
    return case


def _loss() -> Case:
    case = Case("cross-entropy", "cross_entropy", ("O-1", "O-2"), {"ignore": IGNORE})
    labels = np.array([2, IGNORE, 8, 0, IGNORE], np.int64)
    counted = int((labels != IGNORE).sum())
    case.inputs |= {"logits": draw("loss/logits", (5, 9), 3.0), "labels": labels}
    case.inputs["weight"] = np.full(5, 1 / counted, np.float32)
    logits, weight = wide(case.inputs["logits"]), wide(case.inputs["weight"])
    nll, lse = _ref.cross_entropy_forward(logits, labels)
    nll_bound, lse_bound = bounds.cross_entropy_forward(logits, labels)
    d = _ref.cross_entropy_backward(logits, labels, lse, weight)
    off = weight[:, None] * np.exp(logits - lse[:, None]) * lse_bound[:, None]
    off[labels == IGNORE] = 0
    d_bound = bounds.cross_entropy_backward(logits, labels, lse, weight) + 1.01 * off
    case.expect("nll", nll, nll_bound, "bounds.cross_entropy_forward")
    case.expect("lse", lse, lse_bound, "bounds.cross_entropy_forward")
    case.expect("dlogits", d, d_bound, "bounds.cross_entropy_backward, and lse's error")
    return case


# ---- optimizer ---------------------------------------------------------------------------------


def _adamw() -> Case:
    o = AdamW(lr=0.01, step=3, weight_decay=0.1, grad_scale=0.5)
    params = {n: getattr(o, n) for n in ("lr", "step", "beta1", "beta2", "eps", "weight_decay")}
    case = Case("adamw", "adamw", ("O-3",), params | {"grad_scale": o.grad_scale})
    param, grad, m = (draw(f"adamw/{n}", (12,)) for n in ("param", "grad", "m"))
    # As large as after two steps: what the third adds shows whether beta2 was rounded to float32.
    v = 0.002 * draw("adamw/v", (12,)) ** 2
    case.inputs |= {"param": param, "grad": grad, "m": 0.1 * m, "v": v}
    p, g, m, v = (wide(a) for a in case.inputs.values())
    limits = bounds.adamw_step(p, g, m, v, o)
    _ref.adamw_step(p, g, m, v, o)
    for name, value, limit in zip(("param", "m", "v"), (p, m, v), limits):
        case.expect(f"new_{name}", value, limit, "bounds.adamw_step")
    return case
