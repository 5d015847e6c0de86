"""The base of the study: a small transformer that learns its four skills from scratch."""

from __future__ import annotations

import numpy as np
from continual_methods import BATCH, Training, accuracy, gradients, whole
from continual_tasks import CONFIG, SKILLS, Records, joined, records

from pylora import Llama
from pylora.model.weights import random_weights

STEPS, RATE, RECORDS = 1500, 2e-3, 2000


def made(seed: int, steps: int = STEPS) -> Llama:
    """A model that was trained on the skills from random weights, its weights frozen again."""
    weights = random_weights(CONFIG, seed)
    model = Llama(CONFIG, weights)
    change = whole(model, model.modules)
    training = Training(model, change, ("B",), RATE)
    model.attach(change)
    pool = joined([records(name, RECORDS, seed, "train") for name in SKILLS])
    rng = np.random.default_rng([seed, 7])
    for _ in range(steps):
        batch = pool.take(rng.integers(0, len(pool), 2 * BATCH))
        training.update(gradients(model, batch, ("B",)), steps)

    def trained(name: str) -> np.ndarray:
        W, path = weights(name), name.removesuffix(".weight")
        if path not in change:
            return W
        B = change[path].B
        return W + (B.T if path == model.embed_tokens.path else B)

    return Llama(CONFIG, trained)


def skills(model: Llama, tests: list[Records]) -> float:
    """Mean accuracy on the base's own skills with what is attached."""
    return float(np.mean([accuracy(model, t) for t in tests]))
