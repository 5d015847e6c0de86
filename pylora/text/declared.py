"""The special tokens of a Hugging Face directory, from every file that may declare them.

tokenizer.json comes with its own added tokens; tokenizer_config.json (added_tokens_decoder,
bos_token and its kin, extra_special_tokens) adds to them or changes how they are treated. The older
special_tokens_map.json and added_tokens.json count only where there is no added_tokens_decoder, as
in transformers, whose order of steps this follows (tokenization_utils_base.py, 5.x).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pylora.extras import need

NAMED = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def content(token: Any) -> str | None:
    """A special token is written as a string or as an object with its content."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) and token else None


def add_declared(
    backend: Any,
    settings: Mapping[str, Any],
    special_map: Mapping[str, Any],
    added: Mapping[str, Any],
) -> tuple[dict[str, str], list[str]]:
    """Adds to `backend` what tokenizer_config.json (settings), special_tokens_map.json and
    added_tokens.json declare. Returns what bos_token, eos_token, ... stand for, and what was odd,
    in sentences."""
    decoder = settings.get("added_tokens_decoder")
    has_decoder = isinstance(decoder, Mapping)
    declared: dict[str, Any] = dict(settings)
    if not has_decoder:
        declared |= special_map
    names = {key: name for key in NAMED if (name := content(declared.get(key))) is not None}
    extra = declared.get("extra_special_tokens") or declared.get("additional_special_tokens")
    if isinstance(extra, Mapping):
        names |= {str(key): name for key, value in extra.items() if (name := content(value))}
        extra = None
    for key, value in declared.items():  # image_token and other names of a model's own
        if key.endswith("_token") and key not in names and (name := content(value)):
            names[key] = name
    more = [name for token in extra or () if (name := content(token))]
    tokens: list[tuple[int, Any]] = []
    if has_decoder:
        for index, token in decoder.items():  # type: ignore[union-attr]
            if str(index).isdecimal() and isinstance(token, Mapping) and content(token):
                tokens.append((int(index), _token(token)))
    else:
        special = {*names.values(), *more}
        for name, index in added.items():
            if type(index) is int and name:
                flags = {"normalized": name not in special, "special": name in special}
                tokens.append((index, _token({"content": name} | flags)))
    notes = _add(backend, sorted(tokens, key=lambda t: t[0]))
    known = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    wanted = [
        *((declared.get(key), name) for key, name in names.items()),
        *((None, n) for n in more),
    ]
    backend.add_special_tokens([known.get(n) or _special(token, n) for token, n in wanted])
    return names, notes


def _token(token: Mapping[str, Any]) -> Any:
    flags = {key: value for key in _FLAGS if isinstance(value := token.get(key), bool)}
    return need("tokenizers").AddedToken(token["content"], **flags)


def _special(token: Any, name: str) -> Any:
    if isinstance(token, Mapping):
        return _token({**token, "content": name, "special": True})
    return need("tokenizers").AddedToken(name, special=True, normalized=False)


def _add(backend: Any, tokens: list[tuple[int, Any]]) -> list[str]:
    """Adds (id, token) in the order of their ids; the library numbers new ones itself."""
    present = {repr(token) for token in backend.get_added_tokens_decoder().values()}
    notes = []
    for index, token in tokens:
        if repr(token) not in present:
            backend.add_tokens([token])
        got = backend.token_to_id(token.content)
        if got != index:
            notes.append(
                f"the token {token.content[:40]!r} is declared with the id {index}, but the "
                f"vocabulary gives it {got}; {got} is used, as in transformers"
            )
    return notes
