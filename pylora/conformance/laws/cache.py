"""Laws of decoding with a cache of keys and values: chunks, sequences, adapters, and going back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from pylora.conformance.laws.attention import within
from pylora.conformance.laws.law import Law
from pylora.conformance.laws.session import Block, Decoder
from pylora.conformance.problems.adapted import ALL_DTYPES
from pylora.conformance.problems.attending import beyond_chunks, chunked
from pylora.conformance.protocol import AttentionShape
from pylora.conformance.testcase import Broken, NotTested, Problem, Trial
from pylora.types import Array


def taken(t: Trial, shape: AttentionShape) -> AttentionShape:
    """The shape without the options that the implementation does not name."""
    can = getattr(t.implementation, "attention_options", ())
    window = shape.window if "window" in can else 0
    layout = shape.rope_layout if "interleaved" in can else "half"
    return replace(shape, window=window, rope_layout=layout)


class Session:
    """A decoder of the implementation and the exact one, side by side."""

    def __init__(self, t: Trial, p: Problem) -> None:
        self.t, self.p = t, p
        self.shape = taken(t, p.shape)
        self.theirs = t.decoder(p.weights, self.shape)
        weights = {name: t.weight(W) for name, W in p.weights.items()}
        self.exact = Decoder(weights, self.shape, t.precision)

    def extend(
        self,
        runs: list[tuple[int, int]],
        rows: list[Array],
        lora: list[Mapping[str, Any]],
        what: str,
    ) -> Array:
        """One call, compared; the implementation's y."""
        x = np.concatenate(rows)
        y = self.theirs.extend(x, runs, lora)
        if not isinstance(y, np.ndarray) or y.dtype != x.dtype:
            kind = getattr(y, "dtype", type(y).__name__)
            raise Broken(f"extend returned {kind}, expected an array of {x.dtype}")
        want = self.exact.extend(x, runs, lora)
        bound = want.error * within(self.p.replaced(x=x))
        self.t.expect(f"y of {what}", y, want.value, bound)
        result: Array = y
        return result


def _run(t: Trial, p: Problem, before: Callable[[Session, int], None] | None = None) -> Session:
    """All calls of the problem; `before` each, something may happen."""
    session, at = Session(t, p), dict.fromkeys(p.x, 0)
    for number, (runs, chosen) in enumerate(zip(p.calls, p.lora)):
        if before is not None:
            before(session, number)
        rows = []
        for s, n in runs:
            rows.append(p.x[s][at[s] : at[s] + n])
            at[s] += n
        said = ", ".join(f"{n} rows of {s}" for s, n in runs[:4])
        what = f"call {number} ({said}{', …' if len(runs) > 4 else ''})"
        session.extend(runs, rows, [p.adapters[i] for i in chosen], what)
    return session


def _chunks(t: Trial, p: Problem) -> None:
    _run(t, p)


def _as_a_whole(t: Trial, p: Problem) -> None:
    """One sequence: the chunks' rows are those of attention over it in one go."""
    (sequence,) = p.x
    x, lora = p.x[sequence], p.adapters[p.lora[0][0]]
    shape = taken(t, p.shape)
    decoder, parts, at = t.decoder(p.weights, shape), [], 0
    for runs in p.calls:
        n = runs[0][1]
        parts.append(decoder.extend(x[at : at + n], runs, [lora]))
        at += n
    whole = t.attention(x, p.weights, lora, replace(shape, lengths=(len(x),)))
    weights = {name: t.weight(W) for name, W in p.weights.items()}
    block = Block(weights, lora, replace(shape, lengths=(len(x),)), t.precision)
    bound = 2 * block.forward(x).error * within(p.replaced(x=x))
    sizes = [runs[0][1] for runs in p.calls]
    what = f"y of chunks of {sizes} rows against {len(x)} at once"
    t.expect(what, np.concatenate(parts), whole, bound)


def _leaves(t: Trial, p: Problem) -> None:
    """A sequence is dropped and comes again under its number: it starts anew, the others go on."""
    rng = np.random.default_rng(p.seed)
    session = _run(t, p)
    if not session.theirs.has("drop"):
        raise NotTested("the decoder has no drop()")
    sequences = list(p.x)
    gone = sequences[int(rng.integers(len(sequences)))]
    session.theirs.drop(gone)
    session.exact.drop(gone)
    rng.shuffle(sequences)
    runs = [(s, min(2, len(p.x[s]))) for s in sequences]
    lora = [p.adapters[int(rng.integers(3))] for _ in sequences]
    rows = [p.x[s][:n] for s, n in runs]
    session.extend(runs, rows, lora, f"rows after sequence {gone} was dropped")


