"""KTO: Kahneman-Tversky optimization (Ethayarajh et al. 2024, equation 7), on single answers
with a verdict.

    L = w_d (1 - σ(β (ρ - z)))  of a desirable answer,   w_u (1 - σ(β (z - ρ)))  of another
    ρ = log(π/π_ref)(answer),   z = max(0, mean over the step of log(π/π_ref)(another's answer))

z has no gradient. It is the whole step's, so that micro-batches change nothing. Whose answer the
other one is does not depend on the step: that of the record before it in the file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from pylora.model.through import TokenTop, through
from pylora.training.objectives.answers import Answer, Verdict
from pylora.training.objectives.likelihood import Likelihood, Term, sigmoid
from pylora.training.objectives.rows import batched, laid_out

_AT_A_TIME = 8  # answers, where z is computed


class KTO(Likelihood):
    name = "kto"
    uses = ("beta", "desirable_weight", "undesirable_weight")
    needs_reference = True
    item_kind = Verdict

    def referred(self, items: Sequence[Any]) -> list[Answer]:
        return [answer for item in items for answer in (item.answer, item.other)]

    def of_step(self, model: Any, items: Sequence[Any]) -> Any:
        """z of the step, with the model as it is, without dropout."""
        others, ratios = [item.other for item in items], []
        for micro in batched(others, _AT_A_TIME):
            some = [others[i] for i in micro]
            ids, labels, seqs, parts = laid_out(some, [a.labels for a in some])
            top = TokenTop(labels)
            through(model, ids, seqs, top, grads=False)
            ratios += [a.logp(top.nll[p]) - self.reference[a] for a, p in zip(some, parts)]
        return max(0.0, math.fsum(ratios) / len(ratios))

    def of(self, item: Any, nll: Sequence[np.ndarray], step: Any) -> Term:
        s, answer = self.settings, item.answer
        ratio = answer.logp(nll[0]) - self.reference[answer]
        sign = 1.0 if item.desirable else -1.0
        weight = s.desirable_weight if item.desirable else s.undesirable_weight
        value = sigmoid(s.beta * sign * (ratio - step))
        slope = -weight * s.beta * sign * value * (1 - value)
        return Term(weight * (1 - value), (answer.spread(slope),), (s.beta * ratio,))

    def metrics(self, items: Sequence[Any], terms: Sequence[Term]) -> dict[str, float]:
        """accuracy: how often a desirable answer has a higher reward than another, of all such
        pairs (ties count half); margin: the difference of the mean rewards. Of one kind alone there
        is neither."""
        good = np.array([t.rewards[0] for i, t in zip(items, terms) if i.desirable])
        bad = np.array([t.rewards[0] for i, t in zip(items, terms) if not i.desirable])
        if not (good.size and bad.size):
            return {}
        above = np.sign(good[:, None] - bad[None, :])
        return {
            "accuracy": float((above + 1).mean() / 2),
            "margin": math.fsum(good) / good.size - math.fsum(bad) / bad.size,
        }
