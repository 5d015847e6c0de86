"""Messages as a template can take them: the shapes that people's data have, made into one.

What servers and transformers do before they render is done here: fields that are null are left
out, reasoning goes by every name that templates read, text that comes in parts is joined where the
template only prints text, and the arguments of a tool call, which OpenAI's format writes as a
string of JSON, become an object where the template expects one. Images and sounds are refused by
name. Nothing is rendered here but two probes that tell which shapes a template understands.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from pylora.errors import DataError

_REASONING = ("reasoning_content", "thinking", "reasoning")  # in the order in which they count
_TEXT_PARTS = ("text", "input_text", "output_text")
_OF_TEMPLATE = ("tools", "functions", "documents")  # which some templates take from a message
_PROBE = "kqxzvj"  # a word that no template has


def prepare(template: str, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Copies of `messages` for `template`. Raises DataError naming the message and the fault."""
    prepared = []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise DataError(f"{where} must be an object with a text field 'role'")
        said = {key: plain(value) for key, value in message.items() if value is not None}
        if "content" in said:
            said["content"] = _content(template, said["content"], where)
        elif not said.get("tool_calls"):
            raise DataError(f"{where} has no content; it must be text, or parts of text")
        if said.get("tool_calls"):
            if "tool_calls" not in template:
                raise DataError(
                    f"{where} has tool_calls, but the chat template has no place for them; take "
                    "them out, or use a model whose template knows tools"
                )
            if "arguments is string" not in template:
                said["tool_calls"] = [_call(call) for call in said["tool_calls"]]
        for name in _OF_TEMPLATE:
            if said.get(name) and not re.search(rf"[.\['\"]{name}\b", template):
                raise DataError(
                    f"{where} has {name}, but the chat template looks for none in a message; "
                    f"{name} belong beside the messages"
                )
        reasoning = next((said[key] for key in _REASONING if key in said), None)
        if reasoning is not None:
            said = {"thinking": reasoning, **said, "reasoning_content": reasoning}
        prepared.append(said)
    return prepared


def plain(value: Any) -> Any:
    """A copy made of JSON's types alone: other objects have methods that no template should see."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return str(value)


def _content(template: str, content: Any, where: str) -> Any:
    shapes = shapes_of(template)
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if shapes == {"parts"} else content
    if not isinstance(content, list):
        raise DataError(f"{where}: the field 'content' must be text or a list of parts of text")
    parts = [_part(part, f"{where}.content[{k}]") for k, part in enumerate(content)]
    return parts if "parts" in shapes else "\n".join(part["text"] for part in parts)


def _part(part: Any, where: str) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, dict):
        raise DataError(f"{where} must be text or an object with 'type' and 'text'")
    kind = part.get("type", "text")
    if kind not in _TEXT_PARTS or not isinstance(part.get("text"), str):
        raise DataError(
            f"{where} is a part of the type {str(kind)[:40]!r}; only parts of the type 'text' with "
            "a field 'text' can be used: pylora runs text models"
        )
    return {**part, "type": "text"}


def _call(call: Any) -> Any:
    """A tool call whose arguments are an object, if they are a string that holds one."""
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": _call(call["function"])}
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        try:
            read = json.loads(arguments)
        except (ValueError, RecursionError):
            return call
        if isinstance(read, dict):
            return {**call, "arguments": read}
    return call


@lru_cache(maxsize=8)
def shapes_of(template: str) -> frozenset[str]:
    """Which contents the template prints: "text", "parts" (a list of objects), or both.

    Found out by trying: a template that was not made for lists fails, or prints Python's notation.
    """
    from pylora.text.sandbox import render

    shapes = set()
    for shape, content in (("text", _PROBE), ("parts", [{"type": "text", "text": _PROBE}])):
        message = {"role": "user", "content": content}
        variables = {"messages": [message], "bos_token": "", "eos_token": "", "tools": None}
        try:
            text, _ = render(template, variables | {"strftime_now": lambda form: ""})
        except Exception:  # a template may fail in any way; then it takes no such content
            continue
        if _PROBE in text and "'type'" not in text and '"type"' not in text:
            shapes.add(shape)
    return frozenset(shapes or {"text"})
