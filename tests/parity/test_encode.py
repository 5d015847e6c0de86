"""Every block type that is written, byte for byte what ggml makes of the same numbers."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest

llama_cpp = pytest.importorskip("llama_cpp")
from pylora.backends.c.encoding import TYPES, encode_blocks

pytestmark = pytest.mark.parity


def ggml() -> Any:
    found = sorted((Path(llama_cpp.__file__).parent / "lib").glob("*ggml-base*"))
    if not found:
        pytest.skip("llama-cpp-python has no library of ggml's")
    lib = ctypes.CDLL(str(found[0]))
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    lib.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p,
    ]  # fmt: skip
    return lib


def draws() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    n = (24, 512)
    weights = rng.normal(0, 0.02, n)
    return {
        "weights": weights,
        "heavy tails": rng.standard_t(2, n),
        "many zeros": np.where(rng.random(n) < 0.7, 0, weights),
        "zeros": np.zeros(n),
        "one number": np.full(n, 0.3),
        "negative": -np.abs(weights),
        "positive": np.abs(weights),
        "a grid": rng.integers(-8, 8, n) / 16,
        "many sizes": np.exp(rng.normal(0, 2, n)) * rng.choice([-1, 1], n),
        "tiny": rng.normal(0, 1e-15, n),
    }


@pytest.mark.parametrize("kind", TYPES)
def test_the_bytes_are_ggml_s(kind: str) -> None:
    lib = ggml()
    for name, numbers in draws().items():
        x = np.ascontiguousarray(numbers, np.float32)
        got = encode_blocks(x, kind)
        want = np.zeros_like(got)
        rows, k = x.shape
        size = lib.ggml_quantize_chunk(
            TYPES[kind], x.ctypes.data, want.ctypes.data, 0, rows, k, None
        )
        assert size == want.nbytes
        assert (got == want).all(), name
