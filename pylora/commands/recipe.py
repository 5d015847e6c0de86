"""A file of settings for a verb: YAML (with the `recipes` extra) or JSON, one setting a line.

    model: SmolLM2.gguf
    data: data.jsonl
    out: runs/tone
    lr: 1e-3

A setting is called as its option, with - or _, by any of the names that the option has. Reading
gives each value with its line, so that what is wrong is found: an unknown name, a value of another
kind, the same setting twice. A plain YAML scalar means what it looks like: 1e-3 is a number, which
YAML 1.1 would call a text. What a value must be beyond its kind is checked where it is used.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pylora.commands import layout
from pylora.commands.foreign import HINTS
from pylora.errors import ConfigError
from pylora.extras import need
from pylora.files.bounded import read_text

_LIMIT = 1 << 20  # bytes
# The command line's own matters.
NOT_HERE = {"config", "print_config", "resume", "help"}
_ELSEWHERE = {
    "model-name-or-path": "model", "model-id": "model", "base-model": "model",
    "model-path": "model", "dataset": "data", "dataset-name": "data", "train-file": "data",
    "train": "data",
    "output-dir": "out", "output": "out", "save-path": "out",
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One value of the file: None, a bool, a number, a text, or a list or dict of these."""

    value: Any
    line: int


@dataclass(frozen=True)
class Recipe:
    """The settings of a file by the names of the verb's parameters, as the command line would hold
    them; and the place of each, for errors: "run.yaml, line 3"."""

    values: dict[str, Any]
    places: dict[str, str]


def read(path: Path, command: Any) -> Recipe:
    """The settings of a file. ConfigError names the file and the line of what is wrong."""
    names = _names(command)
    values: dict[str, Any] = {}
    places: dict[str, str] = {}
    for key, entry in _entries(path):
        place = f"{path}, line {entry.line}"
        param = names.get(_plain(key))
        if param is None or param.name in NOT_HERE:
            raise ConfigError(f"{place}: {_unknown(key, param, names)}")
        if param.name in places:
            raise ConfigError(f"{place}: {key} was set already ({places[param.name]})")
        places[param.name] = place
        if entry.value is not None:
            values[param.name] = _value(param, key, entry.value, place)
    return Recipe(values, places)


def is_recipe(path: Path, command: Any) -> bool:
    """Whether a --config holds settings of the verb, and not those of an adapter as PEFT writes
    them: YAML, or a JSON object with the name of a setting that no adapter_config.json has."""
    if not path.is_file():
        return path.suffix.lower() in (".yaml", ".yml")
    text = read_text(path, limit=1 << 24)
    if path.suffix.lower() != ".json" and not text.lstrip("\ufeff \t\r\n").startswith("{"):
        return True
    from dataclasses import fields

    from pylora.adapters.loraconfig import LoraConfig

    peft = {_plain(f.name) for f in fields(LoraConfig)} | {"peft-type"}
    try:
        keys = {_plain(key) for key in json.loads(text)}
    except (ValueError, RecursionError, TypeError, AttributeError):  # no JSON, or no object
        return not any(f'"{name}"' in text for name in ("peft_type", "target_modules"))
    return "peft-type" not in keys and bool(keys & (_names(command).keys() - peft))


def name_of(param: Any) -> str:
    """What a parameter is called in a file: its option's first long name, without the dashes."""
    if param.param_type_name == "argument":
        return str(param.name)
    return str(next((o for o in param.opts if o.startswith("--")), param.opts[0])).lstrip("-")


def settings(command: Any) -> list[Any]:
    """The parameters of a verb that a file may set, in the order of its help."""
    return [p for p in command.params if p.name not in NOT_HERE]


# ---- reading, with lines ------------------------------------------------------------------------


def _entries(path: Path) -> Iterator[tuple[str, Entry]]:
    text = read_text(path, limit=_LIMIT)
    if path.suffix.lower() == ".json" or text.lstrip("\ufeff \t\r\n").startswith("{"):
        return iter(_json_entries(text.lstrip("\ufeff"), path))
    return iter(_yaml_entries(text, path))


def _json_entries(text: str, path: Path) -> list[tuple[str, Entry]]:
    """The fields of one JSON object, in order, repeated ones included."""
    found: list[tuple[str, Entry]] = []
    decoder, space = json.JSONDecoder(), re.compile(r"\s*")

    def after(position: int) -> int:
        match = space.match(text, position)
        return match.end() if match else position

    def wrong(position: int, wanted: str) -> ConfigError:
        line = text.count("\n", 0, position) + 1
        seen = repr(text[position : position + 20]) if position < len(text) else "the file's end"
        return ConfigError(f"{path}, line {line}: {wanted} is expected, not {seen}")

    at = after(0)
    if text[at : at + 1] != "{":
        raise wrong(at, "a JSON object { … } of settings")
    at = after(at + 1)
    while text[at : at + 1] != "}":
        try:
            begin = at
            key, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            raise wrong(begin, "the name of a setting, in double quotes,") from None
        if not isinstance(key, str):
            raise wrong(begin, "the name of a setting, in double quotes,")
        if text[(at := after(at)) : at + 1] != ":":
            raise wrong(at, f"a colon after {key!r}")
        begin = at = after(at + 1)
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            raise wrong(begin, f"a value of {key}, in JSON,") from None
        found.append((key, Entry(value, text.count("\n", 0, begin) + 1)))
        at = after(at)
        if text[at : at + 1] == ",":
            at = after(at + 1)
        elif text[at : at + 1] != "}":
            raise wrong(at, f"a comma after the value of {key}")
    if after(at + 1) < len(text):
        raise wrong(after(at + 1), "the end of the file")
    return found


