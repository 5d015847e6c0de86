"""Finding records in a file of results, and what they come to: medians, tokens a second, shares."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

import work

Record = dict[str, Any]
MERGING = ("merge", "exact merge", "unmerge")  # parts of the case "merge"


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


def tokens(r: Record) -> int:
    """Tokens that one sample of this record went through."""
    k, part = r["key"], r["part"]
    if r["case"] in ("step", "by-length", "by-rank"):
        return int(k["batch"] * k["length"])
    if part == "prefill":
        return int(k["prompt"])
    if part == "decode":
        return int(k["new"])
    if part.endswith(("distinct", "one")):
        return int(k["new"]) * int(part.split()[0])
    return int(k.get("tokens", 0))


def speed(r: Record) -> float:
    """Tokens a second, of the median."""
    return tokens(r) / median(r)


def flops(r: Record) -> float:
    """Operations of one sample that it cannot do without (work.py)."""
    k, part = r["key"], r["part"]
    if r["case"] in ("step", "by-length", "by-rank"):
        return tokens(r) * work.step_flops(k["length"], k.get("rank", work.RANK))
    if part == "prefill":  # the head runs for the last token alone
        head = 2.0 * work.GEOMETRY["vocab_size"] * work.GEOMETRY["hidden_size"]
        return tokens(r) * (work.forward_flops(k["prompt"]) - head)
    if r["case"] == "linear":
        return work.linear_flops(k["d"], k["d"], k["tokens"], work.RANK, k["backward"])
    return tokens(r) * work.forward_flops(2 * k.get("prompt", 0))


def bytes_moved(r: Record) -> float:
    """Bytes of weights from memory of one sample that it cannot do without."""
    k, part = r["key"], r["part"]
    precision = {"Q4_1": "int4"}.get(r["precision"], r["precision"])
    if part in MERGING:
        return 2.0 * k["d"] ** 2 * work.BYTES[precision]  # read and written
    if part == "decode" or part.endswith(("distinct", "one")):
        rows = int(part.split()[0]) if part != "decode" else 1
        adapters = min(rows, k.get("adapters", 1)) if part.endswith("distinct") else 1
        if "file_bytes" in k:
            return float(int(k["new"]) * k["file_bytes"])
        own = 4.0 if r["engine"] == "pylora" else work.BYTES[precision]
        return int(k["new"]) * (
            work.decode_bytes(precision) + adapters * own * work.adapter_numbers()
        )
    return work.decode_bytes(precision) if r["case"] != "linear" else 0.0


def ceiling_of(r: Record, ceilings: dict[str, Any]) -> tuple[str, float]:
    """(name, operations a second) of the fastest instruction for the products of this precision.

    Quantized weights: 16-bit integers forward; a training step's other half, dy W, is float32.
    """
    integer = ["int8 dot" if r["engine"] == "llama" else "int16 dot", "AMX int8", "fp32 FMA"]
    names = {
        "fp32": ["fp32 FMA"],
        "fp32x3": ["AMX bf16", "fp32 FMA"],
        "bf16": ["AMX bf16", "bf16 dot", "fp32 FMA"],
    }.get(r["precision"], integer)
    name = max((n for n in names if n in ceilings), key=lambda n: ceilings[n]["best"])
    most: float = ceilings[name]["best"] * 1e9
    if r["precision"] == "fp32x3" and name == "AMX bf16":
        most /= 3
    if names is integer and r["case"] == "step":
        other = ceilings["fp32 FMA"]["best"] * 1e9
        return f"{name}, fp32 FMA", 2 / (1 / most + 1 / other)
    return name, most


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
