"""Looks for the cause of a wrong answer that no answer of the suite explains: keys and values of
another adapter. The suite's models are made again from its seed, so any mixture can be computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pylora.conformance.engines import verdict as v
from pylora.conformance.engines.ask import Got
from pylora.conformance.suite import adapters, bases
from pylora.conformance.suite.adapters import Meaning
from pylora.conformance.suite.cases import CASES
from pylora.conformance.suite.sequences import foreign_prefix


def whose_cache(
    entry: Any, seed: int, reader: str, names: Sequence[str], which: int, got: Got, allowed: float
) -> str:
    """Which adapter's cache explains what `reader` was answered to a prompt, as a sentence; ""
    where none does. `names`: the adapters that were in use, "" for the base."""
    if got.prompt or not got.next:
        return ""  # a prompt whose tokens were all judged was not taken from a cache
    base = bases.make(entry["family"], entry["tied"], seed)
    cases = {case.name: case for case in CASES}

    def meaning(name: str) -> Meaning:
        return adapters.draw(cases[name], base, seed).meaning() if name else Meaning()

    mine, others = meaning(reader), {n: meaning(n) for n in names if n != reader}
    if mine.weights:
        return ""
    n = len(entry["answer"]["prompt"][which]) + 1
    for kept in range(n - 1, 0, -1):
        for owner, theirs in others.items():
            answer = foreign_prefix(base, mine, theirs, which, kept)
            said = {"next": {which: answer.next[0]}}
            if not theirs.weights and v.distance([(which, got)], said) <= allowed:
                whom = owner or "the base"
                return f"the first {kept} of {n} tokens are taken from a cache of {whom}"
    return ""
