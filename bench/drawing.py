"""How the benchmark's pictures are drawn: whose colour is whose, bars in groups, what colours mean.

The colours themselves are pylora's (pylora/display/palette.py). Nothing is measured or chosen here.
"""

from __future__ import annotations

from typing import Any

from records import KINDS, Record

from pylora.display.palette import BLACK, GREYS, INK, PRECISIONS, VERMILION

try:
    from matplotlib.patches import Patch
except ImportError:
    raise SystemExit("pictures need matplotlib: pip install 'pylora-engine[plot]'") from None

PEERS = {"fp32": GREYS[0], "bf16": GREYS[1]}  # PyTorch + PEFT: greys, by precision
FILES = {"llama": VERMILION, "ik": BLACK, "openvino": GREYS[2]}  # who reads the same files
SAME = KINDS  # names of one precision of the weights


def color(r: Record) -> str:
    """pylora's colours say its precision; those of the others are apart from them."""
    if r["engine"] == "pylora":
        return PRECISIONS[r["precision"].removesuffix("a8")]
    return FILES.get(r["engine"]) or PEERS[r["precision"]]


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
    engines = ["pylora", *FILES, "peft"]
    precisions = ["fp32", "fp32x3", "bf16", "int8", "int8a8", "int4", "int4a8", *KINDS]
    own = r["precision"]
    at = precisions.index(own) if own in precisions else len(precisions)
    return engines.index(r["engine"]), at


def seconds(value: float) -> str:
    """A time in the unit that suits it, with two digits."""
    for unit, factor in (("s", 1), ("ms", 1e3), ("µs", 1e6)):
        if value * factor >= 0.995:
            return f"{float(f'{value * factor:.2g}'):g} {unit}"
    return f"{value * 1e6:.2g} µs"


def note(
    axes: Any, x: float, y: float, text: str, c: str, *, right: bool = False, beside: bool = False
) -> None:
    """Words above a point (with `right`: that end there), or to the left of it."""
    axes.annotate(
        text,
        (x, y),
        xytext=(-10, -3) if beside else (0, 9),
        textcoords="offset points",
        ha="right" if right or beside else "center",
        fontsize=9,
        color=c,
    )
