"""Laws of merging and unmerging, and of modules that an adapter is attached to and taken from."""

from __future__ import annotations

from typing import Any

import numpy as np

from pylora.conformance.bounds import layer as bounds
from pylora.conformance.laws import allowed, oracle
from pylora.conformance.laws.law import Law
from pylora.conformance.problems.layers import (
    DTYPES,
    exact_problems,
    integer_array,
    lora_problems,
)
from pylora.conformance.testcase import Broken, ModuleTrial, NotTested, Problem, Trial
from pylora.types import Array

EXACT = "bit for bit"


def _merge(t: Trial, W: Array, A: Array, B: Array, scale: float) -> tuple[Array, Any]:
    result = t.merge(W, A, B, scale)
    return result if isinstance(result, tuple) else (result, None)


def _unmerge(t: Trial, W: Array, A: Array, B: Array, scale: float, state: Any) -> Array:
    arguments = (W, A, B, scale) if state is None else (W, A, B, scale, state)
    result: Array = t.unmerge(*arguments)
    return result


def _agrees(t: Trial, p: Problem) -> None:
    W, _ = _merge(t, p.W, p.A, p.B, p.scale)
    want = oracle.merged(p.W, p.A, p.B, p.scale)
    t.expect("W'", W, want, bounds.merged(p.W, p.A, p.B, p.scale))


def _exact(t: Trial, p: Problem) -> None:
    W, _ = _merge(t, p.W, p.A, p.B, p.scale)
    off = allowed.merged(p.W, p.A, p.B, p.scale)
    t.expect("W'", W, oracle.merged(p.W, p.A, p.B, p.scale), off)


def _is_the_adapter(t: Trial, p: Problem) -> None:
    W, _ = _merge(t, p.W, p.A, p.B, p.scale)
    if callable(getattr(t.implementation, "base", None)):
        y = t.base(p.x, W, p.bias)
    else:
        y = t.forward(p.x, W, np.zeros_like(p.A), np.zeros_like(p.B), p.scale, p.bias)
    want = oracle.forward(p.x, p.W, [(p.A, p.B, p.scale)], p.bias)
    bound = bounds.merged_forward(p.x, p.W, p.A, p.B, p.scale, p.bias)
    t.expect("y of the merged weight", y, want, bound)


def _fresh(t: Trial, p: Problem) -> None:
    W, _ = _merge(t, p.W, p.A, np.zeros_like(p.B), p.scale)
    t.expect("W' with B = 0", W, p.W)


def _back(t: Trial, p: Problem) -> None:
    W, state = _merge(t, p.W, p.A, p.B, p.scale)
    back = _unmerge(t, W, p.A, p.B, p.scale, state)
    t.expect("unmerge(merge(W))", back, p.W, bounds.unmerged(p.W, p.A, p.B, p.scale))
    t.note(EXACT, _bits(back, p.W))


def _no_drift(t: Trial, p: Problem) -> None:
    W, cycles = p.W, 5
    for _ in range(cycles):
        merged, state = _merge(t, W, p.A, p.B, p.scale)
        W = _unmerge(t, merged, p.A, p.B, p.scale, state)
    off = cycles * allowed.merged(p.W, p.A, p.B, p.scale)
    t.expect(f"W after {cycles} times merge and unmerge", W, p.W, off)


def _bits(a: Array, b: Array) -> bool:
    return np.ascontiguousarray(a).tobytes() == np.ascontiguousarray(b).tobytes()


# ---- modules -------------------------------------------------------------------------------------


def _module(t: Trial, p: Problem) -> tuple[ModuleTrial, Array]:
    """A module and its output before any adapter."""
    module = t.module(p.W.copy(), p.bias)
    return module, module.forward(p.x)


def _attached(t: Trial, p: Problem) -> None:
    module, before = _module(t, p)
    W = t.weight(p.W)
    want = oracle.forward(p.x, W, [], p.bias)
    t.expect("y before an adapter is attached", before, want, allowed.base(t, p))
    module.attach(p.A, p.B, p.scale)
    want = oracle.forward(p.x, W, [(p.A, p.B, p.scale)], p.bias)
    t.expect("y with the adapter", module.forward(p.x), want, allowed.forward(t, p))


def _detached(t: Trial, p: Problem) -> None:
    module, before = _module(t, p)
    module.attach(p.A, p.B, p.scale)
    module.forward(p.x)
    module.detach()
    bound: Array | float = 0.0
    if not t.bitwise:
        bound = 2 * bounds.forward(p.x, t.weight(p.W), [], p.bias, precision=t.precision)
    t.expect("y after detach", module.forward(p.x), before, bound, signs=t.bitwise)


