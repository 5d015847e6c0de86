"""Windows, layouts, and decoding with a cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from pylora.conformance.correct.attending import Attending, CorrectDecoder
from pylora.conformance.correct.plain import Correct
from pylora.conformance.mutants.registry import wrong
from pylora.conformance.protocol import AttentionShape, LoraTriple
from pylora.types import Array, Attn, Seqs

Weights = Mapping[str, Array]
Adapters = Mapping[str, LoraTriple]


# ---- windows and layouts -------------------------------------------------------------------------


@wrong(
    "window-one-too-long",
    "subtle",
    "A token sees window + 1 keys: itself, and window before it.",
    "The window is taken for the distance; models disagree about which it is.",
)
class WindowTooLong(Correct):
    def _attn(self, shape: AttentionShape) -> Attn:
        attn = super()._attn(shape)
        return replace(attn, window=attn.window + (attn.window > 0))


@wrong(
    "window-one-too-short",
    "subtle",
    "A token sees window - 1 keys, and at least itself.",
    "`<` for `<=` in the mask.",
)
class WindowTooShort(Correct):
    def _attn(self, shape: AttentionShape) -> Attn:
        attn = super()._attn(shape)
        return replace(attn, window=max(1, attn.window - 1) if attn.window else 0)


@wrong(
    "window-not-in-backward",
    "subtle",
    "The gradients are those of attention without a window.",
    "The forward kernel has a window, the backward kernel is the older one.",
)
class WindowNotInBackward(Correct):
    def attention_backward(
        self, dy: Array, x: Array, weights: Weights, adapters: Adapters, shape: AttentionShape
    ) -> Any:
        return super().attention_backward(dy, x, weights, adapters, replace(shape, window=0))


@wrong(
    "window-of-1-is-none",
    "subtle",
    "A window of 1 is taken for no window.",
    "`if window > 1`.",
)
class WindowOf1(Correct):
    def _attn(self, shape: AttentionShape) -> Attn:
        attn = super()._attn(shape)
        return replace(attn, window=0 if attn.window == 1 else attn.window)


@wrong(
    "window-past-64-is-64",
    "subtle",
    "Windows beyond 64 are 64.",
    "Keys are read in a block of 64, the block of the window's first key is left out.",
)
class WindowCapped(Correct):
    def _attn(self, shape: AttentionShape) -> Attn:
        attn = super()._attn(shape)
        return replace(attn, window=min(attn.window, 64))


@wrong(
    "interleaved-ignored",
    "gross",
    "Interleaved pairs are turned as half-split ones.",
    "The layout is a field of the file that nobody reads.",
)
class InterleavedIgnored(Correct):
    def _turned(
        self, x: Array, position: Array, shape: AttentionShape, inverse: bool = False
    ) -> Array:
        return super()._turned(x, position, replace(shape, rope_layout="half"), inverse)


@wrong(
    "interleaved-in-q-alone",
    "subtle",
    "q is turned in interleaved pairs, k in half-split ones.",
    "One of two calls got the new argument. A head of two elements does not tell.",
)
class InterleavedInQ(Correct):
    def _turned(
        self, x: Array, position: Array, shape: AttentionShape, inverse: bool = False
    ) -> Array:
        is_k = x.shape[1] == shape.kv_heads * shape.head_dim and shape.heads != shape.kv_heads
        shape = replace(shape, rope_layout="half") if is_k else shape
        return super()._turned(x, position, shape, inverse)


@wrong(
    "interleaved-backward-half",
    "subtle",
    "The backward pass turns half-split pairs back.",
    "The default of an argument.",
)
class InterleavedBackward(Correct):
    def _turned(
        self, x: Array, position: Array, shape: AttentionShape, inverse: bool = False
    ) -> Array:
        shape = replace(shape, rope_layout="half") if inverse else shape
        return super()._turned(x, position, shape, inverse)


@wrong(
    "scores-scaled-twice",
    "gross",
    "Scores are multiplied by the given scale and by 1 / sqrt(head_dim).",
    "The kernel scales by itself.",
)
class ScoresScaledTwice(Correct):
    def _attn(self, shape: AttentionShape) -> Attn:
        attn = super()._attn(shape)
        given = shape.scale is not None
        return replace(attn, scale=attn.scale * (shape.head_dim**-0.5 if given else 1.0))


@wrong(
    "scores-scale-of-1-is-none",
    "subtle",
    "A scale of 1 is taken for none.",
    "1 was the default of the field.",
)
class ScoresScaleOne(Correct):
    def _attn(self, shape: AttentionShape) -> Attn:
        return super()._attn(replace(shape, scale=None if shape.scale == 1 else shape.scale))


@wrong(
    "scores-scale-not-in-backward",
    "subtle",
    "The gradients are scaled by 1 / sqrt(head_dim), whatever the scale is.",
    "The scale is an argument of the forward kernel alone.",
)
class ScoresScaleBackward(Correct):
    def attention_backward(
        self, dy: Array, x: Array, weights: Weights, adapters: Adapters, shape: AttentionShape
    ) -> Any:
        return super().attention_backward(dy, x, weights, adapters, replace(shape, scale=None))


@wrong(
    "attention-any-lengths",
    "subtle",
    "Lengths that do not add up to the rows are taken: what is left over is zero.",
    "Nobody adds them up.",
)
class AnyLengths(Correct):
    def attention(
        self, x: Array, weights: Weights, adapters: Adapters, shape: AttentionShape
    ) -> Array:
        total = sum(shape.lengths)
        if total == len(x):
            return super().attention(x, weights, adapters, shape)
        y = np.zeros((len(x), weights["o_proj"].shape[0]), x.dtype)
        rows = np.resize(x, (total, x.shape[1]))
        some = super().attention(rows, weights, adapters, shape)
        y[: min(total, len(x))] = some[: len(x)]
        return y


@wrong(
    "attention-odd-head-left",
    "subtle",
    "Of an odd head the last element is left as it is.",
    "head_dim // 2 pairs.",
)
class OddHead(Correct):
    def attention(
        self, x: Array, weights: Weights, adapters: Adapters, shape: AttentionShape
    ) -> Array:
        if shape.head_dim % 2 == 0:
            return super().attention(x, weights, adapters, shape)
        return np.zeros((len(x), weights["o_proj"].shape[0]), x.dtype)


@wrong(
    "attention-heads-rounded-down",
    "subtle",
    "Heads that the key heads do not divide are rounded down.",
    "heads // kv_heads.",
)
class HeadsRoundedDown(Correct):
    def attention(
        self, x: Array, weights: Weights, adapters: Adapters, shape: AttentionShape
    ) -> Array:
        extra = shape.heads % shape.kv_heads
        if not extra:
            return super().attention(x, weights, adapters, shape)
        n = (shape.heads - extra) * shape.head_dim
        cut = {**weights, "q_proj": weights["q_proj"][:n], "o_proj": weights["o_proj"][:, :n]}
        return super().attention(x, cut, {}, replace(shape, heads=shape.heads - extra))


@wrong(
    "attention-16-bit-scores",
    "subtle",
    "In 16 bits the shares of each row add up to 1 after they were rounded: o is a rounded mean.",
    "softmax is followed by a cast, and the cast values are normalised again.",
)
class SixteenBitSums(Correct):
    def _project(
        self, name: str, x: Array, weights: Weights, adapters: Adapters
    ) -> tuple[Array, Array | None]:
        y, h = super()._project(name, x, weights, adapters)
        if name == "v_proj" and weights[name].dtype.itemsize == 2:
            total = np.zeros_like(y).astype(weights[name].dtype)
            for column in range(x.shape[1]):
                W = np.asarray(weights[name])[:, column]
                part = (x[:, column : column + 1] * self.widen(W)).astype(total.dtype)
                total = total + part
            base, _ = super()._project(name, x, weights, {})
            y = y - base + self.widen(total)
        return y, h


# ---- the whole block -----------------------------------------------------------------------------


@wrong(
    "block-norm-after",
    "gross",
    "The norm stands after attention, not before it.",
    "Post-norm, as in the first transformers.",
)
class NormAfter(Correct):
    def block(
        self, x: Array, weights: Weights, adapters: Adapters, shape: AttentionShape, eps: float
    ) -> Array:
        ones = {**weights, "norm1": np.ones_like(weights["norm1"])}
        return super().block(x, ones, adapters, shape, eps)


@wrong(
    "block-second-residual-from-x",
    "subtle",
    "The second residual is x, not x₁.",
    "The residual is saved once.",
)
class ResidualFromX(Correct):
    def block(
        self, x: Array, weights: Weights, adapters: Adapters, shape: AttentionShape, eps: float
    ) -> Array:
        y = self.widen(super().block(x, weights, adapters, shape, eps))
        normed, _ = self.ops.rms_norm_forward(self.widen(x), self.widen(weights["norm1"]), eps)
        return (y - self._attend(normed, weights, adapters, shape)[0]).astype(x.dtype)


@wrong(
    "block-gate-adapter-on-up",
    "subtle",
    "The adapter of gate_proj is applied to up_proj too.",
    "Gate and up are one fused matrix with one adapter.",
)
class GateAdapterOnUp(Correct):
    def _project(
        self, name: str, x: Array, weights: Weights, adapters: Adapters
    ) -> tuple[Array, Array | None]:
        if name == "up_proj" and "gate_proj" in adapters:
            adapters = {**adapters, "up_proj": adapters["gate_proj"]}
        return super()._project(name, x, weights, adapters)


# ---- decoding ------------------------------------------------------------------------------------


class _Decoding(Correct):
    """Correct but for its decoder."""

    session: type[CorrectDecoder] = CorrectDecoder

    def decoder(self, weights: Weights, shape: AttentionShape) -> CorrectDecoder:
        super().decoder(weights, shape)
        return self.session(self, weights, shape)


class _StartsAgain(CorrectDecoder):
    def positions(self, sequence: int, n: int) -> Array:
        return np.arange(n, dtype=np.int64) + (self.length(sequence) if n == 1 else 0)


@wrong(
    "cache-position-restarts",
    "subtle",
    "The positions of a second chunk start again at 0; single rows are right.",
    "Prefill starts at 0, and a chunk is prefilled.",
)
class PositionRestarts(_Decoding):
    session = _StartsAgain


class _StuckAfterEmpty(CorrectDecoder):
    late = 0

    def one(self, sequence: int, x: Array, adapters: Adapters) -> Array:
        if not len(x) and self.length(sequence):
            self.late = 1
        return super().one(sequence, x, adapters)

    def positions(self, sequence: int, n: int) -> Array:
        position = super().positions(sequence, n) - self.late
        self.late = 0 if n else self.late
        return np.maximum(position, 0)


@wrong(
    "cache-stuck-after-empty-chunk",
    "subtle",
    "After a chunk of no rows the position is one too small.",
    "Length is last position + 1, and an empty chunk has no last position.",
)
class StuckAfterEmpty(_Decoding):
    session = _StuckAfterEmpty


class _WindowOfTheChunk(CorrectDecoder):
    def attend(self, q: Array, k: Array, v: Array, n: int) -> Array:
        window = self.shape.window
        if window and len(k) > n:
            window += 1
        kept = self.shape
        self.shape = replace(kept, window=window)
        o = super().attend(q, k, v, n)
        self.shape = kept
        return o


@wrong(
    "cache-window-one-too-long",
    "subtle",
    "With keys in the cache the window is one too long; without it is right.",
    "The cache keeps `window` rows, and the new one comes on top.",
)
class WindowOfTheCache(_Decoding):
    session = _WindowOfTheChunk


class _WindowForgotten(CorrectDecoder):
    def attend(self, q: Array, k: Array, v: Array, n: int) -> Array:
        if n > 1:
            return super().attend(q, k, v, n)
        kept = self.shape
        self.shape = replace(kept, window=0)
        o = super().attend(q, k, v, n)
        self.shape = kept
        return o


@wrong(
    "cache-window-forgotten-for-one-row",
    "subtle",
    "The kernel for a single row knows no window.",
    "Decoding has a kernel of its own.",
)
class WindowForgotten(_Decoding):
    session = _WindowForgotten


class _NotCausalInChunk(CorrectDecoder):
    def attend(self, q: Array, k: Array, v: Array, n: int) -> Array:
        if len(k) == n:
            return super().attend(q, k, v, n)
        o = np.zeros_like(q)
        for i in range(n):  # each of the chunk's queries sees all of its keys
            seqs = Seqs(*(np.array(a, np.int64) for a in ([0, 1], [0], [len(k)])))
            attn = self.maker._attn(self.shape)
            o[i : i + 1], _ = self.maker.ops.attention_forward(q[i : i + 1], k, v, seqs, attn)
        return o


@wrong(
    "cache-chunk-not-causal",
    "subtle",
    "Rows of a later chunk see the whole chunk, also what comes after them.",
    "With a cache the mask is left out: it was made for one new row.",
)
class ChunkNotCausal(_Decoding):
    session = _NotCausalInChunk


class _FirstAdapter(CorrectDecoder):
    def extend(
        self, x: Array, runs: Sequence[tuple[int, int]], adapters: Sequence[Adapters]
    ) -> Array:
        return super().extend(x, runs, [adapters[0]] * len(runs) if runs else adapters)


@wrong(
    "cache-first-adapter-for-all",
    "subtle",
    "All runs of a call use the first one's adapters.",
    "The batch has an adapter, not its rows.",
)
class FirstAdapterForAll(_Decoding):
    session = _FirstAdapter


class _AdapterOfTheStart(CorrectDecoder):
    def __init__(self, maker: Attending, weights: Weights, shape: AttentionShape) -> None:
        super().__init__(maker, weights, shape)
        self.own: dict[int, Adapters] = {}

    def one(self, sequence: int, x: Array, adapters: Adapters) -> Array:
        return super().one(sequence, x, self.own.setdefault(sequence, adapters))


@wrong(
    "cache-adapter-of-the-start",
    "subtle",
    "A sequence keeps the adapters of its first chunk.",
    "The adapter is a field of the request.",
)
class AdapterOfTheStart(_Decoding):
    session = _AdapterOfTheStart


class _RecomputesKeys(CorrectDecoder):
    def __init__(self, maker: Attending, weights: Weights, shape: AttentionShape) -> None:
        super().__init__(maker, weights, shape)
        self.rows: dict[int, Array] = {}

    def one(self, sequence: int, x: Array, adapters: Adapters) -> Array:
        rows = np.concatenate([self.rows[sequence], x]) if sequence in self.rows else x
        rows = rows[: self.length(sequence) + len(x)] if sequence in self.rows else rows
        self.rows[sequence], before = rows, self.length(sequence)
        self.kept.pop(sequence, None)
        return super().one(sequence, rows, adapters)[before:]


@wrong(
    "cache-keys-of-the-new-adapter",
    "subtle",
    "Keys and values of earlier rows are those of the newest adapter.",
    "The cache is dropped when the adapter changes, and filled again.",
)
class RecomputesKeys(_Decoding):
    session = _RecomputesKeys


class _SharedSlots(CorrectDecoder):
    def drop(self, sequence: int) -> None:
        """Its rows stay; the length alone is 0, and is counted again from what lies there."""
        if self.length(sequence) > 1:
            k, v = self.kept[sequence]
            self.kept[sequence] = k[:1], v[:1]


@wrong(
    "cache-first-row-stays",
    "subtle",
    "The first row of a dropped sequence stays in its slot.",
    "BOS is the same for all; it was kept for the next request.",
)
class FirstRowStays(_Decoding):
    session = _SharedSlots


class _DropsAnother(CorrectDecoder):
    def drop(self, sequence: int) -> None:
        names = list(self.kept)
        super().drop(sequence)
        last = names[-1]
        if last != sequence and last in self.kept:
            k, v = self.kept[last]
            self.kept[last] = k[::-1], v[::-1]


@wrong(
    "cache-moved-rows-in-reverse",
    "subtle",
    "When a sequence leaves, the last one is moved into its slot, rows reversed.",
    "An overlapping copy in the wrong direction.",
)
class MovedInReverse(_Decoding):
    session = _DropsAnother


class _TruncatesLate(CorrectDecoder):
    def truncate(self, sequence: int, length: int) -> None:
        super().truncate(sequence, min(length + 1, self.length(sequence)))


@wrong(
    "cache-truncate-one-too-many",
    "subtle",
    "Cutting back leaves one row too many.",
    "The last accepted token's index is taken for a length.",
)
class TruncatesLate(_Decoding):
    session = _TruncatesLate


class _PositionStays(CorrectDecoder):
    def __init__(self, maker: Attending, weights: Weights, shape: AttentionShape) -> None:
        super().__init__(maker, weights, shape)
        self.next: dict[int, int] = {}

    def positions(self, sequence: int, n: int) -> Array:
        first = self.next.get(sequence, 0)
        self.next[sequence] = first + n
        return np.arange(first, first + n, dtype=np.int64)

    def drop(self, sequence: int) -> None:
        super().drop(sequence)
        self.next.pop(sequence, None)


@wrong(
    "cache-position-does-not-go-back",
    "subtle",
    "After cutting back positions go on from where they were.",
    "The cache and the counter are two things.",
)
class PositionStays(_Decoding):
    session = _PositionStays


class _Capacity(CorrectDecoder):
    def one(self, sequence: int, x: Array, adapters: Adapters) -> Array:
        y = super().one(sequence, x, adapters)
        k, v = self.kept[sequence]
        if len(k) > 128:  # a ring: the oldest rows are written over
            self.kept[sequence] = (
                np.concatenate([k[len(k) - 128 :][:1], k[1:]]),
                np.concatenate([v[len(v) - 128 :][:1], v[1:]]),
            )
        return y


@wrong(
    "cache-ring-of-128",
    "subtle",
    "Beyond 128 rows the first row is written over.",
    "A ring buffer as long as the tests' longest prompt.",
)
class RingOf128(_Decoding):
    session = _Capacity


class _LastSequences(CorrectDecoder):
    def extend(
        self, x: Array, runs: Sequence[tuple[int, int]], adapters: Sequence[Adapters]
    ) -> Array:
        y = super().extend(x, runs, adapters)
        if len(runs) > 32:
            y[sum(n for _, n in runs[:32]) :] = 0
        return y


@wrong(
    "cache-32-sequences",
    "subtle",
    "Sequences after the 32nd of a call get nothing.",
    "A block of 32 threads, one for each sequence.",
)
class ThirtyTwoSequences(_Decoding):
    session = _LastSequences


class _ByPlace(CorrectDecoder):
    def extend(
        self, x: Array, runs: Sequence[tuple[int, int]], adapters: Sequence[Adapters]
    ) -> Array:
        return super().extend(x, [(i, n) for i, (_, n) in enumerate(runs)], adapters)


@wrong(
    "cache-by-place-in-the-batch",
    "subtle",
    "A sequence's slot is its place in the call, not its number.",
    "Requests keep their order until one of them ends.",
)
class ByPlace(_Decoding):
    session = _ByPlace
