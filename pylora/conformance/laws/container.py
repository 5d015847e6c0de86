"""Laws of the safetensors container: what is well-formed is read, and nothing else.

A file is written here byte by byte (`Made`), so that each fault is one change to a file that is
read without it.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from pylora.conformance.laws.files import CONFIG, WEIGHTS, adapters, compare, fitting, tensors_of
from pylora.conformance.laws.law import Law
from pylora.conformance.problems.layers import plans
from pylora.conformance.testcase import Problem, Trial
from pylora.types import Array

Item = TypeVar("Item")
REFUSED = "load(damaged) must raise, where load(whole) does not"
PEFT = ("load", "peft_files")


@dataclass
class Made:
    """A safetensors file before it is written. `entries`: name -> header entry, in the order of the
    file; `data`: the bytes behind the header."""

    entries: dict[str, Any] = field(default_factory=dict)
    data: bytes = b""
    metadata: Any = None

    @classmethod
    def of(cls, tensors: list[tuple[str, Array, str]]) -> Made:
        """Of (name, array, dtype); bfloat16 as uint16 bits."""
        made = cls()
        for name, a, dtype in tensors:
            end = len(made.data) + a.nbytes
            offsets = [len(made.data), end]
            made.entries[name] = {"dtype": dtype, "shape": list(a.shape), "data_offsets": offsets}
            made.data += np.ascontiguousarray(a).tobytes()
        return made

    def header(self) -> dict[str, Any]:
        meta = {} if self.metadata is None else {"__metadata__": self.metadata}
        return {**meta, **self.entries}

    def bytes(self, text: bytes | None = None, length: int | None = None) -> bytes:
        """The file; `text` in place of the header, `length` in place of its length."""
        if text is None:
            text = json.dumps(self.header()).encode()
            text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text) if length is None else length) + text + self.data


def made_of(p: Problem) -> Made:
    return Made.of([(name, a, "F32") for name, a in tensors_of(p)])


def put(t: Trial, p: Problem, weights: bytes, config: bytes | None = None) -> str:
    directory = t.directory() + "/adapter"
    text = json.dumps({"peft_type": "LORA", **p.config}).encode()
    t.write(f"{directory}/{CONFIG}", text if config is None else config)
    t.write(f"{directory}/{WEIGHTS}", weights)
    return directory


def _moved(made: Made, i: int, start: Any, end: Any) -> bytes:
    """With other offsets of one tensor."""
    name = list(made.entries)[i]
    entry = {**made.entries[name], "data_offsets": [start, end]}
    return Made({**made.entries, name: entry}, made.data).bytes()


def _with(made: Made, i: int, **change: Any) -> bytes:
    """With other fields of one tensor's entry; None takes the field out."""
    name = list(made.entries)[i]
    entry = {k: v for k, v in {**made.entries[name], **change}.items() if v is not None}
    return Made({**made.entries, name: entry}, made.data).bytes()


def turned(items: Sequence[Item], seed: int) -> list[Item]:
    """All of them, beginning with one that the seed chooses."""
    at = seed % max(len(items), 1)
    return [*items[at:], *items[:at]]


def law(
    id: str, sentence: str, maths: str, violation: str, spec: tuple[str, ...],
    check: Callable[[Trial, Problem], None], cost: int,
    covering: Callable[[str, int], list[Problem]] | None = None,
) -> Law:  # fmt: skip
    return Law(
        id, sentence, maths, violation, spec, PEFT, plans, check, (), cost=cost, covering=covering
    )


