"""The verb that lists the model families and what each has."""

from __future__ import annotations

from pylora.commands.app import LOOK, command
from pylora.display.console import Console


@command(LOOK, "pylora families")
def families() -> None:
    """List the model families that can be loaded: config.json's and GGUF's names, what they add."""
    from pylora.model import families as known
    from pylora.model.summary import example, in_words

    rows = []
    for name, family in known.ALL.items():
        gguf = family.gguf.arch if family.gguf is not None else "no"
        rows.append((name, gguf, family.title, ", ".join(in_words(example(family))) or "as Llama"))
    screen = Console()
    screen.table(("model_type", "GGUF", "models", "what it has"), rows)
    screen.say(f"{len(rows)} families; {known.PAGE} says how to add one")
