"""Laws of adapter files: what was saved is loaded, and what does not fit is refused.

The laws that write or damage files themselves know PEFT's layout and need file_format = "peft".
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

from pylora.conformance.laws.law import Law
from pylora.conformance.problems.layers import plans
from pylora.conformance.testcase import NotTested, Problem, Trial
from pylora.types import Array

PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NAMES = {"float32": "F32", "float16": "F16", "uint16": "BF16"}


def expected(config: Mapping[str, Any], modules: Mapping[str, Any]) -> dict[str, Any]:
    """Module path -> (r, alpha, scale) for the configs that `plans` draws (spec S-1, T-1, T-5)."""
    import re

    plan = {}
    for path in modules:
        if not any(path == t or path.endswith("." + t) for t in config["target_modules"]):
            continue
        found = []
        for name, default in (
            ("rank_pattern", config["r"]),
            ("alpha_pattern", config["lora_alpha"]),
        ):
            hits = [
                v for k, v in config.get(name, {}).items() if re.fullmatch(rf"(.*\.)?({k})", path)
            ]
            found.append(hits[0] if hits else default)
        r, alpha = found
        plan[path] = r, alpha, alpha / (np.sqrt(r) if config.get("use_rslora") else r)
    return plan


def adapters(p: Problem) -> dict[str, tuple[Array, Array]]:
    """Random A and B of each target of the problem."""
    rng = np.random.default_rng(p.seed)
    return {
        path: (
            rng.normal(size=(r, p.modules[path][1])).astype(np.float32),
            rng.normal(size=(p.modules[path][0], r)).astype(np.float32),
        )
        for path, (r, _, _) in expected(p.config, p.modules).items()
    }


def fitting(p: Problem) -> Problem:
    """The problem without pattern keys that match no target: those are errors of another law."""
    import re

    paths = list(expected(p.config, p.modules))
    config = dict(p.config)
    for name in ("rank_pattern", "alpha_pattern"):
        kept = {
            k: v
            for k, v in config.get(name, {}).items()
            if any(re.fullmatch(rf"(.*\.)?({k})", path) for path in paths)
        }
        config.pop(name, None)
        if kept:
            config[name] = kept
    return p.replaced(config=config)


def safetensors(tensors: list[tuple[str, Array]]) -> bytes:
    """A safetensors file, also one with repeated names; uint16 arrays are bfloat16 bits."""
    entries, data = [], b""
    for name, a in tensors:
        end = len(data) + a.nbytes
        entry = {
            "dtype": _NAMES[str(a.dtype)],
            "shape": list(a.shape),
            "data_offsets": [len(data), end],
        }
        entries.append(f"{json.dumps(name)}: {json.dumps(entry)}")
        data += np.ascontiguousarray(a).tobytes()
    header = ("{" + ", ".join(entries) + "}").encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + data


def tensors_of(p: Problem) -> list[tuple[str, Array]]:
    """PEFT's keys and the arrays of `adapters`."""
    out = []
    for path, (A, B) in adapters(p).items():
        out += [(f"{PREFIX}{path}.lora_A.weight", A), (f"{PREFIX}{path}.lora_B.weight", B)]
    return out


def write(t: Trial, p: Problem, tensors: list[tuple[str, Array]], cut: int = 0) -> str:
    """A PEFT directory with these tensors; `cut` bytes are missing at the end of the file."""
    directory = t.directory() + "/adapter"
    data = safetensors(tensors)
    config = {"peft_type": "LORA", **p.config}
    t.write(f"{directory}/{CONFIG}", json.dumps(config).encode())
    t.write(f"{directory}/{WEIGHTS}", data[: len(data) - cut])
    return directory


def compare(
    t: Trial, got: Mapping[str, Any], want: dict[str, tuple[Array, Array]], p: Problem
) -> None:
    plan = expected(p.config, p.modules)
    if set(got) != set(want):
        odd = sorted(set(got) ^ set(want))
        holds = f"set(RESULT) == set({sorted(want)!r})"
        t.fail(f"load returned other modules than were saved; they differ in {odd}", got, holds)
    for path, (A, B) in want.items():
        t.expect(f"A of {path}", got, A, signs=True, item=(path, 0))
        t.expect(f"B of {path}", got, B, signs=True, item=(path, 1))
        s = plan[path][2]
        t.expect(f"scale of {path}", got, s, 2.0**-22 * abs(s), item=(path, 2))


def _round_trip(t: Trial, p: Problem) -> None:
    p = fitting(p)
    directory, saved = t.directory() + "/adapter", adapters(p)
    t.save(directory, saved, p.config)
    compare(t, t.load(directory, p.modules), saved, p)


def _keys(t: Trial, p: Problem) -> None:
    from pathlib import Path

    p = fitting(p)
    directory = t.directory() + "/adapter"
    t.save(directory, adapters(p), p.config)
    file = Path(directory) / WEIGHTS
    if not file.is_file():
        t.fail(f"save wrote no {WEIGHTS}")
    data = file.read_bytes()
    n = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + n])
    header.pop("__metadata__", None)
    shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
    want = {name: a.shape for name, a in tensors_of(p)}
    if shapes != want:
        odd = sorted(set(shapes.items()) ^ set(want.items()))
        t.fail(f"keys and shapes of {WEIGHTS} differ from PEFT's in {odd}")


def _reads(t: Trial, p: Problem) -> None:
    p = fitting(p)
    compare(t, t.load(write(t, p, tensors_of(p)), p.modules), adapters(p), p)


