"""Results of another form than the protocol says are broken, and the sentence says which part."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("hypothesis")
pytest.importorskip("ml_dtypes")

from pylora.conformance import run
from pylora.conformance.correct.plain import Correct
from pylora.conformance.forms import Form, form
from pylora.conformance.protocol import METHODS

CHANGES = [
    ("E3", "embedding_forward", lambda y: y[:, :0], "has shape"),
    ("E3", "embedding_forward", lambda y: y.astype(np.complex64), "has dtype complex64"),
    ("E6", "embedding_backward", lambda g: g[0], "expected a tuple of 2"),
    ("B20", "backward_mixed", lambda g: (g[0], g[1] + [g[0]]), "expected a tuple of"),
    (
        "B20",
        "backward_mixed",
        lambda g: (g[0], [(A[:0], B) for A, B in g[1]]),
        "element 0 of element",
    ),
    ("A27", "adapter_step", lambda p: {"A": p["A"]}, "must be a dict of A, B"),
    ("D33", "dropout_mask", lambda m: m.astype(np.float32), "expected bool"),
    ("A24", "cross_entropy", lambda r: (r[0][:, None], r[1]), "element 0 of the result"),
    ("G4", "decoder", lambda d: object(), "no method extend"),
]


@pytest.mark.parametrize("law, method, change, said", CHANGES)
def test_another_form_is_broken(law, method, change, said):
    made = getattr(Correct, method)
    wrong = type("Wrong", (Correct,), {method: lambda self, *a: change(made(self, *a))})
    (outcome,) = run(wrong, [law], examples=25).outcomes
    assert outcome.status == "BROKEN" and said in outcome.reason, outcome.reason


def test_a_decoder_that_returns_another_dtype_is_broken():
    class Wide(Correct):
        def decoder(self, weights, shape):
            session = super().decoder(weights, shape)
            extend = session.extend
            session.extend = lambda *a: extend(*a).astype(np.float64)
            return session

    (outcome,) = run(Wide, ["G4"], examples=5).outcomes
    assert outcome.status == "BROKEN" and "expected an array of float32" in outcome.reason


def test_forms_are_of_methods():
    a = np.zeros((3, 2), np.float32)
    assert form("rms_norm", (a, a[0], 1e-5)) == Form((3, 2), np.dtype(np.float32))
    assert form("no_such", ()) is None
    assert form("forward", ()) is None  # testcase.py looks at that itself
    assert "embedding_merge" in METHODS
