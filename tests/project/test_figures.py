"""bench/figures.py: what a bar's place, hatch and colour say. Needs matplotlib."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

import figures

from pylora.display.palette import PRECISIONS


def record(case: str, contender: str, seconds: float, part: str = "", **key: Any) -> dict[str, Any]:
    engine, precision = contender.split(",")[0].split(" ")
    return {
        "case": case,
        "contender": contender,
        "engine": {"pylora": "pylora", "PEFT": "peft", "llama.cpp": "llama"}[engine],
        "precision": precision,
        "variant": contender.partition(", ")[2],
        "part": part,
        "key": key,
        "seconds": [seconds],
        "life_peak_rss_bytes": 1e9,
    }


def document() -> dict[str, Any]:
    step = {"batch": 4, "length": 256}
    decode = {"prompt": 512, "new": 32}
    ceilings = {
        "fp32 FMA": {"best": 200.0, "unit": "GFLOP/s"},
        "memory read": {"best": 20.0, "unit": "GB/s"},
    }
    return {
        "ceilings": ceilings,
        "records": [
            record("step", "pylora fp32", 10.0, **step),
            record("step", "PEFT fp32", 20.0, **step),
            record("step", "PEFT fp32, tuned", 5.0, **step),
            record("generate", "pylora int4", 1.0, "decode", **decode),
            record("generate", "PEFT bf16", 4.0, "decode", **decode),
        ],
    }


def test_bars_begin_at_one_and_a_loss_goes_to_the_left_of_it() -> None:
    figure = figures.versus_picture(document())
    (axes,) = figure.axes
    spans = [sorted((p.get_x(), p.get_x() + p.get_width())) for p in axes.patches]
    assert spans == [[0.5, 1], [1, 4]]
    assert axes.get_xlim()[0] < 0.5


def test_colours_are_explained_and_another_precision_of_the_peer_is_hatched() -> None:
    figure = figures.versus_picture(document())
    hatches = [p.get_hatch() or "" for p in figure.axes[0].patches]
    assert hatches[0] == "" and hatches[1]
    words = [text.get_text() for text in figure.legends[0].get_texts()]
    assert words[:2] == ["pylora in fp32", "pylora in int4"]
    assert "another precision" in words[2]
    from matplotlib.colors import to_hex

    colours = [to_hex(p.get_facecolor()).upper() for p in figure.axes[0].patches]
    assert colours == [PRECISIONS["fp32"].upper(), PRECISIONS["int4"].upper()]


def test_no_word_of_the_roofline_is_on_its_line() -> None:
    figure = figures.roofline_picture(document())
    (axes,) = figure.axes
    figure.canvas.draw()
    line = axes.transData.transform((100, 0))[0]
    for text in axes.texts:
        box = text.get_window_extent()
        assert not box.x0 <= line <= box.x1, text.get_text()
    assert len(axes.patches) - 1 == 5  # a bar for each record, and the column behind the words


def test_curves_with_the_same_numbers_are_one_line_with_both_names() -> None:
    curves = {"pylora fp32": [2.0, 1.0], "pylora int8": [2.0, 1.1], "pylora int4": [2.0, 1.1]}
    left, _ = figures.loss_picture({"loss": curves}).axes
    names = [line.get_label() for line in left.lines]
    assert names == ["pylora fp32", "pylora int8 = pylora int4"]
    assert len({line.get_color() for line in left.lines}) == 2


def test_nothing_measured_is_no_picture() -> None:
    empty = {"ceilings": {}, "records": []}
    assert [picture(empty) for picture in figures.SPEED.values()] == [None] * len(figures.SPEED)
    assert figures.loss_picture({}) is None