def _reads_narrow(t: Trial, p: Problem) -> None:
    p = fitting(p)
    half = p.seed % 2 == 0
    stored, want = [], {}
    for path, pair in adapters(p).items():
        wide = []
        for letter, a in zip("AB", pair):
            bits = (a.view(np.uint32) >> 16).astype(np.uint16)
            narrow = a.astype(np.float16) if half else bits
            stored.append((f"{PREFIX}{path}.lora_{letter}.weight", narrow))
            wide.append(
                narrow.astype(np.float32)
                if half
                else (bits.astype(np.uint32) << 16).view(np.float32)
            )
        want[path] = wide[0], wide[1]
    got = t.load(write(t, p, stored), p.modules)
    as_float32 = {
        path: (np.asarray(A).astype(np.float32), np.asarray(B).astype(np.float32), s)
        for path, (A, B, s) in got.items()
    }
    compare(t, as_float32, want, p)


def _damage(kind: str) -> Any:
    def check(t: Trial, p: Problem) -> None:
        p = fitting(p)
        tensors = tensors_of(p)
        t.load(write(t, p, tensors), p.modules)  # whole, it must be read
        i, cut, modules = p.seed % len(tensors), 0, dict(p.modules)
        name, a = tensors[i]
        if kind == "extra":
            other = name.replace("_proj", "_other", 1)
            tensors.append((other, a))
            why = f"a file with {other!r}, which belongs to no module"
        elif kind == "missing":
            del tensors[i]
            why = f"a file without {name!r}"
        elif kind == "shape":
            axis = 0 if name.endswith("lora_B.weight") else 1
            tensors[i] = name, np.concatenate([a, a], axis=axis)
            why = f"{name!r} with twice the features that the module has"
        elif kind == "rank":
            axis = 1 if name.endswith("lora_B.weight") else 0
            tensors[i] = name, np.concatenate([a, a], axis=axis)
            why = f"{name!r} with a rank that is not the config's"
        elif kind == "twice":
            tensors.append((name, a + 1))
            why = f"a file in which {name!r} occurs twice"
        elif kind == "cut":
            cut = 1 + p.seed % (4 * sum(b.size for _, b in tensors))
            why = f"a file of which the last {cut} bytes are missing"
        elif kind == "nan":
            bad = a.copy()
            bad.flat[p.seed % a.size] = np.nan
            tensors[i] = name, bad
            why = f"NaN in {name!r}"
        else:
            gone = [path for path in modules if path.endswith("." + p.config["target_modules"][0])]
            for path in gone:
                del modules[path]
            if not modules:
                raise NotTested("the model has no other module")
            why = f"an adapter of {gone[0]!r} for a model that has no such module"
        t.must_raise(why, "load", write(t, p, tensors, cut), modules)

    return check


def _refusal(id: str, kind: str, sentence: str, violation: str, spec: tuple[str, ...]) -> Law:
    return Law(
        id,
        sentence,
        "load(damaged) must raise, where load(whole) does not",
        violation,
        spec,
        ("load", "peft_files"),
        plans,
        _damage(kind),
        (),
    )


LAWS = (
    Law(
        "K1",
        "What was saved is loaded: the same bits and the same scales.",
        "load(save(A, B, config)) = (A, B, s), s by S-1 and T-5",
        "scale, patterns or rsLoRA are lost on the way through a file",
        ("K-5", "S-1", "S-2"),
        ("save", "load"),
        plans,
        _round_trip,
        (),
    ),
    Law(
        "K2",
        "Files have PEFT's keys and shapes.",
        "base_model.model.<path>.lora_A.weight [r,k] and .lora_B.weight [d,r], nothing else",
        "other programs cannot read the adapter, or read A for B",
        ("K-1", "K-2"),
        ("save", "peft_files"),
        plans,
        _keys,
        (),
    ),
    Law(
        "K3",
        "A PEFT directory of another program is read.",
        "load = what was written, with the scale of its config",
        "alpha, rsLoRA or a pattern in adapter_config.json is not obeyed",
        ("K-2", "S-1", "S-2"),
        ("load", "peft_files"),
        plans,
        _reads,
        (),
    ),
    Law(
        "K4",
        "Adapters stored in 16 bits are read.",
        "load of float16 or bfloat16 tensors = their values",
        "bits are taken for another format",
        ("K-8",),
        ("load", "peft_files"),
        plans,
        _reads_narrow,
        (),
    ),
    _refusal(
        "K5",
        "extra",
        "A tensor that belongs to no module is an error.",
        "part of an adapter is silently dropped: the model answers, wrongly",
        ("K-4",),
    ),
    _refusal(
        "K6",
        "missing",
        "A tensor that is missing is an error.",
        "a module silently runs without its adapter, or with random numbers",
        ("K-4",),
    ),
    _refusal(
        "K7",
        "shape",
        "A tensor of the wrong shape is an error.",
        "it is broadcast, cut or skipped",
        ("K-4",),
    ),
    _refusal(
        "K8",
        "rank",
        "A tensor whose rank is not the config's is an error.",
        "the scale alpha / r is taken with the wrong r",
        ("K-4", "S-2"),
    ),
    _refusal(
        "K9",
        "twice",
        "A tensor that occurs twice is an error.",
        "which of the two is used is chance, and tools differ in it",
        ("K-4",),
    ),
    _refusal(
        "K10",
        "cut",
        "A file that was cut off is an error.",
        "half of an interrupted download is used as an adapter",
        ("K-7",),
    ),
    _refusal(
        "K11",
        "nan",
        "NaN in an adapter is an error.",
        "a run that diverged is deployed",
        ("K-4",),
    ),
    _refusal(
        "K12",
        "target",
        "An adapter of modules that the model does not have is an error.",
        "an adapter of another model is accepted and does nothing",
        ("K-4", "T-6"),
    ),
)
