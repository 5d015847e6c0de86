"""The picture of a rate finder: loss by rate, and where the rate for a run is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pylora.display.palette import BLUE, SKY, VERMILION
from pylora.display.plots import _figure

if TYPE_CHECKING:
    from pylora.training.findrate import Found


def rate_picture(path: str | Path, found: Found, *, chosen: float | None = None) -> None:
    """Draws each step's loss, the smoothed one relative to the untrained adapter's, and the rate
    that is suggested; `chosen`: the one that a run would have had anyway."""
    with _figure(path, (8, 4.5)) as canvas:
        axes = canvas.subplots()
        first = found.losses[0] if found.losses else 1.0
        axes.plot(
            found.rates, [loss / first for loss in found.losses],
            color=SKY, linewidth=0.9, alpha=0.8, label="each step beside the first",
        )  # fmt: skip
        axes.plot(
            found.rates, found.relative,
            color=BLUE, linewidth=2, label="of the loss before, on the same batch; smoothed",
        )  # fmt: skip
        if found.suggested is not None:
            axes.axvline(
                found.suggested, color=VERMILION, linewidth=1.6,
                label=f"suggested: {found.suggested:g}",
            )  # fmt: skip
        if chosen is not None:
            axes.axvline(
                chosen, color=VERMILION, linewidth=1.2, linestyle=":",
                label=f"by the model's width: {chosen:g}",
            )  # fmt: skip
        axes.set_xscale("log")
        top = max([1.1, *found.relative]) * 1.1
        axes.set_ylim(0, min(top, 3.0))
        axes.set(xlabel="learning rate", ylabel="loss / loss before", title="Rate finder")
        axes.grid(True, which="both", alpha=0.25)
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.14), "ncols": 2}
        axes.legend(frameon=False, **below)
