"""Golden vectors: inputs, expected outputs and error bounds that a port in any language reads.

    write(directory, cases)  manifest.json, and <case>/<array>.bin: raw little-endian, row-major
    load(directory)          the same cases again, with sizes and digests checked

Expected values are computed in float64 by `pylora.reference` from the float32 inputs, and each
comes with the bound that a float32 implementation must keep, as an array of the same shape (see
`pylora.conformance.bounds.ops`). Bits that every machine must give (random words, masks, initial
values, merged weights) are marked exact. What a case means is in docs/porting.md.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pylora.conformance.vectors.questions import Question
from pylora.conformance.vectors.questions import write as write_questions
from pylora.errors import ConfigError, FileFormatError, UnsupportedError
from pylora.files.bounded import read_json
from pylora.files.whole import atomic_dir
from pylora.types import Array

FORMAT = "pylora-vectors"
VERSION = 1  # of names, files and meanings: changes when a reader of the old ones would fail
MANIFEST = "manifest.json"
_LIMIT = 1 << 30  # bytes of one array that `load` accepts

DTYPES = {"f32": "<f4", "f64": "<f8", "u8": "|u1", "u16": "<u2", "u32": "<u4", "i64": "<i8"}
_NAMES = {np.dtype(code).newbyteorder("="): name for name, code in DTYPES.items()}


@dataclass(frozen=True, eq=False)
class Expected:
    """An output: |got - value| <= bound in each element, or the same bits where bound is None."""

    value: Array
    bound: Array | None = None
    rule: str = "exact"  # where the bound comes from
    spec: tuple[str, ...] = ()  # the statements that it shows, where not all of the case's


@dataclass(eq=False)
class Case:
    """One thing to compute: `op` says what, `spec` which statements of docs/spec.md it shows."""

    name: str
    op: str
    spec: tuple[str, ...]
    params: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, Array] = field(default_factory=dict)
    outputs: dict[str, Expected] = field(default_factory=dict)
    files: dict[str, Mapping[str, bytes]] = field(default_factory=dict)  # folder -> its files

    def expect(
        self, name: str, value: Array, bound: Any, rule: str, spec: tuple[str, ...] = ()
    ) -> None:
        """An output in float64 with the bound of a float32 computation."""
        value = np.asarray(value, np.float64)
        limit = np.broadcast_to(np.asarray(bound, np.float64), value.shape).copy()
        self.outputs[name] = Expected(value, limit, rule, spec)

    def exact(self, name: str, value: Array, spec: tuple[str, ...] = ()) -> None:
        """An output whose bits are the same on every machine."""
        self.outputs[name] = Expected(np.asarray(value), spec=spec)

    def shown_by(self, name: str) -> tuple[str, ...]:
        """The statements that an output shows."""
        return self.outputs[name].spec or self.spec


def check_output(directory: str | os.PathLike[str]) -> None:
    """ConfigError for a directory that `write` would refuse; to be asked before cases are made."""
    target = Path(directory)
    if target.is_dir() and any(target.iterdir()) and not (target / MANIFEST).is_file():
        raise ConfigError(
            f"{target} holds files that are no vectors; name a new directory or empty this one"
        )


def write(
    directory: str | os.PathLike[str],
    cases: list[Case],
    questions: Mapping[str, tuple[Mapping[str, Any], list[Question]]] | None = None,
) -> Path:
    """Writes cases, and questions by kind with their models, to a new directory, whole or not at
    all; returns it.

    Raises ConfigError where the directory exists and holds files that are not vectors.
    """
    target = Path(directory)
    listed = []
    with atomic_dir(target) as beside:
        for case in cases:
            listed.append(_write_case(beside, case))
        for kind, (models, some) in (questions or {}).items():
            write_questions(beside, kind, models, some)
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "byte_order": "little",
            "order": "row-major",
            "spec": "docs/spec.md",
            "cases": listed,
        }
        text = json.dumps(manifest, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
        assert "\\" not in text  # a reader needs no escapes
        (beside / MANIFEST).write_text(text, encoding="utf-8")
    return target


def _write_case(root: Path, case: Case) -> dict[str, Any]:
    def put(name: str, array: Array) -> dict[str, Any]:
        dtype = _NAMES[array.dtype]
        data = np.ascontiguousarray(array, DTYPES[dtype]).tobytes()
        file = f"{case.name}/{name}.bin"
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        return {"dtype": dtype, "shape": list(array.shape), "file": file, "sha256": digest}

    entry: dict[str, Any] = {"name": case.name, "op": case.op, "spec": list(case.spec)}
    entry["params"] = case.params
    entry["inputs"] = {name: put(name, array) for name, array in case.inputs.items()}
    entry["outputs"] = outputs = {}
    for name, out in case.outputs.items():
        outputs[name] = put(name, out.value) | {"rule": out.rule}
        if out.spec:
            outputs[name]["spec"] = list(out.spec)
        if out.bound is not None:
            outputs[name]["bound"] = put(f"{name}.bound", out.bound)
    for folder, files in case.files.items():
        (root / case.name / folder).mkdir(parents=True)
        for file, data in files.items():
            (root / case.name / folder / file).write_bytes(data)
        entry[folder] = f"{case.name}/{folder}"
    return entry


def load(directory: str | os.PathLike[str]) -> list[Case]:
    """The cases in a directory that `write` made.

    Raises FileFormatError for a missing, resized or altered file, UnsupportedError for another
    version. Folders of further files (an adapter) are left where they are.
    """
    root = Path(directory)
    manifest = read_json(root / MANIFEST, limit=16 << 20)
    if manifest.get("format") != FORMAT:
        raise FileFormatError(f"{root / MANIFEST}: format is not {FORMAT!r}")
    if manifest.get("version") != VERSION:
        raise UnsupportedError(
            f"{root / MANIFEST}: version {manifest.get('version')!r} of the vectors, this program "
            f"reads version {VERSION}; write them again with `pylora vectors --out DIR`"
        )
    try:
        return [_load_case(root, entry) for entry in manifest["cases"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise FileFormatError(f"{root / MANIFEST}: a case is malformed ({error!r})") from None


def _load_case(root: Path, entry: Mapping[str, Any]) -> Case:
    inputs = {name: _get(root, at) for name, at in entry["inputs"].items()}
    outputs = {
        name: Expected(
            _get(root, at),
            _get(root, at["bound"]) if "bound" in at else None,
            at["rule"],
            tuple(at.get("spec", ())),
        )
        for name, at in entry["outputs"].items()
    }
    spec = tuple(entry["spec"])
    return Case(entry["name"], entry["op"], spec, dict(entry["params"]), inputs, outputs)


def _get(root: Path, at: Mapping[str, Any]) -> Array:
    file = (root / at["file"]).resolve()
    if not file.is_relative_to(root.resolve()) or not file.is_file():
        raise FileFormatError(f"{root / MANIFEST}: there is no file {at['file']!r} in {root}")
    dtype = np.dtype(DTYPES[at["dtype"]])
    size = math.prod(at["shape"]) * dtype.itemsize
    if file.stat().st_size != size or size > _LIMIT:
        raise FileFormatError(
            f"{file} has {file.stat().st_size} bytes, but shape {at['shape']} of {at['dtype']} "
            f"has {size}"
        )
    data = file.read_bytes()
    if hashlib.sha256(data).hexdigest() != at["sha256"]:
        raise FileFormatError(f"{file} was changed: its SHA-256 is not that in {MANIFEST}")
    return np.frombuffer(data, dtype).reshape(at["shape"]).astype(dtype.newbyteorder("="))