def _yaml_entries(text: str, path: Path) -> list[tuple[str, Entry]]:
    """The entries of one YAML mapping, in order, repeated ones included."""
    yaml = need("yaml")
    try:
        top = yaml.compose(text, Loader=yaml.SafeLoader)
        found = [] if top is None else _yaml_pairs(top, path)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}, line {mark.line + 1}" if mark is not None else f"{path}"
        said = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
        raise ConfigError(f"{place}: this is not YAML: {said}") from None
    except RecursionError:
        raise ConfigError(f"{path}: lists in lists, too deep for a file of settings") from None
    return found


def _yaml_pairs(top: Any, path: Path) -> list[tuple[str, Entry]]:
    if top.id != "mapping":
        line = top.start_mark.line + 1
        raise ConfigError(f"{path}, line {line}: settings are expected, such as `rank: 16`")
    found = []
    for key, node in top.value:
        line = key.start_mark.line + 1
        if key.id != "scalar":
            raise ConfigError(f"{path}, line {line}: the name of a setting is a word")
        found.append((str(key.value), Entry(_yaml_value(node, f"{path}, line {line}"), line)))
    return found


def _yaml_value(node: Any, place: str, depth: int = 0) -> Any:
    if depth > 1:
        raise ConfigError(f"{place}: a value is a word, a number, or a list of these")
    if node.id == "sequence":
        return [_yaml_value(one, place, depth + 1) for one in node.value]
    if node.id == "mapping":
        pairs = ((_yaml_scalar(k), v) for k, v in node.value if k.id == "scalar")
        return {str(k): _yaml_value(v, place, depth + 1) for k, v in pairs}
    return _yaml_scalar(node)


def _yaml_scalar(node: Any) -> Any:
    text = str(node.value)
    if node.style is not None:  # in quotes
        return text
    if node.tag.endswith(":null"):
        return None
    if node.tag.endswith(":bool"):
        return text.lower() in ("true", "yes", "on")
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


# ---- names and kinds ----------------------------------------------------------------------------


def _plain(name: str) -> str:
    return name.strip().lower().replace("_", "-").lstrip("-")


def _names(command: Any) -> dict[str, Any]:
    """Every name of every parameter. What switches an option off (--no-packing) is none."""
    found = {}
    for param in command.params:
        for name in (*param.opts, name_of(param), param.name):
            found[_plain(name)] = param
    return found


def _unknown(key: str, param: Any, names: Mapping[str, Any]) -> str:
    if param is not None:
        return f"{key} is for the command line, not for a file of settings"
    plain = _plain(key)
    if plain == "backend":
        return f"{key} is for the command line: pylora --backend NAME train …"
    meant = _ELSEWHERE.get(plain)
    if meant is None and f"--{plain}" in HINTS:
        return f"there is no setting {key}; {HINTS[f'--{plain}'].format(verb='train')}"
    off = plain.removeprefix("no-")
    if meant is None and off != plain and off in names:
        return f"there is no setting {key}; write {off}: false"
    known = [n for n, p in names.items() if p.name not in NOT_HERE]
    near = [meant] if meant else difflib.get_close_matches(plain, known, n=1, cutoff=0.5)
    shown = [n.replace("-", "_") if "_" in key else n for n in near]
    hint = f"did you mean {shown[0]}?" if shown else f"there are {', '.join(sorted(known))}"
    return f"there is no setting {key}; {hint}"


def _value(param: Any, key: str, value: Any, place: str) -> Any:
    """The value as the command line would hold it. ConfigError for one of another kind."""
    kind = layout.kind(param)
    if getattr(param, "multiple", False):
        if isinstance(value, dict):
            return [f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in value.items()]
        return [str(one) for one in (value if isinstance(value, list) else [value])]
    if kind == "flag" and isinstance(value, bool):
        return value
    whole = isinstance(value, int) and not isinstance(value, bool)
    if kind == "whole number" and whole or kind == "number" and (whole or type(value) is float):
        return repr(value)
    if kind == "text" and isinstance(value, str):
        return value
    if _takes_words(param) and isinstance(value, list):
        if value and all(isinstance(one, str) for one in value):
            return ",".join(value)
    if param.name == "trainable_token_indices" and isinstance(value, (list, dict)):
        return json.dumps(value)
    if param.name == "fields" and isinstance(value, dict):
        return ",".join(f"{k}={v}" for k, v in value.items())
    raise ConfigError(f"{place}: {key} is {_shown(value)}; {_wanted(param, kind, value)}")


def _takes_words(param: Any) -> bool:
    """Whether a list of words is one value of this option, which separates them by commas."""
    return param.name in ("targets", "fields", "modules_to_save")


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return f"the text {value!r}"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value!r}" if isinstance(value, (int, float)) else f"a {type(value).__name__}"


def _wanted(param: Any, kind: str, value: Any) -> str:
    if kind == "text":
        if isinstance(value, (bool, int, float)):
            return f'it must be a text; put it in quotes if it is one: "{_shown(value)}"'
        return "it must be a text"
    if kind == "flag":
        near = difflib.get_close_matches(str(value).lower(), ("true", "false"), 1, 0.5)
        return f"it must be {near[0] if near else 'true or false'}"
    if isinstance(value, str):
        try:
            number = int(value) if kind == "whole number" else float(value)
            return f"it must be a {kind}, without quotes: {number:g}"
        except ValueError:
            pass
    if kind == "whole number" and isinstance(value, float) and abs(value) < 1e18:
        return f"it must be a whole number, such as {round(value)}"
    default = param.default if isinstance(param.default, (int, float)) else None
    return f"it must be a {kind}" + ("" if default is None else f", such as {default:g}")
