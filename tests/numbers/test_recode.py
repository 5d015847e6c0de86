"""Blocks of other kinds as Q4_1 and Q8_0: gguf-py says what they are worth."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize as theirs
from hypothesis import given
from hypothesis import strategies as st

from pylora.numbers.precision import Stored
from pylora.numbers.quantize import dequantize
from pylora.numbers.recode import RECODED, recode

SIZES = {"q4_k": (256, 144), "q5_0": (32, 22)}


def blocks(kind: str, seed: int, rows: int = 3, columns: int = 512) -> np.ndarray:
    """Random bytes, with scales that are ordinary numbers."""
    rng = np.random.default_rng(seed)
    size, width = SIZES[kind]
    out = rng.integers(0, 256, (rows * columns // size, width), np.uint8)
    for i in (0, 2) if kind == "q4_k" else (0,):
        scale = (rng.standard_normal(len(out)) * 10.0 ** rng.integers(-4, 1)).astype("<f2")
        out[:, i : i + 2] = scale.view(np.uint8).reshape(-1, 2)
    return out.reshape(rows, -1)


def worth(rows: np.ndarray, kind: str) -> np.ndarray:
    return theirs(rows, gguf.GGMLQuantizationType[kind.upper()])


@given(st.integers(0, 2**32))
def test_q5_0_keeps_every_value(seed: int) -> None:
    rows = blocks("q5_0", seed)
    got = recode(rows, "q5_0")
    assert got is not None
    same = dequantize(Stored("q8_0", got, (3, 512)))
    np.testing.assert_array_equal(same, worth(rows, "q5_0"))


@given(st.integers(0, 2**32))
def test_q4_k_moves_by_the_rounding_of_its_two_scales(seed: int) -> None:
    rows = blocks("q4_k", seed)
    got = recode(rows, "q4_k")
    assert got is not None
    near = dequantize(Stored("q4_1", got, (3, 512))).astype(np.float64).reshape(-1, 32)
    want = worth(rows, "q4_k").astype(np.float64).reshape(-1, 32)
    # The group's exact scale and minimum, out of the values of the codes themselves.
    codes = got.reshape(-1, 20)[:, 4:]
    q = np.hstack([codes & 15, codes >> 4]).astype(np.float64)
    head = got.reshape(-1, 20)[:, :4].copy().view("<f2").astype(np.float64)
    scale, low = np.abs(head[:, :1]), np.abs(head[:, 1:])
    bound = 2.0**-11 * (q * scale + low) * (1 + 2.0**-10) + 2.0**-25 * (q + 1)
    assert (np.abs(near - want) <= bound + 1e-6 * np.abs(want)).all()


def test_scales_beyond_float16_are_not_recoded() -> None:
    rows = blocks("q4_k", 0)
    rows[0, :2] = np.array([60000], "<f2").view(np.uint8)
    rows[0, 4:8] = 63
    assert recode(rows, "q4_k") is None


@pytest.mark.parametrize("kind", RECODED)
def test_a_row_of_other_length_cannot_be_recoded(kind: str) -> None:
    with pytest.raises(ValueError):
        recode(np.zeros((1, 7), np.uint8), kind)
