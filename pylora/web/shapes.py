"""How answers are written: OpenAI's objects for chat and completions, whole and in pieces.

A shape turns what `Choice` gives out into JSON. The objects have all of OpenAI's fields; added are
`seed`, with which the answer can be had again, and vLLM's `stop_reason`.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

from pylora.serving.request import Token
from pylora.web.ask import Asked
from pylora.web.choice import Choice, Piece
from pylora.web.pieces import Entry, Pieces

Json = dict[str, Any]


class Shape:
    """What all have in common. One for each response."""

    kind = chunk = prefix = ""

    def __init__(self, asked: Asked, fingerprint: str) -> None:
        self.asked = asked
        self.pieces = Pieces(asked.grammars, asked.by_id)
        self._head: Json = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": asked.model,
            "system_fingerprint": fingerprint,
        }

    def whole(self, choices: Sequence[Choice], said: Sequence[Piece], usage: Json) -> Json:
        """The answer to a request that does not stream."""
        listed = [self.choice(c, p) for c, p in zip(choices, said, strict=True)]
        head = {**self._head, "object": self.kind}
        return {**head, "choices": listed, "usage": usage, "seed": self.asked.seed}

    def _event(self, choice: Json | None, usage: Json | None) -> Json:
        event = {**self._head, "object": self.chunk, "choices": [] if choice is None else [choice]}
        if self.asked.usage:
            event["usage"] = usage
        return event

    def opening(self, choice: Choice) -> list[Json]:
        """Events before the first token."""
        return []

    def piece(self, choice: Choice, piece: Piece) -> list[Json]:
        """Events of what has become certain."""
        raise NotImplementedError

    def closing(self, choice: Choice, piece: Piece) -> list[Json]:
        """Events of the rest, and of the end."""
        raise NotImplementedError

    def used(self, usage: Json) -> Json | None:
        """The last event, if it was asked for."""
        return self._event(None, usage) if self.asked.usage else None

    def choice(self, choice: Choice, piece: Piece) -> Json:
        """A choice of a whole answer; `piece` is all of it."""
        raise NotImplementedError


class Chat(Shape):
    """/v1/chat/completions."""

    kind, chunk, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def choice(self, choice: Choice, piece: Piece) -> Json:
        message: Json = {"role": "assistant", "content": piece.text, "refusal": None}
        if piece.calls:
            message["content"] = piece.text or None
            message["tool_calls"] = [call.said() for call in piece.calls]
        return {
            "index": choice.number,
            "message": message,
            "logprobs": self._logs(piece.entries),
            "finish_reason": choice.reason,
            "stop_reason": choice.stopped_by,
        }

    def _logs(self, entries: Sequence[Entry]) -> Json | None:
        if not self.asked.logs:
            return None
        return {"content": self.pieces.content(entries, self.asked.top), "refusal": None}

    def _delta(self, choice: Choice, delta: Json, entries: Sequence[Entry] = ()) -> Json:
        logs = self._logs(entries) if entries else None
        said = {"index": choice.number, "delta": delta, "logprobs": logs, "finish_reason": None}
        return self._event(said, None)

    def opening(self, choice: Choice) -> list[Json]:
        return [self._delta(choice, {"role": "assistant", "content": "", "refusal": None})]

    def piece(self, choice: Choice, piece: Piece) -> list[Json]:
        return [self._delta(choice, {"content": piece.text}, piece.entries)]

    def closing(self, choice: Choice, piece: Piece) -> list[Json]:
        events = self.piece(choice, piece) if piece.text or piece.entries else []
        if piece.calls:
            calls = [call.said(i) for i, call in enumerate(piece.calls)]
            events.append(self._delta(choice, {"tool_calls": calls}))
        end = self._delta(choice, {})
        end["choices"][0] |= {"finish_reason": choice.reason, "stop_reason": choice.stopped_by}
        return [*events, end]


class Completion(Shape):
    """/v1/completions. `echoes`: the prompt's tokens, by the number of the choice."""

    kind = chunk = "text_completion"
    prefix = "cmpl"

    def __init__(self, asked: Asked, fingerprint: str) -> None:
        super().__init__(asked, fingerprint)
        self.echoes: dict[int, Sequence[Token]] = {}

    def _echo(self, choice: Choice) -> tuple[str, list[Entry]]:
        """The prompt in front of an answer, if it is wanted: its text and entries."""
        if not self.asked.echo:
            return "", []
        text = self.asked.prompts[choice.number // self.asked.n].text
        entries, at = [], 0
        for token in self.echoes.get(choice.number, ()):
            entries.append(Entry(token, at))
            at += len(self.asked.tokenizer.decode([token.id]))
        return text, entries

    def choice(self, choice: Choice, piece: Piece) -> Json:
        text, echo = self._echo(choice)
        return {
            "index": choice.number,
            "text": text + piece.text,
            "logprobs": self._logs(piece.entries, echo, len(text)),
            "finish_reason": choice.reason,
            "stop_reason": choice.stopped_by,
        }

    def _logs(self, entries: Sequence[Entry], echo: Sequence[Entry], before: int) -> Json | None:
        if not self.asked.logs:
            return None
        moved = [Entry(e.token, e.start + before) for e in entries]
        return self.pieces.lists([*echo, *moved], self.asked.top)

    def _said(self, choice: Choice, text: str, logs: Json | None) -> Json:
        return self._event(
            {"index": choice.number, "text": text, "logprobs": logs, "finish_reason": None}, None
        )

    def opening(self, choice: Choice) -> list[Json]:
        text, echo = self._echo(choice)
        return [self._said(choice, text, self._logs([], echo, 0))] if text or echo else []

    def piece(self, choice: Choice, piece: Piece) -> list[Json]:
        before = len(self._echo(choice)[0]) if self.asked.logs else 0
        logs = self._logs(piece.entries, [], before) if piece.entries else None
        return [self._said(choice, piece.text, logs)]

    def closing(self, choice: Choice, piece: Piece) -> list[Json]:
        end = self.piece(choice, piece)
        end[0]["choices"][0] |= {"finish_reason": choice.reason, "stop_reason": choice.stopped_by}
        return end


class Llama(Shape):
    """llama.cpp's /completion: one answer, flat."""

    def whole(self, choices: Sequence[Choice], said: Sequence[Piece], usage: Json) -> Json:
        return {**self._flat(choices[0], said[0]), **self._end(choices[0], usage)}

    def _flat(self, choice: Choice, piece: Piece) -> Json:
        flat: Json = {"index": 0, "content": piece.text, "stop": False}
        if self.asked.logs:
            flat["completion_probabilities"] = self.pieces.content(piece.entries, self.asked.top)
        return flat

    def _end(self, choice: Choice, usage: Json | None) -> Json:
        kinds = {"length": "limit"}
        kind = "word" if choice.stopped_by not in (None, "deadline") else "eos"
        return {
            "stop": True,
            "model": self.asked.model,
            "stop_type": kinds.get(choice.reason or "", kind),
            "stopping_word": choice.stopped_by or "",
            "tokens_predicted": choice.tokens,
            "tokens_evaluated": len(self.asked.prompts[0].ids),
            "tokens_cached": 0
            if usage is None
            else usage["prompt_tokens_details"]["cached_tokens"],
            "seed": self.asked.seed,
            "prompt": self.asked.prompts[0].text,
        }

    def piece(self, choice: Choice, piece: Piece) -> list[Json]:
        return [self._flat(choice, piece)]

    def closing(self, choice: Choice, piece: Piece) -> list[Json]:
        return [{**self._flat(choice, piece), **self._end(choice, None)}]
