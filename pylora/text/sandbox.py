"""The sandbox that chat templates run in: Jinja's own, with bounds on work and size.

Jinja's sandbox denies a template Python's internals; the bounds here deny it endless loops and
giant strings. Loop rounds, calls, filters and operators spend from one budget for each render, and
whatever can make a long text is checked before it is made. Needs the extra "text"; import it only
where that is known to be there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from datetime import datetime
from functools import lru_cache, wraps
from string import Formatter
from typing import Any

from jinja2 import Template, meta, nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_TEXT = 1 << 24  # characters of any text that a template makes, entries of any list
BUDGET = 500_000  # steps in one render
CHARGE = 64  # a step also pays for so many characters or entries of a value that is made
MAX_NUMBER = 1 << 64
OPEN, CLOSE = "\ufdd0", "\ufdd1"  # around what {% generation %} holds; no character of any text

_FILTERS = frozenset(
    "abs capitalize count d default dictsort e escape first float int items join last length list "
    "lower map max min reject rejectattr replace reverse round safe select selectattr sort string "
    "striptags sum title trim truncate unique upper wordcount".split()
)
# Those of them that print their input.
_TEXTUAL = frozenset(
    "capitalize e escape lower safe string striptags title trim truncate upper wordcount".split()
)
# String methods whose result can be far longer than what goes in.
_GROWING = frozenset("center expandtabs ljust rjust translate zfill".split())

_left: ContextVar[list[int]] = ContextVar("pylora_chat_budget")


class TemplateFailure(Exception):
    """What raise_exception and the bounds raise inside a template."""


def _spend(amount: int) -> None:
    left = _left.get()
    left[0] -= amount
    if left[0] < 0:
        raise TemplateFailure(f"it takes more than {BUDGET} steps")


def joined(pieces: Iterable[Any]) -> str:
    """ "".join with a bound on the length."""
    parts: list[str] = []
    size = 0
    for piece in pieces:
        text = _text(piece)
        size += len(text)
        if size > MAX_TEXT:
            raise TemplateFailure(f"it makes a text of more than {MAX_TEXT} characters")
        parts.append(text)
    _spend(1 + size // CHARGE)
    return "".join(parts)


def _text(value: Any) -> str:
    """str(value), after walking it: nested lists that share parts print exponentially long."""
    if isinstance(value, (list, tuple, dict)):
        _walk(value)
    return str(value)


def _walk(value: Any) -> None:
    _spend(_cost((value,)))
    for item in value.values() if isinstance(value, dict) else value:
        if isinstance(item, (list, tuple, dict)):
            _walk(item)
        else:
            _spend(_cost((item,)))


def _shown(value: Any) -> str:
    """What every {{ expression }} goes through."""
    text = _text(value)
    _spend(_cost((text,)))
    return text


def _rounds(items: Iterable[Any]) -> Iterator[Any]:
    """What every `for` in a template goes through: one step of the budget for each round."""
    for item in items:
        _spend(1)
        yield item


def _length(x: Any) -> int:
    return len(x) if isinstance(x, (str, bytes, list, tuple, dict, range)) else 0


def _cost(values: Iterable[Any]) -> int:
    return 1 + sum(_length(value) for value in values) // CHARGE


def _counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)  # keeps Jinja's marks of what to pass
    def counted(*args: Any, **kwargs: Any) -> Any:
        _spend(_cost(args))
        for value in args if name in _TEXTUAL else ():
            if isinstance(value, (list, tuple, dict)):
                _walk(value)
        return function(*args, **kwargs)

    return counted


def _replace(text: str, old: str, new: str, count: int = -1) -> str:
    grown = len(text) + max(text.count(old), 0) * len(new)
    if grown > MAX_TEXT:
        raise TemplateFailure(f"it makes a text of more than {MAX_TEXT} characters")
    _spend(1 + grown // CHARGE)
    return text.replace(old, new, count)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike Jinja's, it does not escape for HTML; so do transformers and the templates expect."""
    if indent is not None and not 0 <= indent <= 16:
        raise TemplateFailure(f"tojson with an indent of {indent}")
    if isinstance(value, (list, tuple, dict)):
        _walk(value)
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _indent(text: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    pad = width if isinstance(width, str) else " " * max(0, min(int(width), 65))
    if len(pad) > 64:
        raise TemplateFailure(f"indent with a width of {width if isinstance(width, int) else pad}")
    head, *lines = f"{text}\n".splitlines()  # Jinja's keeps a line break at the end in this way
    parts = [pad, head] if first else [head]
    for line in lines:
        parts.append(f"\n{pad if line or blank else ''}{line}")
    return joined(parts)


def _check_format(function: Any, values: list[Any]) -> None:
    """Refuses a "...".format(...) with widths, and bounds what it makes."""
    text = getattr(getattr(function, "__wrapped__", None), "__self__", None)
    if not isinstance(text, str):
        raise TemplateFailure("format() is only supported on text; use ~ instead")
    fields = [field for field in Formatter().parse(text) if field[1] is not None]
    if any(spec or how or not re.fullmatch(r"\w*", str(name)) for _, name, spec, how in fields):
        raise TemplateFailure("format() with a width, a conversion or a part of a value; use ~")
    size = len(text) + len(fields) * max((len(_text(value)) for value in values), default=0)
    if size > MAX_TEXT:
        raise TemplateFailure(f"it makes a text of more than {MAX_TEXT} characters")
    _spend(1 + size // CHARGE)


def _raise_exception(message: Any = "") -> None:
    raise TemplateFailure(f"it refuses these messages: {message}")


def _whole(x: Any) -> int:
    return x if isinstance(x, int) else 0


def _replace_filter(text: Any, old: Any, new: Any, count: int | None = None) -> str:
    return _replace(str(text), str(old), str(new), -1 if count is None else count)


def _join_filter(items: Iterable[Any], d: Any = "", attribute: str | None = None) -> str:
    if attribute is not None:
        items = (item[attribute] for item in items)
    parts: list[Any] = []
    for item in items:
        parts += [d, item] if parts else [item]
        _spend(1)
    return joined(parts)


class Bounds(NodeTransformer):
    """Sends every loop and every `~` through the functions above."""

    def visit_For(self, node: Any) -> Any:
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "_rounds", [], [], None, None)
        return node

    def visit_Concat(self, node: Any) -> Any:
        self.generic_visit(node)
        return nodes.Filter(nodes.List(node.nodes), "_joined", [], [], None, None)


class Generation(Extension):
    """{% generation %}: transformers' mark of what the assistant writes. Its content, between two
    characters that Unicode keeps out of texts; `render` takes them out and says where they were."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        marks = [nodes.Output([nodes.TemplateData(c)], lineno=line) for c in (OPEN, CLOSE)]
        return [marks[0], *body, marks[1]]


class Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("+", "*", "**", "%"))
    concat = staticmethod(joined)

    def _parse(self, *args: Any) -> Any:
        return Bounds().visit(super()._parse(*args))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and attr in _GROWING:
            return False
        return bool(super().is_safe_attribute(obj, attr, value))

    def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        _spend(_cost(args))
        name = getattr(function, "__name__", "")
        if name in ("format", "format_map"):  # Jinja hands these out before asking if they are safe
            _check_format(function, [*args, *kwargs.values()])
        text = getattr(function, "__self__", None)
        if isinstance(text, str) and name in ("replace", "join"):
            # What Jinja adds inside of loops and blocks is for its own functions.
            given = {k: v for k, v in kwargs.items() if k not in ("_loop_vars", "_block_vars")}
            if name == "replace":
                return _replace(text, *args, **given)
            return _join_filter(args[0], text)
        return super().call(context, function, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        size = 0
        if operator == "+":
            size = _length(left) + _length(right)
        elif operator == "*" and (_length(left) or _length(right)):
            size = max(_length(left), _length(right)) * max(_whole(left), _whole(right))
        elif operator == "%" and isinstance(left, str):
            raise TemplateFailure("the operator % on text is not supported; use ~ instead")
        elif operator == "**" or max(abs(_whole(left)), abs(_whole(right))) > MAX_NUMBER:
            raise TemplateFailure("powers and giant numbers are not supported")
        if size > MAX_TEXT:
            raise TemplateFailure(f"it makes a text or list of more than {MAX_TEXT} entries")
        _spend(1 + size // CHARGE)
        return super().call_binop(context, operator, left, right)


@lru_cache(maxsize=1)
def _environment() -> Environment:
    environment = Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
        extensions=["jinja2.ext.loopcontrols", Generation],
    )
    kept = {name: f for name, f in environment.filters.items() if name in _FILTERS}
    bounded = {
        "tojson": _tojson,
        "indent": _indent,
        "replace": _replace_filter,
        "join": _join_filter,
    }
    environment.filters = {name: _counted(name, f) for name, f in (kept | bounded).items()}
    environment.filters |= {"_rounds": _rounds, "_joined": joined}
    environment.globals = {
        name: environment.globals[name] for name in ("range", "dict", "namespace")
    } | {"raise_exception": _raise_exception}
    return environment


@lru_cache(maxsize=8)
def _compile(template: str) -> Template:
    return _environment().from_string(template)


def variables_of(template: str) -> frozenset[str]:
    """The names that a template asks for and does not set itself."""
    return frozenset(meta.find_undeclared_variables(_environment().parse(template)))


def strftime_at(now: datetime) -> Callable[[str], str]:
    """`strftime_now` of templates, at one fixed time."""

    def strftime_now(form: str) -> str:
        text = str(form)
        if len(text) > 256 or re.search(r"%[^a-zA-Z%]*\d", text):  # "%99999999d" pads to that width
            raise TemplateFailure(f"strftime_now with the format {text[:40]!r}")
        return now.strftime(text)

    return strftime_now


def render(template: str, variables: dict[str, Any]) -> tuple[str, list[tuple[int, int]]]:
    """The text, and where in it {% generation %} blocks begin and end.

    Renders within the bounds; raises whatever Jinja, the bounds or the template raise.
    """
    token = _left.set([BUDGET])
    try:
        text = joined(_compile(template).generate(variables))
    finally:
        _left.reset(token)
    if OPEN not in text and CLOSE not in text:
        return text, []
    spans: list[tuple[int, int]] = []
    parts: list[str] = []
    length, opened = 0, -1
    for part in re.split(f"([{OPEN}{CLOSE}])", text):
        if part == OPEN:
            opened = length
        elif part == CLOSE:
            spans.append((opened, length))
        else:
            parts.append(part)
            length += len(part)
    return "".join(parts), spans
