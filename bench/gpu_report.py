"""The table of a bench/gpu.py run: medians, ratios to PEFT, shares of the ceilings."""

from __future__ import annotations

import statistics
from typing import Any

import gpu_shapes as shapes

Record = dict[str, Any]


def median(r: Record | None) -> float | None:
    return statistics.median(r["seconds"]) if r and r["seconds"] else None


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1e6:.0f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def ceilings(result: dict[str, Any]) -> dict[str, float]:
    """Bytes/s of a copy (read and written), operations/s of the bf16 product."""
    out, n = {}, shapes.CEILING
    for r in result["records"]:
        seconds = median(r)
        if r["case"] == "ceiling" and seconds:
            amount = 2.0 * 32 * n**2 if r["key"]["what"] == "copy" else 2.0 * n**3
            out[r["key"]["what"]] = amount / seconds
    return out


def _note(r: Record, seconds: float, top: dict[str, float]) -> str:
    """Share of what the device can do, for the cases that have such a bar."""
    key = r["key"]
    if r["case"] in ("merge", "unmerge") and "copy" in top:
        size = 2 if key["precision"] == "bf16" else 4
        rate = 2.0 * key["width"] ** 2 * size / seconds
        return f"{rate / 1e9:.0f} GB/s, {rate / top['copy']:.0%} of a copy"
    if r["case"] == "step":
        tokens = key["batch"] * key["length"] / seconds
        note = f"{tokens:.0f} tokens/s, {r['peak_bytes'] / 1e9:.1f} GB"
        if "bf16 product" in top:
            useful = shapes.step_flops(key["batch"], key["length"]) / seconds
            note += f", {useful / top['bf16 product']:.0%} of the bf16 ceiling"
        return note
    if r["case"] == "decode":
        return f"{key['rows'] / seconds:.0f} tokens/s"
    return ""


def table(result: dict[str, Any]) -> str:
    top = ceilings(result)
    lines = [f"{result['device']}, {result['date']}: {result['versions']}"]
    units = {"copy": "GB/s", "bf16 product": "GFLOP/s"}
    lines += [f"ceiling, {name}: {rate / 1e9:.0f} {units[name]}" for name, rate in top.items()]
    groups: dict[tuple[str, str], dict[str, Record]] = {}
    for r in result["records"]:
        if r["case"] != "ceiling":
            groups.setdefault((r["case"], str(r["key"])), {})[r["contender"]] = r
    for (case, _), found in groups.items():
        some = next(iter(found.values()))
        key = ", ".join(f"{k} {v}" for k, v in some["key"].items() if k != "alone")
        ours = median(found.get("pylora"))
        cells = []
        for name, r in found.items():
            seconds = median(r)
            if seconds is None:
                cells.append(f"{name} failed: {r.get('failed', '')}")
                continue
            ratio = f" ({seconds / ours:.2f} ×)" if ours and name != "pylora" else ""
            note = _note(r, seconds, top)
            cells.append(f"{name} {_time(seconds)}{ratio}{f' [{note}]' if note else ''}")
        lines.append(f"{case}: {key}: " + "; ".join(cells))
    if result["left_out"]:
        lines.append(f"left out for want of time: {len(result['left_out'])} cases")
    return "\n".join(lines)
