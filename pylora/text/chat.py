"""Chat templates: conversations to text, by the Jinja source that comes with a model.

A template comes from a stranger's file, so it is data, not trusted code: sandbox.py bounds what it
can reach, how long it works and how much it makes. A template has no random number and sees no
clock but the date that it is given, so the same messages give the same text, whenever that is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any

from pylora.errors import DataError, wrong_type
from pylora.extras import need
from pylora.text.messages import plain, prepare

MAX_TEMPLATE = 1 << 20  # characters
# What `strftime_now` says unless another date is given: the day that templates of Llama 3 fall
# back to where there is no clock.
FIXED_DATE = datetime(2024, 7, 26)
DATE = "strftime_now"  # as an argument, YYYY-MM-DD: the date that templates see
_GIVEN = ("messages", "tools", "documents", "add_generation_prompt")


@dataclass(frozen=True)
class Rendered:
    """The text of a conversation, and the parts of it that the template marks as generated."""

    text: str
    generated: tuple[tuple[int, int], ...]  # begin and end of each {% generation %}, in characters


def render_chat(template: str, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
    """The text of `render_marked` alone, which says what the options are."""
    return render_marked(template, messages, **options).text


def render_marked(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = False,
    special_tokens: Mapping[str, str] | None = None,
    tools: Sequence[Any] | None = None,
    documents: Sequence[Any] | None = None,
    arguments: Mapping[str, Any] | None = None,
    now: datetime | None = None,
) -> Rendered:
    """A conversation as the template writes it.

    messages: [{"role": str, "content": str}, ...]; content may also be null or a list of parts of
    text, and further keys (tool_calls, reasoning_content, name, ...) are passed on. special_tokens:
    what `bos_token`, `eos_token`, ... stand for. tools, documents: what the template shows of them.
    arguments: any other variable of the template, such as enable_thinking. now: the date that
    `strftime_now` shows, FIXED_DATE if none is given.

    Raises DataError naming the template's problem, an argument that it does not use, or tools or
    documents that it has no place for: what it would leave out is never dropped silently.
    """
    need("jinja2")
    from pylora.text.sandbox import CLOSE, OPEN, render, strftime_at

    for name, value in (("tools", tools), ("documents", documents)):
        if value is not None and (isinstance(value, str) or not isinstance(value, Sequence)):
            wrong_type(name, "a list", value)
    used = template_variables(template)
    given = dict(arguments or {})
    now = _date(given.pop(DATE)) if DATE in given else now
    for name in given:
        if name in _GIVEN:
            raise DataError(f"{name!r} is given by pylora, so it cannot be a template argument")
        if name not in used:
            takes = sorted(used - {*_GIVEN, DATE, *(special_tokens or ())})
            raise DataError(
                f"the chat template has no argument {name[:80]!r}; it has "
                f"{', '.join(repr(a) for a in takes) or 'none'}"
            )
    for name, value in (("tools", tools), ("documents", documents)):
        if value and name not in used:
            raise DataError(
                f"there are {name}, but the chat template has no place for them; take them out, "
                f"or use a model whose template knows {name}"
            )
    variables: dict[str, Any] = dict(special_tokens or {}) | plain(given)
    variables |= {"messages": prepare(template, messages)}
    variables |= {"tools": plain(list(tools)) if tools else None}
    variables |= {"documents": plain(list(documents)) if documents else None}
    variables["add_generation_prompt"] = add_generation_prompt
    said = json.dumps(variables, ensure_ascii=False) if "generation" in template else ""
    if OPEN in said or CLOSE in said:
        raise DataError("the messages have U+FDD0 or U+FDD1, which are not characters; take it out")
    variables[DATE] = strftime_at(now or FIXED_DATE)
    try:
        text, spans = render(template, variables)
    except Exception as error:  # a template may fail in any way that Python code can
        raise _failure(error) from error
    return Rendered(text, tuple(spans))


@lru_cache(maxsize=8)
def template_variables(template: str) -> frozenset[str]:
    """The names that a template asks for. DataError for a template that cannot be read."""
    need("jinja2")
    from pylora.text.sandbox import variables_of

    if len(template) > MAX_TEMPLATE:
        raise DataError(
            f"the chat template has {len(template)} characters; {MAX_TEMPLATE} are allowed"
        )
    try:
        return variables_of(template)
    except Exception as error:  # Jinja's parser meets whatever a stranger wrote
        raise _failure(error) from error


def _failure(error: Exception) -> DataError:
    line = getattr(error, "lineno", None)
    place = f" at line {line}" if isinstance(line, int) else ""
    return DataError(f"the chat template failed{place}: {str(error)[:500] or type(error).__name__}")


def _date(value: Any) -> datetime:
    try:
        return datetime.fromisoformat(str(value))
    except ValueError:
        raise DataError(
            f"{DATE} is {str(value)[:40]!r}; as a template argument it is the date that the "
            "template sees, YYYY-MM-DD"
        ) from None
