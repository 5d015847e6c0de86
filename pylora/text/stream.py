"""Text as its tokens come: what is shown is decode(all) without decode(what came before).

A token's text depends on its neighbours (a first space that is dropped, bytes of one character in
several tokens), so tokens are never decoded alone. A character that is not whole yet waits for its
rest. The work for each token is small however long the text is: only the tokens since the last
place where the text was whole are decoded again, with a few before them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_BACK = 6  # tokens of what came before, at first; more if they have no text


class TextStream:
    """Ids in, text out. `add` gives what became certain, `end` the rest."""

    def __init__(self, tokenizer: Any, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = [int(i) for i in before]
        self._read = len(self._ids)  # the ids whose text has been given, or came before
        self._start = self._window()

    def add(self, token: int) -> str:
        self._ids.append(int(token))
        text = self._new()
        if not text or text.endswith("\ufffd"):
            return ""
        return self._give(text)

    def end(self) -> str:
        return self._give(self._new())

    def _new(self) -> str:
        """The text of the ids that have not been read."""
        decode = self._tokenizer.decode
        known = decode(self._ids[self._start : self._read])
        whole: str = decode(self._ids[self._start :])
        # What came before may end within a character: then its last signs are those of the new one.
        known = known.rstrip("\ufffd") if not whole.startswith(known) else known
        return whole[len(known) :]

    def _give(self, text: str) -> str:
        self._read = len(self._ids)
        self._start = self._window()
        return text

    def _window(self) -> int:
        """Where to start decoding so that the text before `_read` is neither empty nor cut."""
        back = _BACK
        while back < self._read:
            text = self._tokenizer.decode(self._ids[self._read - back : self._read])
            if text.strip("\ufffd ") and not text.startswith("\ufffd"):
                return self._read - back
            back *= 2
        return 0
