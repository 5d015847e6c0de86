"""The bars that the project set itself, and how each is judged from a file of results.

A bar is a share of what this machine can do, measured in the same run, or a ratio to the best peer
on it: of a peer's settings (a malloc that keeps its pages, compiled, flash attention, repacked
weights) the fastest is taken, and named. Ratios are of medians; "x as fast" divides the peer's
seconds by pylora's for the same work.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from records import Record, best, bytes_moved, find, median, select, share, speed, tokens

NOT_MEASURED = "not measured"
ONE = {"model": False}  # the run's own geometry
STEP = {"batch": 4, "length": 256, "recompute": False, **ONE}
AGAIN = {**STEP, "recompute": True}
AT_MOST = ("memory", "file", "cost", "self", "seconds")
PEERS = {"peft": "PEFT", "llama": "llama.cpp", "ik": "ik_llama.cpp", "openvino": "OpenVINO"}


@dataclass(frozen=True)
class Bar:
    """One figure with its bar. kind: "speed" (times as fast as the peer's best setting), "memory"
    (a share of the peer's), "self" (pylora's own seconds over those of another of its parts or
    precisions), "share" (of what the machine allows), "cost" (time that is added to another part's,
    a share of it), "file" (peak memory over the bytes of the file), "seconds" (at most)."""

    what: str
    case: str
    part: str
    ours: str  # precisions of pylora's, the fastest of which counts: "fp32", "int4 int8"
    peer: str = ""  # an engine's precision: "peft bf16", "llama"; for "self" and "cost" a part
    need: float = 1.0
    dream: float | None = None
    kind: str = "speed"
    key: dict[str, Any] = field(default_factory=dict)
    only: str = ""  # a ceiling without which it is not judged


@dataclass(frozen=True)
class Row:
    """A bar with what was measured; texts for the table."""

    bar: Bar
    ours: str = NOT_MEASURED
    peer: str = ""
    value: float | None = None
    text: str = ""
    own: str = ""  # the precision of pylora's that it is about
    rival: str = ""  # the contender that it is compared with

    @property
    def met(self) -> bool | None:
        if self.value is None:
            return None
        at_most = self.bar.kind in AT_MOST
        return self.value <= self.bar.need if at_most else self.value >= self.bar.need


def _steps() -> Iterator[Bar]:
    what = "training step, {}"
    for p, only in (("fp32", ""), ("bf16", "bf16 dot")):
        own = f"{what.format(p)}: share of the machine's limit"
        yield Bar(own, "step", "", p, "", 0.8, 0.9, "share", STEP, only)
    for p, need in (("fp32", 1.3), ("bf16", 1.25)):
        yield Bar(what.format(p), "step", "", p, f"peft {p}", need, 1.6, key=STEP)
    yield Bar(
        what.format("fp32x3 beside fp32"), "step", "", "fp32x3", "peft fp32", 1.3, 1.6, key=STEP,
        only="AMX bf16",
    )  # fmt: skip
    for p in ("int8", "int4"):
        own = f"{what.format(p)} base, beside our own fp32"
        yield Bar(own, "step", "", p, "pylora fp32", 1.0, 1.5, "speed", STEP)
    for again, key in (("", STEP), (", recomputing", AGAIN)):
        for p in ("fp32", "bf16"):
            own = f"peak memory of the {p} step{again}"
            yield Bar(own, "step", "", p, f"peft {p}", 0.4, 0.25, "memory", key)


def _decoding() -> Iterator[Bar]:
    for p, need in (("int4", 0.75), ("int8", 0.8), ("bf16", 0.85), ("fp32", 0.85)):
        own = f"decode, one sequence, {p}: share of reading memory"
        yield Bar(own, "generate", "decode", p, "", need, 0.9, "share", ONE)
    yield Bar("prefill 512, fp32", "generate", "prefill", "fp32", "peft fp32", 1.3, 1.6, key=ONE)
    yield Bar("prefill 512, bf16", "generate", "prefill", "bf16", "peft bf16", 1.25, 1.6, key=ONE)
    for p, need, dream in (("bf16", 4, 5), ("int8", 7, 9), ("int4", 10, 20)):
        what = f"decode, one sequence, {p}"
        yield Bar(what, "generate", "decode", p, "peft", need, dream, key=ONE)
    for rows, need, dream in ((8, 10, 15), (32, 20, 30)):
        what = f"decode, {rows} distinct adapters of 100, bf16"
        yield Bar(what, "resident", f"{rows} distinct", "bf16", "peft", need, dream)
    for p in ("bf16", "fp32", "int4"):
        own = f"32 distinct adapters against one, {p}"
        part = "32 distinct", "32 one"
        yield Bar(own, "resident", part[0], p, part[1], 1.08, 1.03, "self")
    for case, n in (("resident", 100), ("by-adapters", 1000)):
        own = f"switching, {n:,} resident"
        yield Bar(own, case, "switch", "bf16", "peft", 10e-6, None, "seconds", {"adapters": n})


def _files(records: list[Record]) -> Iterator[Bar]:
    """For each file that was measured; eight bits of activations are compared apart."""
    files = {(r["key"]["model"], r["key"]["kind"]): r for r in select(records, "gguf", "decode")}
    quantized = sorted({r["precision"] for r in records if r["precision"].startswith("int")})
    ways = [
        ("", [p for p in quantized if not p.endswith("a8")]),
        (", activations in 8 bits", [p for p in quantized if p.endswith("a8")]),
    ]
    for (model, kind), _ in files.items():
        key = {"model": model, "kind": kind}
        for way, own in ways:
            for part in ("decode", "prefill"):
                for engine, need, dream in (("llama", 1.3, 2.0), ("ik", 1.1, 1.5)):
                    what = f"{part}, {model} {kind}{way}"
                    if own:
                        yield Bar(what, "gguf", part, " ".join(own), engine, need, dream, key=key)
        if kind == "Q4_K_M":
            what = f"peak memory, generating, {model} {kind}"
            yield Bar(what, "gguf", "decode", "int4", "", 1.1, None, "file", key)


def _adapters(records: list[Record]) -> Iterator[Bar]:
    found = {(r["precision"], r["key"].get("kind", False)) for r in records
             if r["case"] == "adapter-cost" and r["engine"] == "pylora"}  # fmt: skip
    for precision, kind in sorted(found, key=str):
        for part, need in (("decode", 0.05), ("prefill", 0.04)):
            of = f", {kind} file" if kind else ""
            what = f"cost of an adapter, r = 16, all linear, {part}, {precision}{of}"
            key = {"kind": kind}
            yield Bar(
                what, "adapter-cost", f"16 {part}", precision, f"0 {part}", need, 0.02, "cost", key
            )


def _merges() -> Iterator[Bar]:
    for p, need, dream in (("fp32", 8, 12), ("bf16", 15, 30)):
        own = f"merge 4096², {p}: share of changing memory in place"
        yield Bar(own, "merge", "merge", p, "", 0.6, 0.85, "share")
        yield Bar(f"merge 4096², {p}", "merge", "merge", p, f"peft {p}", need, dream)


def bars(document: dict[str, Any]) -> list[Bar]:
    """Those of this machine and of the files that were there."""
    records = document["records"]
    some = [*_steps(), *_decoding(), *_files(records), *_adapters(records), *_merges()]
    return [bar for bar in some if not bar.only or bar.only in document["ceilings"]]


def judge(document: dict[str, Any]) -> list[Row]:
    """Every bar, in order."""
    return [_row(bar, document) for bar in bars(document)]


def _ours(bar: Bar, records: list[Record], part: str) -> Record | None:
    some = [find(records, bar.case, f"pylora {p}", part, **bar.key) for p in bar.ours.split()]
    return min((r for r in some if r is not None), key=median, default=None)


def _row(bar: Bar, document: dict[str, Any]) -> Row:
    records, ceilings = document["records"], document["ceilings"]
    ours = _ours(bar, records, bar.part)
    if ours is None:
        return Row(bar)
    name, shown = ours["contender"].removeprefix("pylora "), _shown(ours, bar)
    if len(bar.ours.split()) > 1:
        shown += f" ({name})"
    if bar.kind == "share":
        if not ceilings:
            return Row(bar, shown)
        value, limit = share(ours, ceilings)
        if bar.part == "merge":
            shown = f"{bytes_moved(ours) / median(ours) / 1e9:.1f} GB/s"
        most = (
            f"{ceilings[limit]['best']:.0f} {ceilings[limit]['unit']}" if limit in ceilings else ""
        )
        return Row(bar, shown, f"{limit} {most}".strip(), value, f"{value:.0%}")
    if bar.kind == "file":
        size = ours["key"]["file_bytes"]
        value = ours["life_peak_rss_bytes"] / size
        return Row(bar, shown, f"{size / 1e9:.2f} GB (the file)", value, f"{value:.2f} ×")
    if bar.kind in ("self", "cost"):
        other = _ours(bar, records, bar.peer)
        if other is None:
            return Row(bar, shown)
        value = median(ours) / median(other)
        if bar.kind == "self":
            return Row(bar, shown, _shown(other, bar), value, f"{value:.2f} ×")
        return Row(bar, shown, f"{_shown(other, bar)} (none)", value - 1, f"{value - 1:+.1%}")
    engine, _, precision = bar.peer.partition(" ")
    more = {"precision": precision} if precision else {}
    peer = best(records, bar.case, bar.part, engine, **more, **bar.key)
    if peer is None and engine == "peft":  # no kernel for that dtype here: its best in another
        peer = best(records, bar.case, bar.part, engine, **bar.key)
    if bar.kind == "seconds":
        value = median(ours)
        return Row(bar, shown, _named(peer, bar) if peer else "", value, _seconds(value))
    if peer is None:
        return Row(bar, shown)
    if bar.kind == "memory":
        value = ours["life_peak_rss_bytes"] / peer["life_peak_rss_bytes"]
    else:
        value = median(peer) / median(ours)
    text, rival = f"{value:.2f} ×", peer["contender"]
    return Row(bar, shown, _named(peer, bar), value, text, ours["precision"], rival)


def _named(r: Record, bar: Bar) -> str:
    return f"{_shown(r, bar)} ({r['contender']})"


def _shown(r: Record, bar: Bar) -> str:
    if bar.kind in ("memory", "file"):
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
    if bar.kind == "cost":
        return f"≤ {value:.0%}"
    return f"{'≤' if bar.kind in AT_MOST else '≥'} {value:g} ×"
