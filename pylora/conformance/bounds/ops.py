"""Tolerances of a backend's operations: how far a floating-point result may be from the exact one,
derived from the dtype, the length of the sums and the magnitudes that were summed. The bounds of
the laws, which hold for whole functions computed in any way, are in layer.py, built on these.

Every function returns an array of absolute bounds of the shape of the result it is named after, for
a computation in `dtype` against the exact value of the same inputs (float64 stands in for exact).
They hold for any order of summation, with or without fused multiply-adds, so every backend is held
to the same bound; a wrong scale, a lost term or a stale row is far outside of it.

The theorems (N. J. Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., 2002):

- u, the unit roundoff: fl(a op b) = (a op b)(1 + δ), |δ| <= u. For + - * / and sqrt (sect. 2.2).
- Lemma 3.1: a product of n factors (1 + δ_i)^±1 is 1 + θ with |θ| <= gamma_n = n u / (1 - n u).
- Lemma 3.3: (1 + θ_j)(1 + θ_k) = 1 + θ_{j+k}: a chain of operations adds up its counts.
- (3.5): a dot product of length n has error <= gamma_n sum |x_i| |y_i|, in any order.

Where an exact result is below the smallest normal number the relative bounds do not hold; `tiny`
is the absolute error that an underflow adds.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from pylora.reference import IGNORE, Reference
from pylora.types import AdamW, Array, Attn, LoRA, Seqs

# Roundings that one exp or log may be away from exact: NumPy documents < 4 ulp for float32 exp and
# log, the C core's are within 2 ulp; one ulp is at most 2 u.
EXP = 8
DROP = 3  # 1 - p, its reciprocal, and the product with x
SCALE = 2  # the scale rounded to dtype, and the product with it


@cache
def unit(dtype: Any = np.float32) -> float:
    """u, the unit roundoff of round to nearest: half the distance from 1 to the next number.

    `dtype` is anything NumPy takes, or "f32", "f16", "bf16", "f64".
    """
    names = {"f64": 2.0**-53, "f32": 2.0**-24, "f16": 2.0**-11, "bf16": 2.0**-8}
    names["bfloat16"] = names["bf16"]
    if str(dtype) in names:
        return names[str(dtype)]
    return float(np.finfo(dtype).eps) / 2


def tiny(dtype: Any = np.float32) -> float:
    """What an underflow may add: the smallest normal number, should subnormals be flushed; those
    of float16 may not be (spec H-2)."""
    if str(dtype) in ("bfloat16", "float16"):
        return 2.0**-24 if str(dtype) == "float16" else 2.0**-126
    return float(np.finfo(dtype).tiny)


def gamma(n: float, dtype: Any = np.float32) -> float:
    """gamma_n = n u / (1 - n u) (Higham, lemma 3.1): the relative error of n roundings."""
    nu = n * unit(dtype)
    if nu >= 1:
        raise ValueError(f"gamma_n says nothing at n = {n}, u = {unit(dtype)}")
    return float(nu / (1 - nu))


def assert_within(got: Array, want: Array, bound: Array | float, what: str = "result") -> None:
    """Fails, naming the worst element, unless |got - want| <= bound everywhere.

    Equal elements (also infinities) are within any bound; NaN is within none.
    """
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape, f"{what}: shape {got.shape}, expected {want.shape}"
    if got.size == 0:
        return
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.where(got == want, 0.0, np.abs(got.astype(np.float64) - want))
    limit = np.broadcast_to(np.asarray(bound, np.float64), error.shape)
    bad = ~(error <= limit)
    if bad.any():
        over = np.where(np.isfinite(error / np.maximum(limit, 1e-300)), error, np.inf)
        at = np.unravel_index(np.argmax(np.where(bad, over, -1)), error.shape)
        raise AssertionError(
            f"{what}{[int(i) for i in at]}: got {got[at]!r}, expected {want[at]!r}: off by "
            f"{error[at]:.3g}, allowed {limit[at]:.3g} ({int(bad.sum())} of {error.size} are out)"
        )


def matmul(x: Array, M: Array, dtype: Any = np.float32, extra: int = 0) -> Array:
    """x [m,K] M [K,n]: gamma_{K + extra} |x| |M| (Higham, 3.5 and 3.13)."""
    return gamma(x.shape[1] + extra, dtype) * (_abs(x) @ _abs(M))


# ---- LoRA linear ------------------------------------------------------------------------------


def lora_forward(
    x: Array,
    W: Array,
    bias: Array | None = None,
    lora: LoRA | None = None,
    residual: Array | None = None,
    *,
    p: float = 0.0,
    dtype: Any = np.float32,
) -> tuple[Array, Array | None]:
    """Of y and h. The base's sum has k + 2 terms; the adapter's is a chain of two products, so by
    lemma 3.3 gamma_{k + r + ...} s |drop(x)| |A|ᵀ |B|ᵀ. `p` is the dropout probability."""
    k, X = x.shape[1], _abs(x)
    total, n, bound_h = X @ _abs(W).T, k + 4, None
    if bias is not None:
        total = total + _abs(bias)
    if residual is not None:
        total = total + _abs(residual)
    if lora is not None:
        H = X @ _abs(lora.A).T / (1 - p)
        bound_h = gamma(k + DROP, dtype) * H
        n += DROP + lora.rank + SCALE + 1
        total = total + abs(lora.scale) * (H @ _abs(lora.B).T)
    return gamma(n, dtype) * total, bound_h


def lora_backward(
    dy: Array,
    x: Array,
    h: Array,
    W: Array,
    lora: LoRA,
    add: Array | None = None,
    *,
    p: float = 0.0,
    dtype: Any = np.float32,
) -> tuple[Array, Array, Array]:
    """Of dx, dA, dB: chains of two products (g = dy B the first), gamma of the sum of lengths."""
    (m, d), r, s = dy.shape, lora.rank, abs(lora.scale)
    D, A, B = _abs(dy), _abs(lora.A), _abs(lora.B)
    dx = D @ _abs(W) + s * ((D @ B) @ A) / (1 - p)
    if add is not None:
        dx = dx + _abs(add)
    dA = s * (D @ B).T @ _abs(x) / (1 - p)
    return (
        gamma(d + r + SCALE + DROP + 2, dtype) * dx,
        gamma(d + m + SCALE + DROP, dtype) * dA,
        gamma(m + SCALE, dtype) * (s * D.T @ _abs(h)),
    )


def merged_forward(
    x: Array, W: Array, lora: LoRA, *, stored: str = "f32", dtype: Any = np.float32
) -> Array:
    """Of x W'ᵀ against x Wᵀ + s x Aᵀ Bᵀ, both computed in `dtype`, W' = round(W + s B A) stored as
    `stored`: twice the bound of the adapter's path, and u_stored |x| |W'|ᵀ for the one rounding."""
    delta = abs(lora.scale) * (_abs(lora.B) @ _abs(lora.A))
    half = 2.0**-25 if stored == "f16" else 0.0  # half of f16's smallest subnormal number
    rounding = unit(stored) * (_abs(W) + delta) + half
    return 2 * lora_forward(x, W, None, lora, dtype=dtype)[0] + _abs(x) @ (2 * rounding).T


# ---- transformer ------------------------------------------------------------------------------


def rms_norm_forward(
    x: Array, w: Array, eps: float, dtype: Any = np.float32
) -> tuple[Array, Array]:
    """Of y and rstd. A sum of K squares has no cancellation, so it is off by at most gamma_{K+4}
    relatively; 1/sqrt halves that and adds two roundings."""
    rstd = 1 / np.sqrt((_abs(x) ** 2).mean(axis=1) + eps)
    n = (x.shape[1] + 4) / 2 + 3
    return gamma(n + 2, dtype) * _abs(x) * rstd[:, None] * _abs(w), gamma(n, dtype) * rstd


def rms_norm_backward(
    dy: Array,
    x: Array,
    w: Array,
    rstd: Array,
    add: Array | None = None,
    dtype: Any = np.float32,
) -> tuple[Array, Array]:
    """Of dx and dw, with rstd an exact input: each term's magnitude times gamma of its chain."""
    X, r, dyw = _abs(x), _abs(rstd)[:, None], _abs(dy) * _abs(w)
    dx = r * (dyw + X * r * r * (dyw * X).mean(axis=1)[:, None])
    if add is not None:
        dx = dx + _abs(add)
    dw = (_abs(dy) * X * r).sum(axis=0)
    return gamma(x.shape[1] + 9, dtype) * dx, gamma(x.shape[0] + 2, dtype) * dw


