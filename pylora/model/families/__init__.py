"""The families that are supported: by Hugging Face's model_type, each a page of data beside this.

To add one: a file here with a value of `Family`, its name in the list below; docs/architecture.md
says what else.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from pylora.errors import UnsupportedError
from pylora.model.families.family import Family
from pylora.model.families.llama import LLAMA
from pylora.model.families.mistral import MINISTRAL, MISTRAL
from pylora.model.families.qwen import QWEN2, QWEN3

_LIST = (LLAMA, MISTRAL, MINISTRAL, QWEN2, QWEN3)
ALL: Mapping[str, Family] = {family.model_type: family for family in _LIST}
PAGE = "docs/architecture.md"


def of(model_type: object) -> Family:
    """The family of a model_type. UnsupportedError that names the nearest one for any other."""
    if isinstance(model_type, str) and model_type in ALL:
        return ALL[model_type]
    close: list[str] = []
    if isinstance(model_type, str):
        close = difflib.get_close_matches(model_type.lower(), ALL, n=1, cutoff=0.5)
    nearest = f"the nearest that is supported is {close[0]!r}; " if close else ""
    raise UnsupportedError(
        f"config.json: model_type is {model_type!r:.80}, which is not supported; {nearest}"
        f'supported are {", ".join(ALL)}; "Add a family" in {PAGE} says how to add one'
    )
