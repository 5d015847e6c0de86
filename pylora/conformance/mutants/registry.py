"""What a mutant is, and the list that the decorator `wrong` adds to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

from pylora.conformance.correct.plain import Correct

Kind = Literal["gross", "subtle"]


@dataclass(frozen=True)
class Mutant:
    """A wrong implementation of the protocol: `make()` gives one, fresh.

    `kind`: "gross" shows in any result with ordinary numbers; "subtle" needs a special input, a
    second call, or bits. `thread`: a public report of the same fault, as owner/repository#number.
    """

    id: str
    kind: Kind
    sentence: str  # what it does
    story: str  # where that comes from
    thread: str | None
    make: Callable[[], Correct]
    group: str  # the module that it is in

    @property
    def name(self) -> str:
        return self.id.replace("-", " ")

    @property
    def link(self) -> str | None:
        """The address of the thread. GitHub forwards issue numbers of pull requests."""
        if self.thread is None:
            return None
        repository, number = self.thread.split("#")
        return f"https://github.com/{repository}/issues/{number}"


REGISTRY: dict[str, Mutant] = {}
Made = TypeVar("Made", bound=type[Correct])


def wrong(
    id: str, kind: Kind, sentence: str, story: str, thread: str | None = None
) -> Callable[[Made], Made]:
    """Registers the class under it as a mutant, and names its implementation."""

    def register(made: Made) -> Made:
        if id in REGISTRY:
            raise ValueError(f"two mutants have the id {id!r}")
        made.name = f"mutant {id}"
        REGISTRY[id] = Mutant(id, kind, sentence, story, thread, made, made.__module__)
        return made

    return register
