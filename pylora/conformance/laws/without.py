"""The statements of docs/spec.md that no law checks, each with the reason. A test holds this list:
every statement is cited by a law or is in it, and none is both."""

from __future__ import annotations

VECTORS = "bits: the golden vectors hold it (docs/porting.md)"
FREE = "it allows, and forbids nothing that a result could show"
MODELS = "the order of whole layers: every family is compared with transformers and llama.cpp"
WITHOUT: dict[str, str] = {
    "I-8": VECTORS,
    "R-3": VECTORS,
    "R-4": VECTORS,
    "R-5": VECTORS,
    "D-6": "an embedding's methods of the protocol take no dropout",
    "K-3": "the protocol's modules have no biases; pylora is tested with files of PEFT's",
    "A-21": MODELS,
    "A-22": MODELS,
    "A-26": MODELS,
    "A-28": MODELS,
    "V-6": FREE,
    "V-11": FREE,
}


def table() -> str:
    """The list in Markdown, for docs/laws.md."""
    lines = ["| statement | why no law checks it |", "|---|---|"]
    return "\n".join([*lines, *(f"| {id} | {why} |" for id, why in WITHOUT.items())]) + "\n"
