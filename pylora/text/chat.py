"""Chat templates: conversations to text, by the Jinja source that comes with a model.

A template comes from a stranger's file, so it is data, not trusted code: sandbox.py bounds
what it can reach, how long it works and how much it makes. There is no clock and no random number
in a template, so the same messages give the same text, whenever that is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from pylora.errors import DataError
from pylora.extras import need

MAX_TEMPLATE = 1 << 20  # characters


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = False,
    special_tokens: Mapping[str, str] | None = None,
    now: datetime | None = None,
) -> str:
    """The text of a conversation.

    messages: [{"role": str, "content": str}, ...]; further keys are passed on. special_tokens:
    what `bos_token`, `eos_token`, ... stand for. `strftime_now` exists only if `now` is given:
    most templates then fall back to a fixed date. Raises DataError naming the template's problem.
    """
    need("jinja2")
    from pylora.text.sandbox import render

    if len(template) > MAX_TEMPLATE:
        raise DataError(
            f"the chat template has {len(template)} characters; {MAX_TEMPLATE} are allowed"
        )
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise DataError(f"messages[{i}] must be an object with a text field 'role'")
    variables: dict[str, Any] = dict(special_tokens or {})
    variables |= {"messages": [dict(m) for m in messages], "tools": None, "documents": None}
    variables["add_generation_prompt"] = add_generation_prompt
    if now is not None:
        variables["strftime_now"] = now.strftime
    try:
        return render(template, variables)
    except Exception as error:  # a template may fail in any way that Python code can
        line = getattr(error, "lineno", None)
        place = f" at line {line}" if isinstance(line, int) else ""
        raise DataError(
            f"the chat template failed{place}: {str(error)[:500] or type(error).__name__}"
        ) from error
