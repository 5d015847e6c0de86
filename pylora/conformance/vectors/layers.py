"""Golden vectors of layers with more in them: no adapter yet, several, one for each row, tokens in
place of numbers, sixteen bits."""

from __future__ import annotations

from typing import Any

import numpy as np

from pylora.conformance.bounds import ops as bounds
from pylora.conformance.vectors.cases import Case
from pylora.conformance.vectors.ops import RULE, draw, wide
from pylora.reference import Reference
from pylora.types import Array, LoRA

_ref = Reference()


def cases() -> list[Case]:
    """All cases of this file."""
    duplicates, none = [2, 2, 2, 7, 2, 0, 2, 7], np.zeros(0, np.int64)
    return [
        _unread("lora-fresh-nan-in-A"),
        _rows("rows-nan", np.nan),
        _rows("rows-infinity", -np.inf),
        _rows("rows-nan-fresh", np.nan, fresh=True),
        _embedding("lora-embedding", np.array([3, 0, 3, 8, 1])),
        _embedding("lora-embedding-repeated", np.array(duplicates), scale=-0.5),
        _embedding("lora-embedding-none", none),
        _embedding("lora-embedding-B-first", np.array([2, 0]), sparse=0),
        _embedding("lora-embedding-B-last", np.array([2, 0]), sparse=-1),
        _unread_embedding("lora-embedding-nan-in-A"),
        _embedding("lora-embedding-fresh", np.array([1, 4, 4]), fresh=True),
        _stacked(),
        _mixed("mixed", [1, -1, 0, 2, 2, 1, -1, 0, 2]),
        _mixed("mixed-unused", [1, 1, -1, 1]),
        _sixteen("f16"),
        _sixteen("bf16"),
    ]


def _unread(name: str) -> Case:
    """B = 0, and A holds NaN and infinity: nothing of it may be in y or dx (F-2, B-4)."""
    params = {"r": 2, "alpha": 4.0, "use_rslora": False, "scale": 2.0}
    case = Case(name, "lora", ("F-2", "B-4"), params)
    x, W = draw(f"{name}/x", (3, 5)), draw(f"{name}/W", (4, 5))
    A, B = draw(f"{name}/A", (2, 5)), np.zeros((4, 2), np.float32)
    A[0, 1], A[1, 3] = np.nan, np.inf
    dy = draw(f"{name}/dy", (3, 4))
    case.inputs |= {"x": x, "W": W, "A": A, "B": B, "dy": dy}
    rule = "bounds.matmul"
    y, dx = wide(x) @ wide(W).T, wide(dy) @ wide(W)
    case.expect("y", y, bounds.matmul(wide(x), wide(W).T), rule, spec=("F-2",))
    case.expect("dx", dx, bounds.matmul(wide(dy), wide(W)), rule, spec=("B-4",))
    case.expect("dA", np.zeros((2, 5)), 0.0, "zero", spec=("B-4",))
    return case


def _rows(name: str, value: float, *, fresh: bool = False) -> Case:
    """One number of one row of x and of dy is not finite: the other rows must not see it, and that
    row must not hide it."""
    params: dict[str, Any] = {"scale": 2.0, "rows": [0, 2, 3]}
    case = Case(name, "rows", ("F-7", "B-7", "N-5"), params)
    x, W, dy = (draw(f"{name}/{n}", s) for n, s in (("x", (4, 5)), ("W", (6, 5)), ("dy", (4, 6))))
    x[1, 2], dy[1, 4] = value, value
    A, B = draw(f"{name}/A", (2, 5)), draw(f"{name}/B", (6, 2))
    if fresh:
        B[...] = 0
    case.inputs |= {"x": x, "W": W, "A": A, "B": B, "dy": dy}
    rest, lora = params["rows"], LoRA(wide(A), wide(B), 2.0)
    x, W, dy = wide(x)[rest], wide(W), wide(dy)[rest]
    y, h = _ref.lora_forward(x, W, None, lora)
    dx, _, _ = _ref.lora_backward(dy, x, h, W, lora)
    case.expect("y", y, bounds.lora_forward(x, W, None, lora)[0], RULE, spec=("F-7",))
    case.expect("dx", dx, bounds.lora_backward(dy, x, h, W, lora)[0], RULE, spec=("B-7",))
    case.exact("finite", np.array([1, 0, 1, 1], np.uint8), spec=("F-7", "N-5"))
    return case


