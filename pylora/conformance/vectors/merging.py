"""Golden vectors of merging: ordinary weights, and the edges at which implementations part.

An edge is one column: d = 1, B mostly ones, so that a column of A lists the numbers that are added
up, in order. What W is and what must come out is exact; nothing here depends on a machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pylora.conformance.vectors.cases import Case
from pylora.conformance.vectors.ops import draw, wide
from pylora.reference import Reference
from pylora.types import Array, LoRA

_ref = Reference()
_SPEC = ("M-1", "M-3", "M-7", "M-8")
_SMALL = 2.0**-60  # the last element of an edge's B: its column reaches below float32's numbers
_FORMATS = {"f32": (24, -149, 128), "f16": (11, -24, 16), "bf16": (8, -133, 128)}


def cases() -> list[Case]:
    """All cases of this file."""
    out = []
    for dtype in ("f32", "f16", "bf16"):
        out += [_usual(dtype), _edges(dtype), _unmerge(dtype)]
    return [*out, _scale(), _negative(), _nothing("f32"), _nothing("bf16"), _ranks(), _no_rows()]


def _case(
    name: str, dtype: str, W: Array, A: Array, B: Array, scale: float, spec: Sequence[str] = _SPEC
) -> Case:
    """A case `merge`: W as an array of the dtype (bfloat16: its bits)."""
    case = Case(name, "merge", tuple(spec), {"dtype": dtype, "scale": scale})
    merged, residue = _ref.merge(W, LoRA(A, B, scale), dtype)
    case.inputs |= {"W": _ref._bits(W), "A": A, "B": B}
    case.exact("merged", _ref._bits(merged))
    case.exact("position", residue.position, spec=("M-8",))
    case.exact("bits", residue.bits, spec=("M-8",))
    return case


def _usual(dtype: str) -> Case:
    name = f"merge-{dtype}"
    W = _ref._narrow(wide(draw(f"{name}/W", (6, 10), 0.1)), dtype)
    A, B = draw(f"{name}/A", (3, 10)), draw(f"{name}/B", (6, 3), 0.2)
    return _case(name, dtype, W, A, B, 2.0 / 3.0)


def _column_case(
    name: str, dtype: str, columns: Sequence[tuple[float, Sequence[float]]], scale: float = 1.0
) -> Case:
    """One row of weights: (W, what is added to it in order); the last of five is times 2⁻⁶⁰."""
    W = _ref._narrow(np.array([[w for w, _ in columns]]), dtype)
    A = np.zeros((5, len(columns)), np.float32)
    for j, (_, addends) in enumerate(columns):
        values = np.array(addends, np.float64)
        values[4:] /= _SMALL
        A[: len(values), j] = values
        assert (A[: len(values), j] == values).all(), (name, j)  # a float32 each
    B = np.array([[1, 1, 1, 1, _SMALL]], np.float32)
    return _case(name, dtype, W, A, B, scale)


def _edges(dtype: str) -> Case:
    """Ties, values beside ties, subnormal numbers, overflow, zeros: each of both signs."""
    digits, smallest, top = _FORMATS[dtype]
    half, last = 2.0**-digits, 2.0 ** (1 - digits)  # of 1: half a unit in the last place, and one
    low, largest = 2.0**smallest, (2 - last) * 2.0 ** (top - 1)
    over = 2.0 ** (top - 1) * half  # half a unit of the largest number
    normal = 2.0 ** (smallest + digits - 1)  # the smallest one
    beside, below = half * 2.0**-25, low * 2.0**-50
    columns: list[tuple[float, Sequence[float]]] = [
        (1, [half]),  # a tie: to even, down
        (1 + last, [half]),  # a tie: to even, up
        (1, [half, beside]),  # just above: up. Through float32, bfloat16 would see a tie
        (1 + last, [half, -beside]),  # just below: down
        (1, [half, 0, 0, 0, 2.0**-70]),  # W + t in float64 loses this: a tie again
        (1, [-half / 2]),  # below a power of two the steps are half as large
        (0, [0, 0, 0, 0, low / 2]),  # half the smallest: to zero
        (0, [0, 0, 0, 0, low * 1.5]),  # to even: two of it
        (0, [0, 0, 0, 0, low * (0.5 + 2.0**-20)]),
        (0, [0, 0, 0, low * 0.5 if low > 2.0**-148 else 0, below]),  # just above half
        (low, [0, 0, 0, 0, low]),  # must not be flushed
        (normal, [0, 0, 0, 0, -low / 2]),  # between the largest subnormal and the smallest normal
        (normal, [0, 0, 0, 0, -low]),
        (largest, [over]),  # a tie between the largest and infinity: infinity
        (largest, [over, -over * 2.0**-24]),  # just below it: the largest
        (largest, [over * 2]),
        (largest, [over, over, over * 3]),
        (1, [-1]),
        (3, [2.0**30, -(2.0**30), 0.5]),
    ]
    columns += [(-w, [-a for a in addends]) for w, addends in columns]
    columns += [(np.inf, [1.0]), (-np.inf, [1.0])]  # stays, and is not in the residue
    columns += [(0.0, [0.0]), (-0.0, [0.0]), (-0.0, [-0.0]), (0.0, [-0.0]), (-0.0, [low])]
    return _column_case(f"merge-edges-{dtype}", dtype, columns)


def _ranks() -> Case:
    """The order of the sum: from zero, rank after rank, then times s, then added to W."""
    big, tie = 2.0**53, 2.0**40
    columns: list[tuple[float, Sequence[float]]] = [
        (0.0, [big, 1, -big]),  # 0; in the other order 1
        (0.0, [-big, 1, big]),
        (0.0, [1, big, -big]),
        (1.0, [big, -big]),  # 1; with W in the sum 0
        (0.0, [big, -big, 1]),  # 1; by pairs, too
        (0.0, [1, 1, big, -big]),
        (0.25, [tie, 1, -tie]),  # s × (1), not the sum of s × each
        (0.0, [2.0**24, 1, -(2.0**24)]),  # float64: 1; float32: 0
    ]
    return _column_case("merge-order-of-ranks", "f32", columns, 0.1)


def _scale() -> Case:
    """s = 0.1, which is another number in float32."""
    name, d, k = "merge-scale", 4, 24
    W = draw(f"{name}/W", (d, k), 2.0**-12)
    return _case(name, "f32", W, draw(f"{name}/A", (2, k)), draw(f"{name}/B", (d, 2)), 0.1)


def _negative() -> Case:
    """A negative s times a sum that is 0.0 is -0.0, which leaves a W of -0.0 alone."""
    columns: list[tuple[float, Sequence[float]]] = [
        (-0.0, [0.0]),
        (0.0, [0.0]),
        (-0.0, [1, -1]),
        (0.5, [0.25]),
        (-0.5, [0.25]),
    ]
    return _column_case("merge-negative-scale", "f32", columns, -1.5)


def _nothing(dtype: str) -> Case:
    """B = 0 and NaN nowhere: t is 0.0, so W stays, but -0.0 becomes 0.0 and is in the residue."""
    name = f"merge-fresh-{dtype}"
    W = _ref._narrow(np.array([[1.5, -0.0, 0.0, -2.0], [-0.0, 3.0, -0.0, 0.25]]), dtype)
    return _case(name, dtype, W, draw(f"{name}/A", (2, 4)), np.zeros((2, 2), np.float32), 2.0)


def _no_rows() -> Case:
    """An empty weight has an empty residue."""
    return _case(
        "merge-no-rows",
        "f16",
        np.zeros((0, 4), np.float16),
        draw("merge-no-rows/A", (2, 4)),
        np.zeros((0, 2), np.float32),
        1.0,
        ("F-6", "M-8"),
    )


def _unmerge(dtype: str) -> Case:
    """Back: merged weights and a residue are given, W is to come out, bit for bit."""
    name, params = f"unmerge-{dtype}", {"dtype": dtype, "scale": 2.0 / 3.0}
    case = Case(name, "unmerge", ("M-3", "M-8"), params)
    values = wide(draw(f"{name}/W", (4, 9), 0.05))
    values[0, :3], values[1, 2] = (-0.0, 0.0, 1000.0), 60000.0
    W = _ref._narrow(values, dtype)
    A, B = draw(f"{name}/A", (2, 9)), draw(f"{name}/B", (4, 2), 40.0)
    A[:, 0] = 0  # -0.0 + 0.0 is 0.0: only the residue knows
    merged, residue = _ref.merge(W, LoRA(A, B, params["scale"]), dtype)  # type: ignore[arg-type]
    assert len(residue.position)
    inputs: dict[str, Any] = {"merged": _ref._bits(merged), "A": A, "B": B}
    case.inputs |= inputs | {"position": residue.position, "bits": residue.bits}
    case.exact("W", _ref._bits(W))
    return case
