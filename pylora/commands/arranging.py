"""Where the settings of `pylora train` come from: the command line, a file, the run itself.

What is typed comes before what --config FILE says, and that before what the run that --resume
continues was started with (OUT/run.json). A setting that a typed one replaces, as --steps does
epochs, is dropped with it. The three arguments may stand in the file, too: then all three are
typed, or those that the file lacks; with --resume one argument is OUT. Nothing is trained here.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from pylora.commands import layout, recipe, rules
from pylora.commands.guard import stop
from pylora.commands.parse import UsageError, Verb
from pylora.errors import ConfigError, PyloraError
from pylora.files.whole import atomic_write

RUN = "run.json"  # the settings of a run, in its folder
_ARGUMENTS = ("model", "data", "out")
_PLACES = "pylora.places"  # in the context: where the settings of a file stand
# TrainConfig's names for what the command line calls otherwise.
_FIELDS = {"warmup_steps": "warmup", "lora_plus_ratio": "lora_plus"}


class TrainVerb(Verb):
    """`train`, with its settings also from files."""

    def make_parser(self, ctx: Any) -> Any:
        """The parser of a command line, which looks into the files that it names."""
        parser: Any = super().make_parser(ctx)
        inner = parser.parse_args

        def parse_args(args: list[str]) -> Any:
            opts, rest, order = inner(args=args)
            if not ctx.resilient_parsing and not rest:
                try:
                    _arrange(self, ctx, opts)
                except PyloraError as error:
                    stop(str(error), 1)
            return opts, rest, order

        parser.parse_args = parse_args
        return parser


def _arrange(command: Any, ctx: Any, opts: dict[str, Any]) -> None:
    """Fills the context's defaults from the files; moves arguments to where they belong."""
    given = [opts.pop(n) for n in _ARGUMENTS if isinstance(opts.get(n), str)]
    typed = {name for name, value in opts.items() if value is not None and name not in _ARGUMENTS}
    layers: list[Mapping[str, Any]] = []
    places: dict[str, str] = {}
    file = opts.get("config")
    if isinstance(file, str) and not recipe.is_recipe(Path(file), command):
        if "adapter_config" in typed:
            raise UsageError("--config and --adapter-config are the same here", ctx)
        opts["adapter_config"] = opts.pop("config")
        typed = typed - {"config"} | {"adapter_config"}
    elif isinstance(file, str):
        read = recipe.read(Path(file), command)
        layers.append(read.values)
        places = read.places
    values: dict[str, Any] = dict(layers[0]) if layers else {}
    resume = opts.get("resume") is True
    _place_arguments(ctx, given, values, opts, resume)
    out = opts.get("out") or values.get("out")
    if resume and out is not None and (Path(out) / RUN).is_file():
        before = recipe.read(Path(out) / RUN, command).values
        before = _without_replaced(before, set(values))
        values = before | values | {"out": out}
    elif resume and out is not None and len(given) == 1 and not layers:
        _nothing_to_resume(Path(out))
    values = _without_replaced(values, typed)
    ctx.default_map = values
    ctx.meta[_PLACES] = {name: place for name, place in places.items() if name in values}
    if opts.get("print_config") is True:
        shown = values | {n: v for n, v in opts.items() if v is not None}
        print(commented(command, shown))
        raise typer.Exit(0)


def _place_arguments(
    ctx: Any, given: list[str], values: Mapping[str, Any], opts: dict[str, Any], resume: bool
) -> None:
    """Gives the typed arguments their names."""
    lacking = [name for name in _ARGUMENTS if name not in values]
    if resume and len(given) == 1:
        names = ["out"]
    elif values and len(given) < 3:
        names = lacking
        if len(given) > len(names):
            there = " and ".join(n.upper() for n in _ARGUMENTS if n in values)
            rest = " and ".join(n.upper() for n in lacking) or "none"
            raise UsageError(
                f"the file of settings has {there} already; of the arguments give {rest}, or all "
                "three",
                ctx,
            )
    else:
        names = list(_ARGUMENTS)
    opts.update(zip(names, given, strict=False))


def _without_replaced(values: Mapping[str, Any], typed: set[str]) -> dict[str, Any]:
    """Without what a typed setting stands in place of."""
    gone = set()
    for rule in rules.RULES["train"]:
        if isinstance(rule, rules.Excludes):
            if rule.other in typed and rule.option not in typed:
                gone.add(rule.option)
            if rule.option in typed and rule.other not in typed and rule.when is None:
                gone.add(rule.other)
    return {name: value for name, value in values.items() if name not in gone}


def _nothing_to_resume(out: Path) -> None:
    if not out.exists():
        raise ConfigError(f"{out}: there is no such directory to resume from")
    raise ConfigError(
        f"{out} has no {RUN}, which says what its run was started with; give MODEL DATA OUT and "
        "the run's options beside --resume"
    )


def place_of(ctx: Any, message: str) -> str:
    """The message of an error about a setting, with the file's line where it came from a file. It
    begins with the setting's name, or with "there is no" and it."""
    name = message.removeprefix("there is no ")
    name = name.split(" ", 1)[0].rstrip(":").lstrip("-").replace("-", "_")
    places = ctx.meta.get(_PLACES, {})
    place = places.get(_FIELDS.get(name, name))
    return f"{place}: {message}" if place else message


# ---- writing ------------------------------------------------------------------------------------


def record(command: Any, values: Mapping[str, Any]) -> str:
    """The settings as the text of a JSON recipe; what is not set is left out. Paths of what is
    there are whole ones, so that the run can be continued from elsewhere."""
    found: dict[str, Any] = {}
    for param in recipe.settings(command):
        value = values.get(param.name)
        if value is None or value == () or value == [] or param.name == "overwrite":
            continue
        if isinstance(value, Path):
            value = str(value.resolve() if value.exists() and str(value) != "-" else value)
        found[recipe.name_of(param)] = list(value) if isinstance(value, tuple) else value
    return json.dumps(found, indent=1, ensure_ascii=False) + "\n"


def write_record(out: Path, text: str) -> None:
    """Puts the settings into a run's folder."""
    with atomic_write(out / RUN) as beside:
        beside.write_text(text, encoding="utf-8")


def commented(command: Any, values: Mapping[str, Any]) -> str:
    """A recipe in YAML with every setting: these values, else the defaults, each explained. What
    has no value stands in a comment."""
    lines = ["# Settings of `pylora train --config FILE`; an option that is typed comes first."]
    parts: dict[str, list[Any]] = {}
    for param in recipe.settings(command):
        part = getattr(param, "rich_help_panel", None) or "Other options"
        part = "What and where" if param.param_type_name == "argument" else part
        parts.setdefault(part, []).append(param)
    for part, params in parts.items():
        lines += ["", f"# ---- {part} " + "-" * max(4, 70 - len(part))]
        for param in params:
            value = values.get(param.name, param.default)
            lines += textwrap.wrap(f"# {(param.help or '').strip()}", 98, subsequent_indent="# ")
            blank = value is None or value == ()
            name = recipe.name_of(param)
            lines.append(f"# {name}:" if blank else f"{name}: {_yaml(param, value)}")
    return "\n".join(lines)


def _yaml(param: Any, value: Any) -> str:
    kind = layout.kind(param)
    if isinstance(value, (list, tuple)):
        return json.dumps([str(one) for one in value], ensure_ascii=False)
    if kind in ("whole number", "number"):
        return str(value)
    return json.dumps(value if isinstance(value, bool) else str(value), ensure_ascii=False)
