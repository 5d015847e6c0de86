"""Draws a file of results; measures nothing, so a picture can be drawn again at any time.

    python bench/figures.py [FILE.json] [--accuracy FILE.json] [--out docs/img]

Without a file: the newest in bench/results. Needs matplotlib (pylora's extra `plot`). What was not
measured is left out of a picture, and a picture of nothing is not drawn.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from bars import judge
from drawing import SAME, Bar, Group, color, grouped, legend, note, order, rows_high, seconds
from records import Record, find, median, read, select, share, speed, tokens
from report import ROOT, newest
from work import step_flops

from pylora.display.palette import (
    BLACK,
    BLUE,
    GREYS,
    INK,
    MARKS,
    ORANGE,
    PAPER,
    PRECISIONS,
    VERMILION,
)

try:
    from matplotlib.figure import Figure
except ImportError:
    raise SystemExit("pictures need matplotlib: pip install 'pylora-engine[plot]'") from None

PEER_LINES = {"fp32": BLACK, "bf16": VERMILION}  # of PEFT, where lines cross
VERSUS = {  # cases of bench/bars.py -> heading; a part in the key takes that part alone
    ("step", ""): "training step, 4 × 256 tokens",
    ("generate", "prefill"): "prefill, 512 tokens",
    ("generate", "decode"): "decode, one sequence",
    ("resident", ""): "decode, a batch of distinct adapters, 100 resident",
    ("gguf", "decode"): "decode, the GGUF file itself, no adapter",
    ("gguf", "prefill"): "prefill 512, the GGUF file itself, no adapter",
    ("merge", ""): "merge of one 4096 × 4096 weight",
}


def versus_picture(document: dict[str, Any]) -> Figure | None:
    """How many times as fast as its peer pylora is, case by case; bars begin at 1 ×."""
    judged = [r for r in judge(document) if r.value and r.rival and r.bar.kind == "speed"]
    groups: list[Group] = []
    used: list[str] = []
    other = False
    for (case, part), heading in VERSUS.items():
        rows: list[Bar] = []
        for r in judged:
            if r.bar.case != case or (part and r.bar.part != part):
                continue
            mine = r.own
            peer, _, variant = r.rival.partition(", ")
            name, _, theirs = peer.rpartition(" ")
            differs = mine != SAME.get(theirs, theirs)
            what = f"{r.bar.key['model']} " if case == "gguf" else ""
            what = f"{r.bar.part.split()[0]} sequences, " if case == "resident" else what
            label = f"{what}{mine}  against  {name} {theirs}" + (f", {variant}" if variant else "")
            ours = r.ours.partition(" tokens/s")[0]
            text = f"{(r.value or 0):.2f} ×   {ours} : {r.peer.partition(' (')[0]}"
            plain = mine.removesuffix("a8")
            rows.append((label, r.value or 0.0, PRECISIONS[plain], "////" * differs, text))
            used.append(plain)
            other |= differs
        if rows:
            groups.append((heading, rows))
    if not groups:
        return None
    figure = Figure(figsize=(10.5, 1.5 + 0.235 * rows_high(groups)), layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log")
    values = [value for _, rows in groups for _, value, *_ in rows]
    low, top = min([1.0, *values]), max([2.0, *values])
    grouped(axes, groups, start=1.0)
    axes.set_xlim(low if low == 1 else 0.8 * low, 3.2 * top)
    ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200) if low <= t <= 1.3 * top]
    axes.set_xticks(ticks, [f"{t:g} ×" for t in ticks])
    axes.minorticks_off()
    axes.axvline(1, color=INK, linewidth=1)
    axes.set_title(
        "How many times as fast as its peer pylora is (log scale; 1 × is equal speed)",
        fontsize=10.5,
        loc="left",
    )
    entries = [(c, "", f"pylora in {p}") for p, c in PRECISIONS.items() if p in used]
    if other:
        entries.append((GREYS[1], "////", "hatched: the peer computes in another precision"))
    legend(figure, entries)
    return figure


PANELS = [  # heading, case, part
    ("training step, 4 × 256 tokens", "step", ""),
    ("prefill, 512 tokens", "generate", "prefill"),
    ("decode, one sequence", "generate", "decode"),
    ("decode, 8 sequences, an adapter each, 100 resident", "resident", "8 distinct"),
    ("decode, 32 sequences, an adapter each, 100 resident", "resident", "32 distinct"),
]


def whole_steps(records: list[Record], case: str, part: str) -> list[Record]:
    """Those of a case, in order, without other models and those that compute activations twice."""
    some = [
        r
        for r in select(records, case, part)
        if not r["key"].get("recompute") and "model" not in r["key"]
    ]
    return sorted(some, key=order)


def speed_picture(document: dict[str, Any]) -> Figure | None:
    """Tokens a second of every whole-model case."""
    panels = [(head, whole_steps(document["records"], case, p)) for head, case, p in PANELS]
    panels = [(head, some) for head, some in panels if some]
    if not panels:
        return None
    columns = [panels[0::2], panels[1::2]]
    tall = [sum(len(some) + 2.0 for _, some in column) for column in columns]
    figure = Figure(figsize=(12, 0.7 + 0.25 * max(tall)), layout="constrained")
    for half, column in zip(figure.subfigures(1, 2), columns):
        if not column:
            continue
        sizes = [len(some) + 0.6 for _, some in column]
        grid = half.subplots(len(column), 1, squeeze=False, height_ratios=sizes)
        for axes, (heading, some) in zip(grid[:, 0], column):
            rows = [(r["contender"], speed(r), color(r), "", f"{speed(r):,.0f}") for r in some]
            grouped(axes, [("", rows)])
            axes.set_xlim(0, 1.12 * max(speed(r) for r in some))
            axes.set_title(f"{heading}: tokens/s", fontsize=10, loc="left")
    return figure


def roofline_picture(document: dict[str, Any]) -> Figure | None:
    """How much of what the machine can do is reached."""
    records, ceilings = document["records"], document["ceilings"]
    merging = ("merge of one 4096 × 4096 weight", "merge", "merge")
    groups: list[Group] = []
    limits: list[str] = []
    for heading, case, part in [*PANELS, merging]:
        rows: list[Bar] = []
        for r in whole_steps(records, case, part):
            if r["variant"] in ("", "tuned") and ceilings:
                value, limit = share(r, ceilings)
                limits.append(limit)
                rows.append((r["contender"], 100 * value, color(r), "", f"{value:.0%}"))
        if rows:
            groups.append((heading, rows))
    if not groups:
        return None
    figure = Figure(figsize=(10, 1.2 + 0.2 * rows_high(groups)), layout="constrained")
    axes = figure.subplots()
    grouped(axes, groups)
    # Right of 100 % a column of its own says what the limit is, so that no word is on the line.
    most = max(100.0, *(1.08 * value for _, rows in groups for _, value, *_ in rows))
    axes.set_xlim(0, 1.36 * most)
    axes.axvspan(most, 1.36 * most, color=PAPER, zorder=-2, linewidth=0)
    for y, limit in zip(axes.get_yticks(), limits):
        axes.text(1.02 * most, y, limit, va="center", fontsize=8.5, color=INK)
    axes.text(1.02 * most, 0, "what limits it", va="center", fontsize=9.5, fontweight="bold")
    axes.set_xticks(range(0, 101, 20), [f"{t} %" for t in range(0, 101, 20)])
    axes.axvline(100, color=INK, linewidth=1)
    axes.grid(True, axis="x", alpha=0.25, zorder=-1)
    axes.set_axisbelow(True)
    axes.set_title(
        "Share of this machine's own limit: the least time it allows / the time taken",
        fontsize=10.5,
        loc="left",
    )
    return figure


def memory_picture(document: dict[str, Any]) -> Figure | None:
    """Peak memory of the processes, of a training step and of decoding."""
    records = document["records"]
    some = [r for r in select(records, "step") if "model" not in r["key"]]
    steps = sorted(some, key=order)
    panels = [
        ("training step, 4 × 256 tokens", [r for r in steps if not r["key"].get("recompute")]),
        ("the same, activations recomputed", [r for r in steps if r["key"].get("recompute")]),
        ("decode, one sequence", whole_steps(records, "generate", "decode")),
    ]

    def bars(some: list[Record]) -> list[Bar]:
        sizes = [(r, r["life_peak_rss_bytes"] / 1e9) for r in some]
        return [(r["contender"], size, color(r), "", f"{size:.2f}") for r, size in sizes]

    groups = [(heading, bars(some)) for heading, some in panels if some]
    if not groups:
        return None
    figure = Figure(figsize=(9, 1.0 + 0.23 * rows_high(groups)), layout="constrained")
    axes = figure.subplots()
    grouped(axes, groups)
    axes.set_xlim(0, 1.1 * max(value for _, rows in groups for _, value, *_ in rows))
    axes.set_title("Peak memory of the process, GB", fontsize=10.5, loc="left")
    return figure


def adapters_picture(document: dict[str, Any]) -> Figure | None:
    """What one more adapter costs: decoding, switching, memory."""
    records = document["records"]
    parts = {
        part: sorted(select(records, "by-adapters", part), key=lambda r: r["key"]["adapters"])
        for part in ("32 distinct", "32 one", "8 distinct", "switch")
    }
    some = parts["32 distinct"]
    if len(some) < 2:
        return None
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    ours = PRECISIONS["bf16"]
    n = [r["key"]["adapters"] for r in some]
    for part, label, style, c in (
        ("32 one", "32 sequences, one adapter", "o--", BLUE),
        ("32 distinct", "32 sequences, an adapter each", "o-", ours),
        ("8 distinct", "8 sequences, an adapter each", "s-", ORANGE),
    ):
        left.plot(n, [speed(r) for r in parts[part]], style, color=c, label=label, markersize=5)
    left.set(title="Decoding, pylora bf16: tokens/s", ylim=(0, 1.15 * max(map(speed, some))))
    switch = [median(r) for r in parts["switch"]]
    middle.plot(n, switch, "o-", color=ours, markersize=5)
    middle.set(title="Switching to another adapter: time", yscale="log", ylim=(3e-8, 3))
    middle.set_yticks([1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1])
    middle.yaxis.set_major_formatter(lambda value, _: seconds(value))
    middle.minorticks_off()
    note(middle, n[-1], switch[-1], f"pylora: {seconds(switch[-1])}", ours, right=True)
    memory = [r["life_peak_rss_bytes"] / 1e9 for r in some]
    right.plot(n, memory, "o-", color=ours, markersize=5)
    each = 1e3 * (memory[-1] - memory[0]) / (n[-1] - n[0])
    right.set(title="Peak memory of the process: GB", ylim=0)
    note(right, n[-1], memory[-1], f"pylora: {each:.1f} MB an adapter", ours, beside=True)
    for part, axes, value, words in (
        ("32 distinct", left, speed, "PEFT, 32 with an adapter each: {:.0f}"),
        ("switch", middle, median, "PEFT: {}"),
        ("switch", right, lambda r: r["life_peak_rss_bytes"] / 1e9, "PEFT: {:.2f}"),
    ):
        peer = find(records, "resident", "PEFT bf16", part)
        if peer:
            at, v = peer["key"]["adapters"], value(peer)
            axes.plot([at], [v], "D", color=GREYS[2], markersize=7)
            note(axes, at, v, words.format(seconds(v) if axes is middle else v), GREYS[2])
    for axes in (left, middle):
        axes.set_xscale("log")
        axes.set_xticks([1, 10, 100, 1000], ["1", "10", "100", "1000"])
    for axes in (left, middle, right):
        axes.set_xlabel("adapters resident")
        axes.grid(True, alpha=0.25)
    left.legend(frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(0, 0.32))
    return figure


def scaling_picture(document: dict[str, Any]) -> Figure | None:
    """The cost of a step against length and rank, beside the growth of its operations."""
    records = document["records"]
    lengths, ranks = select(records, "by-length"), select(records, "by-rank")
    if not lengths and not ranks:
        return None
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    for axes, some, name, title in zip(
        figure.subplots(1, 2),
        (lengths, ranks),
        ("length", "rank"),
        ("A training step of one sequence", "A training step of 512 tokens"),
    ):
        for contender, mark in zip(dict.fromkeys(r["contender"] for r in some), "osD^v"):
            mine = sorted(
                (r for r in some if r["contender"] == contender), key=lambda r: r["key"][name]
            )
            x = [r["key"][name] for r in mine]
            line = {"color": color(mine[0]), "label": contender, "markersize": 5}
            axes.plot(x, [1e3 * median(r) / tokens(r) for r in mine], f"{mark}-", **line)
            if mine[0]["engine"] == "pylora":
                cost = [step_flops(r["key"]["length"], r["key"].get("rank", 8)) for r in mine]
                per = [1e3 * median(r) / tokens(r) / c for r, c in zip(mine, cost)]
                fit = sorted(per)[len(per) // 2]
                axes.plot(x, [fit * c for c in cost], ":", color=color(mine[0]), linewidth=1.5)
        axes.plot([], [], ":", color=INK, label="dotted: as its operations grow")
        axes.set_xscale("log", base=2)
        ticks = sorted({r["key"][name] for r in some})
        axes.set_xticks(ticks, [str(t) for t in ticks])
        axes.minorticks_off()
        axes.set_ylim(0)
        label = "tokens in the sequence" if name == "length" else "rank"
        axes.set(xlabel=label, title=f"{title}: milliseconds a token")
        axes.grid(True, alpha=0.25)
        axes.legend(frameon=False, fontsize=8.5)
    return figure


def moving(values: list[float], n: int = 10) -> list[float]:
    """Of each value and those before it, the mean of up to n."""
    return [sum(values[max(0, i - n) : i]) / min(i, n) for i in range(1, len(values) + 1)]


def loss_picture(document: dict[str, Any]) -> Figure | None:
    """The loss of a fine-tune in every precision, and how far each is from float32's."""
    curves: dict[str, list[float]] = document.get("loss", {})
    if not curves:
        return None
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    strict = curves.get("pylora fp32")
    for i, (name, losses) in enumerate(curves.items()):
        engine, precision = name.split(" ")[:2]
        peer = engine == "PEFT"
        # The same numbers as another curve (int8 and int4 here): both names, one line.
        twins = [n for n, other in curves.items() if other == losses]
        if twins[0] != name:
            continue
        line = {
            "color": PEER_LINES[precision] if peer else PRECISIONS[precision],
            "label": " = ".join(twins),
            "linewidth": 1.5,
            "linestyle": "--" if peer else "-",
            "marker": MARKS[i % len(MARKS)],
            "markersize": 4.5,
            "markevery": (4 * i, max(1, len(losses) // 8)),
        }
        left.plot(range(1, len(losses) + 1), moving(losses), **line)
        if strict and name != "pylora fp32":
            gap = [abs(a - b) / b for a, b in zip(losses, strict)]
            right.plot(range(1, len(gap) + 1), moving(gap), **line)
    left.set(xlabel="step", yscale="log", title="Loss of a fine-tune (mean of 10 steps)")
    left.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    right.set(xlabel="step", yscale="log")
    right.set_title("Distance from pylora fp32's loss, relative (mean of 10 steps)")
    for axes in (left, right):
        axes.grid(True, which="major", alpha=0.3)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    left.legend(frameon=False, fontsize=9)
    right.legend(frameon=False, fontsize=9, loc="lower right")
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
            document = read(path)
            print(*draw(document, pictures, a.out), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