def malformed(made: Made, i: int) -> dict[str, bytes]:
    """What is wrong -> the file. `i` is the tensor that it happens to."""
    whole, text = made.bytes(), json.dumps(made.header()).encode()
    names = list(made.entries)
    last, first = len(names) - 1, made.entries[names[0]]["data_offsets"]
    start, end = made.entries[names[i]]["data_offsets"]
    n, shape = len(made.data), made.entries[names[i]]["shape"]
    hole = Made({k: dict(v) for k, v in made.entries.items()}, made.data + bytes(4))
    a, b = hole.entries[names[last]]["data_offsets"]
    hole.entries[names[last]]["data_offsets"] = [a + 4, b + 4]
    out = {
        "a byte behind the data": whole + b"\0",
        "eight bytes behind the data": whole + bytes(8),
        "a second file behind the first": whole + whole,
        "a hole of four bytes between two tensors": hole.bytes(),
        "a tensor that lies on the first one": _moved(made, last, *first) if last else whole[:-1],
        "a tensor that ends beyond the file": _moved(made, last, n - (b - a) + 4, n + 4),
        "a tensor far beyond the file": _moved(made, i, 2**60, 2**60 + end - start),
        "offsets that end before they begin": _moved(made, i, end, start),
        "negative offsets": _moved(made, i, start - end, 0),
        "offsets that are texts": _moved(made, i, str(start), str(end)),
        "offsets that are fractions": _moved(made, i, start + 0.5, end + 0.5),
        "one offset": _with(made, i, data_offsets=[start]),
        "three offsets": _with(made, i, data_offsets=[start, end, end]),
        "no offsets": _with(made, i, data_offsets=None),
        "no dtype": _with(made, i, dtype=None),
        "no shape": _with(made, i, shape=None),
        "a dtype that does not exist": _with(made, i, dtype="F31"),
        "a dtype in small letters": _with(made, i, dtype="f32"),
        "a dtype that is a number": _with(made, i, dtype=32),
        "integers for an adapter": _with(made, i, dtype="I32"),
        "bytes for an adapter": _with(made, i, dtype="U8", shape=[shape[0], shape[1] * 4]),
        "half the bytes that the shape needs": _with(made, i, dtype="F64"),
        "a shape whose size overflows": _with(made, i, shape=[2**32, 2**32]),
        "a shape whose size overflows to the right one": _with(made, i, shape=[2**62, 4, *shape]),
        "a negative dimension": _with(made, i, shape=[-shape[0], -shape[1]]),
        "a dimension that is a fraction": _with(made, i, shape=[shape[0] + 0.5, shape[1]]),
        "a shape that is a text": _with(made, i, shape=str(shape)),
        "an entry that is a list": Made({**made.entries, names[i]: [1]}, made.data).bytes(),
        "an entry that is null": Made({**made.entries, names[i]: None}, made.data).bytes(),
        "metadata that are no texts": Made(made.entries, made.data, {"a": 1}).bytes(),
        "metadata that are a list": Made(made.entries, made.data, ["a"]).bytes(),
        "a header that is longer than the file": made.bytes(text, 2**40),
        "a header of 2**63 bytes": made.bytes(text, 2**63),
        "a header of 2**64 - 1 bytes": made.bytes(text, 2**64 - 1),
        "a header of no bytes": made.bytes(b""),
        "a header that is cut off": made.bytes(text[: len(text) // 2]),
        "a length of the header that is one too small": made.bytes(text, len(text) - 1),
        "something behind the header's object": made.bytes(text + b" {}"),
        "a header that is a list": made.bytes(b"[" + text + b"]"),
        "a header that is not UTF-8": made.bytes(text[:-1] + b', "\xff": 1}'),
        "a header in UTF-16": made.bytes(text.decode().encode("utf-16")),
        "a header that is nested too deep": made.bytes(b'{"a":' * 20000 + b"1" + b"}" * 20000),
        "a header in Python's syntax": made.bytes(text.replace(b'"', b"'")),
        "nothing": b"",
        "seven bytes": whole[:7],
        "a header and no data": whole[: len(whole) - n],
        "zeros": bytes(len(whole)),
    }  # fmt: skip
    return out


def _refuses_malformed(t: Trial, p: Problem) -> None:
    p = fitting(p)
    made = made_of(p)
    t.load(put(t, p, made.bytes()), p.modules)  # as it is, it must be read
    bad = malformed(made, p.seed % len(made.entries))
    for why in turned(list(bad), p.seed):
        t.must_raise(f"a file with {why}", "load", put(t, p, bad[why]), p.modules)


def _harmless(t: Trial, p: Problem) -> None:
    """Other forms of the same file."""
    p = fitting(p)
    made, want = made_of(p), adapters(p)
    text = json.dumps(made.header()).encode()
    backwards = Made(dict(reversed(made.entries.items())), made.data)
    forms = {
        "a header that is not padded": made.bytes(text),
        "a header with a hundred spaces behind it": made.bytes(text + b" " * 100),
        "a header with line ends": made.bytes(json.dumps(made.header(), indent=2).encode()),
        "entries in another order than the data": backwards.bytes(),
        "fields of an entry in another order": Made(
            {n: dict(reversed(e.items())) for n, e in made.entries.items()}, made.data
        ).bytes(),
        "metadata": Made(made.entries, made.data, {"format": "pt", "ü": "\n"}).bytes(),
        "escapes in names": made.bytes(text.replace(b"base_model", b"b\\u0061se_model")),
    }
    for why in turned(list(forms), p.seed):
        got = t.load(put(t, p, forms[why]), p.modules)
        compare(t, got, want, p)


LAWS = (
    law(
        "K20",
        "A file that is not well-formed is an error.",
        f"trailing bytes, holes, overlaps, offsets, dtypes, shapes, headers, 40 kinds: {REFUSED}",
        "two readers see two adapters in one file, or memory is read that is not the file's",
        ("K-7", "K-9"),
        _refuses_malformed,
        50,
    ),
    law(
        "K22",
        "Harmless forms of a file are read.",
        "padding, order of entries and fields, metadata, escapes: load = what was written",
        "files of other writers cannot be read, or are read by order in place of offsets",
        ("K-9",),
        _harmless,
        10,
    ),
)
