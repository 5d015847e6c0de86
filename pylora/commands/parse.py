"""How the command line is read: typer's parser, with the promise that nothing typed is ignored.

`--learning_rate` is `--learning-rate`, `--backend` may stand behind the verb, an option that is
given twice is refused, the table of rules.py is held, and what is wrong comes with a suggestion,
the usage and an example. How help looks is in layout.py.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from pylora.commands import layout, rules
from pylora.commands.foreign import HINTS

UsageError: Any = typer.BadParameter.__mro__[1]  # typer brings its own click, or uses click's
ClickException: Any = UsageError.__mro__[1]
_GLOBAL = "--backend"  # before the verb, but understood behind it


class Verb(TyperCommand):
    """One verb."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Reads the arguments. Raises UsageError, with a sentence, for what is not right."""
        args = list(_spelled(args, _names(self)))
        _refuse_repeated(ctx, self, args)
        try:
            rest: list[str] = super().parse_args(ctx, list(args))  # it empties its list
        except UsageError as error:
            error.ctx = error.ctx or ctx
            raise
        if ctx.resilient_parsing:  # completion
            return rest
        typed = {n for n in ctx.params if _source(ctx, n) in ("COMMANDLINE", "ENVIRONMENT")}
        _refuse_empty(ctx, self, args, typed)
        given = {name for name in typed if ctx.params[name] is not False}
        given |= {n for n in ctx.params if _source(ctx, n) == "DEFAULT_MAP" and _asks(self, ctx, n)}
        values = ctx.params | {"verb": self.name}
        if wrong := rules.check(self.name or "", given, values, lambda n: called(self, n)):
            raise UsageError(wrong, ctx)
        above = ctx.parent
        given = {n for n in above.params if _source(above, n) == "COMMANDLINE"}
        names = {"verb": f"`{self.name}`"}
        if wrong := rules.check(
            rules.ROOT,
            given,
            above.params | {"verb": self.name},
            lambda n: names.get(n) or called(above.command, n),
        ):
            raise UsageError(wrong, ctx)
        return rest

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Writes what --help shows."""
        layout.of_verb(self, ctx, formatter)


class Verbs(TyperGroup):
    """All of them."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Options before the verb; those that may stand behind it are fetched."""
        if not args and not ctx.resilient_parsing:
            print(ctx.get_help(), file=sys.stderr)
            raise typer.Exit(2)
        if args[:1] == ["help"]:
            args = [*args[1:2], "--help"]
        args = list(_spelled(_hoisted(args), _names(self)))
        first = next((i for i, arg in enumerate(args) if arg in self.commands), len(args))
        _refuse_repeated(ctx, self, args[:first])
        rest: list[str] = super().parse_args(ctx, args)
        return rest

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The verb. Raises UsageError naming those that are nearly so called."""
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            near = _SYNONYMS.get(args[0].lower()) or difflib.get_close_matches(
                args[0].lower(), self.commands, n=2, cutoff=0.6
            )
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            listed = ", ".join(name for name, verb in self.commands.items() if not verb.hidden)
            raise UsageError(f"there is no verb {args[0]!r}{hint} (the verbs: {listed})", ctx)
        return super().resolve_command(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Writes what --help shows."""
        layout.of_all(self, ctx, formatter)


_SYNONYMS = {
    "finetune": ("train",), "fine-tune": ("train",), "lora": ("train",), "sft": ("train",),
    "run": ("generate", "chat"), "infer": ("generate",), "complete": ("generate",),
    "fuse": ("merge",), "export": ("merge",), "show": ("inspect", "plan"), "test": ("check",),
    "evaluate": ("eval",), "version": ("--version",), "gpu": ("doctor",),
}  # fmt: skip


