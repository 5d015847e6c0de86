"""DPO: direct preference optimization (Rafailov et al. 2023, equation 7), with the conservative
label smoothing of Mitchell's note (2023), as TRL has it.

    L = -(1 - e) log σ(β h) - e log σ(-β h),   h = log(π/π_ref)(chosen) - log(π/π_ref)(rejected)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pylora.training.objectives.likelihood import Likelihood, Term, preferred


class DPO(Likelihood):
    name = "dpo"
    uses = ("beta", "label_smoothing")
    needs_reference = True

    def of(self, item: Any, nll: Sequence[np.ndarray], step: Any) -> Term:
        beta = self.settings.beta
        ratios = [a.logp(one) - self.reference[a] for a, one in zip(item.answers, nll)]
        loss, slope = preferred(beta * (ratios[0] - ratios[1]), self.settings.label_smoothing)
        slopes = item.chosen.spread(slope * beta), item.rejected.spread(-slope * beta)
        return Term(loss, slopes, (beta * ratios[0], beta * ratios[1]))
