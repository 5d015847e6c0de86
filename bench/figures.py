"""Draws a file of results; measures nothing, so a picture can be drawn again at any time.

    python bench/figures.py [FILE.json] [--accuracy FILE.json] [--out docs/img]

Without a file: the newest in bench/results. Needs matplotlib (pylora's extra `plot`). What was not
measured is left out of a picture, and a picture of nothing is not drawn.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from bars import judge
from records import Record, find, median, select, share, speed, tokens
from report import ROOT, newest
from work import step_flops

try:
    from matplotlib.figure import Figure
except ImportError:
    raise SystemExit("pictures need matplotlib: pip install 'pylora[plot]'") from None

COLORS = {  # pylora in blues, PyTorch + PEFT in greys, llama.cpp in brown
    "pylora fp32": "#9ecae1",
    "pylora fp32x3": "#6baed6",
    "pylora bf16": "#2171b5",
    "pylora int8": "#08519c",
    "pylora int4": "#08306b",
    "llama.cpp Q4_1": "#a6611a",
}
PEER_COLORS = {"": "#969696", "tuned": "#737373", "compiled": "#525252"}


def color(r: Record) -> str:
    return COLORS.get(r["contender"]) or PEER_COLORS.get(r["variant"], "#bdbdbd")


def bars(axes: Any, rows: list[tuple[str, float, str, str]], title: str) -> None:
    """Horizontal bars (label, value, color, text beside the bar), the first on top."""
    at = range(len(rows))
    axes.barh(at, [value for _, value, _, _ in rows], color=[c for *_, c, _ in rows], height=0.72)
    axes.set_yticks(at, [label for label, *_ in rows])
    axes.invert_yaxis()
    top = max((value for _, value, _, _ in rows), default=1.0)
    for i, (_, value, _, text) in enumerate(rows):
        at_x = value + 0.015 * top
        axes.text(at_x, i, text, va="center", fontsize=8.5, backgroundcolor="white", zorder=3)
    axes.set_xlim(0, top * 1.22)
    axes.set_title(title, fontsize=10.5, loc="left")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)


def order(r: Record) -> tuple[int, int]:
    engines = ["pylora", "llama", "peft"]
    precisions = ["fp32", "fp32x3", "bf16", "int8", "int4", "Q4_1"]
    return engines.index(r["engine"]), precisions.index(r["precision"])


def versus_picture(document: dict[str, Any]) -> Figure | None:
    """How many times as fast as its peer pylora is, case by case."""
    cases = ("step", "generate", "resident", "gguf")
    rows = [r for r in judge(document) if r.value and r.bar.kind == "speed" and r.bar.case in cases]
    if not rows:
        return None
    figure = Figure(figsize=(9.5, 0.9 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots()
    bars(
        axes,
        [
            (
                f"{r.bar.what}  vs  {r.bar.peer}",
                r.value or 0.0,
                COLORS[r.bar.ours],
                f"{r.text}   ({r.ours.removesuffix(' tokens/s')} : {r.peer})",
            )
            for r in rows
        ],
        "pylora: times as fast as its peer, and tokens/s of both",
    )
    axes.set_xscale("log")
    top = max(r.value or 0.0 for r in rows)
    low = min(0.5, *(0.7 * (r.value or 1.0) for r in rows))
    axes.set_xlim(low, 12 * top)
    ticks = [t for t in (0.5, 1, 2, 5, 10, 20, 50, 100, 200) if t <= 2 * top]
    axes.set_xticks(ticks, [f"{t:g} ×" for t in ticks])
    axes.minorticks_off()
    axes.axvline(1, color="#525252", linewidth=1)
    return figure


def speed_picture(document: dict[str, Any]) -> Figure | None:
    """Tokens a second of every whole-model case."""
    records = document["records"]
    plain = [r for r in select(records, "step") if not r["key"].get("recompute")]
    panels = [
        ("training step, 4 × 256 tokens", plain),
        ("prefill, 512 tokens", select(records, "generate", "prefill")),
        ("decode, one sequence", select(records, "generate", "decode")),
        ("decode, 8 distinct adapters of 100", select(records, "resident", "8 distinct")),
        ("decode, 32 distinct adapters of 100", select(records, "resident", "32 distinct")),
        ("decode, the GGUF file itself", select(records, "gguf", "decode")),
    ]
    panels = [(title, sorted(some, key=order)) for title, some in panels if some]
    if not panels:
        return None
    columns = [panels[0::2], panels[1::2]]
    tall = [sum(len(some) + 1.8 for _, some in column) for column in columns]
    figure = Figure(figsize=(12, 0.9 + 0.27 * max(tall)), layout="constrained")
    for half, column in zip(figure.subfigures(1, 2), columns):
        if not column:
            continue
        sizes = [len(some) + 1.0 for _, some in column]
        grid = half.subplots(len(column), 1, squeeze=False, height_ratios=sizes)
        for axes, (title, some) in zip(grid[:, 0], column):
            rows = [(r["contender"], speed(r), color(r), f"{speed(r):,.0f}") for r in some]
            bars(axes, rows, f"{title}: tokens/s")
    return figure


def roofline_picture(document: dict[str, Any]) -> Figure | None:
    """How much of what the machine can do is reached."""
    records, ceilings = document["records"], document["ceilings"]
    groups: list[tuple[str, list[Record]]] = [
        ("training step", [r for r in select(records, "step") if not r["key"].get("recompute")]),
        ("prefill 512", select(records, "generate", "prefill")),
        ("decode, 1 sequence", select(records, "generate", "decode")),
        ("decode, 8 adapters", select(records, "resident", "8 distinct")),
        ("decode, 32 adapters", select(records, "resident", "32 distinct")),
        ("merge 4096²", select(records, "merge", "merge")),
    ]
    rows = []
    for what, some in groups:
        for r in sorted(some, key=order):
            if r["variant"] in ("", "tuned") and ceilings:
                value, limit = share(r, ceilings)
                text = f"{value:.0%} of {limit}"
                rows.append((f"{what}, {r['contender']}", 100 * value, color(r), text))
    if not rows:
        return None
    figure = Figure(figsize=(10, 0.9 + 0.23 * len(rows)), layout="constrained")
    axes = figure.subplots()
    bars(axes, rows, "Share of the roofline: the least time this machine allows / the time taken")
    axes.set_xlim(0, max(126.0, axes.get_xlim()[1]))
    axes.axvline(100, color="#cb181d", linewidth=1, linestyle="--", zorder=0)
    axes.set_xlabel("%")
    axes.tick_params(axis="y", labelsize=8.5)
    return figure


def memory_picture(document: dict[str, Any]) -> Figure | None:
    """Peak memory of the processes, of a training step and of decoding."""
    records = document["records"]
    steps = sorted(select(records, "step"), key=order)
    panels = [
        ("training step, 4 × 256", [r for r in steps if not r["key"].get("recompute")]),
        ("the same, activations recomputed", [r for r in steps if r["key"].get("recompute")]),
        ("decode, one sequence", sorted(select(records, "generate", "decode"), key=order)),
    ]
    panels = [(title, some) for title, some in panels if some]
    if not panels:
        return None
    sizes = [len(some) + 1.0 for _, some in panels]
    figure = Figure(figsize=(8.5, 0.9 + 0.3 * sum(sizes)), layout="constrained")
    grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=sizes, sharex=True)
    for axes, (title, some) in zip(grid[:, 0], panels):
        rows = [
            (r["contender"], g, color(r), f"{g:.2f}")
            for r in some
            for g in [r["life_peak_rss_bytes"] / 1e9]
        ]
        bars(axes, rows, f"{title}: peak memory of the process, GB")
    most = max(r["life_peak_rss_bytes"] for _, some in panels for r in some) / 1e9
    grid[-1, 0].set_xlim(0, most * 1.15)
    return figure


def adapters_picture(document: dict[str, Any]) -> Figure | None:
    """What one more adapter costs: decoding, switching, memory."""
    records = document["records"]
    some = sorted(select(records, "by-adapters", "32 distinct"), key=lambda r: r["key"]["adapters"])
    if len(some) < 2:
        return None
    figure = Figure(figsize=(12, 3.9), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    n = [r["key"]["adapters"] for r in some]
    for part, label, style in (
        ("32 distinct", "32 rows, distinct adapters", "o-"),
        ("32 one", "32 rows, one adapter", "o--"),
        ("8 distinct", "8 rows, distinct adapters", "s-"),
    ):
        rows = sorted(select(records, "by-adapters", part), key=lambda r: r["key"]["adapters"])
        left.plot(n, [speed(r) for r in rows], style, color="#2171b5", label=label, markersize=4)
    left.set(ylabel="tokens/s", title="Decoding, pylora bf16")
    left.set_ylim(0)
    switch = sorted(select(records, "by-adapters", "switch"), key=lambda r: r["key"]["adapters"])
    middle.plot(n, [1e6 * median(r) for r in switch], "o-", color="#2171b5", label="pylora bf16")
    middle.set(ylabel="microseconds", title="Switching the adapter", yscale="log")
    memory = [r["life_peak_rss_bytes"] / 1e9 for r in some]
    right.plot(n, memory, "o-", color="#2171b5", label="pylora bf16")
    right.set(ylabel="GB", title="Peak memory of the process", ylim=0)
    for part, axes, value in (
        ("32 distinct", left, speed),
        ("switch", middle, lambda r: 1e6 * median(r)),
        ("switch", right, lambda r: r["life_peak_rss_bytes"] / 1e9),
    ):
        peer = find(records, "resident", "PEFT bf16", part)
        if peer:
            label = "PEFT bf16, 32 distinct" if axes is left else "PEFT bf16"
            axes.plot([peer["key"]["adapters"]], [value(peer)], "D", color="#737373", label=label)
    for axes in (left, middle, right):
        if axes is not right:
            axes.set_xscale("log")
        axes.set_xlabel("adapters resident")
        axes.grid(True, alpha=0.25)
        axes.legend(frameon=False, fontsize=8)
    return figure


def scaling_picture(document: dict[str, Any]) -> Figure | None:
    """The cost of a step against length and rank, beside the growth of its operations."""
    records = document["records"]
    lengths, ranks = select(records, "by-length"), select(records, "by-rank")
    if not lengths and not ranks:
        return None
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axes, some, name, title in zip(
        figure.subplots(1, 2),
        (lengths, ranks),
        ("length", "rank"),
        ("A training step of one sequence", "A training step of 512 tokens"),
    ):
        for contender in dict.fromkeys(r["contender"] for r in some):
            mine = sorted(
                (r for r in some if r["contender"] == contender), key=lambda r: r["key"][name]
            )
            x = [r["key"][name] for r in mine]
            line = {"color": color(mine[0]), "label": contender, "markersize": 4}
            axes.plot(x, [1e3 * median(r) / tokens(r) for r in mine], "o-", **line)
            if mine[0]["engine"] == "pylora":
                cost = [step_flops(r["key"]["length"], r["key"].get("rank", 8)) for r in mine]
                per = [1e3 * median(r) / tokens(r) / c for r, c in zip(mine, cost)]
                fit = sorted(per)[len(per) // 2]
                axes.plot(x, [fit * c for c in cost], ":", color=color(mine[0]), linewidth=1.2)
        axes.plot([], [], ":", color="#2171b5", label="as its operations grow")
        axes.set_xscale("log", base=2)
        ticks = sorted({r["key"][name] for r in some})
        axes.set_xticks(ticks, [str(t) for t in ticks])
        axes.set_ylim(0)
        label = "tokens in the sequence" if name == "length" else "rank"
        axes.set(xlabel=label, ylabel="milliseconds a token", title=title)
        axes.grid(True, alpha=0.25)
        axes.legend(frameon=False, fontsize=8)
    return figure


def moving(values: list[float], n: int = 10) -> list[float]:
    """Of each value and those before it, the mean of up to n."""
    return [sum(values[max(0, i - n) : i]) / min(i, n) for i in range(1, len(values) + 1)]


def loss_picture(document: dict[str, Any]) -> Figure | None:
    """The loss of a fine-tune in every precision, and how far each is from float32's."""
    curves: dict[str, list[float]] = document.get("loss", {})
    if not curves:
        return None
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    strict = curves.get("pylora fp32")
    for name, losses in curves.items():
        c, peer = COLORS.get(name, "#737373"), name.startswith("PEFT")
        c = {"PEFT fp32": "#fd8d3c", "PEFT bf16": "#a63603"}.get(name, c)
        line = {"color": c, "label": name, "linewidth": 1.4, "linestyle": "--" if peer else "-"}
        left.plot(range(1, len(losses) + 1), moving(losses), **line)
        if strict and name != "pylora fp32":
            gap = [abs(a - b) / b for a, b in zip(losses, strict)]
            right.plot(range(1, len(gap) + 1), moving(gap), **line)
    left.set(xlabel="step", ylabel="loss (mean of 10 steps)", yscale="log", title="Fine-tuning")
    right.set(
        xlabel="step", yscale="log", title="|loss − pylora fp32's| / fp32's, mean of 10 steps"
    )
    for axes in (left, right):
        axes.grid(True, which="both", alpha=0.2)
        axes.legend(frameon=False, fontsize=8)
    return figure


