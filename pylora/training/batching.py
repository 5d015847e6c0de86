"""Which examples make up each step, in which order, and the arrays that the model takes.

The order of an epoch is a function of the seed, the epoch and the lengths alone: sort keys are
Philox words (key: the seed; stream: "shuffle/<epoch>"), so another language or a resumed run gets
the same batches. Sequences are laid one behind the other; nothing is ever padded.

Splitting a step into micro-batches changes no number that matters: each row weighs 1 / (labels in
the whole step), and its dropout mask is that of its row in the whole step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pylora.errors import ConfigError, DataError
from pylora.numbers.random import stream
from pylora.reference import IGNORE, Reference
from pylora.training.config import TrainConfig
from pylora.training.examples import Example
from pylora.types import Seqs, brief

Micro = tuple[int, ...]  # indices of examples
Step = tuple[Micro, ...]  # the micro-batches of one update

_SPREAD = 32  # batches that are sorted by length together; more: closer lengths, less shuffling
_OPEN = 32  # micro-batches that packing fills at a time


@dataclass(frozen=True, eq=False)
class Batch:
    """The arrays of one micro-batch of m rows, and where its rows are in the whole step."""

    __repr__ = brief

    ids: np.ndarray  # int64 [m]
    labels: np.ndarray  # int64 [m]
    seqs: Seqs
    row0: int  # rows of the step before this micro-batch


def assemble(examples: Sequence[Example], micro: Micro, row0: int = 0) -> Batch:
    """Lays the examples with these indices one behind the other."""
    chosen = [examples[i] for i in micro]
    return Batch(
        np.concatenate([e.ids for e in chosen]),
        np.concatenate([e.labels for e in chosen]),
        Seqs.of([len(e) for e in chosen]),
        row0,
    )


def batches(examples: Sequence[Example], step: Step, only: range | None = None) -> Iterator[Batch]:
    """The micro-batches of a step, in order, each knowing its first row; or `only` some."""
    row0 = 0
    for number, micro in enumerate(step):
        if only is None or number in only:
            yield assemble(examples, micro, row0)
        row0 += sum(len(examples[i]) for i in micro)


def label_count(examples: Sequence[Example], step: Step) -> int:
    """Labels of the whole step that count."""
    return sum(int((examples[i].labels != IGNORE).sum()) for micro in step for i in micro)


def shuffled(n: int, *, seed: int, name: str) -> list[int]:
    """A permutation of range(n): the order of n 64-bit Philox keys, ties by index."""
    words = Reference().philox(seed, stream("shuffle", name), 0, 2 * n).astype(np.uint64)
    keys = words[0::2] | (words[1::2] << np.uint64(32))
    return [int(i) for i in np.argsort(keys, kind="stable")]


def epoch_steps(
    lengths: Sequence[int],
    *,
    seed: int,
    epoch: int,
    batch_size: int = 8,
    accumulation: int = 1,
    packing: bool = False,
    max_tokens: int | None = None,
) -> list[Step]:
    """The steps of one epoch (0, 1, ...) over examples of these lengths (in rows).

    Without packing: batch_size examples of similar length a step (the last step may have fewer),
    split in `accumulation` micro-batches, and further where one would exceed max_tokens. With
    packing: micro-batches filled up to max_tokens, `accumulation` of them a step. Each example
    occurs exactly once. DataError for an example longer than max_tokens.
    """
    if max_tokens is None and packing:
        raise ConfigError("packing needs max_tokens, the number of tokens to fill up to")
    for i, n in enumerate(lengths):
        if max_tokens is not None and n > max_tokens:
            raise DataError(
                f"example {i} has {n} tokens, more than max_tokens {max_tokens}; "
                "raise max_tokens or shorten the example"
            )
    order = shuffled(len(lengths), seed=seed, name=str(epoch))
    if packing:
        assert max_tokens is not None
        micros = _packed(lengths, order, max_tokens)
        steps = [tuple(micros[i : i + accumulation]) for i in range(0, len(micros), accumulation)]
    else:
        groups = _bucketed(lengths, order, batch_size)
        steps = [_split(lengths, group, accumulation, max_tokens) for group in groups]
    return [steps[i] for i in shuffled(len(steps), seed=seed, name=f"{epoch}/steps")]


def epoch_of(config: TrainConfig, lengths: Sequence[int], epoch: int = 0) -> list[Step]:
    """`epoch_steps` of a run with these settings."""
    return epoch_steps(
        lengths,
        seed=config.seed,
        epoch=epoch,
        batch_size=config.batch_size,
        accumulation=config.accumulation,
        packing=config.packing,
        max_tokens=config.max_tokens,
    )


def _bucketed(lengths: Sequence[int], order: list[int], size: int) -> list[list[int]]:
    """Groups of `size`, alike in length: a stretch of the shuffled order is sorted, then cut."""
    groups = []
    for start in range(0, len(order), size * _SPREAD):
        bucket = sorted(order[start : start + size * _SPREAD], key=lambda i: lengths[i])
        groups += [bucket[i : i + size] for i in range(0, len(bucket), size)]
    return groups


def _split(lengths: Sequence[int], group: list[int], parts: int, max_tokens: int | None) -> Step:
    """`group` in order, cut into `parts` of nearly equal count, and where max_tokens is reached."""
    micros: list[Micro] = []
    for part in np.array_split(np.asarray(group), min(parts, len(group))):
        micro: list[int] = []
        total = 0
        for i in part.tolist():
            if micro and max_tokens is not None and total + lengths[i] > max_tokens:
                micros.append(tuple(micro))
                micro, total = [], 0
            micro.append(i)
            total += lengths[i]
        micros.append(tuple(micro))
    return tuple(micros)


def _packed(lengths: Sequence[int], order: list[int], max_tokens: int) -> list[Micro]:
    """First fit in the shuffled order, over the `_OPEN` micro-batches opened last."""
    bins: list[list[int]] = []
    room: list[int] = []
    for i in order:
        for b in range(max(0, len(bins) - _OPEN), len(bins)):
            if lengths[i] <= room[b]:
                break
        else:
            b = len(bins)
            bins.append([])
            room.append(max_tokens)
        bins[b].append(i)
        room[b] -= lengths[i]
    return [tuple(b) for b in bins]