def _replaced(t: Trial, p: Problem) -> None:
    rng = np.random.default_rng(p.seed)
    module, before = _module(t, p)
    module.attach(*(integer_array(rng, a.shape, dtype=a.dtype) for a in (p.A, p.B)), 2.0)
    module.forward(p.x)
    module.detach()
    module.attach(p.A, p.B, p.scale)
    want = oracle.forward(p.x, t.weight(p.W), [(p.A, p.B, p.scale)], p.bias)
    t.expect("y with the second adapter", module.forward(p.x), want, allowed.forward(t, p))


def _needs(module: ModuleTrial, *methods: str) -> None:
    for name in methods:
        if not module.has(name):
            raise NotTested(f"the module has no {name}()")


def _merged_module(t: Trial, p: Problem) -> None:
    module, before = _module(t, p)
    _needs(module, "merge", "unmerge")
    module.attach(p.A, p.B, p.scale)
    want = module.forward(p.x)
    module.merge()
    t.expect("y of the merged module", module.forward(p.x), want)
    module.unmerge()
    t.expect("y after unmerge, the adapter still attached", module.forward(p.x), want)
    module.detach()
    t.expect("y after unmerge and detach", module.forward(p.x), before)


def _twice(t: Trial, p: Problem) -> None:
    module, _ = _module(t, p)
    _needs(module, "merge", "unmerge")
    module.attach(p.A, p.B, p.scale)
    want = module.forward(p.x)
    for what in ("unmerge", "merge", "merge"):
        try:
            getattr(module, what)()
        except Broken:  # refusing is right too
            t.calls.pop()
        name = f"y after {what}, which had nothing to do," if what == "unmerge" else "y after merge"
        t.expect(name, module.forward(p.x), want)


def _promised_bits(t: Trial, p: Problem) -> None:
    W, state = _merge(t, p.W, p.A, p.B, p.scale)
    back = _unmerge(t, W, p.A, p.B, p.scale, state)
    t.expect("unmerge(merge(W)), promised to be W,", back, p.W, signs=True)


def _switched(t: Trial, p: Problem) -> None:
    rng = np.random.default_rng(p.seed)
    module, _ = _module(t, p)
    module.attach(*(integer_array(rng, a.shape, dtype=a.dtype) for a in (p.A, p.B)), 2.0)
    try:
        module.attach(p.A, p.B, p.scale)
    except Broken:  # to ask for detach first is right too
        t.calls.pop()
        return
    want = oracle.forward(p.x, t.weight(p.W), [(p.A, p.B, p.scale)], p.bias)
    t.expect("y after a second attach", module.forward(p.x), want, allowed.forward(t, p))


def _detached_while_merged(t: Trial, p: Problem) -> None:
    module, before = _module(t, p)
    _needs(module, "merge", "unmerge")
    module.attach(p.A, p.B, p.scale)
    module.merge()
    try:
        module.detach()
    except Broken:  # to ask for unmerge first is right too
        t.calls.pop()
        module.unmerge()
        module.detach()
    t.expect("y after detach of a merged adapter", module.forward(p.x), before)


def _weight_stays(t: Trial, p: Problem) -> None:
    module, _ = _module(t, p)
    _needs(module, "weight")
    module.attach(p.A, p.B, p.scale)
    module.forward(p.x)
    t.expect("the weight with an adapter attached", np.asarray(module.weight()), p.W)
    module.detach()
    t.expect("the weight after detach", np.asarray(module.weight()), p.W)


