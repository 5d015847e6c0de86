"""All laws, by id. Needs the `conformance` extra."""

from __future__ import annotations

from pylora.conformance.laws import (
    adapted,
    attending,
    attention,
    backward,
    cache,
    calls,
    container,
    dropout,
    edges,
    embedding,
    every,
    every_calls,
    families,
    files,
    forward,
    initial,
    initial_bits,
    large,
    layouts,
    masks,
    merge,
    methods,
    mixed,
    module_starts,
    module_streams,
    modules,
    operations,
    orders,
    plan,
    planned,
    reaching,
    replaced,
    saved,
    settings,
    shapes,
    single,
    sizes,
    sizes_attention,
    sizes_chance,
    sizes_files,
    special,
    special_parts,
    streams,
    tensors,
    weighted,
    widths,
)
from pylora.conformance.laws.law import Law
from pylora.errors import ConfigError

SIZES = (sizes, sizes_chance, sizes_attention, sizes_files)
_FILES = (
    forward,
    backward,
    merge,
    mixed,
    adapted,
    embedding,
    dropout,
    streams,
    masks,
    initial,
    initial_bits,
    module_streams,
    module_starts,
    shapes,
    files,
    container,
    tensors,
    settings,
    saved,
    replaced,
    plan,
    planned,
    weighted,
    single,
    attention,
    attending,
    cache,
    operations,
    families,
    orders,
    edges,
    special,
    large,
    special_parts,
    reaching,
    modules,
    calls,
    methods,
    *SIZES,
    layouts,
    every,
    every_calls,
    widths,
)
LAWS: dict[str, Law] = {law.id: law for file in _FILES for law in file.LAWS}


def find(ids: tuple[str, ...] | list[str]) -> list[Law]:
    """The laws with these ids; all where none is named. ConfigError for an id that is unknown."""
    for id in ids:
        if id not in LAWS:
            raise ConfigError(f"there is no law {id!r}; there are {', '.join(LAWS)}")
    return [LAWS[id] for id in ids] if ids else list(LAWS.values())


def table() -> str:
    """The laws as a table in Markdown, for docs/laws.md."""
    lines = [
        "| law | holds | maths | a violation means | spec | needs |",
        "|---|---|---|---|---|---|",
    ]
    for law in LAWS.values():
        cells = [law.id, law.sentence, law.maths, law.violation]
        cells += [", ".join(law.spec), ", ".join(n for n in law.needs if n != "float32")]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    said = "Every statement of the specification is cited by a law."
    return "\n".join([*lines, "", said]) + "\n"


if __name__ == "__main__":
    print(table(), end="")
