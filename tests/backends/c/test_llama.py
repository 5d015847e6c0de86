"""The whole-model operation of the C core has the bits of its composition, of any structure."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from structures import run, structures, weights_of

from pylora import backends
from pylora.ops.composed import Composed

c = pytest.importorskip("pylora.backends.c")
PRECISIONS = ("fp32", "bf16", "int8", "int4", "int4a8")


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return [x.tobytes() for x in a] == [y.tobytes() for y in b]


@pytest.mark.parametrize("precision", PRECISIONS)
@settings(max_examples=25)
@given(s=structures())
def test_the_bits_of_the_composition(precision: str, s: dict[str, Any]) -> None:
    ops = backends.get("c")
    w = weights_of(s, precision, ops)
    native = ops.llama(w)
    assert not isinstance(native, Composed)
    assert same(run(native, w, s, ops), run(Composed(ops, w), w, s, ops))
