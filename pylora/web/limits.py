"""How much one request may ask for."""

from __future__ import annotations

from dataclasses import dataclass

from pylora.web.problem import Problem, malformed


@dataclass(frozen=True)
class Limits:
    """How much one request may ask for. `context`: tokens of prompt and answer together; `most`:
    of one answer; `seconds`: until it has to end; `body`: bytes; `answers`: n times prompts."""

    context: int
    most: int | None = None
    seconds: float | None = None
    body: int = 8 << 20
    answers: int = 256

    def tokens(self, prompt: int, asked: int | None) -> int:
        """How many new tokens there may be. Problem where the model's context is too short."""
        room = self.context - prompt
        least = 1 if asked is None else asked
        if least > room:
            wanted = "" if asked is None else f" with {asked} new ones"
            raise Problem(
                400,
                f"the prompt has {prompt} tokens;{wanted} that is more than the {self.context} "
                "that fit; shorten it, or ask for fewer tokens",
                param="max_tokens" if asked is not None and prompt < self.context else None,
                code="context_length_exceeded",
            )
        if self.most is not None and asked is not None and asked > self.most:
            raise malformed(
                f"max_tokens is {asked}; this server gives at most {self.most}", "max_tokens"
            )
        return min(room, self.most or room) if asked is None else asked
