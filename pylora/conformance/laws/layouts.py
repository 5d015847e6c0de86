"""Laws of layout: how an argument lies in memory changes neither the result nor the argument.

Each method, each of its arrays alone and all of them at once, in each of problems/layouts.py. The
result is compared with the implementation's own for contiguous copies of the same numbers: small
integers, so that it is equal; attention's within twice its bound. What is right is not asked here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from pylora.conformance.bounds import layer as bounds
from pylora.conformance.laws import allowed
from pylora.conformance.laws.block import Block
from pylora.conformance.laws.law import Law
from pylora.conformance.problems import sizes, sizes_attention
from pylora.conformance.problems.layers import DTYPES, st
from pylora.conformance.problems.layouts import LAYOUTS, Guard, laid_out
from pylora.conformance.testcase import Problem, Trial
from pylora.types import Array

ALL = "all"
Arrays = dict[str, Array]
Call = Callable[[Trial, Problem, Arrays], Any]


def _adapters(a: Arrays, p: Problem) -> list[tuple[Array, Array, float]]:
    scales = (p.scale, -1.0)
    return [(a[f"A{i}"], a[f"B{i}"], s) for i, s in zip("12", scales)]


def _layer(p: Problem, *names: str) -> Arrays:
    every = {n: getattr(p, n) for n in ("x", "W", "A", "B", "dy")}
    every["bias"] = np.ones(len(p.W), p.W.dtype) if p.bias is None else p.bias
    every |= {"A1": p.A, "B1": p.B, "A2": p.A[::-1].copy(), "B2": p.B[::-1].copy()}
    every["rows"] = (np.arange(len(p.x)) % 3 - 1).astype(np.int64)
    every |= {"target": p.dy, "counted": np.arange(len(p.x)) % 4 != 1}
    return {n: every[n] for n in names}


def _module(t: Trial, p: Problem, a: Arrays) -> Any:
    module = t.module(a["W"], a["bias"])
    before = module.forward(a["x"])
    module.attach(a["A"], a["B"], p.scale)
    out = [before, module.forward(a["x"])]
    if module.has("merge") and module.has("unmerge"):
        module.merge()
        out.append(module.forward(a["x"]))
        module.unmerge()
        out.append(module.forward(a["x"]))
    return out


def _unmerge(t: Trial, p: Problem, a: Arrays) -> Any:
    """What merging gave is laid out; a merged weight is no broadcast of one row."""
    W, *more = _pair(t.merge(np.ascontiguousarray(a["W"]), p.A, p.B, p.scale))
    if p.argument in ("W", ALL) and "broadcast" not in p.layout:
        W = laid_out(W, p.layout)
    return t.unmerge(W, a["A"], a["B"], p.scale, *more)


def _pair(merged: Any) -> tuple[Any, ...]:
    return merged if isinstance(merged, tuple) else (merged,)


CALLS: dict[str, tuple[tuple[str, ...], Call]] = {
    "forward": (
        ("x", "W", "A", "B", "bias"),
        lambda t, p, a: t.forward(a["x"], a["W"], a["A"], a["B"], p.scale, a["bias"]),
    ),
    "base": (("x", "W", "bias"), lambda t, p, a: t.base(a["x"], a["W"], a["bias"])),
    "backward": (
        ("dy", "x", "W", "A", "B"),
        lambda t, p, a: t.backward(a["dy"], a["x"], a["W"], a["A"], a["B"], p.scale)[:3],
    ),
    "loss_gradients": (
        ("x", "target", "counted", "W", "A", "B"),
        lambda t, p, a: t.loss_gradients(
            [(a["x"], a["target"], a["counted"])] * 2, a["W"], a["A"], a["B"], p.scale
        ),
    ),
    "merge": (
        ("W", "A", "B"),
        lambda t, p, a: _pair(t.merge(a["W"], a["A"], a["B"], p.scale))[0],
    ),
    "unmerge": (("A", "B", "W"), _unmerge),
    "module": (("W", "x", "A", "B", "bias"), _module),
    "dropout_forward": (
        ("x", "W", "A", "B"),
        lambda t, p, a: t.dropout_forward(a["x"], a["W"], a["A"], a["B"], p.scale, 0.5, 3),
    ),
    "dropout_backward": (
        ("dy", "x", "W", "A", "B"),
        lambda t, p, a: t.dropout_backward(
            a["dy"], a["x"], a["W"], a["A"], a["B"], p.scale, 0.5, 3
        ),
    ),
    "forward_stacked": (
        ("x", "W", "A1", "B1", "A2", "B2", "bias"),
        lambda t, p, a: t.forward_stacked(a["x"], a["W"], _adapters(a, p), a["bias"]),
    ),
    "forward_mixed": (
        ("x", "W", "A1", "B1", "A2", "B2", "rows", "bias"),
        lambda t, p, a: t.forward_mixed(a["x"], a["W"], _adapters(a, p), a["rows"], a["bias"]),
    ),
}


def _check(t: Trial, p: Problem) -> None:
    names, call = CALLS[p.method]
    plain = _layer(p, *names)
    _compare(t, p, plain, call, lambda a: _slack(t, p, a))


def _compare(
    t: Trial, p: Problem, plain: Arrays, call: Call, slack: Callable[[Arrays], Any]
) -> None:
    laid = {n: laid_out(a, p.layout if p.argument in (n, ALL) else "C") for n, a in plain.items()}
    guards = {n: Guard.of(a) for n, a in laid.items()}
    usual = {n: np.array(a, order="C") for n, a in laid.items()}
    want = _parts(call(t, p.replaced(layout="C"), usual))
    got = _parts(call(t, p, laid))
    which = "every argument" if p.argument == ALL else p.argument
    said = f"{p.method} with {which} {p.layout!r} in memory"
    if len(got) != len(want):
        t.fail(f"{said}: {len(got)} results, {len(want)} for contiguous arrays")
    off = slack(usual)
    for (name, g), (_, w) in zip(got, want):
        bound = off.get(name, 0.0) if isinstance(off, dict) else off
        t.expect(f"{said}: {name}", g, w, bound)
    for name, guard in guards.items():
        if not guard.untouched:
            t.fail(f"{said}: {name}, or the memory around it, was written to")


def _parts(result: Any) -> list[tuple[str, Array]]:
    """The arrays of a result, named; a dW that is None is none."""
    if result is None:
        return []
    if isinstance(result, np.ndarray):
        return [("the result", result)]
    if result is None:  # the gradient of W, which nobody has to give
        return []
    if isinstance(result, dict):
        return [(f"{k} {n}", v) for k, part in result.items() for n, v in _parts(part)]
    return [(f"result {i}, {n}", v) for i, part in enumerate(result) for n, v in _parts(part)]


def _slack(t: Trial, p: Problem, a: Arrays) -> Any:
    """Nothing where sums are exact; elsewhere what two results may differ by: twice the bound."""
    if p.method == "loss_gradients":
        batches = [(a["x"], a["target"], a["counted"])] * 2
        dA, dB = bounds.loss_gradients(batches, a["W"], a["A"], a["B"], p.scale, t.precision)
        return {"result 0, the result": 2 * dA, "result 1, the result": 2 * dB}
    if p.x.dtype.itemsize > 2 and t.exact:
        return 0.0
    q = p.replaced(**{n: a.get(n, getattr(p, n)) for n in ("x", "W", "A", "B", "dy", "bias")})
    pair = [(a.get(f"A{i}", q.A), a.get(f"B{i}", q.B), s) for i, s in zip("12", (p.scale, -1.0))]
    double = q.x * q.x.dtype.type(2)  # dropout's factor
    parts = [allowed.stacked(t, q, x=double, adapters=pair), *allowed.backward(t, q, x=double)]
    parts += [allowed.merged(q.W, q.A, q.B, p.scale), allowed.merged_forward(t, q)]
    return 4.0 * max(float(np.max(part, initial=0.0)) for part in parts)


def _covering(*methods: str) -> Any:
    def problems(dtype: str, examples: int) -> Iterator[Problem]:
        for method in methods:
            names, _ = CALLS[method]
            for argument in (*names, ALL):
                for i, layout in enumerate(LAYOUTS):
                    yield _problem(dtype, method, argument, layout, i)

    return problems


def _problem(dtype: str, method: str, argument: str, layout: str, seed: int) -> Problem:
    p = sizes.layer(dtype, seed, m=3 + seed % 4, k=4 + seed % 3, d=3 + seed % 5, r=2 + seed % 2)
    return p.replaced(method=method, argument=argument, layout=layout)


def _drawn(*methods: str) -> Any:
    def problems(dtype: str) -> Any:
        chosen = [(m, a) for m in methods for a in (*CALLS[m][0], ALL)]
        return st.builds(
            lambda pair, layout, seed: _problem(dtype, pair[0], pair[1], layout, seed),
            st.sampled_from(chosen),
            st.sampled_from(LAYOUTS),
            st.integers(0, 9999),
        )

    return problems


# ---- attention -----------------------------------------------------------------------------------


def _attention(t: Trial, p: Problem) -> None:
    plain = {"x": p.x, "dy": p.dy} | {f"W of {n}": W for n, W in p.weights.items()}
    for n, (A, B, _) in p.adapters.items():
        plain |= {f"A of {n}": A, f"B of {n}": B}
    if p.method == "attention":
        del plain["dy"]

    def call(t: Trial, p: Problem, a: Arrays) -> Any:
        weights = {n: a[f"W of {n}"] for n in p.weights}
        adapters = {n: (a[f"A of {n}"], a[f"B of {n}"], s) for n, (_, _, s) in p.adapters.items()}
        if p.method == "attention":
            return t.attention(a["x"], weights, adapters, p.shape)
        return t.attention_backward(a["dy"], a["x"], weights, adapters, p.shape)

    def slack(a: Arrays) -> Any:
        weights = {n: t.weight(a[f"W of {n}"]) for n in p.weights}
        adapters = {n: (a[f"A of {n}"], a[f"B of {n}"], s) for n, (_, _, s) in p.adapters.items()}
        block = Block(weights, adapters, p.shape, t.precision)
        y = block.forward(a["x"])
        if p.method == "attention":
            return 2 * y.error
        dx, grads = block.backward(a["dy"])
        bound: dict[str, Any] = {"result 0, the result": 2 * dx.error}
        for n, pair in grads.items():
            for i, g in enumerate(pair):
                bound[f"result 1, {n} result {i}, the result"] = 2 * g.error
        return bound

    _compare(t, p, plain, call, slack)


def _attention_covering(method: str) -> Any:
    def problems(dtype: str, examples: int) -> Iterator[Problem]:
        names = [f"{a} of {n}" for n in sizes_attention.PROJECTIONS for a in "WAB"]
        names = ["x", *names] + ["dy"] * (method == "attention_backward")
        for i, argument in enumerate([*names, ALL]):
            for j, layout in enumerate(LAYOUTS):
                if (i + j) % 4 == 0 or (examples >= sizes.FEW and dtype == "float32"):
                    p = sizes_attention.attention(dtype, "length", 3 + j % 3, i)
                    yield p.replaced(method=method, argument=argument, layout=layout)

    return problems


def _attention_drawn(method: str) -> Any:
    def problems(dtype: str) -> Any:
        names = ["x", "W of q_proj", "W of o_proj", "A of k_proj", "B of v_proj", ALL]
        return st.builds(
            lambda name, argument, layout, n, seed: sizes_attention.attention(
                dtype, name, n, seed
            ).replaced(method=method, argument=argument, layout=layout),
            st.sampled_from(("length", "heads", "head_dim", "hidden", "rank")),
            st.sampled_from(names),
            st.sampled_from(LAYOUTS),
            st.integers(1, 6),
            st.integers(0, 999),
        )

    return problems


def _law(id: str, sentence: str, spec: str, needs: tuple[str, ...]) -> Law:
    of, first = needs[0].startswith("attention"), needs[0]
    return Law(
        id,
        sentence,
        "result(laid out in any way) = result(contiguous), one array at a time and all at once; "
        "exact on small integers"
        if not of
        else "as F17, within twice the bound of A1 and A2",
        "a row's stride is taken for its length, a step for 1, or an argument is used as scratch",
        ("L-3", spec),
        needs,
        _attention_drawn(first) if of else _drawn(needs[-1]),
        _attention if of else _check,
        (),
        dtypes=DTYPES,
        covering=_attention_covering(first) if of else _covering(needs[-1]),
    )


LAWS = (
    _law(
        "F17", "How arrays lie in memory does not matter to the forward pass.", "F-6", ("forward",)
    ),
    _law("F18", "Nor to the base alone.", "F-6", ("base",)),
    _law("B15", "Nor to the gradients.", "F-6", ("backward",)),
    _law("B17", "Nor to the gradient of a step.", "F-6", ("loss_gradients",)),
    _law("M14", "Nor to merging.", "F-6", ("merge",)),
    _law("M15", "Nor to unmerging.", "F-6", ("merge", "unmerge")),
    _law("M16", "Nor to a module.", "F-6", ("module",)),
    _law("X12", "Nor to adapters that are active at once.", "F-6", ("forward_stacked",)),
    _law("X13", "Nor to a mixed batch.", "F-6", ("forward_mixed",)),
    _law("X16", "Nor to dropout.", "F-6", ("dropout_forward",)),
    _law("X17", "Nor to the gradients of dropout.", "F-6", ("dropout_backward",)),
    _law("X18", "Nor to attention.", "F-6", ("attention",)),
    _law("X19", "Nor to the gradients of attention.", "F-6", ("attention_backward",)),
)
