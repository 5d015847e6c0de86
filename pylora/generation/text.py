"""Token ids to text as they come: what an answer adds to its prompt, and where it is to stop.

The text of an answer is decode(prompt + answer) minus decode(prompt): pieces that are decoded apart
would lose a space or a character. Characters whose bytes are not whole yet wait for their rest, and
so does what may be the beginning of a stop string. (Of bytes that are no UTF-8 a decoder may make
less in the whole than in the part: what has been given out stays.)
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

from pylora.errors import ConfigError, WrongTypeError, describe

_BROKEN = "\ufffd"  # what decoding makes of bytes that are no whole character


class Decodes(Protocol):
    """What this needs of a tokenizer."""

    def decode(self, ids: Sequence[int]) -> str: ...


def stop_strings(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """`stop` as a tuple of texts. Raises WrongTypeError or ConfigError for what is none."""
    found = (stop,) if isinstance(stop, str) else () if stop is None else stop
    if not isinstance(found, (list, tuple)) or not all(isinstance(s, str) for s in found):
        raise WrongTypeError(f"stop takes a text or a list of texts, got {describe(stop)}")
    if not all(found):
        raise ConfigError("stop has an empty text, which every answer contains; leave it out")
    return tuple(found)


class TextStream:
    """One answer: `push` takes its tokens in order and gives the text that is sure by then.

    Attributes: ids, the answer's tokens; text, all text given out so far; stopped, whether a stop
    string has come (it is no part of the text, nor is what came behind it), and stopped_by, which;
    ended, whether one of the tokens `ends` has, which have no text.
    """

    def __init__(
        self,
        tokenizer: Decodes,
        prompt: Sequence[int],
        stop: Sequence[str] = (),
        ends: Collection[int] = (),
    ) -> None:
        self.tokenizer, self.stop, self.ends = tokenizer, tuple(stop), frozenset(ends)
        self.ended = False
        self.ids: list[int] = []
        self.text, self.stopped = "", False
        self.stopped_by: str | None = None
        self._waiting = ""  # decoded, but it may be the beginning of a stop string
        # Decoding starts a little before the newest text, not at the beginning each time: where
        # the tokens before it have a text that ends in a whole character, what follows is as in
        # the whole. _window is those tokens and _before their text.
        self._window, self._before = self._tail([int(i) for i in prompt])
        self._new: list[int] = []

    def __repr__(self) -> str:
        return (
            f"TextStream({len(self.ids)} tokens, {self.text[-40:]!r}{', stopped' * self.stopped})"
        )

    def push(self, token: int) -> str:
        """The text that this token makes certain; "" while it has to wait."""
        if self.stopped or self.ended:
            return ""
        if token in self.ends:
            self.ended = True
            return ""
        self.ids.append(token)
        self._new.append(token)
        text = self.tokenizer.decode(self._window + self._new)
        if text.endswith(_BROKEN) or len(text) <= len(self._before):
            return ""
        added = text[len(self._before) :]
        # The next window is this addition, if it stands by itself.
        if (alone := self.tokenizer.decode(self._new)) and not alone.startswith(_BROKEN):
            self._window, self._before = self._new, alone
        else:
            self._window, self._before = self._window + self._new, text
        self._new = []
        return self._give(added, last=False)

    @property
    def decoded(self) -> int:
        """Characters decoded so far: of `text`, and of what waits because it may be a stop string.
        The next token's text begins there."""
        return len(self.text) + len(self._waiting)

    def finish(self) -> str:
        """The rest, when no more tokens come: incomplete characters are U+FFFD."""
        text = self.tokenizer.decode(self._window + self._new) if self._new else self._before
        self._new = []
        return "" if self.stopped else self._give(text[len(self._before) :], last=True)

    def _tail(self, prompt: list[int]) -> tuple[list[int], str]:
        """The end of the prompt that decoding may begin at, and its text."""
        size = 8
        while size < len(prompt):
            text = self.tokenizer.decode(prompt[-size:])
            if text.strip() and not text.startswith(_BROKEN) and not text.endswith(_BROKEN):
                return prompt[-size:], text
            size *= 2
        return prompt, self.tokenizer.decode(prompt)

    def _give(self, added: str, last: bool) -> str:
        """What of the waiting text and `added` is certain."""
        text = self._waiting + added
        found = [(i, s) for s in self.stop if (i := text.find(s)) >= 0]
        if found:
            at, self.stopped_by = min(found, key=lambda f: f[0])
            self.stopped, given, self._waiting = True, text[:at], ""
        else:
            keep = 0 if last else max((_overlap(text, s) for s in self.stop), default=0)
            given, self._waiting = text[: len(text) - keep], text[len(text) - keep :]
        self.text += given
        return given


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters of `text` are the beginning of `stop`, but not all of it."""
    most = min(len(text), len(stop) - 1)
    return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)
