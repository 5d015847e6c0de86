"""Laws of chance for the mask of a module: by its path, its step and the place of the rows.

The same is counted as in streams.py, of every implementation that has the method: no promise of
bits is needed. What a careless generator confuses is here more than a seed: seed, path, step and
the place of the rows in the batch all enter a key, and any two keys that differ must have masks of
their own.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pylora.conformance.laws import battery
from pylora.conformance.laws.law import Law
from pylora.conformance.laws.masks import NAMED, PATHS
from pylora.conformance.laws.streams import PART, SHAPES, SHARES, levels, relatives
from pylora.conformance.problems.layers import pick, st
from pylora.conformance.problems.sizes import THOROUGH
from pylora.conformance.testcase import Broken, Problem, Trial
from pylora.types import Array

_STEPS = (1, 2, 7, 12, 256, 65537)
_ROWS = (0, 0, 5, 1000, 2**20 + 3)
_USUAL = 1 << 31  # a step, and the number of an element, that every implementation takes


def _seeds() -> Any:
    return st.integers(0, 2**31 - 1)


# ---- masks ---------------------------------------------------------------------------------------


def _masks() -> Any:
    return st.builds(
        lambda shape, p, seed, path, step, row0, parts: Problem(
            shape=shape, p=p, seed=seed, path=path, step=step, row0=row0, parts=parts
        ),
        pick(SHAPES),
        pick(SHARES),
        _seeds(),
        pick(NAMED),
        pick(_STEPS),
        pick(_ROWS),
        pick((1, 1, 4)),
    )


def _every_shape(dtype: str, examples: int) -> list[Problem]:
    """All shapes with the fairest p, whole and as the parts of a batch."""
    common = {"p": 0.5, "path": NAMED[0], "row0": 0}
    shapes = [s for s in SHAPES if s[0] * s[1] == 65536]
    return [
        Problem(shape=shape, seed=i, step=1 + i, parts=1 + 3 * (i % 2), **common)
        for i, shape in enumerate((*shapes, SHAPES[-1]))
    ]


def _read(t: Trial, p: Problem) -> Array:
    """The mask, put together from parts that are each told where they start."""
    m, k = p.shape
    cuts = np.linspace(0, m, p.parts + 1).astype(int)
    parts = [
        np.asarray(t.dropout_mask((b - a, k), p.p, p.seed, p.path, p.step, p.row0 + a))
        for a, b in zip(cuts.tolist(), cuts[1:].tolist())
    ]
    return np.concatenate(parts).astype(bool)


def _independent(t: Trial, p: Problem) -> None:
    if said := battery.whole(_read(t, p), 1 - p.p).broken():
        where = f"{p.path!r}, step {p.step}, {p.shape} from row {p.row0} on, in {p.parts} parts"
        t.fail(f"the mask of seed {p.seed} with p = {p.p}, {where}: {said}")


def _keys() -> Any:
    return st.builds(
        lambda shape, seed, high, path, step: Problem(
            shape=shape, seed=seed + (high << 32), path=path, step=step
        ),
        pick(((64, 64), (48, 96), (256, 16))),
        _seeds(),
        pick((0, 0, 0x5A5A5A5A)),
        pick(NAMED),
        pick((1, 12, 21, 258)),
    )


Key = tuple[int, str, int, int]  # seed, path, step, row0


def others(p: Problem) -> dict[str, Key]:
    """Keys that differ from that of the problem and that a careless generator takes for it: two of
    its numbers are added, exchanged or written one behind the other, or one is cut off."""
    seed, path, step, (m, k) = p.seed, p.path, p.step, p.shape
    top = (1 << 64) - 1
    found: dict[str, Key] = {
        f"seed {n}": (s, path, step, 0) for n, s in relatives(seed, p.shape).items()
    }
    for bit in range(33):
        found[f"step with bit {bit} changed"] = seed, path, step ^ (1 << bit), 0
    for other in (1, step + 1, step + 2, 2 * step, step + 256):
        found[f"seed xor step, step {other}"] = seed ^ step ^ other, path, other, 0
        found[f"seed + step, step {other}"] = (seed + step - other) & top, path, other, 0
        found[f"seed - step, step {other}"] = (seed - step + other) & top, path, other, 0
        if seed * step % other == 0:
            found[f"seed times step, step {other}"] = seed * step // other & top, path, other, 0
        high = (step ^ other) << 32
        found[f"seed's upper half xor step, step {other}"] = seed ^ high, path, other, 0
    found["seed and step exchanged"] = step, path, max(seed, 1), 0
    for digits in range(1, len(str(step))):
        text = str(step)
        joined = path + text[:digits], max(int(text[digits:]), 1)
        found[f"{digits} digits of the step behind the path"] = (seed, *joined, 0)
    found["the step behind the path, step 1"] = seed, f"{path}{step}", 1, 0
    found["the step as a part of the path"] = seed, f"{path}/{step}", 1, 0
    for i, other_path in enumerate(q for q in PATHS if q != path):
        found[f"path {other_path!r}"] = seed, other_path, step, 0
        found[f"path {other_path!r}, step + {i}"] = seed, other_path, step + i, 0
    found["path in capitals"] = seed, path.upper(), step, 0
    found["path backwards"] = seed, path[::-1], step, 0
    found["path with / for ."] = seed, path.replace(".", "/"), step, 0
    if "." not in path:
        del found["path with / for ."]
    for row0 in (m, 256, 1000, 4096, 65536, 2**16 // k, 2**31 // k, 2**32 // k, 2**33 // k):
        if row0 >= m:
            found[f"from row {row0} on"] = seed, path, step, row0
    own = seed, path, step, 0
    return {name: key for name, key in found.items() if key != own and 0 <= key[2]}


def _unrelated(t: Trial, p: Problem) -> None:
    """Every two keys have masks that know nothing of each other."""
    m, k = p.shape

    def read(key: Key) -> Array:
        seed, path, step, row0 = key
        mask = t.dropout_mask(p.shape, 0.5, seed, path, step, row0)
        return np.asarray(mask).astype(bool)

    try:
        own = read((p.seed, p.path, p.step, 0))
    except Broken:
        if p.seed < 1 << 31:
            raise
        p = p.replaced(seed=p.seed & 0x7FFFFFFF)
        own = read((p.seed, p.path, p.step, 0))
    found = battery.Found()
    for name, key in others(p).items():
        usual = 0 <= key[0] < 1 << 31 and key[2] < _USUAL and (key[3] + m) * k < _USUAL
        try:
            theirs = read(key)
        except Broken:
            if usual:
                raise
            continue  # refused, not cut off
        battery.across(found, f"seed, path, step, row0 {key} ({name})", own, theirs, 0.5)
    if said := found.broken():
        t.fail(f"against the mask of {(p.seed, p.path, p.step, 0)}: {said}")


def _shares() -> Any:
    return st.builds(
        lambda seed, path, step: Problem(seed=seed, path=path, step=step, deep=False),
        _seeds(),
        pick(NAMED),
        pick(_STEPS),
    )


def _share_covered(dtype: str, examples: int) -> list[Problem]:
    """Millions of elements, for a p that 16 bits do not hold."""
    count = 1 if examples < THOROUGH else 4
    return [Problem(seed=i, path=NAMED[i], step=1, deep=True) for i in range(count)]


def _rounded(t: Trial, p: Problem) -> None:
    found = battery.Found()
    m, k = PART
    for rate, n in levels(p.deep):
        mask = t.dropout_mask((n // k, k), rate, p.seed, p.path, p.step)
        kept = int(np.count_nonzero(np.asarray(mask)))
        found.add("p = {}", np.array([kept]), n, 1 - rate, np.array([rate]))
    if said := found.broken():
        t.fail(f"the share that is kept is not 1 - p: {said}")


MASK = ("dropout_mask",)
LAWS = (
    Law(
        "R5",
        "The elements of a module's mask are kept independently of each other, those of the parts "
        "of a batch too.",
        "what R1 counts, of mask(path, step, row0), whole and put together from parts of the batch",
        "rows repeat beyond a tile, the parts of a batch share a mask, neighbours share a draw",
        ("D-9", "D-2"),
        MASK,
        _masks,
        _independent,
        (),
        covering=_every_shape,
        cost=20,
    ),
    Law(
        "R6",
        "Masks of two modules, steps, seeds or places have nothing to do with each other.",
        "mask(key) against mask(key'): the seeds of R2; steps one bit away; seed xor step, seed ± "
        "step, seed · step equal; digits of the step behind the path; paths alike; row0 2¹⁶, 2³¹, "
        "2³² elements further: equal at half of the places at every shift",
        "seed, path and step are added or joined in a way that makes two keys one, or one is cut",
        ("D-5", "D-9", "R-6"),
        MASK,
        _keys,
        _unrelated,
        (),
        cost=33,
    ),
    Law(
        "R7",
        "A module's elements are dropped with the chance p, also where p or 1 - p is tiny.",
        "as R3, of mask(path, step)",
        "p is rounded to a byte or a half",
        ("D-10", "D-2"),
        MASK,
        _shares,
        _rounded,
        (),
        covering=_share_covered,
        cost=50,
    ),
)