SPEED: dict[str, Callable[[dict[str, Any]], Figure | None]] = {
    "versus": versus_picture,
    "speed": speed_picture,
    "roofline": roofline_picture,
    "memory": memory_picture,
    "adapters": adapters_picture,
    "scaling": scaling_picture,
}
ACCURACY = {"loss": loss_picture}


def draw(document: dict[str, Any], pictures: dict[str, Any], folder: Path) -> list[Path]:
    m = document["machine"]
    where = f"{m['processor']}, {m['threads']} threads, {m['isa']}, {document['date']}"
    drawn = []
    for name, picture in pictures.items():
        figure = picture(document)
        if figure is not None:
            figure.suptitle(f"SmolLM2-135M, LoRA r = 8 on q, k, v, o · {where}", fontsize=10)
            folder.mkdir(parents=True, exist_ok=True)
            drawn.append(folder / f"{name}.png")
            figure.savefig(drawn[-1], dpi=120)
    return drawn


def main() -> int:
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("file", type=Path, nargs="?", help="default: the newest in bench/results")
    p.add_argument("--accuracy", type=Path, help="of bench/accuracy.py; default: the newest")
    p.add_argument("--out", type=Path, default=ROOT / "docs" / "img")
    a = p.parse_args()
    for path, pictures in (
        (a.file or newest("speed-*.json"), SPEED),
        (a.accuracy or newest("accuracy-*.json"), ACCURACY),
    ):
        if path is not None:
            document = json.loads(path.read_text(encoding="utf-8"))
            print(*draw(document, pictures, a.out), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
