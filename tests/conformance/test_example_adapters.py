"""The adapters in examples/conformance run, and find what docs/conformance.md says they find."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

pytest.importorskip("hypothesis")
pytest.importorskip("ml_dtypes")

from pylora import backends
from pylora.conformance import run
from pylora.conformance.running.report import text

EXAMPLES = Path(__file__).parents[2] / "examples" / "conformance"

# What fails in PEFT 0.21 and loralib 0.1.2; docs/conformance.md tells each.
# Plain PyTorch: an embedding and a step's micro-batches add up gradients of 16 bits in 16 bits; the
# loss multiplies the gradient of an uncounted row by 0, which leaves NaN where logits have it.
TORCH = {"E6", "B18", "V20"}
PEFT = {"E6", "E9", "M3", "M17", "K5", "K6", "K11", "K12", "T7", "T8", "T9", "T12"}
PEFT |= {"K20", "K21", "K24", "K26", "K27", "K30", "K33", "T21", "T22", "T23"}
LORALIB = {"M3", "M17"}  # the same rounding


@pytest.fixture
def adapter(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def load(module: str, name: str):
        return getattr(importlib.import_module(module), name)

    yield load
    for module in EXAMPLES.glob("*.py"):
        sys.modules.pop(module.stem, None)


def wrong(report):
    assert not report.of("BROKEN"), text(report)
    return {o.law.id for o in report.of("FAILED")}


@pytest.mark.parametrize("name, backend", [("NumPy", "numpy"), ("C", "c")])
def test_our_backends_keep_every_law(adapter, name, backend):
    if backend not in backends.available():
        pytest.skip(f"the backend {backend} is not built here")
    assert wrong(run(adapter("pylora_backends", name), examples=12)) == set()


@pytest.mark.parametrize("precision", ["Fp32x3", "Bf16", "Int8", "Int4"])
def test_the_c_backend_keeps_every_law_in_every_precision(adapter, precision):
    if "c" not in backends.available():
        pytest.skip("the backend c is not built here")
    report = run(adapter("pylora_backends", f"C{precision}"), examples=6)
    assert wrong(report) == set() and report.warnings == []
    # All but merging and what needs it, float64 and complex numbers.
    assert len(report.of("passed")) >= 90
    assert {o.law.id for o in report.of("passed")} >= {"F5", "F7", "Q1", "B1", "X5", "N4", "N6"}


@pytest.mark.parametrize("kind", ["Q4K", "Q6K"])
def test_the_c_backend_keeps_every_law_on_blocks_of_a_file(adapter, kind):
    if "c" not in backends.available():
        pytest.skip("the backend c is not built here")
    # All laws, and Q5_0: .ci/nightly. These are of the products, their gradients and rows.
    laws = "F1 F2 F3 F5 F7 F8 G1 G2 G3 Q1 B1 B2 B3 E1 E2 E3 X1 X3 X5 N3 N4 D1 D2 O1".split()
    report = run(adapter("pylora_blocks", kind), laws, examples=2)
    assert wrong(report) == set() and report.warnings == []
    assert len(report.of("passed")) > len(laws) - 2


def test_plain_numpy_keeps_every_law_that_it_can_be_asked(adapter):
    report = run(adapter("numpy_ten_lines", "Plain"), examples=25)
    assert wrong(report) == set()
    assert len(report.of("passed")) >= 30 and len(report.of("not tested")) >= 50


@pytest.mark.parity
def test_plain_pytorch_keeps_every_law_that_it_can_be_asked(adapter):
    pytest.importorskip("torch")
    assert wrong(run(adapter("torch_plain", "Torch"), examples=20)) == TORCH


@pytest.mark.parity
def test_peft_fails_where_the_docs_say(adapter):
    pytest.importorskip("peft")
    assert wrong(run(adapter("peft_adapter", "Peft"), examples=20)) == PEFT


@pytest.mark.parity
def test_loralib_fails_where_the_docs_say(adapter):
    pytest.importorskip("loralib")
    assert wrong(run(adapter("loralib_adapter", "LoraLib"), examples=20)) == LORALIB


@pytest.mark.parity
def test_jax_keeps_every_law_that_it_can_be_asked(adapter):
    pytest.importorskip("jax")
    laws = ("F1", "F2", "F4", "B2", "B3", "B7")
    assert wrong(run(adapter("jax_adapter", "Jax"), laws, examples=5)) == set()