def run(app: typer.Typer, args: Sequence[str]) -> int:
    """Runs a command line and returns its exit code; a wrong one is explained on stderr."""
    command: Any = typer.main.get_command(app)
    try:
        code = command.main(
            args=list(args), prog_name="pylora", standalone_mode=False, obj=tuple(args)
        )
    except ClickException as error:
        explain(error)
        return int(error.exit_code)
    except typer.Abort:
        return 1
    if code == 130:  # typer's word for a KeyboardInterrupt outside of a verb
        raise KeyboardInterrupt
    return code if isinstance(code, int) else 0


def explain(error: Any) -> None:
    """What was wrong, what would be right, and where to read more, on stderr."""
    ctx = getattr(error, "ctx", None)
    if ctx is None:
        _say(f"pylora: {error.format_message()}")
        return
    path = ctx.command_path
    _say(f"{path}: {message_of(error, ctx)}")
    _say(f"usage: {layout.usage(ctx)}")
    for example in layout.examples(ctx.command)[:1]:
        _say(f"example: {example}")
    _say(f"more: {path} --help")


def message_of(error: Any, ctx: Any) -> str:
    """The sentence: with a suggestion for an unknown option, and all arguments that are missing."""
    kind, command = type(error).__name__, ctx.command
    if kind == "NoSuchOption":
        return unknown_option(str(error.option_name), ctx)
    if kind == "MissingParameter":
        lacking = [p for p in command.params if p.required and _lacks(ctx, p.name)]
        names = [called(command, p.name) for p in lacking] or [error.format_message()]
        listed = " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
        return f"{listed} {'is' if len(names) == 1 else 'are'} missing"
    text = str(error.format_message()).rstrip(".")
    if text.startswith("Got unexpected extra argument"):
        extra = text[text.rfind("(") + 1 : -1]
        many = "are arguments" if " " in extra else "is one argument"
        return f"{extra} {many} too many; a text with spaces goes into quotes, options before --"
    param = getattr(error, "param", None)
    if param is not None:
        said = text.split(": ", 1)[-1]
        for theirs, ours in _PLAINER:
            said = said.replace(theirs, ours)
        return f"{called(command, param.name)}: {said[:1].lower()}{said[1:]}"
    if kind == "BadOptionUsage" and text.endswith("requires an argument"):
        return f"{error.option_name} needs a value"
    return text[:1].lower() + text[1:] if text[:1].isupper() and text[1:2].islower() else text


def _lacks(ctx: Any, name: str) -> bool:
    """Whether neither the command line nor a file of settings says it."""
    return ctx.params.get(name) is None and ctx.lookup_default(name) is None


_PLAINER = (  # the words of typer's and click's checks
    (", unable to parse string as an integer", ""),
    (", unable to parse string as a number", ""),
    ("a valid integer", "a whole number"),
    ("a valid number", "a number"),
    ("Input should be greater than or equal to", "must be at least"),
    ("Input should be less than or equal to", "must be at most"),
    ("Input should be", "must be"),
)


def unknown_option(typed: str, ctx: Any) -> str:
    """The sentence about an option that the command does not have."""
    command = ctx.command
    if len(typed) < 2 or " " in typed:
        return f"a text that begins with - goes last, behind --: {ctx.command_path} … -- '- text'"
    name = typed.partition("=")[0].replace("_", "-").lower()
    known = sorted(_names(command))
    if name in HINTS:
        return f"there is no option {typed}; {HINTS[name].format(verb=command.name)}"
    near = difflib.get_close_matches(name, known, n=4, cutoff=0.6)
    likeness = {n: difflib.SequenceMatcher(None, n, name).ratio() for n in near}
    near = [n for n in near if likeness[n] > likeness[near[0]] - 0.1]  # the best, and its equals
    near = near or [k for k in known if len(name) > 2 and k.startswith(name)]
    owners = {o: p.name for p in command.params for o in _spellings(p)}
    near = [n for i, n in enumerate(near) if owners.get(n) not in map(owners.get, near[:i])][:2]
    group = getattr(command if ctx.parent is None else ctx.parent.command, "commands", {})
    homes = [v for v, c in group.items() if name in _names(c)]
    if homes:  # it is spelt right
        hint = f"; it is an option of {' and '.join(homes)}"
    elif near:
        hint = f"; did you mean {' or '.join(near)}?"
    else:
        hint = ""
    return f"there is no option {typed}{hint}"


