"""float16, adapters of rank 0, and merging bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pylora.conformance.correct.base import by_adapter
from pylora.conformance.correct.plain import Correct
from pylora.conformance.mutants.registry import wrong
from pylora.conformance.protocol import LoraTriple
from pylora.types import Array


def is_half(a: Array) -> bool:
    return bool(a.dtype == np.float16)


@wrong(
    "float16-sums",
    "subtle",
    "float16 products are summed in float16.",
    "hadd is twice as fast.",
)
class HalfSums(Correct):
    def forward(
        self, x: Array, W: Array, A: Array, B: Array, scale: float, bias: Any = None
    ) -> Array:
        if not is_half(x):
            return super().forward(x, W, A, B, scale, bias)
        y = self._sum(x, W)
        y = y + np.float16(scale) * self._sum(self._sum(x, A), B)
        return y if bias is None else y + bias

    def _sum(self, x: Array, M: Array) -> Array:
        total = np.zeros((x.shape[0], M.shape[0]), np.float16)
        for i in range(x.shape[1]):
            total = total + x[:, i : i + 1] * M[:, i]
        return total


@wrong(
    "float16-saturates",
    "subtle",
    "Results beyond 65504 are 65504.",
    "A conversion that saturates, as 8-bit formats have it.",
)
class Saturates(Correct):
    def forward(
        self, x: Array, W: Array, A: Array, B: Array, scale: float, bias: Any = None
    ) -> Array:
        y = super().forward(x, W, A, B, scale, bias)
        return np.clip(y, -65504, 65504).astype(np.float16) if is_half(x) else y


@wrong(
    "float16-overflows-at-65504",
    "subtle",
    "What is beyond 65504 is infinite, also what rounds to 65504.",
    "A test against the largest number before it is rounded.",
)
class OverflowsEarly(Correct):
    def forward(
        self, x: Array, W: Array, A: Array, B: Array, scale: float, bias: Any = None
    ) -> Array:
        y = super().forward(x, W, A, B, scale, bias)
        if not is_half(x):
            return y
        wide: Any = [self.widen(a) for a in (x, W, A, B)]
        exact: Array = super().forward(wide[0], wide[1], wide[2], wide[3], scale, self.widen(bias))
        over: Array = np.where(np.abs(exact) > 65504, np.copysign(np.inf, exact), y)
        return over.astype(np.float16)


@wrong(
    "float16-subnormals-flushed",
    "subtle",
    "float16 numbers below 2⁻¹⁴ are read as zero.",
    "Denormals are zero: a flag that was meant for float32.",
)
class Flushed(Correct):
    def forward(
        self, x: Array, W: Array, A: Array, B: Array, scale: float, bias: Any = None
    ) -> Array:
        if is_half(x):
            x, W, A, B = (np.where(np.abs(a) < 2.0**-14, a * 0, a) for a in (x, W, A, B))
        return super().forward(x, W, A, B, scale, bias)


@wrong(
    "float16-results-flushed",
    "subtle",
    "float16 results below 2⁻¹⁴ become zero.",
    "The conversion on the way out flushes.",
)
class ResultsFlushed(Correct):
    def forward(
        self, x: Array, W: Array, A: Array, B: Array, scale: float, bias: Any = None
    ) -> Array:
        y = super().forward(x, W, A, B, scale, bias)
        return np.where(np.abs(y) < 2.0**-14, y * 0, y) if is_half(x) else y


@wrong(
    "float16-read-as-bfloat16",
    "gross",
    "The bits of float16 are read as bfloat16.",
    "Both are two bytes.",
)
class ReadAsBfloat16(Correct):
    def widen(self, a: Array | None) -> Any:
        if a is None or not is_half(a):
            return super().widen(a)
        bits = np.ascontiguousarray(a).view(np.uint16).astype(np.uint32) << 16
        return bits.view(np.float32)


@wrong(
    "float16-merge-saturates",
    "subtle",
    "Merged weights beyond 65504 are 65504.",
    "A clamp was put in so that no infinity gets into a file.",
)
class MergeSaturates(Correct):
    def merge(self, W: Array, A: Array, B: Array, scale: float) -> Any:
        merged, state = super().merge(W, A, B, scale), None
        if isinstance(merged, tuple):
            merged, state = merged
        if is_half(W):
            merged = np.clip(merged, -65504, 65504).astype(np.float16)
        return merged if state is None else (merged, state)


@wrong(
    "float16-merge-flushes",
    "subtle",
    "Merged weights below 2⁻¹⁴ become zero.",
    "The conversion to float16 on the way out flushes.",
)
class MergeFlushes(Correct):
    def merge(self, W: Array, A: Array, B: Array, scale: float) -> Any:
        merged = super().merge(W, A, B, scale)
        if is_half(W) and isinstance(merged, tuple):
            small = np.abs(merged[0]) < 2.0**-14
            return np.where(small, merged[0] * 0, merged[0]), merged[1]
        return merged


class _Merge(Correct):
    """W' as `sums` says; unmerging is exact all the same: the state is W."""

    def merge(self, W: Array, A: Array, B: Array, scale: float) -> Any:
        if W.dtype == np.float64:
            return super().merge(W, A, B, scale)
        with np.errstate(all="ignore"):
            return self.sums(W, A, B, scale).astype(W.dtype), W.copy()

    def sums(self, W: Array, A: Array, B: Array, scale: float) -> Array:
        raise NotImplementedError

    def unmerge(self, W: Array, A: Array, B: Array, scale: float, state: Any = None) -> Array:
        if W.dtype == np.float64:
            return super().unmerge(W, A, B, scale, state)
        return np.array(state)


