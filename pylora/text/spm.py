"""SentencePiece BPE exactly as llama.cpp runs it: the neighbours whose union scores best are joined
first, the leftmost of equals, whatever the way in which a token came to be.

The `tokenizers` library ranks pairs, not unions, and cannot have two pairs of one rank, so it
differs where scores are equal or a token can be made in two ways. Here the rule itself runs. It is
kept quick by cutting the text wherever no token has its two neighbouring characters side by side:
no union reaches over such a place. The pieces are words, mostly, and are remembered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from heapq import heapify, heappop, heappush

from pylora.text.partition import Partition

SPACE = "\u2581"
_REMEMBERED = 1 << 16  # pieces
_LONG = 64  # characters of a piece that is not remembered


class SentencePiece:
    """Encodes text by scores."""

    def __init__(
        self,
        names: Mapping[str, int],
        scores: Sequence[float],
        unknown: int | None,
        prefix: bool,
        partition: Partition,
    ) -> None:
        """names: token to id. scores: by id. unknown: the id of what has no token and no bytes.
        prefix: a space is put before a text, and before the text behind a special token."""
        self._names, self._scores, self._partition = names, scores, partition
        self._prefix = prefix
        self._bytes = [self._byte(b, unknown) for b in range(256)]
        self._joined: set[tuple[str, str]] = set()
        for name in names:
            self._joined.update(zip(name, name[1:]))
        self._remember = lru_cache(_REMEMBERED)(self._merge)

    def _byte(self, value: int, unknown: int | None) -> int | None:
        names = self._names
        alone = names.get(chr(value), unknown) if value < 128 else unknown
        return names.get(f"<0x{value:02X}>", alone)

    def __call__(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and the characters of `text` that each stands for."""
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        for begin, end, special in self._partition.cut(text):
            if special is not None:
                ids.append(special)
                spans.append((begin, end))
                continue
            part = text[begin:end].replace(" ", SPACE)
            offset = begin
            if self._prefix:  # two fragments of text never stand side by side
                part, offset = SPACE + part, begin - 1
            for piece in self._pieces(part):
                run = self._remember(piece) if len(piece) <= _LONG else self._merge(piece)
                for token, a, b in run:
                    ids.append(token)
                    spans.append((max(offset + a, begin), max(offset + b, begin)))
                offset += len(piece)
        return ids, spans

    def _pieces(self, text: str) -> list[str]:
        """`text` cut where no token reaches over."""
        joined, pieces, begin = self._joined, [], 0
        for i, pair in enumerate(zip(text, text[1:]), 1):
            if pair not in joined:
                pieces.append(text[begin:i])
                begin = i
        if text:
            pieces.append(text[begin:])
        return pieces

    def _merge(self, text: str) -> tuple[tuple[int, int, int], ...]:
        """(id, begin, end) of the tokens of one piece, by joining neighbours."""
        names, scores = self._names, self._scores
        n = len(text)
        end = list(range(1, n + 1))  # of the part that begins here; 0: joined to the one before
        before, after = list(range(-1, n - 1)), [*range(1, n), -1]
        queue: list[tuple[float, int, int, int]] = []

        def offer(a: int, b: int) -> tuple[float, int, int, int] | None:
            token = names.get(text[a : end[b]])
            return None if token is None else (-scores[token], a, b, end[b])

        queue = [found for i in range(n - 1) if (found := offer(i, i + 1))]
        heapify(queue)
        while queue:
            _, a, b, stop = heappop(queue)
            if not end[a] or not end[b] or after[a] != b or end[b] != stop:
                continue
            end[a], end[b] = stop, 0
            after[a] = after[b]
            if after[b] >= 0:
                before[after[b]] = a
                if found := offer(a, after[b]):
                    heappush(queue, found)
            if before[a] >= 0 and (found := offer(before[a], a)):
                heappush(queue, found)
        out: list[tuple[int, int, int]] = []
        at = 0
        while at >= 0 and n:
            token = names.get(text[at : end[at]])
            if token is not None:
                out.append((token, at, end[at]))
            else:  # one character without a token: its bytes
                ids = (self._bytes[byte] for byte in text[at : end[at]].encode())
                out += [(i, at, end[at]) for i in ids if i is not None]
            at = after[at]
        return tuple(out)
