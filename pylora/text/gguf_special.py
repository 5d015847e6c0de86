"""Which tokens of a GGUF vocabulary are special, start a text or end it: as llama.cpp decides.

The metadata name some by id; a name that is out of range is passed over, with a note. Others are
known by their text, and such a token is a control token even where the file types it as normal.
What llama.cpp would not do either: a file's defaults for keys that are missing are taken for
SentencePiece only; for BPE they are two ids of an old model, which mean nothing in another.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pylora.text.ends import (
    END_OF_MESSAGE,
    END_OF_TURN,
    ENDS,
    FILL_IN,
    FILL_IN_ENDS,
    SHOWN,
    ending,
    not_ending,
)

UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 2, 3, 4, 5
NORMAL = 1
KEYS = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "eot": "eot_token_id",
    "eom": "eom_token_id",
    "unk": "unknown_token_id",
    "sep": "seperator_token_id",  # the format's own spelling
    "pad": "padding_token_id",
    "mask": "mask_token_id",
    **{kind: f"{kind}_token_id" for kind in FILL_IN},
}
_OLD_KEYS = {
    "fim_pre": "prefix_token_id",
    "fim_suf": "suffix_token_id",
    "fim_mid": "middle_token_id",
}
_LOOKS_LIKE_CONTROL = re.compile(r"<\|[^|<>\s]+\|>")


@dataclass
class Specials:
    """ids: by "bos", "eos", "eot", ...; types: of each token, as corrected; ends: the ids that end
    a turn or a text, the usual one first; notes: what was odd, in sentences."""

    ids: dict[str, int]
    types: np.ndarray[Any, Any]  # int [tokens]
    ends: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def find_specials(
    given: Mapping[str, int],
    defaults: Mapping[str, int],
    tokens: Sequence[str],
    types: np.ndarray[Any, Any],
    template: str,
) -> Specials:
    """given: the ids that the metadata name, by key. defaults: for keys that are missing."""
    n = len(tokens)
    found = Specials({what: i for what, i in defaults.items() if i < n}, types.copy())
    for what, key in [*KEYS.items(), *_OLD_KEYS.items()]:
        if (index := given.get(key)) is None:
            continue
        if 0 <= index < n:
            found.ids[what] = index
        else:
            found.notes.append(
                f"{key} is {index}, but there are {n} tokens; it is passed over, as in llama.cpp"
            )
    names = {token: i for i, token in enumerate(tokens)}
    kinds = {"eot": END_OF_TURN, "eom": END_OF_MESSAGE, **FILL_IN}
    for what, texts in kinds.items():
        if what in found.ids:
            continue
        # The reference takes any of them that there is; the lowest id is one such choice.
        present = sorted(names[text] for text in texts if text in names)
        if present:
            found.ids[what] = present[0]
            _make_control(found, tokens, present[0])
    ends = ending(names)
    for i in ends.values():
        _make_control(found, tokens, i)
    every = {text: i for text, i in names.items() if text in ENDS}
    for text in not_ending(every):
        found.types[every[text]] = USER_DEFINED if text == "<|end|>" else NORMAL
    for text in SHOWN:
        if text in names:
            found.types[names[text]] = USER_DEFINED
    kept = set(not_ending(every))
    usual = [found.ids[what] for what in ("eos", "eot", "eom") if what in found.ids]
    fill = [found.ids[what] for what in FILL_IN_ENDS if what in found.ids]
    found.ends = [
        i for i in dict.fromkeys([*usual, *ends.values(), *fill]) if tokens[i] not in kept
    ]
    _say_what_is_cut(found, names, template)
    return found


def _make_control(found: Specials, tokens: Sequence[str], i: int) -> None:
    if found.types[i] != CONTROL:
        found.notes.append(
            f"the token {tokens[i]!r} ends or parts texts but is not typed as a control token; it "
            "is treated as one, as in llama.cpp"
        )
        found.types[i] = CONTROL


def _say_what_is_cut(found: Specials, names: Mapping[str, int], template: str) -> None:
    cut = [
        text
        for text in sorted(set(_LOOKS_LIKE_CONTROL.findall(template)))
        if text in names and found.types[names[text]] == NORMAL
    ]
    if cut:
        found.notes.append(
            f"the chat template writes {', '.join(map(repr, cut[:8]))}, which the file types as "
            "normal text: it is cut into pieces, as in llama.cpp; a file converted anew would have "
            "it as one token"
        )
