"""How well a model predicts examples: mean negative log-likelihood per token, and perplexity."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pylora.errors import DataError, expect
from pylora.training.batching import assemble
from pylora.training.examples import Example
from pylora.training.ranks import ALONE, Ranks
from pylora.types import brief


@dataclass(frozen=True)
class Evaluation:
    """nll: natural log, mean over the tokens that count; perplexity: exp(nll), inf if too large.

    Of another objective (training/objectives/) nll is its loss, there is no perplexity (NaN), and
    `metrics` has what it is judged by."""

    __repr__ = brief

    nll: float
    perplexity: float
    tokens: int  # that count
    seconds: float
    metrics: Mapping[str, float] = field(default_factory=dict)  # what else was measured, by name
    samples: Sequence[Mapping[str, str]] = ()  # answers to fixed prompts: prompt, answer

    def words(self) -> str:
        """ "loss 0.4210, perplexity 1.52, exact match 0.9": what there is."""
        return ", ".join([f"loss {self.nll:.4f}", *self.others()])

    def others(self) -> list[str]:
        """The figures beside the loss, each in words."""
        some = [] if math.isnan(self.perplexity) else [f"perplexity {self.perplexity:.2f}"]
        return some + [f"{n.replace('_', ' ')} {value:.4g}" for n, value in self.metrics.items()]


@dataclass(frozen=True)
class Measured:
    """What a run's `measure` finds at an evaluation: figures by name, and answers to look at."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    samples: Sequence[Mapping[str, str]] = ()


def evaluate(
    model: Any, examples: Sequence[Example], *, batch_size: int = 8, ranks: Ranks = ALONE
) -> Evaluation:
    """Runs `model` (with the adapter it has, without dropout) over the examples.

    The result does not depend on batch_size: rows do not depend on their neighbours, and the sum
    over tokens is rounded once. Nor does it depend on how many processes share the work.
    """
    expect("model", model, "evaluate(model, examples)")
    expect("examples", examples, "evaluate(model, examples)")
    if not examples:
        raise DataError("there are no examples to evaluate on")
    began = time.perf_counter()
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]))
    parts: list[float] = []
    tokens = sum(example.label_count for example in examples)
    starts = range(0, len(order), batch_size)
    for start in starts[ranks.rank :: ranks.size]:
        chosen = tuple(order[start : start + batch_size])
        batch = assemble(examples, chosen)
        nll, _ = model.loss(batch.ids, batch.labels, batch.seqs, grads=False)
        parts.extend(nll.tolist())
    mean = math.fsum(part for one in ranks.gather(parts) for part in one) / tokens
    perplexity = math.exp(mean) if mean < 700 else math.inf
    return Evaluation(mean, perplexity, tokens, time.perf_counter() - began)
