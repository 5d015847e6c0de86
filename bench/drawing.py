"""How the benchmark's pictures are drawn: whose colour is whose, bars in groups, what colours mean.

The colours themselves are pylora's (pylora/display/palette.py). Nothing is measured or chosen here.
"""

from __future__ import annotations

from typing import Any

from records import Record

from pylora.display.palette import GREYS, INK, PRECISIONS, VERMILION

try:
    from matplotlib.patches import Patch
except ImportError:
    raise SystemExit("pictures need matplotlib: pip install 'pylora-engine[plot]'") from None

PEERS = {"fp32": GREYS[0], "bf16": GREYS[1]}  # PyTorch + PEFT: greys, by precision
LLAMA = VERMILION
SAME = {"Q4_1": "int4"}  # names of one precision of the weights


def color(r: Record) -> str:
    """pylora's colours say its precision; those of the others are apart from them."""
    if r["engine"] == "pylora":
        return PRECISIONS[r["precision"]]
    return LLAMA if r["engine"] == "llama" else PEERS[r["precision"]]


Bar = tuple[str, float, str, str, str]  # label, value, colour, hatch, text beside the bar
Group = tuple[str, list[Bar]]  # its heading and its bars


def grouped(axes: Any, groups: list[Group], *, start: float = 0.0) -> None:
    """Horizontal bars from `start` on under the headings of their groups, the first on top."""
    at, ticks, labels = 0.0, [], []
    ends: list[tuple[float, float, str]] = []
    for heading, rows in groups:
        if heading:
            axes.text(
                0.004,
                at,
                heading,
                transform=axes.get_yaxis_transform(),
                va="center",
                fontsize=9.5,
                fontweight="bold",
                color=INK,
            )
            at += 1
        for label, value, c, hatch, text in rows:
            style = {"color": c, "hatch": hatch, "edgecolor": "white", "linewidth": 0}
            axes.barh(at, value - start, left=start, height=0.74, **style)
            ticks.append(at)
            labels.append(label)
            ends.append((max(value, start), at, text))
            at += 1
        at += 0.45
    axes.set_yticks(ticks, labels, fontsize=9)
    axes.set_ylim(at - 0.6, -0.75)
    for x, y, text in ends:
        axes.annotate(
            text,
            (x, y),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            color=INK,
        )
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)


def rows_high(groups: list[Group]) -> float:
    """How many rows the groups take, headings and gaps included."""
    return sum(len(rows) + (1.45 if heading else 0.45) for heading, rows in groups)


def legend(figure: Any, entries: list[tuple[str, str, str]]) -> None:
    """(colour, hatch, words) of each, in one frameless box below the picture."""
    handles = [
        Patch(facecolor=c, hatch=hatch, edgecolor="white", linewidth=0) for c, hatch, _ in entries
    ]
    words = [text for *_, text in entries]
    place = {"loc": "outside lower center", "ncols": len(entries)}
    figure.legend(handles, words, frameon=False, fontsize=8.5, **place)


def order(r: Record) -> tuple[int, int]:
    engines = ["pylora", "llama", "peft"]
    precisions = ["fp32", "fp32x3", "bf16", "int8", "int4", "Q4_1"]
    return engines.index(r["engine"]), precisions.index(r["precision"])
