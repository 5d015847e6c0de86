"""Laws of writing adapter files: all that changes the result comes back, and a writer that fails
leaves what was there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from pylora.conformance.laws.container import turned
from pylora.conformance.laws.files import CONFIG, WEIGHTS, adapters, compare, expected, fitting
from pylora.conformance.laws.law import Law
from pylora.conformance.laws.planned import settled
from pylora.conformance.laws.rules import Rules
from pylora.conformance.problems.layers import plans
from pylora.conformance.problems.layouts import LAYOUTS, laid_out
from pylora.conformance.problems.trees import ALPHAS, systematic, trees
from pylora.conformance.testcase import NotTested, Problem, Trial
from pylora.types import Array

Pairs = dict[str, tuple[Array, Array]]


def _settings(t: Trial, p: Problem) -> None:
    """Everything that a config can say survives the way through a file."""
    p, plan = settled(p)
    saved = {**p.config, **_narrowed(p, plan)}
    if set(Rules(saved, p.modules).plan()) != set(plan):
        raise NotTested("a whole path is the end of another one")
    rng = np.random.default_rng(p.seed)
    pairs: Pairs = {}
    for path, (r, _, _) in plan.items():
        d, k = p.modules[path]
        pairs[path] = (
            rng.normal(size=(r, k)).astype(np.float32),
            rng.normal(size=(d, r)).astype(np.float32),
        )
    directory = t.directory() + "/adapter"
    before = json.dumps(p.config)
    # What is saved knows the adapted modules alone: settings that speak of others go by all.
    t.save(directory, pairs, saved)
    if json.dumps(p.config) != before:
        t.fail("save changed the settings that it was given")
    got = t.load(directory, p.modules)
    if set(got) != set(pairs):
        odd = sorted(set(got) ^ set(pairs))
        t.fail(f"load returned other modules than were saved; they differ in {odd}", got)
    for path, (A, B) in pairs.items():
        t.expect(f"A of {path}", got, A, signs=True, item=(path, 0))
        t.expect(f"B of {path}", got, B, signs=True, item=(path, 1))
        s = plan[path][2]
        t.expect(f"scale of {path}", got, s, 2.0**-22 * abs(s), item=(path, 2))


def _every_alpha(dtype: str, examples: int) -> list[Problem]:
    """Some of the systematic problems, each with another alpha."""
    some = systematic()[::40]
    return [
        p.replaced(config={**p.config, "lora_alpha": ALPHAS[i % len(ALPHAS)]})
        for i, p in enumerate(some)
    ]


def _narrowed(p: Problem, plan: Any) -> dict[str, Any]:
    """The targets by their whole paths, and no exclusions: a writer sees the adapted modules alone,
    among which nothing is left to exclude. Patterns stay as they are, in their order."""
    whole: dict[str, Any] = {"target_modules": sorted(plan), "exclude_modules": None}
    if p.config.get("layers_to_transform") is not None:
        whole |= {"layers_to_transform": None, "layers_pattern": None}
    return whole


def _bits(t: Trial, p: Problem) -> None:
    """Any bits, in any layout."""
    p = fitting(p)
    rng, pairs, want = np.random.default_rng(p.seed), {}, {}
    for i, (path, (A, B)) in enumerate(sorted(adapters(p).items())):
        made = []
        for j, a in enumerate((A, B)):
            words = rng.integers(0, 2**32, a.shape, np.uint32)
            words = np.where((words & 0x7F800000) == 0x7F800000, words & 0x807FFFFF, words)
            words.reshape(-1)[: 2 - j] = (0x80000000, 1)[: min(2 - j, words.size)]
            value = words.astype(np.uint32).view(np.float32)
            given = laid_out(value, LAYOUTS[(p.seed + i + j) % len(LAYOUTS)])
            made.append((given, np.array(given, order="C")))
        pairs[path], want[path] = (made[0][0], made[1][0]), (made[0][1], made[1][1])
    directory = t.directory() + "/adapter"
    t.save(directory, pairs, p.config)
    compare(t, t.load(directory, p.modules), want, p)
    for path, (A, B) in pairs.items():
        t.expect(f"A of {path} after save", A, want[path][0], signs=True)
        t.expect(f"B of {path} after save", B, want[path][1], signs=True)


def _replaces(t: Trial, p: Problem) -> None:
    """Another adapter in the same directory; and one over a torn one."""
    p = fitting(p)
    directory = t.directory() + "/adapter"
    first = adapters(p)
    t.save(directory, first, p.config)
    one = p.config["target_modules"][:1]
    q = fitting(p.replaced(config={**p.config, "target_modules": one, "r": p.config["r"] + 1,
                                   "lora_alpha": 5}, seed=p.seed + 1))  # fmt: skip
    second = adapters(q)
    t.save(directory, second, q.config)
    compare(t, t.load(directory, q.modules), second, q)
    t.save(directory, first, p.config)
    compare(t, t.load(directory, p.modules), first, p)
    torn = t.directory() + "/torn"
    t.write(f"{torn}/{CONFIG}", b'{"r": ')
    t.write(f"{torn}/{WEIGHTS}", b"\x10\0\0\0\0\0\0\0{")
    t.save(torn, first, p.config)
    compare(t, t.load(torn, p.modules), first, p)


def _fails(t: Trial, p: Problem) -> None:
    """Arrays that do not fit are refused, and the older adapter is what it was."""
    p = fitting(p)
    directory = t.directory() + "/adapter"
    first = adapters(p)
    t.save(directory, first, p.config)
    path = sorted(first)[p.seed % len(first)]
    (A, B), plan = first[path], expected(p.config, p.modules)
    r = plan[path][0]
    wrong: dict[str, Any] = {
        "one row of A too many": (np.concatenate([A, A[:1]]), B),
        "B of another rank": (A, np.concatenate([B, B[:, :1]], axis=1)),
        "A and B exchanged": (B, A) if B.shape[0] != r or A.shape[1] != r else (A[:, :, None], B),
        "A with a dimension too many": (A[None], B),
        "B that is flat": (A, B.reshape(-1)),
        "no B": (A, None),
    }
    for why in turned(list(wrong), p.seed):
        pairs = {**{q: (2 * a, 2 * b) for q, (a, b) in first.items()}, path: wrong[why]}
        t.must_raise(f"{why}, of {path}", "save", directory, pairs, p.config)
        compare(t, t.load(directory, p.modules), first, p)
    left = sorted(q.name for q in Path(directory).parent.iterdir())
    if left != ["adapter"]:
        t.fail(f"a writer that failed left {left} beside the adapter")


SAVED = ("save", "load")
LAWS = (
    Law(
        "K30",
        "What the settings say comes back: patterns in their order, expressions, any alpha.",
        "load(save(A, B, config)) = (A, B, s) with the settings that T20 draws",
        "an alpha is made an integer, pattern keys are sorted, or rsLoRA is lost",
        ("K-11", "K-5", "T-5"),
        SAVED,
        trees,
        _settings,
        (),
        covering=_every_alpha,
        cost=2,
    ),
    Law(
        "K31",
        "Any bits come back, from arrays of any layout.",
        "random words, subnormals and -0 in strided, transposed, read-only arrays: load(save) has "
        "their bits",
        "numbers pass through 16 bits, subnormals are flushed, or memory is written row by row",
        ("K-5", "F-8"),
        SAVED,
        plans,
        _bits,
        (),
        cost=2,
    ),
    Law(
        "K32",
        "What is saved replaces what was there, whole or torn.",
        "save(first), save(second): load = second, and the reverse; over torn files too",
        "tensors of the older adapter stay in the file, or its settings do",
        ("K-11",),
        SAVED,
        plans,
        _replaces,
        (),
        cost=4,
    ),
    Law(
        "K33",
        "A writer refuses what does not fit, and leaves what was there.",
        "save(misfit) must raise, and load = what was saved before, with nothing beside it",
        "an interrupted save destroys the adapter that it should have replaced",
        ("K-11",),
        SAVED,
        plans,
        _fails,
        (),
        cost=5,
    ),
)
