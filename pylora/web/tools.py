"""Calls of tools in a model's answer: found in the text as its chat template writes them.

Three forms, told by the template: <tool_call>{"name", "arguments"}</tool_call> (Hermes, Qwen),
[TOOL_CALLS][{"name", "arguments"}, ...] (Mistral), and an answer that is one JSON object with
"name" and "parameters" (Llama 3). A call that must come is held to the function's schema by a
grammar. An answer that looks like a call and is none stays text.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pylora.web.grammars import Form
from pylora.web.problem import malformed


@dataclass(frozen=True)
class Style:
    """How a template writes calls: between which marks, and what the arguments are called."""

    opening: str
    closing: str
    arguments: str = "arguments"
    many: bool = False  # one list of calls in the marks


HERMES = Style("<tool_call>", "</tool_call>")
MISTRAL = Style("[TOOL_CALLS]", "", many=True)
LLAMA = Style("{", "", arguments="parameters")


@dataclass(frozen=True)
class Call:
    """One call. `arguments` is the text of a JSON object, as OpenAI's interface has it."""

    name: str
    arguments: str

    def said(self, index: int | None = None) -> dict[str, Any]:
        """The object of an answer, or with an index that of a stream."""
        function = {"name": self.name, "arguments": self.arguments}
        made = {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
        return made if index is None else {"index": index, **made}


def style_of(template: str) -> Style | None:
    """How this template writes calls; None where it is none of the known ways."""
    if "<tool_call>" in template:
        return HERMES
    if "[TOOL_CALLS]" in template:
        return MISTRAL
    if '"parameters": ' in template and '"name": ' in template:
        return LLAMA
    return None


def must_call(style: Style | None, tools: Sequence[Mapping[str, Any]], choice: Any) -> Form | None:
    """The form of an answer that has to be a call; None where it need not be. Problem for a
    function that is not among the tools, and where calls of this template are not known."""
    if choice in (None, "auto", "none"):
        return None
    functions = [tool["function"] for tool in tools]
    if choice != "required":
        wanted = choice["function"]["name"]
        functions = [f for f in functions if f["name"] == wanted]
        if not functions:
            raise malformed(
                f"tool_choice names {wanted!r}, which is none of the tools", "tool_choice"
            )
    if not functions:
        raise malformed("tool_choice asks for a call, and there are no tools", "tool_choice")
    if style is None:
        raise malformed(
            "tool_choice asks for a call, but how this model's chat template writes calls is not "
            "known; leave it to the model ('auto')",
            "tool_choice",
        )
    one: dict[str, Any] = {
        "anyOf": [
            {
                "type": "object",
                "properties": {
                    "name": {"const": f["name"]},
                    style.arguments: f.get("parameters") or {"type": "object"},
                },
                "required": ["name", style.arguments],
                "additionalProperties": False,
            }
            for f in functions
        ]
    }
    if style.many:
        one = {"type": "array", "items": one, "minItems": 1, "maxItems": 1}
    if style is LLAMA:
        return Form("json", json.dumps(one), "tool_choice")
    begin, end = json.dumps(style.opening), json.dumps(style.closing)
    source = f"start: {begin} NL? call NL? {end if style.closing else ''}\n"
    source += f'NL: "\\n"\ncall: %json {json.dumps(one)}\n'
    return Form("lark", source, "tool_choice")


def calls_in(text: str, style: Style) -> tuple[str, list[Call]]:
    """(the text before the calls, the calls). Where anything is no call: (the whole text, [])."""
    if style is LLAMA:
        found = _calls(text.strip().removeprefix("<|python_tag|>"), style)
        return ("", found) if found else (text, [])
    before, mark, rest = text.partition(style.opening)
    if not mark:
        return text, []
    if style.many:
        found = _calls(rest, style)
        return (before.strip(), found) if found else (text, [])
    calls: list[Call] = []
    while mark:
        inside, _, rest = rest.partition(style.closing)
        one = _calls(inside, style)
        if not one:
            return text, []
        calls += one
        between, mark, rest = rest.partition(style.opening)
        if between.strip():
            return text, []
    return before.strip(), calls


def _calls(text: str, style: Style) -> list[Call]:
    """What a JSON text says to call: an object or a list of them. [] where it is none."""
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        return []
    listed = said if isinstance(said, list) else [said]
    calls = []
    for one in listed:
        if not isinstance(one, dict) or not isinstance(one.get("name"), str):
            return []
        given = one.get(style.arguments, one.get("arguments", one.get("parameters", {})))
        if isinstance(given, str):
            calls.append(Call(one["name"], given))
        elif isinstance(given, dict):
            calls.append(Call(one["name"], json.dumps(given, ensure_ascii=False)))
        else:
            return []
    return calls
