"""Finding records in a file of results, and what they come to: medians, tokens a second, shares."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import work

Record = dict[str, Any]
MERGING = ("merge", "exact merge", "unmerge")  # parts of the case "merge"
STEPS = ("step", "by-length", "by-rank")  # cases whose job is a training step
# Kinds of GGUF files, as the precision of pylora's that has as many bits.
KINDS = {"Q4_0": "int4", "Q4_1": "int4", "Q4_K_M": "int4", "Q8_0": "int8"}


def read(path: Path) -> dict[str, Any]:
    """A file of results. Older ones compared one GGUF file, SmolLM2's Q4_1, and did not say so."""
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for r in document.get("records", ()):
        if r["case"] == "gguf" and "kind" not in r["key"]:
            r["key"] |= {"model": "smollm2-135m", "kind": "Q4_1"}
    return document


def find(
    records: Iterable[Record], case: str, contender: str, part: str = "", **key: Any
) -> Record | None:
    """The record of a contender whose key holds all of `key`; None if it was not measured."""
    for r in records:
        if r["case"] == case and r["contender"] == contender and r["part"] == part:
            if "seconds" in r and all(r["key"].get(k, False) == v for k, v in key.items()):
                return r
    return None


def select(records: Iterable[Record], case: str, part: str = "") -> list[Record]:
    return [r for r in records if r["case"] == case and r["part"] == part and "seconds" in r]


def median(r: Record) -> float:
    return statistics.median(r["seconds"])


def best(records: Iterable[Record], case: str, part: str, engine: str, **key: Any) -> Record | None:
    """Of an engine's records of a case the fastest: its best setting on that machine. `precision`
    among `key` is the contender's own."""
    wanted = key.pop("precision", None)
    some = [
        r
        for r in select(records, case, part)
        if r["engine"] == engine
        and wanted in (None, r["precision"])
        and all(r["key"].get(k, False) == v for k, v in key.items())
    ]
    return min(some, key=median) if some else None


def tokens(r: Record) -> int:
    """Tokens that one sample of this record went through."""
    k, part = r["key"], r["part"]
    if r["case"] in STEPS:
        return int(k["batch"] * k["length"])
    if part.endswith("prefill"):
        return int(k["prompt"])
    if part.endswith("decode"):
        return int(k["new"])
    if part.endswith(("distinct", "one")):
        return int(k["new"]) * int(part.split()[0])
    return int(k.get("tokens", 0))


def speed(r: Record) -> float:
    """Tokens a second, of the median."""
    return tokens(r) / median(r)


def flops(r: Record) -> float:
    """Operations of one sample that it cannot do without (work.py)."""
    k, part, model = r["key"], r["part"], r["key"].get("model")
    if r["case"] in STEPS:
        return tokens(r) * work.step_flops(k["length"], k.get("rank", work.RANK), model)
    if part.endswith("prefill"):  # the head runs for the last token alone
        head = 2.0 * work.head_weights(model)
        return tokens(r) * (work.forward_flops(k["prompt"], work.RANK, model) - head)
    if r["case"] == "linear":
        return work.linear_flops(k["d"], k["d"], k["tokens"], work.RANK, k["backward"])
    return tokens(r) * work.forward_flops(2 * k.get("prompt", 0), work.RANK, model)


def bytes_moved(r: Record) -> float:
    """Bytes of weights from memory of one sample that it cannot do without."""
    k, part, model = r["key"], r["part"], r["key"].get("model")
    precision = KINDS.get(r["precision"], r["precision"])
    if part in MERGING:
        return 2.0 * k["d"] ** 2 * work.stored_bytes(precision)  # read and written
    if part.endswith("decode") or part.endswith(("distinct", "one")):
        if "file_bytes" in k:
            return float(int(k["new"]) * k.get("read_bytes", k["file_bytes"]))
        rows = int(part.split()[0]) if part.endswith(("distinct", "one")) else 1
        adapters = min(rows, k.get("adapters", 1)) if part.endswith("distinct") else 1
        own = 4.0 if r["engine"] == "pylora" else work.stored_bytes(precision)
        each = own * work.adapter_numbers(model=model)
        return int(k["new"]) * (work.decode_bytes(precision, model) + adapters * each)
    return work.decode_bytes(precision, model) if r["case"] != "linear" else 0.0


def ceiling_of(r: Record, ceilings: dict[str, Any]) -> tuple[str, float]:
    """(name, operations a second) of the fastest instructions for the products of this precision.

    Quantized weights: 16-bit integers forward, which are two products of bytes on tiles; 8-bit ones
    where activations have 8 bits ("a8", and the other engines). A training step's other half,
    dy W, has float32 numbers on both sides: three bfloat16 products are as exact as one of them.
    """
    eight = 1 if r["engine"] != "pylora" or r["precision"].endswith("a8") else 2
    exact = [("fp32 FMA", 1), ("AMX bf16", 3)]
    quantized = [("int8 dot" if eight == 1 else "int16 dot", 1), ("AMX int8", eight), *exact[:1]]
    names = {
        "fp32": exact[:1],
        "fp32x3": exact,
        "bf16": [("AMX bf16", 1), ("bf16 dot", 1), ("fp32 FMA", 1)],
    }.get(r["precision"], quantized)
    name, most = _fastest(names, ceilings)
    if names is quantized and r["case"] in STEPS:
        other, rate = _fastest(exact, ceilings)
        return f"{name}, {other}", 2 / (1 / most + 1 / rate)
    return name, most


def _fastest(names: list[tuple[str, int]], ceilings: dict[str, Any]) -> tuple[str, float]:
    """Of (ceiling, how many of its operations make one) the fastest on this machine."""
    rates = {n: ceilings[n]["best"] * 1e9 / times for n, times in names if n in ceilings}
    name = max(rates, key=lambda n: rates[n])
    return name, rates[name]


def share(r: Record, ceilings: dict[str, Any]) -> tuple[float, str]:
    """(least time that the machine allows) / (time taken), and what sets the least time.

    The least time is that of the operations at their ceiling or of the bytes at theirs, whichever
    is longer: where the roofline is above the point.
    """
    moved = "memory change in place" if r["part"] in MERGING else "memory read"
    limits = [(bytes_moved(r) / (ceilings[moved]["best"] * 1e9), moved)]
    if r["part"] not in MERGING:
        name, most = ceiling_of(r, ceilings)
        limits.append((flops(r) / most, name))
    least, name = max(limits)
    return least / median(r), name