@wrong(
    "merge-rounded-by-way-of-float32",
    "subtle",
    "W' is rounded to float32 first and to 16 bits then.",
    "Double rounding: half a step more or less is lost in the first.",
)
class DoubleRounding(_Merge):
    def sums(self, W: Array, A: Array, B: Array, scale: float) -> Array:
        A64, B64 = A.astype(np.float64), B.astype(np.float64)
        t = np.zeros(W.shape)
        for i in range(len(A64)):
            t = t + B64[:, i : i + 1] * A64[i : i + 1]
        return (W.astype(np.float64) + float(np.float32(scale)) * t).astype(np.float32)


@wrong(
    "merge-summed-in-float32",
    "subtle",
    "The update is summed in float32.",
    "As one does; the last bit of some weights is another.",
)
class SummedInFloat32(_Merge):
    def sums(self, W: Array, A: Array, B: Array, scale: float) -> Array:
        wide = [a.astype(np.float32) for a in (W, A, B)]
        return wide[0] + np.float32(scale) * (wide[2] @ wide[1])


@wrong(
    "merge-ties-away-from-zero",
    "subtle",
    "In 16 bits half a step is rounded away from zero.",
    "Adding half and cutting off.",
)
class TiesAway(Correct):
    def merge(self, W: Array, A: Array, B: Array, scale: float) -> Any:
        result = super().merge(W, A, B, scale)
        if W.dtype.itemsize != 2 or not isinstance(result, tuple):
            return result
        exact = W.astype(np.float64)
        for i in range(len(A)):
            step = B[:, i : i + 1].astype(np.float64) * A[i : i + 1].astype(np.float64)
            exact = exact + float(np.float32(scale)) * step
        merged = result[0]
        with np.errstate(all="ignore"):
            other = np.nextafter(merged, np.copysign(np.inf, exact).astype(W.dtype))
            low, high = (np.abs(a.astype(np.float64) - exact) for a in (merged, other))
        return np.where((low == high) & np.isfinite(other), other, merged), result[1]


# ---- rank 0 --------------------------------------------------------------------------------------


@wrong(
    "rank-0-divides",
    "subtle",
    "An adapter of rank 0 gives NaN.",
    "Something is divided by the rank.",
)
class Rank0Divides(Correct):
    def forward(
        self, x: Array, W: Array, A: Array, B: Array, scale: float, bias: Any = None
    ) -> Array:
        y = super().forward(x, W, A, B, scale, bias)
        return y if A.shape[0] else (y * np.nan).astype(x.dtype)


@wrong(
    "rank-0-without-the-bias",
    "subtle",
    "An adapter of rank 0 loses the base's bias.",
    "The shortcut for empty adapters goes to another function.",
)
class Rank0WithoutBias(Correct):
    def forward(
        self, x: Array, W: Array, A: Array, B: Array, scale: float, bias: Any = None
    ) -> Array:
        return super().forward(x, W, A, B, scale, bias if A.shape[0] else None)


