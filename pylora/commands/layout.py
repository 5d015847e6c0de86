"""How --help and the usage line look: arguments, options in groups, defaults, examples.

Plain text at the width of the terminal. An option shows its first long name and its letter; the
names that other tools have for it are taken too, and listed in docs/training.md.
"""

from __future__ import annotations

from typing import Any

_OTHERS = "Other options"


def usage(ctx: Any) -> str:
    """ "pylora train MODEL DATA OUT [options]" """
    command = ctx.command
    if hasattr(command, "commands"):
        return f"{ctx.command_path} [options] VERB …"
    parts = [
        argument(p) if p.required else f"[{argument(p)}]"
        for p in command.params
        if p.param_type_name == "argument"
    ]
    needed = [f"{_long(p)} {_value(p)}" for p in _options(command) if p.required]
    return " ".join((ctx.command_path, *parts, *needed, "[options]"))


def argument(param: Any) -> str:
    """An argument's name, as usage and errors show it."""
    return str(param.metavar or param.name.upper())


def examples(command: Any) -> list[str]:
    """The command lines that a verb gives as examples."""
    return [line.strip() for line in (command.epilog or "").splitlines() if line.strip()]


def of_verb(command: Any, ctx: Any, formatter: Any) -> None:
    """Help of one verb."""
    formatter.write(f"usage: {usage(ctx)}\n")
    _text(command.help or "", formatter)
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    if arguments:
        with formatter.section("Arguments"):
            formatter.write_dl([(argument(p), _help(p)) for p in arguments])
    groups: dict[str, list[tuple[str, str]]] = {}
    for param in _options(command):
        group = getattr(param, "rich_help_panel", None) or "Options"
        groups.setdefault(group, []).append((_left(param), _help(param)))
    last = "Options" if "Options" in groups and len(groups) == 1 else _OTHERS
    if last == _OTHERS and "Options" in groups:
        groups[_OTHERS] = groups.pop("Options")
    groups.setdefault(last, []).append(("-h, --help", "show this and stop"))
    for group, rows in groups.items():
        with formatter.section(group):
            formatter.write_dl(rows)
    shown = examples(command)
    if shown:
        with formatter.section("Example" if len(shown) == 1 else "Examples"):
            for line in shown:
                formatter.write(f"{'':{formatter.current_indent}}{line}\n")


def of_all(group: Any, ctx: Any, formatter: Any) -> None:
    """Help of the command itself: its verbs in groups, and the options before a verb."""
    formatter.write(f"usage: {usage(ctx)}\n")
    _text(group.help or "", formatter)
    parts: dict[str, list[tuple[str, str]]] = {}
    for name, verb in group.commands.items():
        if not verb.hidden:
            part = getattr(verb, "rich_help_panel", None) or "Verbs"
            parts.setdefault(part, []).append((name, verb.get_short_help_str(90)))
    for part, rows in parts.items():
        with formatter.section(part):
            formatter.write_dl(rows)
    options = [(_left(p), _help(p)) for p in _options(group)]
    with formatter.section("Options, before the verb"):
        formatter.write_dl([*options, ("-h, --help", "show this, or of a verb its options")])
    _text("Each verb has --help: pylora train --help", formatter)


def _options(command: Any) -> list[Any]:
    return [
        p
        for p in command.params
        if p.param_type_name == "option" and p.name != "help" and not getattr(p, "hidden", False)
    ]


def _text(text: str, formatter: Any) -> None:
    for paragraph in text.strip().split("\n\n"):
        formatter.write_paragraph()
        with formatter.indentation():
            formatter.write_text(" ".join(paragraph.split()))


def _long(param: Any) -> str:
    return str(next((o for o in param.opts if o.startswith("--")), param.opts[0]))


def _left(param: Any) -> str:
    letters = [o for o in param.opts if not o.startswith("--")]
    names = ", ".join((*letters[:1], _long(param)))
    return names if param.is_flag else f"{names} {_value(param)}"


_KINDS = {"int": "N", "Path": "FILE", "str": "TEXT"}
_KINDS |= {"integer": "N", "path": "FILE", "file": "FILE", "text": "TEXT"}  # as click calls them


def _value(param: Any) -> str:
    """What stands for an option's value."""
    return str(param.metavar) if param.metavar else _KINDS.get(_type_name(param), "X")


def kind(param: Any) -> str:
    """What an option takes, in words: "flag", "whole number", "number" or "text"."""
    if getattr(param, "is_flag", False):
        return "flag"
    name = _type_name(param)
    words = {"int": "whole number", "integer": "whole number", "float": "number"}
    return words.get(name, "text")


def _type_name(param: Any) -> str:
    name = getattr(getattr(param, "type", None), "name", None)  # click's own
    if name is None:
        described = param.type_descriptor.annotation
        name = getattr(described, "__name__", str(described))
    return str(name)


def _help(param: Any) -> str:
    text, default = param.help or "", param.default
    if not callable(default) and default is not None and default is not False and default != ():
        shown = f"{default:g}" if isinstance(default, float) else str(default)
        text += f" (default: {shown})"
    if param.required and param.param_type_name == "option":
        text += " (needed)"
    return text.strip()
