"""Laws of files that replace biases of the base, as PEFT writes them with bias = "all" and
"lora_only"."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

from pylora.conformance.laws.files import (
    PREFIX,
    WEIGHTS,
    adapters,
    expected,
    fitting,
    tensors_of,
    write,
)
from pylora.conformance.laws.law import Law
from pylora.conformance.problems.layers import pick, plans, st
from pylora.conformance.testcase import Problem, Trial
from pylora.types import Array


@st.composite  # type: ignore[untyped-decorator]
def _biased(draw: Any) -> Problem:
    """A plan's problem, and which biases its file replaces."""
    p = fitting(draw(plans()))
    how = draw(pick(("all", "lora_only")))
    return p.replaced(config={**p.config, "bias": how}, number=draw(st.integers(0, 2**16)))


def _biases(p: Problem) -> dict[str, Array]:
    """What the file replaces: biases of adapted modules, with "all" of every module."""
    rng, plan = np.random.default_rng(p.number), expected(p.config, p.modules)
    found = {}
    for path, (d, _) in p.modules.items():
        b = rng.normal(size=d).astype(np.float32)
        if path in plan or p.config["bias"] == "all":
            found[path] = b
    return found


def _key(path: str, p: Problem) -> str:
    adapted = path in expected(p.config, p.modules)
    return f"{PREFIX}{path}{'.base_layer' if adapted else ''}.bias"


def _tensors(p: Problem) -> list[tuple[str, Array]]:
    return [*tensors_of(p), *((_key(path, p), b) for path, b in _biases(p).items())]


def _compare(t: Trial, got: Any, want: dict[str, Array]) -> None:
    if set(got) != set(want):
        odd = sorted(set(got) ^ set(want))
        said = f"load_biases gave the biases of other modules; they differ in {odd}"
        t.fail(said, got, f"set(RESULT) == set({sorted(want)!r})")
    for path, b in want.items():
        t.expect(f"the bias of {path}", got, b, signs=True, item=(path,))


def _reads(t: Trial, p: Problem) -> None:
    _compare(t, t.load_biases(write(t, p, _tensors(p)), p.modules), _biases(p))


def _comes_back(t: Trial, p: Problem) -> None:
    directory, biases = t.directory() + "/adapter", _biases(p)
    t.save_biases(directory, adapters(p), biases, p.config)
    data = (Path(directory) / WEIGHTS).read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__", None)
    keys = {name: a.shape for name, a in _tensors(p)}
    if {name: tuple(entry["shape"]) for name, entry in header.items()} != keys:
        odd = sorted(set(header) ^ set(keys))
        t.fail(f"keys and shapes of {WEIGHTS} are not PEFT's; they differ in {odd}")
    _compare(t, t.load_biases(directory, p.modules), biases)


def _misfits(t: Trial, p: Problem) -> None:
    """One replaced bias is missing, of another length, NaN, or is one that the setting leaves."""
    tensors, biases = _tensors(p), _biases(p)
    t.load_biases(write(t, p, tensors), p.modules)  # whole, it must be read
    path = sorted(biases)[p.number % len(biases)]
    key, kept = _key(path, p), [one for one in tensors if one[0] != _key(path, p)]
    left = [q for q in p.modules if q not in biases]
    bad = biases[path].copy()
    bad[-1] = np.nan
    kinds: list[tuple[str, list[tuple[str, Array]]]] = [
        (f"a file without {key!r}", kept),
        (f"{key!r} of twice as many numbers", [*kept, (key, np.tile(biases[path], 2))]),
        (f"{key!r} with NaN", [*kept, (key, bad)]),
        (f"{key!r} beside its other spelling", [*tensors, (_other(key), biases[path])]),
    ]
    if left:
        extra = f"{PREFIX}{left[0]}.bias"
        b = np.ones(p.modules[left[0]][0], np.float32)
        kinds.append((f"{extra!r}, which lora_only leaves alone", [*tensors, (extra, b)]))
    why, damaged = kinds[p.number // 7 % len(kinds)]
    t.must_raise(why, "load_biases", write(t, p, damaged), p.modules)


def _other(key: str) -> str:
    """PEFT's key of before 0.6 for an adapted module, or the wrapper's for one that is not."""
    if ".base_layer." in key:
        return key.replace(".base_layer.", ".")
    return key.replace(".bias", ".base_layer.bias")


_NEEDS = ("load_biases", "peft_files")
LAWS = (
    Law(
        "K40",
        "Biases that a file replaces are read, of the modules that the setting says.",
        'bias = "lora_only": ….base_layer.bias of adapted modules; "all": ….bias of others too; '
        "load_biases = what was written, bit for bit",
        "a replaced bias is dropped, or one module's is taken for another's: the base answers with "
        "the biases that it had",
        ("K-3", "K-2"),
        _NEEDS,
        _biased,
        _reads,
        (),
    ),
    Law(
        "K41",
        "Replaced biases are written under PEFT's keys, and come back.",
        "save_biases, then the keys of the file and load_biases(save_biases(b)) = b",
        "they are not written, under another key, or those of modules without adapter are left out",
        ("K-3", "K-5"),
        ("save_biases", *_NEEDS),
        _biased,
        _comes_back,
        (),
    ),
    Law(
        "K42",
        "A file whose biases are not those of its setting is an error.",
        "missing, of another length, NaN, twice, or of a module that lora_only leaves: load_biases "
        "must raise, where the whole file is read",
        "the base's own bias stays in its place, silently",
        ("K-3", "K-4"),
        _NEEDS,
        _biased,
        _misfits,
        (),
    ),
)
