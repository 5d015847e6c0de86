"""A counterexample as a program that shows the failure alone: the arrays, the calls in order, and
the relation that does not hold, both of whose sides it computes. It ends with an error while the
fault is there, and with none when it is mended.

Nothing of this package is imported but what the calls themselves need: the oracle's formulas are
written out. Where a law does what cannot be written down in this way (threads, say), the program
gives the law itself the problem; and where the failure hangs on other calls before it, it searches
again. Which of the three it is, is tried out: a program must fail with the implementation, and pass
with one that is right.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from typing import Any

import numpy as np

from pylora.conformance.laws.law import Law
from pylora.conformance.protocol import precision_of
from pylora.conformance.running.writing import MARK, Writer
from pylora.conformance.testcase import Problem, Trial, Violation


def program(
    implementation: Any,
    law: Law,
    problem: Problem,
    trial: Trial,
    violation: Violation,
    title: str,
    search: tuple[int, int],
) -> str:
    """Python source that ends with an error while the failure is there. `search`: the number of
    examples, and the seed, that found it."""
    try:
        source = Writer(implementation, trial).write(violation, title)
    except (ValueError, TypeError, OSError):  # no source, or no text for something: the other form
        source = ""
    if source and _shows(source, implementation):
        return source
    source = Writer(implementation, trial).by_law(law, problem, title)
    if _shows(source, implementation):
        return source
    return Writer(implementation, trial).by_search(law, search, title)


def searched(
    implementation: Any, law: Any, trial: Trial, title: str, search: tuple[int, int]
) -> str:
    """The program that searches again with the law, for a problem too large to be written out."""
    return Writer(implementation, trial).by_search(law, search, title)


def _shows(source: str, implementation: Any) -> bool:
    """Whether the program fails with a fresh one of these, and passes with one that is right."""
    try:
        fresh = type(implementation)()
    except Exception:  # it was made with arguments
        fresh = implementation
    return fails(source, fresh) and not fails(source, right(implementation))


def fails(source: str, implementation: Any) -> bool:
    """Whether the program ends with an error, for this implementation in place of its own."""
    lines = source.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith(MARK))
    lines[at] = ""
    lines = ["" if line.startswith("from __main__") else line for line in lines]
    space: dict[str, Any] = {"__name__": "counterexample", "implementation": implementation}
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with np.errstate(all="ignore"):
                exec(compile("\n".join(lines), "counterexample", "exec"), space)
    except Exception:
        return True
    return False


def right(implementation: Any) -> Any:
    """A correct implementation that stores weights as this one says that it does."""
    from pylora.conformance.correct import plain as wide
    from pylora.conformance.correct import rounded

    by = {"fp32x3": rounded.Fp32x3, "bf16": rounded.Bf16}
    by |= {"int8": rounded.Int8, "int4": rounded.Int4}
    by |= {"int8a8": rounded.Int8a8, "int4a8": rounded.Int4a8, "blocks": rounded.Blocks}
    return by.get(precision_of(implementation), wide.Correct)()
