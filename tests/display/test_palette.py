"""The palette: colours stay apart for colour-blind eyes, and no picture has one of its own."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import pytest

from pylora.display import palette

ROOT = Path(__file__).resolve().parents[2]
# Linear RGB as seen without one kind of cone: Machado, Oliveira and Fernandes (2009), severity 1.
EYES = {
    "usual": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


def lab(color: str, eye: str) -> np.ndarray:
    """CIELAB of "#rrggbb" as this eye sees it."""
    srgb = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.asarray(EYES[eye]) @ linear, 0, 1)
    xyz = (
        np.array(
            [
                [0.4124564, 0.3575761, 0.1804375],
                [0.2126729, 0.7151522, 0.0721750],
                [0.0193339, 0.1191920, 0.9503041],
            ]
        )
        @ seen
        / [0.95047, 1.0, 1.08883]
    )
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def distance(a: str, b: str, eye: str) -> float:
    return float(np.linalg.norm(lab(a, eye) - lab(b, eye)))


@pytest.mark.parametrize("eye", EYES)
def test_colours_of_one_picture_are_told_apart(eye: str) -> None:
    ours = list(palette.PRECISIONS.values())
    for pair in itertools.combinations([*ours, *palette.GREYS], 2):
        assert distance(*pair, eye) > 10, (pair, eye)
    for pair in itertools.combinations(palette.SERIES, 2):
        assert distance(*pair, eye) > 10, (pair, eye)


def test_the_blues_of_before_would_not_pass() -> None:
    assert distance("#08519c", "#08306b", "usual") < distance(palette.BLUE, palette.SKY, "usual")


def test_series_differ_in_colour_and_mark_until_they_begin_again() -> None:
    n = len(palette.SERIES)
    assert len({palette.series(i) for i in range(n)}) == n == len(palette.MARKS)
    assert palette.series(n) == palette.series(0)


def test_no_picture_has_a_colour_of_its_own() -> None:
    for name in ("bench/figures.py", "bench/drawing.py", "pylora/display/plots.py"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert not re.findall(r"#[0-9a-fA-F]{6}\b", text), name
