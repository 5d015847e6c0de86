"""The fields of a JSON body: each is checked, and described for /openapi.json, by the same object.

A field reads a value that `json` made, or raises the Problem that names it. What is not a field is
refused, with the name that may be meant: nothing that a client sends is ignored in silence. null
means that the field is not given, as in OpenAI's interface.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pylora.errors import describe
from pylora.web.problem import malformed

Json = Any
Schema = dict[str, Any]


@dataclass(frozen=True)
class Field:
    """`takes` says in a sentence what it reads; `fits` whether a value is of that kind at all."""

    takes: str
    fits: Callable[[Json], bool]
    schema: Schema
    read: Callable[[Json, str], Json] = lambda value, where: value

    def __call__(self, value: Json, where: str) -> Json:
        """The value as the program uses it."""
        if not self.fits(value):
            raise malformed(f"{where} must be {self.takes}, got {shown(value)}", where)
        return self.read(value, where)


def shown(value: Json) -> str:
    """A value of a body in a few words of a sentence, in JSON's terms."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return f"an object with {len(value)} field{'s' * (len(value) != 1)}"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return describe(value)


def is_number(value: Json) -> bool:
    """Whether it is a finite number, and no truth value. json reads 1e999 as infinity."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond every float
        return False


def text(*, least: int = 0, most: int | None = None, choices: tuple[str, ...] = ()) -> Field:
    """A text of so many characters, or one of some."""
    schema: Schema = {"type": "string"}
    if choices:
        takes = "one of " + ", ".join(map(repr, choices))
        return Field(takes, lambda v: v in choices, {**schema, "enum": list(choices)})
    long = f" of at most {most} characters" if most is not None else ""
    schema |= {"minLength": least} if least else {}
    schema |= {"maxLength": most} if most is not None else {}

    def fits(value: Json) -> bool:
        return (
            isinstance(value, str) and least <= len(value) and (most is None or len(value) <= most)
        )

    return Field(f"a text{long}{' that is not empty' if least else ''}", fits, schema)


def whole(low: int, high: int, *, takes: str | None = None) -> Field:
    """A whole number in a range; 5.0 is one, as in JSON Schema."""

    def fits(value: Json) -> bool:
        if isinstance(value, float):
            return math.isfinite(value) and value == int(value) and low <= value <= high
        return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high

    schema = {"type": "integer", "minimum": low, "maximum": high}
    said = takes or f"a whole number from {low} to {high}"
    return Field(said, fits, schema, lambda v, _: int(v))


def number(low: float, high: float, *, above: bool = False, takes: str | None = None) -> Field:
    """A number in a range; `above`: its lower end is not allowed. An end may be infinite."""

    def fits(value: Json) -> bool:
        return is_number(value) and (low < value if above else low <= value) and value <= high

    schema: Schema = {"type": "number"}
    if math.isfinite(low):
        schema["exclusiveMinimum" if above else "minimum"] = low
    if math.isfinite(high):
        schema["maximum"] = high
    said = takes or f"a number {'above' if above else 'from'} {low:g} to {high:g}"
    return Field(said, fits, schema, lambda v, _: float(v))


def flag() -> Field:
    """true or false."""
    return Field("true or false", lambda v: isinstance(v, bool), {"type": "boolean"})


def list_of(item: Field, *, least: int = 0, most: int | None = None, takes: str = "") -> Field:
    """A list whose items are read one by one."""
    schema: Schema = {"type": "array", "items": item.schema}
    schema |= {"minItems": least} if least else {}
    schema |= {"maxItems": most} if most is not None else {}
    count = f" of at most {most}" if most is not None else ""
    said = takes or f"a list{count}, each {item.takes}"

    def fits(value: Json) -> bool:
        return (
            isinstance(value, list) and least <= len(value) and (most is None or len(value) <= most)
        )

    def read(value: Json, where: str) -> Json:
        return [item(v, f"{where}[{i}]") for i, v in enumerate(value)]

    return Field(said, fits, schema, read)


def either(*some: Field, takes: str | None = None) -> Field:
    """The first of these whose kind a value is."""

    def read(value: Json, where: str) -> Json:
        return next(f for f in some if f.fits(value))(value, where)

    schema = {"anyOf": [f.schema for f in some]}
    said = takes or ", or ".join(f.takes for f in some)
    return Field(said, lambda v: any(f.fits(v) for f in some), schema, read)


def mapping(key: Callable[[str, str], Any], value: Field, *, most: int, takes: str) -> Field:
    """An object with any names: `key(name, where)` reads each name."""

    def read(found: Json, where: str) -> Json:
        return {key(k, where): value(v, f"{where}.{k[:60]}") for k, v in found.items()}

    schema = {"type": "object", "additionalProperties": value.schema, "maxProperties": most}
    return Field(takes, lambda v: isinstance(v, dict) and len(v) <= most, schema, read)


def anything(takes: str = "an object", schema: Schema | None = None) -> Field:
    """An object that is read elsewhere."""
    return Field(takes, lambda v: isinstance(v, dict), schema or {"type": "object"})


@dataclass(frozen=True)
class Record:
    """An object with named fields. `needs`: those that must be there. `idle`: fields of OpenAI's
    that change no answer, which are taken and not used. `without`: fields that would change the
    answer and that cannot be carried out, with the reason."""

    name: str
    fields: Mapping[str, Field]
    needs: tuple[str, ...] = ()
    idle: frozenset[str] = frozenset()
    without: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, value: Json, where: str = "") -> dict[str, Any]:
        """{name: value} of the fields that are given. Problem for anything else."""
        if not isinstance(value, dict):
            raise malformed(
                f"{where or 'the body'} must be {self.takes}, got {shown(value)}", where or None
            )
        within = f"{where}." if where else ""
        found: dict[str, Any] = {}
        for name, given in value.items():
            if name in self.idle or given is None and (name in self.fields or name in self.without):
                continue
            if name in self.without:
                if given in (False, [], {}):
                    continue
                raise malformed(f"{within}{name}: {self.without[name]}", within + name)
            if name not in self.fields:
                raise malformed(self._stranger(within, name), (within + name)[:200])
            found[name] = self.fields[name](given, within + name)
        for name in self.needs:
            if name not in found:
                raise malformed(f"the field {within}{name} is missing", within + name)
        return found

    def _stranger(self, within: str, name: str) -> str:
        near = difflib.get_close_matches(name, self.fields, 1)
        hint = f"; did you mean {near[0]!r}?" if near else "; take it out"
        return f"there is no field {within + name[:80]!r} in {self.name}{hint}"

    @property
    def takes(self) -> str:
        """For a sentence."""
        needed = ", ".join(map(repr, self.needs))
        return f"an object{f' with {needed}' if needed else ''}"

    @property
    def schema(self) -> Schema:
        """As JSON Schema."""
        return {
            "type": "object",
            "properties": {n: nullable(f.schema) for n, f in self.fields.items()}
            | {n: {} for n in sorted(self.idle)},
            "additionalProperties": False,
            **({"required": list(self.needs)} if self.needs else {}),
        }

    def as_field(self) -> Field:
        """This object as a field of another."""
        return Field(self.takes, lambda v: isinstance(v, dict), self.schema, self)


def nullable(schema: Schema) -> Schema:
    """The schema, or null."""
    return {"anyOf": [schema, {"type": "null"}]}