LAWS = (
    Law(
        "M1",
        "The merged weight agrees with the formula (float32).",
        "|W' - (W + s B A)| <= gamma_{r+4} (|W| + |s||B||A|)",
        "a missing, doubled or rounded scale, or a transposed product, in the merge only",
        ("M-1", "S-3", "N-1"),
        ("merge", "float32"),
        lora_problems,
        _agrees,
        ("W", "A", "B"),
    ),
    Law(
        "M2",
        "On small integers the merge is exact.",
        "W' = W + s B A, with equality",
        "as M1; also an update that goes through a 16-bit format",
        ("M-1", "S-3"),
        ("merge",),
        exact_problems,
        _exact,
        ("W", "A", "B"),
        dtypes=DTYPES,
    ),
    Law(
        "M3",
        "Merging into bfloat16 rounds once.",
        "|W' - (W + s B A)| <= u_bf16 (|W| + |s||B||A|), and gamma_{r+4} of float32",
        "the update is rounded to bfloat16 before it is added, which loses part of it",
        ("M-1",),
        ("merge", "bfloat16"),
        lambda: lora_problems(dtype="bfloat16"),
        _agrees,
        ("W", "A", "B"),
    ),
    Law(
        "M4",
        "A merged module gives the adapter's output.",
        "x W'ᵀ + bias = x Wᵀ + bias + s (x Aᵀ) Bᵀ within the error of W' times |x| and F1's bound",
        "merge and adapter disagree: a deployed model is not the one that was tested",
        ("M-2", "S-3"),
        ("forward", "merge"),
        lora_problems,
        _is_the_adapter,
        dtypes=DTYPES,
    ),
    Law(
        "M5",
        "Merging a fresh adapter changes nothing.",
        "B = 0 implies W' = W",
        "the merge rescales or rounds the weight itself",
        ("M-1", "F-2"),
        ("merge",),
        lora_problems,
        _fresh,
        ("W", "A", "B"),
        dtypes=DTYPES,
    ),
    Law(
        "M6",
        "Unmerging gives the weight back.",
        "|unmerge(merge(W)) - W| <= the sum of both steps' bounds; the bits are compared too",
        "another scale, or another adapter, is taken out than was put in",
        ("M-3", "S-3"),
        ("merge", "unmerge", "float32"),
        lora_problems,
        _back,
        ("W", "A", "B"),
    ),
    Law(
        "M7",
        "Merging and unmerging does not drift.",
        "five times merge and unmerge give W, exact on small integers",
        "an error that grows each time that adapters are switched",
        ("M-3",),
        ("merge", "unmerge"),
        exact_problems,
        _no_drift,
        ("W", "A", "B"),
        dtypes=DTYPES,
    ),
    Law(
        "M8",
        "Unmerging bfloat16 gives the weight back.",
        "as M6, for weights stored in bfloat16",
        "as M6",
        ("M-3",),
        ("merge", "unmerge", "bfloat16"),
        lambda: lora_problems(dtype="bfloat16"),
        _back,
        ("W", "A", "B"),
    ),
    Law(
        "M9",
        "Where the implementation promises it, unmerging gives back every bit.",
        "unmerge(merge(W)) has the bits of W",
        "what rounding lost is not put back: the file that comes out is not the one that went in",
        ("M-3", "V-6"),
        ("merge", "unmerge", "exact_unmerge"),
        lora_problems,
        _promised_bits,
        ("W", "A", "B"),
        dtypes=DTYPES,
    ),
    Law(
        "D1",
        "A module computes the base, and with an adapter attached base and adapter.",
        "forward = x Wᵀ + bias, after attach + s (x Aᵀ) Bᵀ, exact",
        "the attached adapter is not active, or is scaled otherwise",
        ("F-1", "F-9"),
        ("module",),
        exact_problems,
        _attached,
        dtypes=DTYPES,
    ),
    Law(
        "D2",
        "Detaching restores the base, bit for bit where bits are promised.",
        "forward after detach has the bits of forward before; without the promise, as F7",
        "something of the adapter stays behind",
        ("F-9", "X-5"),
        ("module",),
        lora_problems,
        _detached,
        dtypes=DTYPES,
    ),
    Law(
        "D3",
        "A second adapter does not feel the first.",
        "attach, detach, attach another: as if only the other had been attached, exact",
        "state of the first adapter leaks into the second",
        ("X-5",),
        ("module",),
        exact_problems,
        _replaced,
        dtypes=DTYPES,
    ),
    Law(
        "D4",
        "A module that is merged, unmerged and detached goes through the same outputs.",
        "y(merged) = y(attached) = y(unmerged), y(detached) = y(before), exact",
        "the scale is applied again when merged, or unmerge takes out something else",
        ("M-2", "M-3", "F-9"),
        ("module",),
        exact_problems,
        _merged_module,
        dtypes=DTYPES,
    ),
    Law(
        "D5",
        "Merging twice, or unmerging what is not merged, does nothing or is refused.",
        "y(unmerge) = y(merge) = y(merge, merge) = y, exact",
        "the update is added, or taken out, once too often",
        ("M-5",),
        ("module",),
        exact_problems,
        _twice,
        dtypes=DTYPES,
    ),
    Law(
        "D6",
        "An attached adapter does not touch the base weight.",
        "weight() = W with an adapter attached and after detach",
        "the weight is merged behind the caller's back, or rounded",
        ("B-2", "F-9"),
        ("module",),
        lora_problems,
        _weight_stays,
        dtypes=DTYPES,
    ),
    Law(
        "D7",
        "Attaching another adapter replaces the first, or is refused.",
        "attach, attach another: as if only the other had been attached, exact",
        "the first adapter goes on answering under the second one's name, or both do",
        ("X-5",),
        ("module",),
        exact_problems,
        _switched,
        dtypes=DTYPES,
    ),
    Law(
        "D8",
        "Detaching a merged adapter restores the base.",
        "attach, merge, detach (or, where that is refused, unmerge, detach): y(before), exact",
        "the merged weight stays behind when the adapter that could undo it is gone",
        ("X-5", "M-5", "F-9"),
        ("module",),
        exact_problems,
        _detached_while_merged,
        dtypes=DTYPES,
    ),
)
