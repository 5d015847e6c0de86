"""Laws of statements that belong to no larger group: the scale's precision, shared weights, modules
that cannot take LoRA, ways of initialising that change the base."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np

from pylora.conformance.bounds import layer as bounds
from pylora.conformance.laws import allowed, oracle
from pylora.conformance.laws.law import Law
from pylora.conformance.laws.planned import settled
from pylora.conformance.problems.layers import exact_problems, pick, st
from pylora.conformance.problems.trees import trees
from pylora.conformance.testcase import Broken, NotTested, Problem, Trial

ALPHAS = (16, 1, 3, 0.1, 2.5, 1e-3, 7, 1 / 3, 1e5, 12345.678)
RANKS = (1, 2, 3, 5, 7, 8, 12, 13, 64, 96, 255, 1000, 4097)


def _scales() -> object:
    return st.builds(
        lambda alpha, r, rslora: Problem(alpha=alpha, r=r, rslora=rslora),
        pick(ALPHAS), pick(RANKS), st.booleans(),
    )  # fmt: skip


def _rounded_once(t: Trial, p: Problem) -> None:
    got = float(t.scaling(p.alpha, p.r, p.rslora))
    if p.rslora:
        want = float(p.alpha / math.sqrt(p.r))
    else:
        want = float(Fraction(p.alpha) / p.r)
    unit = bounds.relative(1, "float32")
    t.note("the scale rounded once", abs(got - want) <= unit * want)
    # The root, the quotient and alpha itself may each have been rounded to float32.
    t.expect("the scale", got, want, bounds.relative(3, "float32") * want)


def _shared(t: Trial, p: Problem) -> None:
    """Two modules over the same array, as a tied embedding and head are."""
    W = p.W.copy()
    one, other = t.module(W, p.bias), t.module(W, p.bias)
    if not one.has("merge"):
        raise NotTested("the module has no merge()")
    before = other.forward(p.x).copy()
    try:
        one.attach(p.A, p.B, p.scale)
        one.merge()
    except Broken:
        return  # refused, which is right as well
    t.expect("y of the module that shares W", other.forward(p.x), before, _again(t, p))
    want = oracle.forward(p.x, t.weight(p.W), [(p.A, p.B, p.scale)], p.bias)
    if t.exact:
        t.expect("y of the merged module", one.forward(p.x), want, allowed.forward(t, p))


def _again(t: Trial, p: Problem) -> Any:
    return 0.0 if t.bitwise or t.exact else 2 * np.asarray(allowed.base(t, p))


INITS = ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "PiSSA", "OLoRA")


def _changes_base(t: Trial, p: Problem) -> None:
    p, _ = settled(p)
    known = tuple(str(m).lower() for m in getattr(t.implementation, "init_methods", ()))
    for name in INITS:
        if name.lower().split("_niter")[0] not in known:
            said = f"init_lora_weights = {name!r}, which changes the base's weights"
            t.must_raise(said, "plan", {**p.config, "init_lora_weights": name}, p.modules)


def _no_lora(t: Trial, p: Problem) -> None:
    p, want = settled(p)
    path = sorted(want)[p.seed % len(want)]
    norm = f"{path.rsplit('.', 1)[0]}.input_norm" if "." in path else "input_norm"
    modules = {**p.modules, norm: None}
    plain = {"r": 4, "lora_alpha": 8}
    named = {**plain, "target_modules": [path, "input_norm"]}
    try:
        got = t.plan({**plain, "target_modules": [path]}, modules)
    except Broken as broken:
        raise NotTested(f"plan takes no module without LoRA: {broken}") from None
    if norm in got:
        t.fail(f"{norm}, which nobody named, is adapted")
    t.must_raise(f"{norm!r}, which cannot take LoRA", "plan", named, modules)
    whole = {**plain, "target_modules": [norm]}
    t.must_raise(f"{norm!r} alone, which cannot take LoRA", "plan", whole, modules)
    every = t.plan({**plain, "target_modules": "all-linear"}, modules)
    if set(every) != set(p.modules) - {"lm_head"}:
        t.fail(f'"all-linear" chose {sorted(set(every) ^ set(p.modules))} wrongly')


LAWS = (
    Law(
        "S3",
        "The scale is as exact as float32 allows.",
        "|s - alpha / r| <= gamma_3 of float32, with rsLoRA too; whether it was rounded once is "
        "counted",
        "it goes through 16 bits, or through a reciprocal square root of few digits",
        ("S-5", "S-1"),
        ("scaling",),
        _scales,
        _rounded_once,
        (),
    ),
    Law(
        "D20",
        "Merging into a weight that two modules share reaches one of them, or is refused.",
        "y of the other module = y before, exact",
        "a tied head changes with the embedding, or a layer that is used twice is merged twice",
        ("M-6",),
        ("module",),
        exact_problems,
        _shared,
        ("x", "W", "A", "B", "bias"),
        cost=2,
    ),
    Law(
        "T27",
        "A way of initialising that changes the base is carried out, or refused.",
        "plan with PiSSA, OLoRA, CorDA, LoftQ or LoRA-GA must raise, unless init_methods names it",
        "an adapter that fits another base is put on this one",
        ("I-7",),
        ("plan",),
        trees,
        _changes_base,
        (),
        cost=10,
    ),
    Law(
        "T28",
        "A module that cannot take LoRA is refused where it is named, and else left out.",
        "modules[path] = None: a target that names it must raise; all-linear leaves it out",
        "a normalisation is skipped in silence: the adapter is smaller than was asked for",
        ("T-7", "T-2"),
        ("plan",),
        trees,
        _no_lora,
        (),
        cost=5,
    ),
)
