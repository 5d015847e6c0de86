"""ORPO: odds ratio preference optimization (Hong et al. 2024, equations 6 and 7). No reference.

    L = NLL(prompt and chosen) - λ log σ(log odds(chosen) - log odds(rejected))
    odds(y) = p / (1 - p),   log p = log π(y) / |y|

The first term is the mean over all tokens of the step's chosen texts, prompts included: so do the
authors' program and TRL.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from pylora.training.objectives.likelihood import Likelihood, Term, preferred

_CERTAIN = -1e-12  # log p above this is taken for it: the odds of certainty are infinite


class ORPO(Likelihood):
    name = "orpo"
    uses = ("beta",)

    def labels(self, item: Any) -> list[np.ndarray]:
        return [item.chosen.targets, item.rejected.labels]

    def of_step(self, model: Any, items: Sequence[Any]) -> Any:
        """The weight of a chosen text's token: items of the step over such tokens of the step."""
        return len(items) / sum(len(item.chosen) for item in items)

    def of(self, item: Any, nll: Sequence[np.ndarray], step: Any) -> Term:
        weight, beta, answers = step, self.settings.beta, item.answers
        means = [min(a.logp(one) / a.count, _CERTAIN) for a, one in zip(answers, nll)]
        odds = [mean - log1mexp(mean) for mean in means]
        ratio, slope = preferred(odds[0] - odds[1], 0.0)
        # d log odds / d log p = 1 / (1 - p)
        spread = [
            a.spread(sign * beta * slope / -math.expm1(mean) / a.count)
            for a, mean, sign in zip(answers, means, (1.0, -1.0))
        ]
        loss = weight * math.fsum(nll[0].tolist()) + beta * ratio
        rewards = beta * means[0], beta * means[1]
        return Term(loss, (spread[0] + weight, spread[1]), rewards)


def log1mexp(x: float) -> float:
    """log(1 - exp(x)) of x < 0, without cancellation at either end."""
    return math.log1p(-math.exp(x)) if x < -math.log(2) else math.log(-math.expm1(x))
