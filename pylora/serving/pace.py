"""How many tokens of prompts a step may take in while others wait for their next token.

A step that takes in a piece of a prompt lasts longer than one that only decodes, and everybody in
it waits. So the piece is chosen by what steps have lasted on this machine, with this model: the
largest of a few sizes with which a step lasts at most `STALL` times as long as without. Nothing
here changes what is computed, only when.
"""

from __future__ import annotations

STALL = 1.6  # so that the slowest steps stay below twice the usual ones, noise included
SMALLEST = 16  # tokens: fewer take hardly less time
_WEIGHT = 0.2  # of the newest measurement
_WORSE = 0.5  # of one that is slower than was believed
_GUESS = 1.5  # what a size that was not tried yet may cost, of half of it
_FORGET = 0.999  # each step, of what a size is believed to cost: it is tried again in the end
_REFRESH = 64  # steps after which one without a prompt's piece is measured again


class Pace:
    """What steps last, as measured."""

    def __init__(self, most: int) -> None:
        """`most`: tokens of prompts in a step, whoever waits."""
        self.most = max(most, 1)
        self._sizes = [SMALLEST << i for i in range(20) if SMALLEST << i < self.most] + [self.most]
        self._alone: dict[int, float] = {}  # seconds of a step that decodes so many
        self._more: dict[int, float] = {}  # seconds that a piece of this size adds
        self._since = 0

    def alone(self, decoding: int) -> float | None:
        """How long a step lasts that only decodes so many; None: nothing like it was measured."""
        if not self._alone:
            return None
        return self._alone[min(self._alone, key=lambda n: abs(n - decoding))]

    def piece(self, decoding: int) -> int:
        """Tokens of prompts that the next step may take in, beside so many that decode."""
        if not decoding:
            return self.most
        base = self.alone(decoding)
        if base is None:
            return 0  # so that it is measured
        if self._since >= _REFRESH:
            return 0
        room, best = (STALL - 1) * base, self._sizes[0]
        for size in self._sizes:
            known = self._more.get(size)
            if known is None:
                half = self._more.get(size // 2)
                if half is None:
                    break
                known = _GUESS * half
            if known <= room:
                best = size
        return best

    def note(self, decoding: int, piece: int, seconds: float) -> None:
        """A step has lasted so long."""
        if not decoding:
            return
        if not piece:
            self._since = 0
            old = self._alone.get(decoding, seconds)
            self._alone[decoding] = old + _WEIGHT * (min(seconds, 2 * old) - old)
            return
        self._since += 1
        base = self.alone(decoding)
        if base is None:
            return
        size = min((s for s in self._sizes if s >= piece), default=self.most)
        for other in self._more:
            self._more[other] *= _FORGET
        if 2 * piece <= size and size > SMALLEST:
            return  # the end of a prompt: says little about whole pieces
        more = max(seconds - base, 0.0)
        old = self._more.get(size, more)
        weight = _WORSE if more > old else _WEIGHT
        self._more[size] = old + weight * (min(more, 3 * old + base) - old)
