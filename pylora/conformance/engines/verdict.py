"""Judges what an engine said: right, or wrong by a rule that has a name, or by none that is known.

An engine is right where every number that it gave is within the tolerance of the right answer's,
and wrong by a rule where that holds for what the rule would answer. Where both hold, nothing is
claimed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pylora.conformance.engines.ask import Got

RIGHT, WRONG, REFUSED, FAILED = "right", "WRONG", "refused", "FAILED"
CANNOT_SAY, NOT_TESTED, CANNOT_TELL = "not expressible", "not tested", "cannot tell"
BAD = (WRONG, FAILED)

Answer = Mapping[str, Any]  # {"prompt": [[...]], "next": [[...]]}


@dataclass(frozen=True)
class Verdict:
    """kind: one of the words above; text: a sentence; rule: the wrong rule that is followed;
    error: the largest difference from the right answer, in `unit`; tolerance: what was allowed."""

    kind: str
    text: str = ""
    rule: str = ""
    error: float | None = None
    tolerance: float | None = None
    unit: str = "nats"


def distance(got: Sequence[tuple[int, Got]], answer: Answer) -> float:
    """The largest difference of the numbers of some prompts (by index) from an answer's.

    Infinite where a number is NaN, or where there is none to compare.
    """
    most, count = 0.0, 0
    for which, g in got:
        pairs = [(v, answer["prompt"][which][i - 1]) for i, v in g.prompt.items()]
        pairs += [(v, answer["next"][which][t]) for t, v in g.next.items()]
        for value, wanted in pairs:
            off = abs(value - wanted)
            most = math.inf if math.isnan(off) else max(most, off)
            count += 1
    return most if count else math.inf


def judge(
    got: Sequence[tuple[int, Got]],
    right: Answer,
    wrong: Mapping[str, Answer],
    sentences: Mapping[str, str],
    tolerance: float,
) -> Verdict:
    """The verdict on these numbers. `sentences` say each wrong rule in words."""
    off = distance(got, right)
    # Some prompts may be right, such as where only the first request after a change is wrong.
    bad = [g for g in got if distance([g], right) > tolerance] or got
    others = sorted((distance(bad, answer), rule) for rule, answer in wrong.items())
    near = others[0] if others else (math.inf, "")
    some = f" (in {len(bad)} of {len(got)} answers)" if len(bad) < len(got) else ""
    if off <= tolerance:
        if near[0] <= tolerance:
            text = f"at this precision it might also be that {sentences[near[1]]}"
            return Verdict(CANNOT_TELL, text, near[1], off, tolerance)
        return Verdict(RIGHT, "", "", off, tolerance)
    if near[0] <= tolerance:
        return Verdict(WRONG, sentences[near[1]] + some, near[1], off, tolerance)
    if math.isinf(off):
        return Verdict(WRONG, "what it gives are no numbers (NaN)", "", off, tolerance)
    text = f"off by {off:.3g} nats{some}, {tolerance:.2g} allowed; by no rule that is known"
    if near[1]:
        text += f" (nearest, {near[0]:.3g} off: {sentences[near[1]]})"
    return Verdict(WRONG, text, "", off, tolerance)