def _goes_back(t: Trial, p: Problem) -> None:
    """A sequence is cut back to its first rows: as if the others had never been."""
    rng = np.random.default_rng(p.seed)

    def back(session: Session, number: int) -> None:
        started = [s for s in p.x if session.exact.length(s)]
        if not session.theirs.has("truncate"):
            raise NotTested("the decoder has no truncate()")
        if not started or rng.random() < 0.3:
            return
        s = started[int(rng.integers(len(started)))]
        length = int(rng.integers(session.exact.length(s) + 1))
        session.theirs.truncate(s, length)
        session.exact.truncate(s, length)

    _run(t, p, back)


def _ours_alone(t: Trial, p: Problem) -> None:
    """A sequence by itself, in the same chunks: its rows are those among the others."""
    chosen = list(p.x)[p.seed % len(p.x)]
    together = _run(t, p)
    alone, at = Session(t, p), 0
    shared = t.decoder(p.weights, together.shape)
    position = dict.fromkeys(p.x, 0)
    for runs, lora in zip(p.calls, p.lora):
        rows = []
        for s, n in runs:
            rows.append(p.x[s][position[s] : position[s] + n])
            position[s] += n
        y = shared.extend(np.concatenate(rows), runs, [p.adapters[i] for i in lora])
        start = 0
        for (s, n), i in zip(runs, lora):
            if s == chosen:
                x = p.x[s][at : at + n]
                mine = alone.extend([(s, n)], [x], [p.adapters[i]], f"{n} rows of {s} alone")
                off: Any = 0.0
                if not t.bitwise:
                    off = np.inf  # the bound of each is asked for above
                what = f"rows of sequence {s} among {len(runs)} against alone"
                t.expect(what, y, mine, off, at=slice(start, start + n))
                at += n
            start += n


NEEDS = ("decoder",)
LAWS = (
    Law(
        "G4",
        "Rows that come in chunks are those that come at once.",
        "y of every chunk is that of its rows among all rows before them in their sequence: one by "
        "one, a prompt and then one by one, chunks of none, several sequences of different "
        "length in any order; windows and interleaved pairs; running error analysis",
        "the position starts again in the second chunk, a window counts the chunk's rows, the "
        "cache is not moved on, or a sequence reads another's",
        ("G-1", "G-2", "G-3", "A-9", "A-4"),
        NEEDS,
        chunked,
        _chunks,
        (),
        dtypes=ALL_DTYPES,
        covering=beyond_chunks,
    ),
    Law(
        "G5",
        "Decoding in chunks is the implementation's own attention.",
        "y(chunks) = y(whole) within twice A1's bound, for every way of cutting",
        "as G4, shown without an oracle",
        ("G-1",),
        (*NEEDS, "attention"),
        lambda dtype: chunked(dtype, several=False),
        _as_a_whole,
        (),
        dtypes=ALL_DTYPES,
    ),
    Law(
        "G6",
        "Each run of rows has its own adapters, and keys keep those that they were made with.",
        "as G4, each run with another adapter than its sequence had before, or none",
        "the first run's adapter serves all, a switch waits for the next call, or the cache is "
        "computed again with the new adapter",
        ("G-4", "X-3", "X-5"),
        NEEDS,
        lambda dtype: chunked(dtype, switching=True),
        _chunks,
        (),
        dtypes=ALL_DTYPES,
        cost=2,
    ),
    Law(
        "G7",
        "A sequence does not know of the others.",
        "its rows among others are its rows alone: bit for bit where bits are promised",
        "an answer changes with the load of the server, or with who came before",
        ("G-5", "A-7", "N-4"),
        NEEDS,
        lambda dtype: chunked(dtype, switching=True),
        _ours_alone,
        (),
        dtypes=ALL_DTYPES,
        cost=2,
    ),
    Law(
        "G8",
        "A sequence that left and comes again starts anew.",
        "after drop(s) the rows of s are those of a sequence of no rows; all others go on",
        "keys of the one before are seen, or another sequence's are moved",
        ("G-6",),
        NEEDS,
        lambda dtype: chunked(dtype, switching=True),
        _leaves,
        (),
        dtypes=ALL_DTYPES,
        cost=2,
    ),
    Law(
        "G9",
        "A sequence that is cut back goes on as if the rest had never been.",
        "after truncate(s, n) the next row of s has position n and sees n rows before it",
        "rejected rows stay in the cache, or the position does not go back with it",
        ("G-6",),
        NEEDS,
        lambda dtype: chunked(dtype, switching=True),
        _goes_back,
        (),
        dtypes=ALL_DTYPES,
        cost=2,
    ),
)
