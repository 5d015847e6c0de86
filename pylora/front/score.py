"""How likely a model finds a text, token by token."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pylora.errors import DataError

if TYPE_CHECKING:
    from pylora.adapters.adapter import Adapter
    from pylora.model.llama import Llama
    from pylora.text.tokenizer import Tokenizer


@dataclass(frozen=True, eq=False, repr=False)
class Score:
    """`Model.score` of one text of n tokens.

    ids and tokens (their texts) have n entries; logprobs, float64 [n], has the natural logarithm of
    each token's probability after those before it. The first is nan: nothing comes before it.
    """

    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    logprobs: np.ndarray

    @property
    def total(self) -> float:
        """The log probability of all tokens behind the first."""
        return math.fsum(self.logprobs[1:])

    @property
    def perplexity(self) -> float:
        """exp of minus the mean log probability; inf if too large; nan of a text of one token."""
        n = len(self.ids) - 1
        if n < 1:
            return math.nan
        mean = -self.total / n
        return math.exp(mean) if mean < 700 else math.inf

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return (
            f"Score({len(self)} tokens, total logprob {self.total:.4f}, "
            f"perplexity {self.perplexity:.4g})"
        )


def score_of(llama: Llama, tokenizer: Tokenizer, adapter: Adapter | None, text: str) -> Score:
    """The score of a text with this adapter, which is attached meanwhile and taken away again."""
    ids = tokenizer.encode(text, bos=tokenizer.add_bos)
    if not ids:
        raise DataError("the text to score has no token")
    logprobs = np.full(len(ids), np.nan)
    if len(ids) > 1:
        try:
            if adapter is not None:
                llama.attach(adapter)
            nll, _ = llama.loss(ids[:-1], ids[1:], grads=False)
        finally:
            llama.detach()
        logprobs[1:] = -np.asarray(llama.ops.to_numpy(nll), np.float64)
    return Score(tuple(ids), tuple(tokenizer.decode([i]) for i in ids), logprobs)
