"""The bars that the project set itself, and how each is judged from a file of results.

Ratios are of medians. "x as fast" divides the peer's seconds by pylora's for the same work.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from records import Record, bytes_moved, find, median, speed, tokens

NOT_MEASURED = "not measured"
STEP = {"batch": 4, "length": 256, "recompute": False}
AGAIN = {**STEP, "recompute": True}


@dataclass(frozen=True)
class Bar:
    """One figure with its bar. kind: "speed", "memory" (a share of the peer's), "self" (pylora's
    own part over another), "seconds" (at most), "share" (of a ceiling)."""

    what: str
    case: str
    part: str
    ours: str
    peer: str  # a contender; for "self" a part; for "share" a ceiling
    need: float
    dream: float | None = None
    kind: str = "speed"
    key: dict[str, Any] = field(default_factory=dict)
    amx: bool = False  # only where the machine has AMX


@dataclass(frozen=True)
class Row:
    """A bar with what was measured; texts for the table."""

    bar: Bar
    ours: str = NOT_MEASURED
    peer: str = ""
    value: float | None = None
    text: str = ""

    @property
    def met(self) -> bool | None:
        if self.value is None:
            return None
        at_most = self.bar.kind in ("memory", "self", "seconds")
        return self.value <= self.bar.need if at_most else self.value >= self.bar.need


def _bars() -> list[Bar]:
    out: list[Bar] = []
    against = [
        ("PEFT bf16", 4, 5.5),
        ("PEFT bf16, tuned", 2.8, 4),
        ("PEFT bf16, compiled", 2.3, 3.2),
    ]
    for peer, need, dream in against:
        out.append(
            Bar("training step, bf16", "step", "", "pylora bf16", peer, need, dream, key=STEP)
        )
    for peer, need, dream in [("PEFT fp32", 1.8, 2.1), ("PEFT fp32, tuned", 1.3, 1.5)]:
        out.append(
            Bar("training step, fp32", "step", "", "pylora fp32", peer, need, dream, key=STEP)
        )
    for peer, need, dream in [("PEFT fp32", 3, 4), ("PEFT fp32, tuned", 2.2, 2.9)]:
        what = "training step, fp32x3 (AMX)"
        out.append(Bar(what, "step", "", "pylora fp32x3", peer, need, dream, key=STEP, amx=True))
    for what, key in [("", STEP), (", recomputing", AGAIN)]:
        what = f"peak memory of the bf16 step{what}"
        ours, peer = "pylora bf16", "PEFT bf16"
        out.append(Bar(what, "step", "", ours, peer, 0.4, 0.25, "memory", key))
    ours, peer = "pylora bf16", "PEFT bf16"
    out.append(Bar("prefill 512, bf16", "generate", "prefill", ours, peer, 3, 4))
    for precision, need, dream in [("bf16", 4, 5), ("int8", 7, 9), ("int4", 10, 20)]:
        what = f"decode, one sequence, {precision}"
        out.append(Bar(what, "generate", "decode", f"pylora {precision}", peer, need, dream))
    for rows, need, dream in [(8, 10, 15), (32, 20, 30)]:
        what = f"decode, {rows} distinct adapters of 100"
        out.append(Bar(what, "resident", f"{rows} distinct", ours, peer, need, dream))
    what = "32 distinct adapters against one"
    out.append(Bar(what, "resident", "32 distinct", ours, "32 one", 1.2, 1.05, "self"))
    for case, n in [("resident", 100), ("by-adapters", 1000)]:
        what, key = f"switching, {n:,} resident", {"adapters": n}
        out.append(Bar(what, case, "switch", ours, "PEFT bf16", 10e-6, None, "seconds", key))
    for d in (576, 1024):
        for m, need, dream in [(1, 8, 15), (16, 4, 9), (512, 2.3, 3.5), (2048, 1.6, 2.3)]:
            what = f"LoRA linear forward, bf16, d = {d}, {m} token{'s' if m > 1 else ''}"
            key = {"d": d, "tokens": m, "backward": False}
            out.append(Bar(what, "linear", "", ours, peer, need, dream, key=key))
    for d, need, dream in [(1024, 2.3, 3.5), (4096, 1.5, 2)]:
        what = f"LoRA linear forward + backward, bf16, d = {d}, 512 tokens"
        key = {"d": d, "tokens": 512, "backward": True}
        out.append(Bar(what, "linear", "", ours, peer, need, dream, key=key))
    for precision, need, dream in [("fp32", 8, 12), ("bf16", 15, 30)]:
        what, ours, peer = f"merge 4096², {precision}", f"pylora {precision}", f"PEFT {precision}"
        out.append(Bar(what, "merge", "merge", ours, peer, need, dream))
        what += ": share of changing memory in place"
        out.append(Bar(what, "merge", "merge", ours, "memory change in place", 0.6, 0.85, "share"))
    what = "decode, int4, the GGUF file, no adapter"
    out.append(Bar(what, "gguf", "decode", "pylora int4", "llama.cpp Q4_1", 1.5, 4))
    return out


BARS = _bars()


def judge(document: dict[str, Any]) -> list[Row]:
    """Every bar, in order; those for AMX only where the machine has it."""
    amx = "AMX bf16" in document["ceilings"]
    return [_row(bar, document) for bar in BARS if amx or not bar.amx]


def _row(bar: Bar, document: dict[str, Any]) -> Row:
    records = document["records"]
    ours = find(records, bar.case, bar.ours, bar.part, **bar.key)
    if ours is None:
        return Row(bar)
    shown = _shown(ours, bar)
    if bar.kind == "seconds":
        peer = find(records, bar.case, bar.peer, bar.part, **bar.key)
        value = median(ours)
        return Row(bar, shown, _shown(peer, bar) if peer else "", value, _seconds(value))
    if bar.kind == "share":
        ceiling = document["ceilings"].get(bar.peer)
        if ceiling is None:
            return Row(bar, shown)
        rate = bytes_moved(ours) / median(ours) / 1e9
        value = rate / ceiling["best"]
        most = f"{ceiling['best']:.1f} {ceiling['unit']}"
        return Row(bar, f"{rate:.1f} GB/s", most, value, f"{value:.0%}")
    name = bar.ours if bar.kind == "self" else bar.peer
    part = bar.peer if bar.kind == "self" else bar.part
    peer = find(records, bar.case, name, part, **bar.key)
    if peer is None:
        return Row(bar, shown)
    if bar.kind == "memory":
        value = ours["life_peak_rss_bytes"] / peer["life_peak_rss_bytes"]
        return Row(bar, shown, _shown(peer, bar), value, f"{value:.2f} ×")
    value = median(ours) / median(peer)
    if bar.kind == "speed":
        value = 1 / value
    return Row(bar, shown, _shown(peer, bar), value, f"{value:.2f} ×")


def _shown(r: Record, bar: Bar) -> str:
    if bar.kind == "memory":
        return f"{r['life_peak_rss_bytes'] / 1e9:.2f} GB"
    if bar.kind == "seconds" or not tokens(r) or r["case"] == "linear":
        return _seconds(median(r))
    return f"{speed(r):,.0f} tokens/s"


def _seconds(s: float) -> str:
    for unit, factor in (("s", 1), ("ms", 1e3), ("µs", 1e6)):
        if s * factor >= 1:
            return f"{s * factor:.3g} {unit}"
    return f"{s * 1e6:.2g} µs"


def needed(bar: Bar, value: float | None) -> str:
    """The bar (or the moonshot) as text."""
    if value is None:
        return ""
    if bar.kind == "seconds":
        return f"< {_seconds(value)}"
    if bar.kind == "share":
        return f"≥ {value:.0%}"
    return f"{'≤' if bar.kind in ('memory', 'self') else '≥'} {value:g} ×"
