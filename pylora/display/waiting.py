"""Says that something is still going on: a line every few seconds, with the time that has passed.

For work whose length nobody knows before. Nothing is said of what is over within that time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EVERY = 8.0  # seconds between two lines: nothing that pylora demo does is silent for ten


@contextmanager
def waiting(
    say: Callable[[str], None], what: str, *, every: float = EVERY
) -> Iterator[Callable[[str], None]]:
    """While the block runs, `say` hears "… {what}{how far}, 16 s" now and then, from a thread.

    Yields a function that is told how far it is, such as "12 of 150"; that text stands behind
    `what` from then on.
    """
    began, done = time.monotonic(), threading.Event()
    far = ""

    def note(text: str) -> None:
        nonlocal far
        far = f", {text}"

    def speak() -> None:
        while not done.wait(every):
            say(f"… {what}{far}, {time.monotonic() - began:.0f} s")

    thread = threading.Thread(target=speak, name=f"waiting: {what}", daemon=True)
    thread.start()
    try:
        yield note
    finally:
        done.set()
        thread.join()
