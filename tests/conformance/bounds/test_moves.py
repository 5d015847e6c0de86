"""The kit on weights that are stored in fewer bits: its bounds hold for what each precision says it
rounds, and are come near to. That they are broken by what rounds more, test_mutants.py shows."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("hypothesis")
pytest.importorskip("ml_dtypes")

from pylora.conformance import run
from pylora.conformance.bounds.moves import PRECISIONS
from pylora.conformance.correct.rounded import (
    Bf16,
    Blocks,
    Fp32x3,
    Int4,
    Int4a8,
    Int8,
    Int8a8,
    Rounded,
    q4_1,
    q8_0,
)
from pylora.conformance.protocol import problems_of
from pylora.conformance.running.report import text

# Laws that compare with the oracle within a bound; others compare two results that err alike.
BOUNDED = "F1 F3 B1 B6 O1 X1 X3 P4 P5 A1 A2".split()
ALL = (Fp32x3, Bf16, Int8, Int4, Int8a8, Int4a8, Blocks)
LAWS = (
    "F1 F2 F3 F6 F7 F11 F8 F9 F10 G1 G2 G3 E2 Q1 B1 B2 B3 B6 B9 B10 B11 B13 O1 D1 D2 D3 D7 X1 X2 "
    "X3 X4 X5 X6 X7 X8 N3 N4 N7 P1 P4 P5 I4 A1 A2 A4"
).split()


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.precision)
def test_what_a_precision_says_it_rounds_is_within_its_bounds(cls):
    report = run(cls, LAWS, examples=8)
    assert report.ok, text(report)
    assert report.warnings == [] and report.of("not tested") == []
    tight = {o.law.id: o.tightness for o in report.outcomes if o.law.id in BOUNDED}
    assert {law: t for law, t in tight.items() if t < 1e-3} == {}
    assert tight["F1"] > 0.05, "nothing comes near the bound, which would let mistakes through"


def test_every_precision_has_its_implementation():
    assert tuple(cls.precision for cls in ALL) == PRECISIONS[1:]


def test_a_precision_without_its_weights_is_reported():
    class Forgetful(Rounded):
        precision, stored = "int8", None

    class Unheard(Rounded):
        precision = "int7"

    assert "stored" in problems_of(Forgetful())[0]
    assert "int7" in problems_of(Unheard())[0]


@pytest.mark.parametrize("kind, kept", [("Q8_0", q8_0), ("Q4_1", q4_1)])
def test_stored_values_are_those_of_ggml(kind, kept, rng):
    gguf = pytest.importorskip("gguf")
    W = rng.normal(size=(7, 96)).astype(np.float32)
    number = gguf.GGMLQuantizationType[kind]
    want = gguf.quants.dequantize(gguf.quants.quantize(W, number), number)
    # ggml multiplies by the reciprocal of the step: a tie may go the other way.
    assert np.mean(kept(W) != want) < 0.01