def _unread_embedding(name: str) -> Case:
    """As above for an embedding: y is the rows of W themselves, in every bit."""
    case, ids = Case(name, "embedding", ("F-2", "F-5"), {"scale": 2.0}), np.array([4, 1], np.int64)
    W, A = draw(f"{name}/W", (6, 3)), draw(f"{name}/A", (2, 6))
    A[0, 4], A[1, 1] = np.nan, np.inf
    dy, B = draw(f"{name}/dy", (2, 3)), np.zeros((3, 2), np.float32)
    case.inputs |= {"ids": ids, "W": W, "A": A, "B": B, "dy": dy}
    case.expect("y", W[ids], 0.0, "rows of W")
    return case


def _embedding(
    name: str, ids: Array, *, scale: float = 1.5, fresh: bool = False, sparse: int | None = None
) -> Case:
    vocab, hidden, r = 9, 5, 2
    case = Case(name, "embedding", ("F-5", "B-6"), {"scale": scale})
    ids, m = ids.astype(np.int64), len(ids)
    A = draw(f"{name}/A", (r, vocab))
    case.inputs |= {
        "ids": ids,
        "W": draw(f"{name}/W", (vocab, hidden)),
        "A": np.zeros_like(A) if fresh else A,
        "B": draw(f"{name}/B", (hidden, r)),
        "dy": draw(f"{name}/dy", (m, hidden)),
    }
    if sparse is not None:  # one number, in this place, and negative: not an empty B
        case.inputs["B"][...] = 0
        case.inputs["B"].flat[sparse] = -0.5
    W, A, B, dy = (wide(case.inputs[n]) for n in ("W", "A", "B", "dy"))
    h, s, size = A[:, ids].T, scale, abs(scale)
    g = dy @ B
    dA = _ref.embedding_backward(ids, s * g, vocab).T
    magnitude = np.abs(W)[ids] + size * np.abs(h) @ np.abs(B).T
    y_bound = bounds.gamma(r + 4) * magnitude
    case.expect("y", W[ids] + s * h @ B.T, y_bound, "gamma_{r+4}", spec=("F-5",))
    g_abs = _ref.embedding_backward(ids, size * np.abs(dy) @ np.abs(B), vocab).T
    chain = bounds.gamma(hidden + m + 3)
    case.expect("dA", dA, chain * g_abs, "gamma_{hidden+m+3} of the chain", spec=("B-6",))
    dB_bound = bounds.gamma(m + 2) * size * np.abs(dy).T @ np.abs(h)
    case.expect("dB", s * dy.T @ h, dB_bound, "gamma_{m+2} s |dy|ᵀ |h|", spec=("B-6",))
    return case


# ---- several adapters --------------------------------------------------------------------------


def _several(case: Case, m: int, d: int, k: int, ranks: list[int]) -> tuple[Any, ...]:
    """Draws the inputs x, W, dy and A.<i>, B.<i>; gives them as float64."""
    name = case.name
    case.inputs |= {"x": draw(f"{name}/x", (m, k)), "W": draw(f"{name}/W", (d, k), k**-0.5)}
    for i, r in enumerate(ranks):
        case.inputs[f"A.{i}"] = draw(f"{name}/A.{i}", (r, k), k**-0.5)
        case.inputs[f"B.{i}"] = draw(f"{name}/B.{i}", (d, r), r**-0.5)
    case.inputs["dy"] = draw(f"{name}/dy", (m, d))
    x, W, dy = (wide(case.inputs[n]) for n in ("x", "W", "dy"))
    loras = [
        LoRA(wide(case.inputs[f"A.{i}"]), wide(case.inputs[f"B.{i}"]), s)
        for i, s in enumerate(case.params["scales"])
    ]
    return x, W, dy, loras


def _stacked() -> Case:
    """Two adapters at once, of different rank and scale."""
    case = Case("stacked", "stacked", ("X-1", "X-2"), {"scales": [2.0, -0.75]})
    x, W, dy, loras = _several(case, 4, 6, 9, [3, 5])
    A = np.concatenate([lora.A for lora in loras])
    B = np.concatenate([lora.scale * lora.B for lora in loras], axis=1)
    whole = LoRA(A, B, 1.0)
    y, h = _ref.lora_forward(x, W, None, whole)
    dx, _, _ = _ref.lora_backward(dy, x, h, W, whole)
    case.expect("y", y, 1.5 * bounds.lora_forward(x, W, None, whole)[0], RULE)
    case.expect("dx", dx, 1.5 * bounds.lora_backward(dy, x, h, W, whole)[0], RULE)
    _gradients(case, x, dy, loras, [np.ones(len(x), bool)] * 2)
    return case


