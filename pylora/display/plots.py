"""Pictures: the loss curve, the norms and singular values of an adapter, a sparkline for terminals.

Only the sparkline works without matplotlib (the `plot` extra). Pictures are PNG files that appear
whole or not at all. Nothing here computes results; it draws what it is given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pylora.display.palette import BLUE, SKY, VERMILION, series
from pylora.errors import ConfigError
from pylora.extras import need
from pylora.files.whole import atomic_write

if TYPE_CHECKING:
    from pylora.adapters.inspect import ModuleStats

_BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int = 60) -> str:
    """`values` as one line of bars from the least to the greatest, averaged down to `width`.

    Values that are not finite are shown as spaces. An empty sequence gives an empty string.
    """
    n = min(width, len(values))
    edges = [i * len(values) // n for i in range(n)] + [len(values)]
    means = [sum(values[a:b]) / (b - a) for a, b in zip(edges, edges[1:], strict=False) if b > a]
    finite = [v for v in means if math.isfinite(v)]
    if not finite:
        return " " * len(means)
    low, span = min(finite), (max(finite) - min(finite)) or 1.0
    top = len(_BARS) - 1
    return "".join(_BARS[round((v - low) / span * top)] if math.isfinite(v) else " " for v in means)


def loss_curve(
    path: str | Path,
    loss: Sequence[float],
    *,
    title: str = "Training loss",
    window: int = 10,
    evaluations: Sequence[tuple[int, float]] = (),
) -> None:
    """Draws the loss of each step, and its mean over the last `window` steps, on a log scale.

    evaluations: (step, loss) of each time that other examples were looked at; step 0 is before
    training. One that is not finite is left out.
    """
    with _figure(path, (8, 4.5)) as figure:
        axes = figure.subplots()
        steps = range(1, len(loss) + 1)
        mean = [sum(loss[max(0, i - window) : i]) / min(i, window) for i in range(1, len(loss) + 1)]
        axes.plot(steps, loss, color=SKY, linewidth=0.9, alpha=0.8, label="training, each step")
        axes.plot(steps, mean, color=BLUE, linewidth=2, label=f"training, mean of {window} steps")
        seen = [(step, value) for step, value in evaluations if math.isfinite(value)]
        if seen:
            at, values = zip(*seen, strict=True)
            label = f"evaluation, examples not trained on: {values[-1]:.2g} at the end"
            style = {"color": VERMILION, "markersize": 6, "linewidth": 1.2, "zorder": 3}
            axes.plot(at, values, "D--", label=label, **style)
        if loss and min([*loss, *(value for _, value in seen)]) > 0:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        first = min([1, *(step for step, _ in seen)])
        last = max([2, len(loss), *(step for step, _ in seen)])
        room = 0.015 * (last - first)
        axes.set_xlim(first - room, last + room)
        axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
        axes.grid(True, which="both", alpha=0.25)
        axes.legend(frameon=False)


def adapter_picture(
    path: str | Path, stats: Sequence[ModuleStats], *, title: str = "Adapter"
) -> None:
    """Two panels: the norm of each module's delta by layer and kind, and its singular values."""
    by_kind: dict[str, list[ModuleStats]] = {}
    for one in stats:
        by_kind.setdefault(one.kind, []).append(one)
    inside = sorted({one.layer for one in stats if one.layer is not None})
    rows: list[int | None] = [*inside, *([None] if any(s.layer is None for s in stats) else [])]
    height = min(12.0, max(4.5, 2.2 + 0.22 * len(rows)))
    with _figure(path, (12, height)) as figure:
        left, right = figure.subplots(1, 2, width_ratios=(max(1.0, 0.45 * len(by_kind)), 2.2))
        grid = [[math.nan] * len(by_kind) for _ in rows]
        for column, members in enumerate(by_kind.values()):
            for one in members:
                grid[rows.index(one.layer)][column] = one.norm
        image = left.imshow(grid, aspect="auto", cmap="cividis", interpolation="nearest")
        left.set_xticks(range(len(by_kind)), list(by_kind), rotation=35, ha="right")
        shown = [i for i, layer in enumerate(rows) if layer is None or i % -(-len(rows) // 16) == 0]
        left.set_yticks(shown, [str("none" if rows[i] is None else rows[i]) for i in shown])
        left.set(ylabel="layer", title="‖s·BA‖ of each module (Frobenius)")
        figure.colorbar(image, ax=left, fraction=0.08, pad=0.03)
        for column, (kind, members) in enumerate(by_kind.items()):
            length = max(len(one.singular_values) for one in members)
            at = [
                sorted(one.singular_values[i] for one in members if i < len(one.singular_values))
                for i in range(length)
            ]
            index, (color, mark) = range(1, length + 1), series(column)
            middle = [values[len(values) // 2] for values in at]
            # Beside each other, as bands of many kinds would hide one another.
            x = [i + 0.7 * ((column + 0.5) / len(by_kind) - 0.5) for i in index]
            right.plot(x, middle, color=color, marker=mark, markersize=4.5, label=kind)
            least, most = [values[0] for values in at], [values[-1] for values in at]
            right.vlines(x, least, most, color=color, alpha=0.45, linewidth=1.6)
        if any(one.norm > 0 for one in stats):
            right.set_yscale("log")
        widest = max((len(one.singular_values) for one in stats), default=1)
        right.set_xticks(range(1, widest + 1, max(1, math.ceil(widest / 16))))
        right.set(
            xlabel="index",
            ylabel="singular value of s·BA",
            title="Singular values: median over layers, and range",
        )
        right.grid(True, which="both", alpha=0.25)
        right.legend(frameon=False, fontsize="small", ncols=2)
        figure.suptitle(title)


class _figure:
    """A figure without a window, written to `path` as PNG when the block ends without an error."""

    def __init__(self, path: str | Path, inches: tuple[float, float]) -> None:
        self.path = Path(path)
        if self.path.suffix.lower() != ".png":
            raise ConfigError(f"{self.path}: a picture is a PNG; name it .png")
        need("matplotlib")
        self.figure = need("matplotlib.figure").Figure(figsize=inches, layout="constrained")

    def __enter__(self) -> Any:
        return self.figure

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(self.path) as beside:
                self.figure.savefig(beside, format="png", dpi=130)
