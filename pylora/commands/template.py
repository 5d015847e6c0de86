"""--template-arg: variables of the chat template on the command line; and a tokenizer's notes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from pylora.errors import ConfigError

TemplateArgs = Annotated[
    list[str] | None,
    typer.Option(
        "--template-arg",
        metavar="NAME=VALUE",
        help="variable of the chat template, such as enable_thinking=false; may be repeated; "
        "strftime_now=YYYY-MM-DD: the date that it shows",
    ),
]


def template_arguments(given: Sequence[str] | None) -> dict[str, Any]:
    """{"enable_thinking": False, ...} of ["enable_thinking=false", ...]. A value that is JSON is
    what it says there, any other is text. Raises ConfigError."""
    found: dict[str, Any] = {}
    for entry in given or ():
        name, equals, value = entry.partition("=")
        if not equals or not name:
            raise ConfigError(
                f"--template-arg {entry[:80]!r} must be NAME=VALUE, such as enable_thinking=false"
            )
        if name in found:
            raise ConfigError(f"--template-arg {name} is given twice")
        try:
            found[name] = json.loads(value)
        except (ValueError, RecursionError):
            found[name] = value
    return found


def refuse_unused(given: Sequence[str] | None, tokenizer: Any) -> Callable[[], None]:
    """To be called when all texts were encoded: ConfigError if arguments were given and none of
    them went through the chat template."""
    rendered: list[bool] = []
    render = tokenizer.render

    def noted(*args: Any, **options: Any) -> Any:
        rendered.append(True)
        return render(*args, **options)

    def check() -> None:
        tokenizer.render = render
        if given and not rendered:
            raise ConfigError(
                f"--template-arg {given[0]} would change nothing: the data has no conversation, "
                "and nothing else goes through the chat template; leave it out"
            )

    tokenizer.render = noted
    return check


def use_template(tokenizer: Any, given: Sequence[str] | None) -> None:
    """Gives the arguments to every conversation, and says on stderr what the tokenizer notes."""
    tokenizer.arguments |= template_arguments(given)
    for note in tokenizer.notes:
        print(f"note: {note}", file=sys.stderr)