def called(command: Any, name: str) -> str:
    """How a parameter is written on the command line: --eval, PROMPT."""
    for param in command.params:
        if param.name == name:
            if param.param_type_name == "argument":
                return str(layout.argument(param))
            return str(next((o for o in param.opts if o.startswith("--")), param.opts[0]))
    return name


def _asks(command: Any, ctx: Any, name: str) -> bool:
    """Whether what a file of settings says of a parameter is anything but its default."""
    param = next(p for p in command.params if p.name == name)
    return ctx.params[name] is not False and ctx.params[name] != param.default


def _source(ctx: Any, name: str) -> str:
    source = ctx.get_parameter_source(name)
    return "" if source is None else str(source.name)


def _names(command: Any) -> frozenset[str]:
    """Every spelling of every option of a command."""
    listed = (o for p in command.params if p.param_type_name == "option" for o in _spellings(p))
    return frozenset((*listed, "--help", "-h"))


def _spellings(param: Any) -> list[str]:
    return [*param.opts, *param.secondary_opts]


def _spelled(args: Sequence[str], names: frozenset[str]) -> Iterator[str]:
    """--learning_rate and --Learning-Rate are --learning-rate, where that is an option."""
    for i, arg in enumerate(args):
        if arg == "--":
            yield from args[i:]
            return
        name, sign, value = arg.partition("=")
        plain = name.replace("_", "-").lower()
        long = name.startswith("--") and name not in names and plain in names
        yield plain + sign + value if long else arg


def _hoisted(args: Sequence[str]) -> list[str]:
    """With the options that belong before the verb there, wherever they were typed."""
    front: list[str] = []
    rest: list[str] = []
    waiting = iter(args)
    for arg in waiting:
        if arg == "--":
            rest += [arg, *waiting]
        elif arg == _GLOBAL:
            front += [arg, *(value for value in (next(waiting, None),) if value is not None)]
        else:
            (front if arg.startswith(_GLOBAL + "=") else rest).append(arg)
    return front + rest


def _refuse_repeated(ctx: Any, command: Any, args: Sequence[str]) -> None:
    """UsageError for an option that is given twice: one of the two would be ignored."""
    by_name = {o: p for p in command.params if p.param_type_name == "option" for o in _spellings(p)}
    seen: dict[str, str] = {}
    waiting = iter(args)
    for arg in waiting:
        if arg == "--":
            return
        name, sign, _ = arg.partition("=")
        if name not in by_name and arg[:1] == "-" and arg[:2] != "--":
            name, sign = arg[:2], arg[2:]  # -n5
        param = by_name.get(name)
        if param is None:
            continue
        if not param.is_flag and not sign:
            next(waiting, None)  # its value, whatever it looks like
        if param.name in seen and not param.multiple:
            first = seen[param.name]
            twice = (
                f"{name} is given twice" if name == first else f"{first} and {name} are the same"
            )
            raise UsageError(f"{twice}; which of the two is meant?", ctx)
        seen[param.name] = name


def _refuse_empty(ctx: Any, command: Any, args: Sequence[str], typed: set[str]) -> None:
    """UsageError for an empty path, such as "$OUT" with OUT not set: it would be this folder."""
    from pathlib import Path

    if "" not in args and not any(arg.endswith("=") for arg in args):
        return
    for name in typed:
        if ctx.params[name] == Path() and "." not in args:
            raise UsageError(f"{called(command, name)} is empty; is a shell variable not set?", ctx)


def _say(line: str) -> None:
    if sys.stderr is not None:
        print(line, file=sys.stderr)
