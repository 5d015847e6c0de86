"""Small preference data that several test files share."""

from __future__ import annotations

import numpy as np

from pylora.model.config import LlamaConfig
from pylora.training.objectives.answers import Answer, Preference, Verdict

VOCAB = LlamaConfig.tiny().vocab_size


def answer(
    rng: np.random.Generator, prompt: list[int], n: int, where: str = "made", vocab: int = VOCAB
) -> Answer:
    """n random tokens behind a prompt."""
    tokens = [*prompt, *rng.integers(0, vocab, n).tolist()]
    return Answer.of(tokens, [False] * len(prompt) + [True] * n, where)


def preferences(n: int = 6, seed: int = 0, vocab: int = VOCAB) -> list[Preference]:
    """Pairs of random answers of several lengths."""
    rng = np.random.default_rng(seed)
    out = []
    for i in range(n):
        prompt = rng.integers(0, vocab, 2 + i % 3).tolist()
        lengths = rng.integers(1, 6, 2)
        pair = [answer(rng, prompt, int(k), f"made:{i}", vocab) for k in lengths]
        out.append(Preference(pair[0], pair[1], f"made:{i}"))
    return out


def verdicts(n: int = 6, seed: int = 0, vocab: int = VOCAB) -> list[Verdict]:
    """Random answers, every second of them desirable."""
    rng = np.random.default_rng(seed)
    out = []
    for i in range(n):
        prompt = rng.integers(0, vocab, 2 + i % 3).tolist()
        pair = [answer(rng, prompt, int(k), f"made:{i}", vocab) for k in rng.integers(1, 6, 2)]
        out.append(Verdict(pair[0], pair[1], i % 2 == 0, f"made:{i}"))
    return out
