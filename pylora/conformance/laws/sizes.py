"""Laws of sizes: no dimension of any method has a limit beyond which the result is another one.

Each walks a list of problems (problems/sizes.py) before it draws any: one dimension large, the
others tiny, around every usual limit. Small integers, so equality is asked for.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from pylora.conformance.laws import allowed, oracle
from pylora.conformance.laws.law import Law
from pylora.conformance.problems import sizes
from pylora.conformance.problems.layers import DTYPES, np_dtype, st
from pylora.conformance.testcase import Problem, Trial

NAMES = ("dx", "dA", "dB")


def _at(p: Problem) -> str:
    """The sizes, for a message."""
    m, k, (d, r) = p.x.shape[0], p.x.shape[1], p.B.shape
    return f"of m = {m}, k = {k}, d = {d}, r = {r}"


def has(t: Trial, method: str) -> bool:
    return callable(getattr(t.implementation, method, None))


def _forward(t: Trial, p: Problem) -> None:
    y = t.forward(p.x, p.W, p.A, p.B, p.scale, p.bias)
    W = t.weight(p.W)
    want = oracle.forward(p.x, W, [(p.A, p.B, p.scale)], p.bias)
    t.expect(f"y {_at(p)}", y, want, allowed.forward(t, p))
    if has(t, "base"):
        y, want = t.base(p.x, p.W, p.bias), oracle.forward(p.x, W, [], p.bias)
        t.expect(f"y without adapter, {_at(p)}", y, want, allowed.base(t, p))


def _backward(t: Trial, p: Problem) -> None:
    got = t.backward(p.dy, p.x, p.W, p.A, p.B, p.scale)
    want = oracle.backward(p.dy, p.x, t.weight(p.W), p.A, p.B, p.scale)
    for name, g, w, off in zip(NAMES, got, want, allowed.backward(t, p)):
        t.expect(f"{name} {_at(p)}", g, w, off)


def _merge(t: Trial, p: Problem) -> None:
    result = t.merge(p.W, p.A, p.B, p.scale)
    W, state = result if isinstance(result, tuple) else (result, None)
    off = allowed.merged(p.W, p.A, p.B, p.scale)
    t.expect(f"W' {_at(p)}", W, oracle.merged(p.W, p.A, p.B, p.scale), off)
    if has(t, "unmerge"):
        more = () if state is None else (state,)
        back = t.unmerge(W, p.A, p.B, p.scale, *more)
        t.expect(f"W after unmerging, {_at(p)}", back, p.W, off)


def _residue(t: Trial, p: Problem) -> None:
    """Weights that lose bits when merged, everywhere: what puts them back must reach all."""
    result = t.merge(p.W, p.A, p.B, p.scale)
    W, state = result if isinstance(result, tuple) else (result, None)
    more = () if state is None else (state,)
    back = t.unmerge(W, p.A, p.B, p.scale, *more)
    t.expect(f"W after unmerging, {_at(p)}", back, p.W, 0.0, signs=True)


def _module(t: Trial, p: Problem) -> None:
    module = t.module(p.W.copy(), p.bias)
    before = module.forward(p.x)
    W = t.weight(p.W)
    base, off = oracle.forward(p.x, W, [], p.bias), allowed.base(t, p)
    t.expect(f"y before an adapter is attached, {_at(p)}", before, base, off)
    module.attach(p.A, p.B, p.scale)
    want = oracle.forward(p.x, W, [(p.A, p.B, p.scale)], p.bias)
    t.expect(f"y with the adapter, {_at(p)}", module.forward(p.x), want, allowed.forward(t, p))
    if module.has("merge") and module.has("unmerge"):
        off = allowed.forward(t, p) + allowed.merged_forward(t, p)
        module.merge()
        t.expect(f"y of the merged module, {_at(p)}", module.forward(p.x), want, off)
        module.unmerge()
        t.expect(f"y after unmerge, {_at(p)}", module.forward(p.x), want, off)
    module.detach()
    t.expect(f"y after detach, {_at(p)}", module.forward(p.x), base, 2 * allowed.base(t, p))


def _attached_often(t: Trial, p: Problem) -> None:
    """Adapter after adapter is attached and taken off; around each limit one is asked."""
    module = t.module(p.W.copy(), p.bias)
    signs = (p.A, p.B, p.scale), (-p.A, p.B, -0.5), (p.A[::-1].copy(), p.B, 2.0)
    seen = set(sizes.edges(p.size).tolist())
    W = t.weight(p.W)
    for i in range(p.size):
        A, B, scale = signs[i % 3]
        if i not in seen:
            module.quietly("attach", A, B, scale)
            module.quietly("detach")
            continue
        module.attach(A, B, scale)
        want = oracle.forward(p.x, W, [(A, B, scale)], p.bias)
        off = allowed.forward(t, p, A=A, B=B, scale=scale)
        t.expect(
            f"y with the adapter that was attached as number {i + 1}",
            module.forward(p.x),
            want,
            off,
        )
        module.detach()
    base = oracle.forward(p.x, W, [], p.bias)
    t.expect("y after the last was detached", module.forward(p.x), base, allowed.base(t, p))


def _mixed(t: Trial, p: Problem) -> None:
    y = t.forward_mixed(p.x, p.W, p.adapters, p.rows, p.bias)
    want = oracle.mixed(p.x, t.weight(p.W), p.adapters, p.rows, p.bias)
    t.expect(f"y {_of_several(p)}", y, want, allowed.mixed(t, p))


def _stacked(t: Trial, p: Problem) -> None:
    y = t.forward_stacked(p.x, p.W, p.adapters, p.bias)
    want = oracle.forward(p.x, t.weight(p.W), p.adapters, p.bias)
    t.expect(f"y {_of_several(p)}", y, want, allowed.stacked(t, p))


def _of_several(p: Problem) -> str:
    ranks = [A.shape[0] for A, _, _ in p.adapters]
    top = f"{len(ranks)} adapters of ranks up to {max(ranks, default=0)}"
    return f"of {top}, {len(p.rows)} rows, k = {p.x.shape[1]}, d = {p.W.shape[0]}"


def _threads(t: Trial, p: Problem) -> None:
    """Of y, dA and dB: any number of threads, more than rows or columns among them."""
    W = t.weight(p.W)
    want = oracle.forward(p.x, W, [(p.A, p.B, p.scale)], p.bias)
    wants = oracle.backward(p.dy, p.x, W, p.A, p.B, p.scale)
    try:
        t.set_num_threads(p.threads)
        y = t.forward(p.x, p.W, p.A, p.B, p.scale, p.bias)
        t.expect(f"y {_at(p)} with {p.threads} threads", y, want, allowed.forward(t, p))
        if has(t, "backward"):
            got = t.backward(p.dy, p.x, p.W, p.A, p.B, p.scale)
            for name, g, w, off in zip(NAMES, got, wants, allowed.backward(t, p)):
                t.expect(f"{name} {_at(p)} with {p.threads} threads", g, w, off)
    finally:
        t.set_num_threads(1)


def _thread_counts(dtype: str, examples: int) -> Any:
    counts = (2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65)
    for n in counts + ((127, 128, 129) if examples >= sizes.THOROUGH else ()):
        for i, name in enumerate("mkdr"):
            for size in (n - 1, n + 1, 97 + n):
                yield sizes.layer(dtype, i, "", **{name: size}).replaced(threads=n)


def _with_threads(dtype: str) -> Any:
    counts = st.sampled_from((2, 3, 4, 7, 8, 16, 33))
    return st.builds(lambda p, n: p.replaced(threads=n), sizes.large_layers(dtype), counts)


def _weights(dtype: str, examples: int) -> Any:
    """Of each of d and k large and of both middling: weights that are no integers."""

    def make(name: str, n: int) -> Problem:
        p = sizes.layer(dtype, 1, "", **{name: n})
        rng = np.random.default_rng(n)
        arrays = {a: rng.normal(size=getattr(p, a).shape).astype(p.W.dtype) for a in "WAB"}
        return p.replaced(**arrays, scale=0.7)

    for name in "dk":
        for size in sizes.walk(examples, sizes.LIMITS[-1], dtype=dtype):
            yield sizes.sized(partial(make, name), size)
    yield make("d", sizes.SQUARE).replaced(**_square(dtype))


def _square(dtype: str) -> dict[str, Any]:
    n, rng = sizes.SQUARE, np.random.default_rng(3)
    shapes = {"W": (n, n), "A": (2, n), "B": (n, 2)}
    kind = np_dtype(dtype)
    return {name: rng.normal(size=shape).astype(kind) for name, shape in shapes.items()}


def _module_layers(dtype: str, examples: int) -> Any:
    return sizes.layers(dtype, examples, 4096)


def _counts(dtype: str, examples: int) -> Any:
    top = 65536 if examples >= sizes.THOROUGH else 1025
    yield sizes.layer(dtype, 0).replaced(size=top + 2)


def _any(dtype: str) -> Any:
    return sizes.large_layers(dtype)


def _any_weight(dtype: str) -> Any:
    return sizes.large_layers(dtype, "kdr")


EVERY = "of each dimension in turn: 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 65536, -1, +0, +1"
LAWS = (
    Law(
        "F12",
        "No size is a limit to the forward pass.",
        f"as F2, {EVERY}, and past; exact",
        "a buffer, a tile, an index or a grid serves a usual size and no other",
        ("L-1", "F-1"),
        ("forward",),
        _any,
        _forward,
        dtypes=DTYPES,
        covering=sizes.layers,
    ),
    Law(
        "B14",
        "No size is a limit to the gradients.",
        "dx, dA and dB as in B2, at the sizes of F12; exact",
        "as F12",
        ("L-1", "B-1"),
        ("backward",),
        _any,
        _backward,
        dtypes=DTYPES,
        covering=sizes.layers,
    ),
    Law(
        "M10",
        "No size is a limit to merging and unmerging.",
        "W' as in M2, unmerge(W') = W, d, k and r at the sizes of F12; exact",
        "as F12; part of the weight stays as it was",
        ("L-1", "M-1", "M-3"),
        ("merge",),
        _any_weight,
        _merge,
        ("W", "A", "B"),
        dtypes=DTYPES,
        covering=sizes.layers,
    ),
    Law(
        "M11",
        "What unmerging puts back reaches every element of the weight.",
        "unmerge(merge(W)) has the bits of W, d and k at the sizes of F12",
        "positions are kept in too few bits, or a list of them has a limit",
        ("L-1", "M-3"),
        ("merge", "unmerge", "exact_unmerge"),
        _any_weight,
        _residue,
        ("W", "A", "B"),
        dtypes=DTYPES,
        covering=_weights,
    ),
    Law(
        "M12",
        "No size is a limit to a module.",
        "y before, with, merged with, unmerged from and without an adapter, up to 4097; exact",
        "as F12, in the module's own buffers",
        ("L-1", "F-1", "M-2"),
        ("module",),
        _any,
        _module,
        dtypes=DTYPES,
        covering=_module_layers,
    ),
    Law(
        "M13",
        "The thousandth adapter that is attached counts as the first does.",
        "attach and detach, 1027 times: y as in D1 around each limit; exact",
        "slots run out, or one is used again with what it held",
        ("L-1", "X-5"),
        ("module",),
        lambda dtype: st.builds(lambda p: p.replaced(size=9), sizes.large_layers(dtype, "mkdr")),
        _attached_often,
        dtypes=DTYPES,
        covering=_counts,
    ),
    Law(
        "X10",
        "No size is a limit to adapters that are active at once.",
        "as X2: how many adapters, one's rank, m, k and d at the sizes of F12; exact",
        "as F12; adapters or ranks beyond a limit are left out",
        ("L-1", "X-1"),
        ("forward_stacked",),
        sizes.large_several,
        _stacked,
        ("x", "W", "bias"),
        dtypes=DTYPES,
        covering=sizes.stacked,
    ),
    Law(
        "X11",
        "No size is a limit to a mixed batch.",
        "as X4: one's rank, how many adapters, rows of a segment, segments, k and d at the sizes "
        "of F12; exact",
        "a kernel for small ranks, few adapters or short segments is used for all",
        ("L-1", "X-3"),
        ("forward_mixed",),
        sizes.large_several,
        _mixed,
        ("x", "W", "bias"),
        dtypes=DTYPES,
        covering=sizes.mixed,
    ),
    Law(
        "F19",
        "No number of threads is a limit.",
        "y, dx, dA and dB as in F2 and B2 with 2 to 65 threads, sizes beside that number; exact",
        "a share of no rows, or more threads than shares, is forgotten",
        ("L-1", "N-3"),
        ("forward", "set_num_threads"),
        _with_threads,
        _threads,
        dtypes=DTYPES,
        covering=_thread_counts,
    ),
)
