"""Golden vectors of random streams: words, numbers, initial values, dropout.

All are exact. The rows of the dropout cases were searched for: an element whose word lies between
p as float64 and p as float32, and one whose word is the limit itself.
"""

from __future__ import annotations

import math

import numpy as np

from pylora.conformance.vectors.cases import Case
from pylora.conformance.vectors.ops import draw
from pylora.numbers import random
from pylora.reference import Reference
from pylora.types import Drop

_ref = Reference()
PATH = "model.layers.1.self_attn.q_proj"


def cases() -> list[Case]:
    """All cases of this file."""
    return [*_words(), *_units(), _quantile(), *_initial(), *_dropout()]


def _words() -> list[Case]:
    out = []
    for i, (seed, stream, first) in enumerate(
        [
            (0, 0, 0),
            (0x0123456789ABCDEF, 0xFEDCBA9876543210, 5),
            (1, 2, 4 * 2**32 - 2),  # the counter's lower half overflows
            (2**64 - 1, 2**64 - 1, 3),
            (2**32, 2**63, 2**40 + 1),
        ]
    ):
        # 64-bit numbers as text: JSON's numbers are float64 in many languages
        params = {"seed": str(seed), "stream": str(stream), "first": str(first)}
        case = Case(f"philox-{i}", "philox", ("R-1",), params)
        case.exact("words", _ref.philox(seed, stream, first, 11))
        out.append(case)
    return out


def _units() -> list[Case]:
    out = []
    for name, path in (("unit", PATH), ("unit-name", "modèle.层.0")):
        stream = random.stream("init", path)
        params = {"seed": "7", "name": f"init/{path}", "stream": str(stream)}
        case = Case(name, "unit", ("R-2", "R-3"), params)
        case.exact("u", random.unit(7, stream, 0, 8))
        out.append(case)
    return out


def _quantile() -> Case:
    """AS 241 in all three branches, in both tails, at the borders of the branches and beside them,
    and at the smallest and the largest u that R-3 can give."""
    case = Case("quantile", "quantile", ("R-4",))
    edges = [0.075, 0.925, math.exp(-25.0), 1 - math.exp(-25.0), 0.5]
    u = [2.0**-53, 1 - 2.0**-53, 2.0**-53 * 3, 1e-15, 1 - 2.0**-50, 1e-12, 1 - 1e-12, 1e-8, 0.001]
    u += [0.0749, 0.9251, 0.1, 0.25, 0.3, 0.49999, 0.50001, 0.6, 0.75, 0.9, 0.999, 1 - 1e-8]
    # Where the logarithm of a library gives another last digit of z than the one that is spelt out.
    u += [0.0511029157054531, 0.04366078141355437, 0.053065246287049575, 0.06808675408622455]
    u += [1.7046967485226148e-12, 1.6567747847324757e-14, 9.102885188460357e-14]
    u += [1.1485822083933895e-15, 2.6837781992731218e-15, 1.0610854075880946e-11]
    # Where the last terms of the logarithm's series, and the border of its reduction, show.
    u += [0.0006921981528605538, 1.0516270906195725e-08, 0.0027538770777765617]
    u += [5.394796840600006e-06, 0.04419417824357661]
    for edge in edges:
        step = np.spacing(edge)
        u += [edge - 2 * step, edge - step, edge, edge + step, edge + 2 * step]
    case.inputs["u"] = np.array(sorted(u))
    case.exact("z", random.normal_quantile(case.inputs["u"]))
    return case


def _initial() -> list[Case]:
    """`kind` is "linear" or "embedding", whose A is [r, vocab] and B [hidden, r]."""
    out = []
    for name, kind, method, (d, k, r), path, bias, spec in (
        ("init-kaiming", "linear", "kaiming", (6, 25, 4), PATH, False, ("I-1", "I-2")),
        ("init-gaussian", "linear", "gaussian", (6, 25, 4), PATH, False, ("I-1", "I-3")),
        ("init-gaussian-3", "linear", "gaussian", (5, 40, 3), "lm_head", False, ("I-3",)),
        ("init-false", "linear", "false", (6, 7, 3), "modèle.q_proj", True, ("I-4",)),
        ("init-embedding", "embedding", "kaiming", (5, 11, 2), "embed_tokens", False, ("I-5",)),
        ("init-embedding-false", "embedding", "false", (5, 11, 3), "wte", False, ("I-5",)),
    ):
        params = {"kind": kind, "method": method, "seed": "7", "path": path}
        case = Case(name, "init", (*spec, "I-8", "R-4", "R-5"), params)

        def stream(*suffix: str, path: str = path) -> int:
            return random.stream("init", path, *suffix)

        zeros = np.zeros((d, r), np.float32)
        if kind == "embedding":
            A, B = (
                np.zeros((r, k), np.float32),
                random.normal((d, r), 1.0, seed=7, stream=stream("B")),
            )
            if method == "false":
                A = random.normal((r, k), 1.0, seed=7, stream=stream())
        elif method == "gaussian":
            A, B = random.normal((r, k), 1 / r, seed=7, stream=stream()), zeros
        else:
            A, B = random.uniform((r, k), 1 / math.sqrt(k), seed=7, stream=stream()), zeros
            if method == "false":
                B = random.uniform((d, r), 1 / math.sqrt(r), seed=7, stream=stream("B"))
        case.exact("A", A)
        case.exact("B", B)
        if bias:
            bound = 1 / math.sqrt(r)
            case.exact("bias", random.uniform((d,), bound, seed=7, stream=stream("bias")))
        out.append(case)
    return out


def _dropout() -> list[Case]:
    word = 13949148  # of the element 7 of row 24: that is the limit of p = word / 2³², and is kept
    out = []
    for name, p, row0, spec in (
        ("dropout", 0.3, 3, ("D-2", "D-7", "D-8")),
        ("dropout-zero", 0.0, 0, ("D-4",)),
        ("dropout-tiny", 2.0**-31, 0, ("D-7",)),  # the factor is 1 in float32
        ("dropout-most", 1 - 2.0**-24, 0, ("D-2", "D-7")),
        ("dropout-float32", 0.3, 21241594, ("D-7",)),  # element 7 of row 21241595 tells
        ("dropout-limit", word / 2.0**32, 24, ("D-7",)),
        ("dropout-factor", 0.15, 0, ("D-2", "D-7")),  # 1 - p is rounded to float32, too
        ("dropout-floor", 2058505.5 / 2.0**32, 151, ("D-7",)),  # element 7 of row 151 has 2058505
        ("dropout-far", 0.5, 2**33, ("D-7", "D-8")),
    ):
        drop = Drop(p, 11, random.stream("dropout", PATH, "1"), row0)
        params = {"p": drop.p, "seed": "11", "path": PATH, "step": 1, "row0": drop.row0}
        params["stream"] = str(drop.stream)
        case = Case(name, "dropout", spec, params)
        x = case.inputs["x"] = draw(f"{name}/x", (4, 9))
        dropped = _ref.dropout(x, drop)
        case.exact("kept", (dropped != 0).astype(np.uint8))
        case.exact("y", dropped)
        out.append(case)
    return out
