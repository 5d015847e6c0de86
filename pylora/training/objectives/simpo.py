"""SimPO: simple preference optimization (Meng et al. 2024, equation 6). No reference.

L = -(1 - e) log σ(z) - e log σ(-z),   z = β log π(chosen) / |chosen| - β log π(rejected) / |rejected| - γ
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pylora.training.objectives.likelihood import Likelihood, Term, preferred


class SimPO(Likelihood):
    name = "simpo"
    uses = ("beta", "gamma", "label_smoothing")

    def of(self, item: Any, nll: Sequence[np.ndarray], step: Any) -> Term:
        s, answers = self.settings, item.answers
        rewards = [s.beta * a.logp(one) / a.count for a, one in zip(answers, nll)]
        loss, slope = preferred(rewards[0] - rewards[1] - s.gamma, s.label_smoothing)
        slopes = tuple(
            a.spread(sign * slope * s.beta / a.count) for a, sign in zip(answers, (1.0, -1.0))
        )
        return Term(loss, slopes, (rewards[0], rewards[1]))
