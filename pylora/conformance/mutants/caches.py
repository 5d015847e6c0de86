"""Decoding with a cache of keys and values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from pylora.conformance.correct.attending import Attending, CorrectDecoder
from pylora.conformance.correct.plain import Correct
from pylora.conformance.mutants.registry import wrong
from pylora.conformance.protocol import AttentionShape, LoraTriple
from pylora.types import Array, Seqs

Weights = Mapping[str, Array]
Adapters = Mapping[str, LoraTriple]


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