def _mixed(name: str, rows: list[int]) -> Case:
    """Row i of x uses the adapter rows[i], and none for -1; one adapter may have no row."""
    case = Case(name, "mixed", ("X-3", "B-8"), {"scales": [2.0, 0.5, -1.25]})
    x, W, dy, loras = _several(case, len(rows), 6, 9, [3, 1, 5])
    index = case.inputs["rows"] = np.array(rows, np.int64)
    y, dx = x @ W.T, dy @ W
    y_bound, dx_bound = bounds.matmul(x, W.T, extra=4), bounds.matmul(dy, W, extra=4)
    for i, lora in enumerate(loras):
        own = index == i
        y[own], h = _ref.lora_forward(x[own], W, None, lora)
        dx[own], _, _ = _ref.lora_backward(dy[own], x[own], h, W, lora)
        y_bound[own] = bounds.lora_forward(x[own], W, None, lora)[0]
        dx_bound[own] = bounds.lora_backward(dy[own], x[own], h, W, lora)[0]
    case.expect("y", y, y_bound, RULE, spec=("X-3",))
    case.expect("dx", dx, dx_bound, RULE)
    _gradients(case, x, dy, loras, [index == i for i in range(len(loras))])
    return case


def _gradients(case: Case, x: Array, dy: Array, loras: list[LoRA], rows: list[Array]) -> None:
    """dA.<i> and dB.<i> over the rows of each adapter; of no row, zeros."""
    for i, (lora, own) in enumerate(zip(loras, rows)):
        x_i, dy_i, s = x[own], dy[own], abs(lora.scale)
        h, h_bound = x_i @ lora.A.T, bounds.matmul(x_i, lora.A.T)
        W = np.zeros((dy.shape[1], x.shape[1]))
        _, dA, dB = _ref.lora_backward(dy_i, x_i, h, W, lora)
        _, dA_bound, dB_bound = bounds.lora_backward(dy_i, x_i, h, W, lora)
        case.expect(f"dA.{i}", dA, dA_bound, RULE)
        case.expect(f"dB.{i}", dB, dB_bound + s * np.abs(dy_i).T @ h_bound, RULE)


# ---- sixteen bits ------------------------------------------------------------------------------


def _sixteen(dtype: str) -> Case:
    """Everything is stored in 16 bits (as bit patterns), and sums are long and of one sign: what is
    accumulated in 16 bits stops growing (N-2). Results and what is between may be stored so."""
    name, m, d, k, r, scale = f"lora-{dtype}", 2, 3, 700, 2, 0.5
    params = {"r": r, "alpha": scale * r, "use_rslora": False, "scale": scale, "dtype": dtype}
    case = Case(name, "lora16", ("N-2", "F-1", "K-8"), params)
    for key, shape, mean in (("x", (m, k), 1.0), ("W", (d, k), 0.5), ("A", (r, k), 0.25)):
        values = wide(draw(f"{name}/{key}", shape, 0.2 * mean)) + mean
        case.inputs[key] = _ref._bits(_ref._narrow(values, dtype))
    B = wide(draw(f"{name}/B", (d, r)))
    B[0, 0] = 2.0**-18  # in float16 a subnormal number
    case.inputs["B"] = _ref._bits(_ref._narrow(B, dtype))
    x, W, A, B = (_ref._wide(_view(a, dtype), dtype) for a in case.inputs.values())
    u = bounds.unit(dtype)
    h = x @ A.T
    base, low = x @ W.T, scale * h @ B.T
    h_bound = bounds.gamma(k) * np.abs(h) + u * np.abs(h)
    size = np.abs(base) + scale * np.abs(h) @ np.abs(B).T
    y_bound = bounds.gamma(k + r + 4) * size + scale * h_bound @ np.abs(B).T
    y_bound = y_bound + 1.02 * u * (np.abs(base) + 2 * np.abs(low) + np.abs(base + low))
    rule = "gamma_n in float32, and 2⁻¹¹ or 2⁻⁸ for h, both products, their sum stored in 16 bits"
    case.expect("h", h, h_bound, rule)
    case.expect("y", base + low, y_bound, rule)
    return case


def _view(bits: Array, dtype: str) -> Array:
    return bits if dtype == "bf16" else bits.view(np.float16)
