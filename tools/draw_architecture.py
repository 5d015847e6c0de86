"""Draws docs/img/architecture.png: the wings of pylora, and which imports which.

    python tools/draw_architecture.py           reads the imports and draws the picture
    python tools/draw_architecture.py --check   says whether the picture is of today's imports

A wing is a folder or a module of pylora/; an import inside a function counts, too. What is read is
kept beside the picture in architecture.json, and the picture carries its digest: the two cannot
drift apart. Needs matplotlib to draw, nothing to check.

A wing stands one floor above the highest that it imports. Of the arrows only those are drawn that
no others imply: who imports `training` may import all that `training` does.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "docs" / "img" / "architecture.json"
PICTURE = DATA.with_suffix(".png")
DIGEST = "Edges"  # the picture's text field
MOST = 7  # points of a floor whose orders are all tried

# What a wing is about. One that is in none of these is an error, so that a new one is thought of.
KINDS = {
    "what people call": ("commands", "demo", "front", "display", "web"),
    "what is done with a model": (
        "check", "conformance", "generation", "merging", "serving", "training",
    ),
    "what a model is": ("adapters", "formats", "model", "text"),
    "how it is computed": ("backends", "ops", "reference", "numbers"),
    "what all stand on": ("errors", "extras", "files", "types"),
}  # fmt: skip
COLORS = ("#f6d8a8", "#cfe3cf", "#c7dcef", "#dcd2ea", "#e3e3e3")  # of the kinds, with dark text
WORDS = {
    "commands": "the verbs of the command line", "demo": "a real model learns a notation",
    "front": "pylora.load: one object", "display": "tables, progress, pictures",
    "web": "HTTP, a page, keys, numbers", "serving": "many requests at once",
    "check": "a user's own model, proved", "conformance": "laws for any LoRA",
    "generation": "continuing tokens", "merging": "into the base, and out again",
    "training": "records, batches, steps, runs", "adapters": "settings, plan, A and B, PEFT",
    "formats": "GGUF, safetensors, Hugging Face", "model": "layers, their gradients, KV cache",
    "text": "tokens and chat templates", "backends": "c, cuda, cupy, numpy",
    "ops": "what a backend must do", "reference": "the oracle: every formula",
    "numbers": "precisions, blocks, random bits", "errors": "what every failure says",
    "extras": "optional packages", "files": "whole or not at all; bounded",
    "types": "plain data of operations",
}  # fmt: skip


def wings(package: Path) -> list[str]:
    """The folders and modules of the package."""
    folders = (p.parent.name for p in package.glob("*/__init__.py"))
    modules = (p.stem for p in package.glob("*.py") if not p.stem.startswith("__"))
    return sorted((*folders, *modules))


def imported(tree: ast.AST, package: str) -> Iterator[str]:
    """The names below the package that a file imports, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.startswith(f"{package}."))
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            if node.module == package:
                yield from (f"{package}.{a.name}" for a in node.names)
            elif node.module.startswith(f"{package}."):
                yield node.module


def edges(package: Path) -> list[tuple[str, str]]:
    """(importer, imported) of wings. The package's own __init__ and __main__ are no wing's."""
    all_wings, found = set(wings(package)), set()
    for file in package.rglob("*.py"):
        inside = file.relative_to(package)
        own = inside.parts[0].removesuffix(".py")
        if own in all_wings:
            tree = ast.parse(file.read_text(encoding="utf-8"))
            for name in imported(tree, package.name):
                other = name.split(".")[1]
                if other != own and other in all_wings:
                    found.add((own, other))
    return sorted(found)


def read(root: Path = ROOT) -> dict[str, Any]:
    """What the picture shows, as it is in the code now."""
    package = root / "pylora"
    return {"wings": wings(package), "edges": [list(e) for e in edges(package)]}


