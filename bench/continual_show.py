"""The tables and pictures of a run of bench/continual.py; nothing is trained here."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from continual_tasks import TASKS

from pylora.display.palette import BLUE, INK, ORANGE, PAPER, VERMILION

# Student's t, two-sided 95 %, by degrees of freedom.
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def interval(values: list[float]) -> str:
    """Mean and 95 % interval over the seeds."""
    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        return f"{mean:.3f}"
    half = T95.get(n - 1, 1.96) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return f"{mean:.3f} ± {half:.3f}"


def average(run: dict[str, Any]) -> float:
    """Mean accuracy over all tasks after the last."""
    return float(np.mean(run["matrix"][-1]))


def forgetting(run: dict[str, Any]) -> float:
    """How far the earlier tasks fell from their best."""
    R = np.array(run["matrix"])
    return float(np.mean(R[:, :-1].max(axis=0) - R[-1, :-1]))


def forward(run: dict[str, Any]) -> float:
    """What the tasks before it did for a task that had not come yet."""
    R, base = np.array(run["matrix"]), np.array(run["base"])
    return float(np.mean([R[j - 1, j] - base[j] for j in range(1, len(base))]))


def size(n: float) -> str:
    """Bytes in KB of 1000."""
    return f"{n / 1000:.1f} KB" if n < 100_000 else f"{n / 1000:.0f} KB"


def of_method(document: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The runs of each method, in the order in which they were made."""
    out: dict[str, list[dict[str, Any]]] = {}
    for run in document["runs"]:
        out.setdefault(run["method"], []).append(run)
    return out


def show(document: dict[str, Any], img: Path) -> None:
    """Prints the tables in Markdown and draws the pictures."""
    methods = of_method(document)
    if methods:
        print("\n| | average | forgetting | forward | needs the task's name | trained "
              "| kept per further task | seconds |\n|---|---|---|---|---|---|---|---|")  # fmt: skip
    for name, runs in methods.items():
        kept = np.mean([np.mean(r["kept"][1:]) for r in runs])
        print(
            f"| {name} | {interval([average(r) for r in runs])} "
            f"| {interval([forgetting(r) for r in runs])} "
            f"| {interval([forward(r) for r in runs])} "
            f"| {'yes' if runs[0]['knows_the_task'] else 'no'} "
            f"| {runs[-1]['trained']:,} | {size(kept)} "
            f"| {np.mean([r['seconds'] for r in runs]):.0f} |"
        )
    if document.get("rank"):
        rates = list(dict.fromkeys(r["rate"] for r in document["rank"]))
        print("\n| rank | " + " | ".join(f"rate {rate:g}" for rate in rates) + " | bytes |")
        print("|---" * (len(rates) + 2) + "|")
        for rank in sorted({r["rank"] for r in document["rank"]}):
            found = [r for r in document["rank"] if r["rank"] == rank]
            cells = [
                interval([float(np.mean(r["accuracy"])) for r in found if r["rate"] == rate])
                for rate in rates
            ]
            print(f"| {rank} | {' | '.join(cells)} | {size(found[0]['bytes'])} |")
    if document.get("volume"):
        print("\n| volume | the task | the base's own skills |\n|---|---|---|")
        for volume, task, skills in volumes(document):
            print(f"| {volume:g} | {interval(task)} | {interval(skills)} |")
    if document.get("place"):
        print("\n| modules | accuracy | trained |\n|---|---|---|")
        for place in dict.fromkeys(r["place"] for r in document["place"]):
            found = [r for r in document["place"] if r["place"] == place]
            scores = [float(np.mean(r["accuracy"])) for r in found]
            print(f"| {place} | {interval(scores)} | {found[0]['trained']:,} |")
    print("\n| rank | bytes of one 1000 × 1000 adapter |\n|---|---|")
    for row in document["bytes"]:
        print(f"| {row['rank']} | {row['bytes'] / 1000:g} KB |")
    draw(document, img)


def volumes(document: dict[str, Any]) -> list[tuple[float, list[float], list[float]]]:
    """(volume, accuracy on the task of each seed, on the skills), each the mean over the tasks."""
    out = []
    rows = document["volume"]
    for volume in sorted({r["volume"] for r in rows}):
        by_seed: dict[int, list[tuple[float, float]]] = {}
        for r in rows:
            if r["volume"] == volume:
                by_seed.setdefault(r["seed"], []).append((r["accuracy"], r["skills"]))
        means = [np.mean(v, axis=0) for v in by_seed.values()]
        out.append((volume, [float(m[0]) for m in means], [float(m[1]) for m in means]))
    return out


def draw(document: dict[str, Any], img: Path) -> None:
    """One heat map a method; the volume knob."""
    from matplotlib.figure import Figure

    methods = of_method(document)
    if methods:
        columns = 4
        rows = math.ceil(len(methods) / columns)
        figure = Figure(figsize=(11, 2.9 * rows + 0.4), facecolor=PAPER, layout="constrained")
        axes = np.atleast_1d(figure.subplots(rows, columns)).reshape(-1)
        names = list(TASKS)
        for ax in axes[len(methods) :]:
            ax.set_visible(False)
        for at, (ax, (name, runs)) in enumerate(zip(axes, methods.items(), strict=False)):
            R = np.mean([r["matrix"] for r in runs], axis=0)
            picture = ax.imshow(R, vmin=0, vmax=1, cmap="cividis")
            for i in range(len(R)):
                for j in range(len(R)):
                    ax.text(j, i, f"{100 * R[i, j]:.0f}", ha="center", va="center", fontsize=8,
                            color="white" if R[i, j] < 0.55 else INK)  # fmt: skip
            ax.set_title(name, fontsize=10, color=INK)
            ax.set_xticks(range(len(names)), names, rotation=35, ha="right", fontsize=7.5)
            left = at % columns == 0
            ax.set_yticks(range(len(names)), [f"after {n}" for n in names] if left else [],
                          fontsize=7.5)  # fmt: skip
            ax.tick_params(length=0)
            for side in ax.spines.values():
                side.set_visible(False)
        figure.colorbar(picture, ax=list(axes), shrink=0.6, label="accuracy")
        figure.savefig(img / "continual.png", dpi=130)
    if document.get("volume"):
        figure = Figure(figsize=(6.4, 3.6), facecolor=PAPER, layout="constrained")
        ax = figure.subplots()
        ax.set_facecolor(PAPER)
        found = volumes(document)
        x = [v for v, _, _ in found]
        ax.plot(x, [np.mean(t) for _, t, _ in found], color=BLUE, marker="o", label="the task")
        ax.plot(x, [np.mean(s) for _, _, s in found], color=ORANGE, marker="s",
                label="the base's own skills")  # fmt: skip
        ax.axvline(1, color=VERMILION, linewidth=0.8, linestyle=":")
        ax.set_xlabel("volume: the adapter's scale, 1 is as trained")
        ax.set_ylabel("accuracy")
        ax.set_ylim(0, 1.02)
        ax.legend(frameon=False, fontsize=9)
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
        figure.savefig(img / "continual_volume.png", dpi=130)
