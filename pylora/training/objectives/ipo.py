"""IPO: identity preference optimization (Azar et al. 2023, equation 17), on log-ratios per token of
the answer, as its authors run it and TRL has it.

    L = (h - 1 / (2 β))²
    h = log(π/π_ref)(chosen) / |chosen| - log(π/π_ref)(rejected) / |rejected|
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pylora.training.objectives.likelihood import Likelihood, Term


class IPO(Likelihood):
    name = "ipo"
    uses = ("beta",)
    needs_reference = True

    def of(self, item: Any, nll: Sequence[np.ndarray], step: Any) -> Term:
        beta, answers = self.settings.beta, item.answers
        ratios = [a.logp(one) - self.reference[a] for a, one in zip(answers, nll)]
        off = ratios[0] / answers[0].count - ratios[1] / answers[1].count - 1 / (2 * beta)
        slopes = tuple(a.spread(sign * 2 * off / a.count) for a, sign in zip(answers, (1.0, -1.0)))
        return Term(off * off, slopes, (beta * ratios[0], beta * ratios[1]))
