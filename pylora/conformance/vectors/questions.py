"""Vectors that are not arrays: a question in JSON, and the answer that is expected.

    plans.json        settings and a list of modules -> the modules that are adapted, or a refusal
    files.json        a folder with an adapter -> its arrays and scales, or a refusal
    converters.json   an adapter in one form -> the same in another

A file is {"format", "version", "kind", "models" (lists of modules by name), "cases": [{"name",
"spec", what is given, "expect"}]}. What is expected is an object; {"refused": why} means that an
error is, whatever its words. `differences` says how an answer may differ: not at all, but for
numbers by the rounding that a kind states, and for further keys in settings.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FORMAT = "pylora-questions"
VERSION = 1
# How far a number may be from the expected one, relative to it: a scale is computed in float64, an
# array of a file must be the file's, a converted one is rounded to float32 once.
ROUNDING = {"plans": 1e-12, "files": 1e-12, "converters": 2.0**-23}
_OPEN = ("config", "metadata")  # objects in which further keys do no harm
_EXACT = ("A", "B", "bias_B")  # arrays that are read, not computed


@dataclass(frozen=True, eq=False)
class Question:
    """One case of a kind: what is given, and what is expected."""

    name: str
    spec: tuple[str, ...]
    given: Mapping[str, Any]
    expect: Mapping[str, Any]
    files: Mapping[str, bytes] = field(default_factory=dict)  # of the folder that `given` names


def write(root: Path, kind: str, models: Mapping[str, Any], questions: Sequence[Question]) -> None:
    """<root>/<kind>.json, and the folders <root>/<kind>/<case> of the cases that have files."""
    listed = []
    for q in questions:
        entry = {"name": q.name, "spec": list(q.spec), **q.given}
        if q.files:
            folder = root / kind / q.name
            folder.mkdir(parents=True)
            for name, data in q.files.items():
                (folder / name).write_bytes(data)
        listed.append(entry | {"expect": q.expect})
    text = {"format": FORMAT, "version": VERSION, "kind": kind, "models": models, "cases": listed}
    body = json.dumps(text, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    (root / f"{kind}.json").write_text(body, encoding="utf-8")


def differences(kind: str, expect: Mapping[str, Any], answer: Any) -> list[str]:
    """What is wrong with an answer, in words; empty if nothing is."""
    if not isinstance(answer, Mapping):
        return [f"the answer is {_short(answer)}, not an object"]
    if "refused" in expect:
        if answer.get("refused"):
            return []
        return [f"was accepted, but must be refused: {expect['refused']}"]
    if answer.get("refused"):
        return [f"was refused ({_short(answer['refused'])}), but must be accepted"]
    if kind == "converters":
        expect, answer = _effect(expect), _effect(answer)
    return list(_compare(expect, answer, "", ROUNDING[kind]))


def _effect(adapter: Mapping[str, Any]) -> dict[str, Any]:
    """An adapter with what its alpha (GGUF) or scale (MLX) does in its B, and 1 in its place: which
    alpha a converter chooses is its own affair. What is malformed is left as it is."""
    try:
        out = json.loads(json.dumps(adapter))
        settings = out.get("config", {}).get("lora_parameters", {})
        alpha, scale = out.get("metadata", {}).get("adapter.lora.alpha"), settings.get("scale")
        for name, rows in out.get("tensors", {}).items():
            if not name.endswith("lora_b"):
                continue
            if alpha is not None:
                factor = alpha / len(rows[0]) if alpha else 1.0
                out["tensors"][name] = [[x * factor for x in row] for row in rows]
            elif scale is not None:
                out["tensors"][name] = [[x * scale for x in row] for row in rows]
        for where, key in ((out.get("metadata"), "adapter.lora.alpha"), (settings, "scale")):
            if where and isinstance(where.get(key), (int, float)):
                where[key] = 1.0
    except (TypeError, ValueError, AttributeError, IndexError, KeyError, ZeroDivisionError):
        return dict(adapter)
    return out  # type: ignore[no-any-return]


def _compare(want: Any, got: Any, where: str, rounding: float) -> list[str]:
    if isinstance(want, Mapping):
        if not isinstance(got, Mapping):
            return [f"{where or 'the answer'}: {_short(got)} in place of an object"]
        key = where.rsplit("/", 1)[-1]
        missing = [k for k in want if k not in got]
        extra = [k for k in got if k not in want] if key not in _OPEN else []
        said = [f"{where}: {what} {', '.join(map(str, names[:5]))}".lstrip(": ")
                for what, names in (("lacks", missing), ("has also", extra)) if names]  # fmt: skip
        for k in want:
            if k in got:
                exact = 0.0 if k in _EXACT else rounding
                said += _compare(want[k], got[k], f"{where}/{k}".lstrip("/"), exact)
        return said
    if isinstance(want, (list, tuple)):
        if not isinstance(got, (list, tuple)) or len(got) != len(want):
            return [f"{where}: {_short(got)} in place of a list of {len(want)}"]
        said = []
        for i, (a, b) in enumerate(zip(want, got)):
            said += _compare(a, b, f"{where}[{i}]", rounding)
        return said[:3]
    if isinstance(want, bool) or not isinstance(want, (int, float)):
        same = type(want) is type(got) and want == got
    else:
        same = _same_number(want, got, rounding)
    return [] if same else [f"{where}: {_short(got)}, expected {_short(want)}"]


def _same_number(want: float, got: Any, rounding: float) -> bool:
    if isinstance(got, bool) or not isinstance(got, (int, float)):
        return False
    try:
        if want == 0:
            return got == 0 and (rounding > 0 or math.copysign(1, got) == math.copysign(1, want))
        return abs(got - want) <= rounding * abs(want)
    except OverflowError:  # an integer beyond float64
        return False


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
