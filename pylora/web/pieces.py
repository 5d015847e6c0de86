"""The texts of tokens, for log-probabilities: OpenAI's entries, in the new form and in the old one.

An entry is of one token: its text, its bytes (a character may be cut in two), its logarithm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pylora.serving.request import Token
from pylora.web.grammars import Grammars

_LEAST = -9999.0  # what OpenAI says of a token that cannot come; JSON has no infinity


@dataclass(frozen=True)
class Entry:
    """A token of an answer, and the place in the text where it begins, in characters."""

    token: Token
    start: int


def logarithm(value: float | None) -> float | None:
    """As JSON can say it."""
    if value is None:
        return None
    return value if math.isfinite(value) else _LEAST


class Pieces:
    """The texts of one tokenizer's tokens. `by_id`: tokens are called "token_id:7"."""

    def __init__(self, grammars: Grammars, by_id: bool = False) -> None:
        self._grammars, self._by_id = grammars, by_id

    def text(self, token: int) -> str:
        """What the token is called."""
        if self._by_id:
            return f"token_id:{token}"
        return self._grammars.bytes_of(token).decode("utf-8", "replace")

    def content(self, entries: Sequence[Entry], top: int) -> list[dict[str, Any]]:
        """Chat's form: an object for each token, with its likeliest rivals."""
        return [
            {
                **self._one(e.token.id, e.token.logprob),
                "top_logprobs": [self._one(i, value) for i, value in e.token.top[:top]],
            }
            for e in entries
        ]

    def _one(self, token: int, value: float | None) -> dict[str, Any]:
        raw = self._grammars.bytes_of(token)
        return {
            "token": self.text(token),
            "logprob": logarithm(value),
            "bytes": list(raw),
            "id": token,
        }

    def lists(self, entries: Sequence[Entry], top: int) -> dict[str, Any]:
        """The old form, of /v1/completions: a list for each property. The likeliest of a place are
        an object by text, to which the token itself is added."""
        tops: list[dict[str, float | None] | None] = []
        for e in entries:
            if e.token.logprob is None:
                tops.append(None)
                continue
            said: dict[str, float | None] = {}
            for i, value in e.token.top[:top]:
                said.setdefault(self.text(i), logarithm(value))
            said.setdefault(self.text(e.token.id), logarithm(e.token.logprob))
            tops.append(said)
        return {
            "tokens": [self.text(e.token.id) for e in entries],
            "token_logprobs": [logarithm(e.token.logprob) for e in entries],
            "top_logprobs": tops,
            "text_offset": [e.start for e in entries],
        }
