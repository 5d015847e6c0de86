"""The adapters in examples/conformance run, and find what docs/conformance.md says they find.

Each adapter is asked each law that it can be asked with PYLORA_ALL_LAWS (.ci/nightly). A run of the
tests asks the C core all of them and the others a share each: those that go wrong, where an adapter
is known to, those that a share was chosen for, and of the rest as many as its share is.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from zlib import crc32

import pytest

pytest.importorskip("hypothesis")
pytest.importorskip("ml_dtypes")

from pylora import backends
from pylora.conformance import LAWS, run
from pylora.conformance.running.report import text

EXAMPLES = Path(__file__).parents[2] / "examples" / "conformance"
ALL = bool(os.environ.get("PYLORA_ALL_LAWS"))
# Of the products, their gradients and rows, in which every kernel has a part.
PRODUCTS = "F1 F2 F3 F5 F7 F8 G1 G2 G3 Q1 B1 B2 B3 E1 E2 E3 X1 X3 X5 N3 N4 D1 D2 O1".split()


def share(name: str, of: int, *always: str) -> tuple[str, ...]:
    """Every law, or one of so many, others for each name, and those that are always asked."""
    if ALL:
        return ()
    return tuple(i for i in LAWS if i in always or crc32(f"{name} {i}".encode()) % of == 0)


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


@pytest.mark.parametrize("name, backend, of", [("NumPy", "numpy", 6), ("C", "c", 1)])
def test_our_backends_keep_every_law(adapter, name, backend, of):
    if backend not in backends.available():
        pytest.skip(f"the backend {backend} is not built here")
    # NumPy's operations are the reference's, which test_mutants.py asks every law.
    report = run(adapter("pylora_backends", name), share(name, of), examples=12 if ALL else 4)
    assert wrong(report) == set()


@pytest.mark.parametrize("precision", ["Fp32x3", "Bf16", "Int8", "Int4"])
def test_the_c_backend_keeps_every_law_in_every_precision(adapter, precision):
    if "c" not in backends.available():
        pytest.skip("the backend c is not built here")
    laws = share(precision, 12, *PRODUCTS, "N6")
    report = run(adapter("pylora_backends", f"C{precision}"), laws, examples=6 if ALL else 3)
    assert wrong(report) == set() and report.warnings == []
    # All but merging and what needs it, float64 and complex numbers.
    assert len(report.of("passed")) >= (90 if ALL else 25)
    assert {o.law.id for o in report.of("passed")} >= {"F5", "F7", "Q1", "B1", "X5", "N4", "N6"}


@pytest.mark.parametrize("kind", ["Q4K", "Q6K"])
def test_the_c_backend_keeps_every_law_on_blocks_of_a_file(adapter, kind):
    if "c" not in backends.available():
        pytest.skip("the backend c is not built here")
    # All laws, and Q5_0: .ci/nightly.
    report = run(adapter("pylora_blocks", kind), PRODUCTS, examples=2)
    assert wrong(report) == set() and report.warnings == []
    assert len(report.of("passed")) > len(PRODUCTS) - 2


def test_plain_numpy_keeps_every_law_that_it_can_be_asked(adapter):
    report = run(adapter("numpy_ten_lines", "Plain"), examples=25 if ALL else 6)
    assert wrong(report) == set()
    assert len(report.of("passed")) >= 30 and len(report.of("not tested")) >= 50


@pytest.mark.parity
def test_plain_pytorch_keeps_every_law_that_it_can_be_asked(adapter):
    pytest.importorskip("torch")
    assert (
        wrong(run(adapter("torch_plain", "Torch"), share("torch", 3, *TORCH), examples=20)) == TORCH
    )


@pytest.mark.parity
def test_peft_fails_where_the_docs_say(adapter):
    pytest.importorskip("peft")
    assert wrong(run(adapter("peft_adapter", "Peft"), share("peft", 6, *PEFT), examples=20)) == PEFT


@pytest.mark.parity
def test_loralib_fails_where_the_docs_say(adapter):
    pytest.importorskip("loralib")
    laws = share("loralib", 3, *LORALIB)
    assert wrong(run(adapter("loralib_adapter", "LoraLib"), laws, examples=20)) == LORALIB


@pytest.mark.parity
def test_jax_keeps_every_law_that_it_can_be_asked(adapter):
    pytest.importorskip("jax")
    laws = ("F1", "F2", "F4", "B2", "B3", "B7")
    assert wrong(run(adapter("jax_adapter", "Jax"), laws, examples=5)) == set()