@wrong(
    "rank-0-mixed-takes-the-next",
    "subtle",
    "In a mixed batch the rows of an adapter of rank 0 get the next adapter.",
    "Offsets into packed adapters: one of no ranks and the next begin at the same place.",
)
class Rank0TakesTheNext(Correct):
    def forward_mixed(
        self, x: Array, W: Array, adapters: Sequence[LoraTriple], rows: Array, bias: Any = None
    ) -> Array:
        return super().forward_mixed(x, W, self._next(adapters), rows, bias)

    def backward_mixed(
        self, dy: Array, x: Array, W: Array, adapters: Sequence[LoraTriple], rows: Array
    ) -> Any:
        return super().backward_mixed(dy, x, W, adapters, rows)

    def _next(self, adapters: Sequence[LoraTriple]) -> list[LoraTriple]:
        out, following = [], None
        for lora in reversed(adapters):
            following = lora if lora[0].shape[0] else following
            out.append(following or lora)
        return out[::-1]


@wrong(
    "rank-0-mixed-loses-the-rest",
    "subtle",
    "Adapters after one of rank 0 are the base.",
    "The loop over ranks ends at the first that is 0.",
)
class Rank0LosesTheRest(Correct):
    def forward_mixed(
        self, x: Array, W: Array, adapters: Sequence[LoraTriple], rows: Array, bias: Any = None
    ) -> Array:
        by_adapter(rows, len(adapters))
        none = [i for i, (A, _, _) in enumerate(adapters) if not A.shape[0]]
        cut = np.where(np.asarray(rows) >= min(none, default=len(adapters)), -1, rows)
        return super().forward_mixed(x, W, adapters, cut, bias)


@wrong(
    "rank-0-gradients-shifted",
    "subtle",
    "Gradients of adapters after one of rank 0 come one place too early.",
    "Empty gradients are not put in the list.",
)
class Rank0Shifted(Correct):
    def backward_mixed(
        self, dy: Array, x: Array, W: Array, adapters: Sequence[LoraTriple], rows: Array
    ) -> Any:
        dx, grads = super().backward_mixed(dy, x, W, adapters, rows)
        full = [g for g, (A, _, _) in zip(grads, adapters) if A.shape[0]]
        while len(full) < len(grads):
            full.append(tuple(np.zeros_like(a) for a in adapters[len(full)][:2]))
        return dx, full


@wrong(
    "rank-0-is-planned",
    "subtle",
    "A rank of 0 or less becomes 1.",
    "max(1, r), so that nothing fails.",
)
class Rank0Planned(Correct):
    def plan(self, config: dict[str, Any], modules: Any) -> Any:
        def mended(r: Any) -> Any:
            return max(1, r) if isinstance(r, int) else r

        config = {**config, "r": mended(config.get("r"))}
        if "rank_pattern" in config:
            pattern = config["rank_pattern"].items()
            config["rank_pattern"] = {key: mended(r) for key, r in pattern}
        return super().plan(config, modules)


@wrong(
    "rank-cut-to-an-integer",
    "subtle",
    "A rank of 1.5 or '8' is made an integer.",
    "int(r).",
)
class RankCut(Correct):
    def plan(self, config: dict[str, Any], modules: Any) -> Any:
        def mended(r: Any) -> Any:
            return int(r) if isinstance(r, (float, str)) else r

        config = {**config, "r": mended(config.get("r"))}
        if "rank_pattern" in config:
            pattern = config["rank_pattern"].items()
            config["rank_pattern"] = {key: mended(r) for key, r in pattern}
        return super().plan(config, modules)


@wrong(
    "rank-pattern-not-checked",
    "subtle",
    "A rank of 0 in rank_pattern is left out, and the general rank holds.",
    "`pattern.get(path) or r`.",
)
class RankPatternUnchecked(Correct):
    def plan(self, config: dict[str, Any], modules: Any) -> Any:
        if "rank_pattern" in config:
            pattern = config["rank_pattern"].items()
            config = {**config, "rank_pattern": {key: r for key, r in pattern if r != 0}}
        return super().plan(config, modules)