def digest(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def stale(root: Path = ROOT) -> str | None:
    """What is not of today's imports, in a sentence; None where all is."""
    now = read(root)
    kept = json.loads(DATA.read_text(encoding="utf-8")) if DATA.exists() else {"edges": []}
    if kept != now:
        before, after = ({tuple(e) for e in d["edges"]} for d in (kept, now))
        changes = [f"now {a} imports {b}" for a, b in sorted(after - before)]
        changes += [f"{a} imports {b} no more" for a, b in sorted(before - after)]
        return f"{DATA.name} is not of today's imports: {'; '.join(changes) or 'other wings'}"
    if digest(now).encode() not in PICTURE.read_bytes():
        return f"{PICTURE.name} was drawn from other imports than those in {DATA.name}"
    return None


# ---- the picture ------------------------------------------------------------------------------


def floors(names: list[str], below: dict[str, set[str]]) -> dict[str, int]:
    """The length of the longest way down from each."""
    found: dict[str, int] = {}

    def floor(name: str, way: tuple[str, ...] = ()) -> int:
        if name in way:
            raise SystemExit(f"an import circle: {' -> '.join((*way, name))}")
        if name not in found:
            found[name] = max((floor(b, (*way, name)) + 1 for b in below[name]), default=0)
        return found[name]

    for name in names:
        floor(name)
    return found


def reduced(below: dict[str, set[str]]) -> list[tuple[str, str]]:
    """The edges that no longer way implies."""
    reach: dict[str, set[str]] = {}

    def all_below(name: str) -> set[str]:
        if name not in reach:
            reach[name] = below[name].union(*(all_below(b) for b in below[name]))
        return reach[name]

    return [
        (a, b)
        for a in sorted(below)
        for b in sorted(below[a])
        if not any(b in all_below(c) for c in below[a] if c != b)
    ]


def routed(
    level: dict[str, int], arrows: list[tuple[str, str]]
) -> tuple[dict[str, int], list[list[str]]]:
    """The floors with a point on each that an arrow passes, and every arrow as its points."""
    points, ways = dict(level), []
    for a, b in arrows:
        between = [f"{a} {b} {i}" for i in range(level[a] - 1, level[b], -1)]
        points |= {name: int(name.split()[-1]) for name in between}
        ways.append([a, *between, b])
    return points, ways


def places(level: dict[str, int], ways: list[list[str]], wide: float) -> dict[str, float]:
    """x of each point: each floor is centred, in the order whose arrows are shortest and cross
    least. One floor at a time is tried in every order, until none gets better."""
    steps = [step for way in ways for step in zip(way, way[1:])]
    rows = [sorted(n for n in level if level[n] == i) for i in range(max(level.values()) + 1)]

    def spread(row: Sequence[str]) -> dict[str, float]:
        sizes = [0.3 * wide if " " in n else wide for n in row]
        starts = [sum(sizes[:i]) - sum(sizes) / 2 for i in range(len(row))]
        return {n: start + size / 2 for n, start, size in zip(row, starts, sizes)}

    def cost(x: dict[str, float], some: list[tuple[str, str]]) -> float:
        crossings = sum(
            level[a] == level[c] and (x[a] - x[c]) * (x[b] - x[d]) < 0
            for (a, b), (c, d) in combinations(some, 2)
        )
        return sum(abs(x[a] - x[b]) for a, b in some) + wide * crossings

    x: dict[str, float] = {}
    for row in rows:
        x |= spread(row)
    best = cost(x, steps)
    while True:
        for i, row in enumerate(rows):
            near = [s for s in steps if level[s[0]] == i or level[s[1]] == i]
            if len(row) <= MOST:
                x |= spread(min(permutations(row), key=lambda r: cost({**x, **spread(r)}, near)))
        now = cost(x, steps)
        if now >= best:
            return x
        best = now


def draw(data: dict[str, Any], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Patch
    from matplotlib.path import Path as MplPath

    joined = {n for e in data["edges"] for n in e}  # a wing without code is not drawn yet
    names = [n for n in data["wings"] if n in joined]
    kind = {n: i for i, group in enumerate(KINDS.values()) for n in group}
    missing = [n for n in names if n not in kind or n not in WORDS]
    if missing:
        raise SystemExit(f"name their kind and words in {Path(__file__).name}: {missing}")
    below = {n: {b for a, b in data["edges"] if a == n} for n in names}
    level, arrows = floors(names, below), reduced(below)
    points, ways = routed(level, arrows)
    wide, high, dy = 2.9, 0.62, 1.12
    x = places(points, ways, wide + 0.4)
    widest = max(abs(x[n]) for n in names) + wide / 2 + 0.3
    top = max(level.values()) * dy
    figure, axes = plt.subplots(figsize=(0.84 * 2 * widest, 0.84 * (top + 2.0)))
    for way in ways:
        # Past a floor straight down, between the boxes there.
        corners = [(x[n], points[n] * dy + side * high / 2) for n in way for side in (1, -1)][1:-1]
        axes.add_patch(
            FancyArrowPatch(
                path=MplPath(corners), arrowstyle="-|>", mutation_scale=11, color="#555555",
                linewidth=1.1, joinstyle="round", zorder=1,
            )
        )  # fmt: skip
    for n in names:
        cx, cy = x[n], level[n] * dy
        axes.add_patch(
            FancyBboxPatch(
                (cx - wide / 2, cy - high / 2), wide, high,
                boxstyle="round,pad=0,rounding_size=0.08", zorder=2,
                facecolor=COLORS[kind[n]], edgecolor="#444444", linewidth=0.9,
            )
        )  # fmt: skip
        text = {"ha": "center", "va": "center", "color": "#111111", "zorder": 3}
        axes.text(cx, cy + 0.12, n, fontsize=12, fontweight="bold", **text)
        axes.text(cx, cy - 0.14, WORDS[n], fontsize=8, **text)
    legend = [Patch(facecolor=c, edgecolor="#444444", label=k) for c, k in zip(COLORS, KINDS)]
    axes.legend(handles=legend, loc="lower center", ncol=len(legend), fontsize=9, frameon=False)
    axes.set_xlim(-widest, widest)
    axes.set_ylim(-1.3, top + 0.7)
    axes.set_axis_off()
    figure.savefig(
        file, dpi=130, bbox_inches="tight", facecolor="white", metadata={DIGEST: digest(data)}
    )
    plt.close(figure)


def main() -> None:
    if "--check" in sys.argv[1:]:
        sentence = stale()
        if sentence:
            raise SystemExit(f"{sentence}; run python tools/draw_architecture.py and look at it")
        return
    data = read()
    draw(data, PICTURE)
    DATA.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
