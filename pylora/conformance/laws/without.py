"""The statements of docs/spec.md that no law checks, each with the reason. A test holds this list:
every statement is cited by a law or is in it, and none is both."""

from __future__ import annotations

VECTORS = "bits: the golden vectors hold it (docs/porting.md)"
WITHOUT: dict[str, str] = {
    "I-8": VECTORS,
    "D-7": VECTORS,
    "D-8": VECTORS,
    "M-7": VECTORS,
    "M-8": VECTORS,
    "R-1": VECTORS,
    "R-2": VECTORS,
    "R-3": VECTORS,
    "R-4": VECTORS,
    "R-5": VECTORS,
    "K-3": "the protocol's modules have no biases; pylora is tested with files of PEFT's",
}


def table() -> str:
    """The list in Markdown, for docs/laws.md."""
    lines = ["| statement | why no law checks it |", "|---|---|"]
    return "\n".join([*lines, *(f"| {id} | {why} |" for id, why in WITHOUT.items())]) + "\n"
