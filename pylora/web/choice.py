"""One answer as it comes: tokens become text that is sure, with their log-probabilities beside it.

A piece of text is given out when no later token can change it, and with it the entries of the
tokens that it is made of. Where a stop string ends the answer, tokens behind it leave no trace.
Nothing is known here of HTTP, nor of how an answer is written down.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pylora.generation.text import TextStream
from pylora.serving.request import Token
from pylora.web.pieces import Entry
from pylora.web.tools import Call, Style, calls_in

if TYPE_CHECKING:
    from pylora.text.tokenizer import Tokenizer


@dataclass
class Piece:
    """What has become certain: text, and the tokens of it. At the end the calls, too."""

    text: str = ""
    entries: list[Entry] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.text or self.entries or self.calls)


class Choice:
    """One answer. `number`: its index in the response. After the end: `reason` is OpenAI's
    finish_reason, `stopped_by` the stop string that came, or "deadline"."""

    def __init__(
        self,
        number: int,
        tokenizer: Tokenizer,
        ids: Sequence[int],
        stop: Sequence[str],
        style: Style | None = None,
    ) -> None:
        """`style`: calls of tools are looked for in that form."""
        self.number, self.style = number, style
        self.stream = TextStream(tokenizer, ids, stop)
        self.tokens = 0
        self.reason: str | None = None
        self.stopped_by: str | None = None
        self._waiting: list[Entry] = []
        self._held = ""  # text that may be a call

    @property
    def ended(self) -> bool:
        """Whether a stop string has come, so that no more tokens are wanted."""
        return self.stream.stopped

    def take(self, token: Token, logs: bool) -> Piece:
        """The next token. `logs`: whether entries are wanted."""
        if self.stream.stopped:
            return Piece()
        self.tokens += 1
        if logs:
            self._waiting.append(Entry(token, self.stream.decoded))
        text = self.stream.push(token.id)
        if self.stream.stopped_by is not None:
            return self._piece(text, self._before_the_stop())
        # While nothing is certain, entries wait for the text that they belong to.
        return self._piece(text, self._release() if text else [])

    def finish(self, reason: str) -> Piece:
        """The rest. `reason`: of the engine's Done; ignored if a stop string has come."""
        rest = self.stream.finish()
        if self.stream.stopped:
            self.reason, self.stopped_by = "stop", self.stream.stopped_by
            entries = self._before_the_stop()
        else:
            self.reason = "length" if reason in ("length", "deadline") else "stop"
            self.stopped_by = "deadline" if reason == "deadline" else None
            entries = self._release()
        piece = self._piece(rest, entries, last=True)
        if piece.calls and self.reason == "stop":
            self.reason = "tool_calls"
        return piece

    def _release(self) -> list[Entry]:
        entries, self._waiting = self._waiting, []
        return entries

    def _before_the_stop(self) -> list[Entry]:
        """Those of tokens that have a part before the stop string."""
        end = len(self.stream.text)
        return [e for e in self._release() if e.start < end]

    def _piece(self, text: str, entries: list[Entry], last: bool = False) -> Piece:
        """`text`, but for what may be a call of a tool: that waits for the end."""
        if self.style is None:
            return Piece(text, entries)
        self._held += text
        if not last:
            given, self._held = _apart(self._held, self.style)
            return Piece(given, entries)
        rest, calls = calls_in(self._held, self.style)
        self._held = ""
        return Piece(rest, entries, calls)


def _apart(text: str, style: Style) -> tuple[str, str]:
    """(what is surely no call, what may be the beginning of one)."""
    if style.opening == "{":  # a call is the whole answer
        lead = text.lstrip()
        may = not lead or lead.startswith(("{", "<|python_tag|>"[: max(1, len(lead))]))
        return ("", text) if may else (text, "")
    at = text.find(style.opening)
    if at >= 0:
        return text[:at], text[at:]
    most = min(len(text), len(style.opening) - 1)
    keep = next((n for n in range(most, 0, -1) if style.opening.startswith(text[-n:])), 0)
    return text[: len(text) - keep], text[len(text) - keep :]