def rope(x: Array, head_dim: int, dtype: Any = np.float32) -> Array:
    """a c - b s with |c|, |s| <= 1: gamma_2 (|a| + |b|) bounds both layouts' pairs; the largest
    element of the head stands for |a| and |b|."""
    heads = _abs(x).reshape(x.shape[0], x.shape[1] // head_dim, head_dim)
    top = heads.max(axis=2, keepdims=True)
    return np.broadcast_to(gamma(2, dtype) * 2 * top, (*top.shape[:2], head_dim)).reshape(x.shape)


def attention_forward(
    q: Array, k: Array, v: Array, seqs: Seqs, attn: Attn, dtype: Any = np.float32
) -> tuple[Array, Array]:
    """Of o and lse. A score is off by δ <= gamma_{D+2} scale |q| |k|, and s - top by another
    u |s - top|; softmax maps that to a factor within exp(±2 max δ); the sums are of n positive
    terms (gamma_n), and o is sum P |v|."""
    u = unit(dtype)
    bound_o, bound_lse = np.zeros(q.shape), np.zeros((q.shape[0], attn.heads))
    for t, h, S, mag, Vt, _, out in _each_query(q, k, v, seqs, attn):
        n, top = S.size, S.max()
        shift = gamma(attn.head_dim + 2, dtype) * mag + u * (top - S) + _cap_off(S, attn, dtype)
        total = np.exp(S - top).sum()
        P = np.exp(S - top) / total
        relative = np.expm1(2 * shift.max()) + gamma(2 * n + EXP + 3, dtype)
        bound_o[t, out] = (P @ np.abs(Vt)) * relative + tiny(dtype) * n * np.abs(Vt).max()
        log_total = float(np.log(total))
        bound_lse[t, h] = (
            shift.max() * 1.01
            + gamma(n + EXP + 1, dtype) * (1 + log_total)
            + gamma(2, dtype) * (abs(top) + log_total)
        )
    return bound_o, bound_lse


def attention_backward(
    do: Array,
    q: Array,
    k: Array,
    v: Array,
    o: Array,
    lse: Array,
    seqs: Seqs,
    attn: Attn,
    dtype: Any = np.float32,
) -> tuple[Array, Array, Array]:
    """Of dq, dk, dv with o and lse exact inputs. P = exp(s - lse) is off by the factor of the
    forward bound; dS = P (dP - sum do o) by gamma_D of its magnitudes; then sums over the n keys,
    or over the queries and the heads that share a key."""
    u = unit(dtype)
    dq, dk, dv = np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)
    shared = q.shape[0] * (attn.heads // attn.kv_heads)
    for t, h, S, mag, Vt, (a, b, Kt, kv), out in _each_query(q, k, v, seqs, attn):
        capped = _cap_off(S, attn, dtype)
        shift = gamma(attn.head_dim + 2, dtype) * mag + u * np.abs(S - lse[t, h]) + capped
        P = np.exp(S - lse[t, h])
        off = np.expm1(shift) + gamma(EXP, dtype)
        g = _abs(do[t, out])
        M = P * (np.abs(Vt) @ g + g @ _abs(o[t, out])) * attn.scale
        slope = 2 * shift / attn.softcap + gamma(6, dtype) if attn.softcap else 0.0
        dS = M * (off + slope + gamma(attn.head_dim + 4, dtype)) + tiny(dtype)
        dq[t, out] = (dS + gamma(b - a + 2, dtype) * M) @ np.abs(Kt)
        dk[a:b, kv] += (dS + gamma(shared + 2, dtype) * M)[:, None] * _abs(q[t, out])
        dv[a:b, kv] += (P * (off + gamma(shared, dtype)) + tiny(dtype))[:, None] * g
    return dq * 1.01, dk * 1.01, dv * 1.01  # products of two of these small terms


def swiglu_forward(gate: Array, up: Array, dtype: Any = np.float32) -> Array:
    """e = exp(-|gate|), 1 + e, a quotient and two products: EXP + 4 roundings of the result."""
    y = _abs(gate) * _sigmoid(gate) * _abs(up)
    return gamma(EXP + 4, dtype) * y + tiny(dtype) * (1 + _abs(gate)) * (1 + _abs(up))


def swiglu_backward(
    dy: Array, gate: Array, up: Array, dtype: Any = np.float32
) -> tuple[Array, Array]:
    """Of dgate and dup; 1 + gate (1 - σ) cancels near gate = -1.28, hence its magnitude."""
    s, G, D, U = _sigmoid(gate), _abs(gate), _abs(dy), _abs(up)
    floor = tiny(dtype) * (1 + G) ** 2 * (1 + D) * (1 + U)
    dgate = D * U * s * (1 + G * _sigmoid(-np.asarray(gate, np.float64)))
    return (
        gamma(2 * EXP + 10, dtype) * dgate + floor,
        gamma(EXP + 4, dtype) * D * G * s + floor,
    )


def embedding_backward(ids: Array, dy: Array, rows: int, dtype: Any = np.float32) -> Array:
    """Sums of as many rows as an id occurs."""
    total = np.zeros((rows, dy.shape[1]))
    np.add.at(total, ids, _abs(dy))
    return gamma(max(1, len(ids)), dtype) * total


# ---- loss and optimizer -----------------------------------------------------------------------


def cross_entropy_forward(
    logits: Array, labels: Array, dtype: Any = np.float32
) -> tuple[Array, Array]:
    """Of nll and lse. sum exp(x - top) is off by sum p u |x - top| + gamma_{n + EXP} relatively;
    a log turns relative error into absolute; then one sum and one difference."""
    x = np.asarray(logits, np.float64)
    top = x.max(axis=1)
    e = np.exp(x - top[:, None])
    total = e.sum(axis=1)
    relative = unit(dtype) * (e * (top[:, None] - x)).sum(axis=1) / total
    relative = (relative + gamma(x.shape[1] + EXP, dtype)) * 1.01
    lse = top + np.log(total)
    bound = relative + gamma(EXP, dtype) * np.log(total) + gamma(1, dtype) * np.abs(lse)
    picked = x[np.arange(len(x)), np.where(labels == IGNORE, 0, labels)]
    nll = np.where(labels == IGNORE, 0, bound + gamma(2, dtype) * np.abs(lse - picked))
    return nll, bound


def cross_entropy_backward(
    logits: Array, labels: Array, lse: Array, weight: Array, dtype: Any = np.float32
) -> Array:
    """exp(x - lse) is off by u |x - lse| + EXP u relatively; minus one-hot, times weight."""
    away = np.asarray(logits, np.float64) - np.asarray(lse, np.float64)[:, None]
    p = np.exp(away)
    bound = p * (np.expm1(unit(dtype) * np.abs(away)) + gamma(EXP + 2, dtype))
    row = np.arange(len(p))
    bound[row, np.where(labels == IGNORE, 0, labels)] += gamma(3, dtype)
    bound *= 1.01 * np.where(labels == IGNORE, 0, _abs(weight))[:, None]
    return bound + tiny(dtype) * np.where(labels == IGNORE, 0, 1 + _abs(weight))[:, None]


def adamw_step(
    param: Array, grad: Array, m: Array, v: Array, o: AdamW, dtype: Any = np.float32
) -> tuple[Array, Array, Array]:
    """Of param, m, v. Each coefficient is rounded once; m sums two terms of any sign, v two
    positive ones; the update is m_hat / (sqrt(v_hat) + eps), no cancellation below the bar."""
    g = _abs(grad) * abs(o.grad_scale)
    mag_m = o.beta1 * _abs(m) + (1 - o.beta1) * g
    new_v = o.beta2 * _abs(v) + (1 - o.beta2) * g * g
    denominator = np.sqrt(new_v / (1 - o.beta2**o.step)) + o.eps
    update = o.lr * mag_m / (1 - o.beta1**o.step) / denominator
    decayed = _abs(param) * (1 + o.lr * o.weight_decay)
    # v below the normal numbers has lost digits; eps keeps what that does to the update small.
    lost = update * np.sqrt(tiny(dtype) / (1 - o.beta2**o.step)) / denominator
    return (
        gamma(4, dtype) * decayed + gamma(20, dtype) * update + lost + tiny(dtype),
        gamma(6, dtype) * mag_m + tiny(dtype),
        gamma(9, dtype) * new_v + tiny(dtype),
    )


def sum_squares(x: Array) -> float:
    """Squares of float32 are exact in float64 and all positive: gamma_n of the sum, in float64."""
    return gamma(max(1, np.size(x)), np.float64) * float((_abs(x) ** 2).sum())


# ---- compositions -----------------------------------------------------------------------------


def chain(*lengths: float, dtype: Any = np.float32) -> float:
    """A relative tolerance for operations one behind the other whose sums have these lengths, each
    well conditioned against the magnitude that the caller multiplies by (Higham, lemma 3.3)."""
    return gamma(sum(lengths), dtype)


def chain_random(*lengths: float, sigmas: float = 6.0, dtype: Any = np.float32) -> float:
    """As `chain`, for long chains, where the worst case is far from what happens: if roundings are
    independent with mean zero, n of them are within sigmas sqrt(n) u, but for a probability of
    2 exp(-sigmas² / 2) (Higham & Mary, SIAM J. Sci. Comput. 41(5), 2019, theorem 2.4)."""
    n, u = sum(lengths), unit(dtype)
    return float(np.expm1((sigmas * np.sqrt(n) * u + n * u * u) / (1 - u)))


# ---- helpers ----------------------------------------------------------------------------------


def _abs(a: Array) -> Array:
    return np.abs(np.asarray(a, np.float64))


def _sigmoid(x: Array) -> Array:
    return Reference()._sigmoid(np.asarray(x, np.float64))


def _each_query(q: Array, k: Array, v: Array, seqs: Seqs, attn: Attn) -> Any:
    """For each query and head: (row, head, scores, their magnitudes, values, (a, b, keys, columns
    of the kv head), columns of the head), in float64."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    D, group = attn.head_dim, attn.heads // attn.kv_heads
    for t, a, b in Reference()._spans(seqs, attn):
        for h in range(attn.heads):
            out, kv = slice(h * D, (h + 1) * D), slice(h // group * D, (h // group + 1) * D)
            K, V = k[a:b, kv], v[a:b, kv]
            mag = attn.scale * (np.abs(K) @ np.abs(q[t, out]))
            S = attn.scale * (K @ q[t, out])
            if attn.softcap:
                S = attn.softcap * np.tanh(S / attn.softcap)
            yield t, h, S, mag, V, (a, b, K, kv), out


def _cap_off(S: Array, attn: Attn, dtype: Any) -> Array:
    """What capping adds to a score's error, which itself it only makes smaller; tanh by exp: see
    bounds/features.py."""
    return gamma(3 * EXP + 12, dtype) * np.abs(S) if attn.softcap else 0 * S
