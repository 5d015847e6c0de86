"""The cupy backend with pylora's kernels, against the reference that it is without them.

Runs where PYLORA_TEST_BACKENDS names cupy and cuda, which brings what stands for NVRTC.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pylora import backends
from pylora.backends.cupy.kernels import Kernels
from pylora.errors import RangeError
from pylora.model.llama import IGNORE

NAMED = os.environ.get("PYLORA_TEST_BACKENDS", "").split(",")
pytestmark = pytest.mark.skipif(
    not {"cuda", "cupy"} <= set(NAMED), reason="PYLORA_TEST_BACKENDS does not name cuda and cupy"
)

SIZES = [(1, 1), (3, 6), (5, 24), (7, 530), (2, 2064)]


@pytest.fixture
def gpu() -> Any:
    ops = backends.exactly("cupy")
    assert ops.kernels.ready, ops.kernels.failure
    return ops


def both(gpu: Any, op: str, *args: Any, **kw: Any) -> tuple[list[Any], list[Any], list[str]]:
    """The results with kernels and without, and the kernels that ran."""
    ran: list[str] = []
    launch = gpu.kernels._launch

    def noted(name: str, *rest: Any) -> None:
        ran.append(name)
        launch(name, *rest)

    def run(copied: list[Any]) -> list[Any]:
        result = getattr(gpu, op)(*copied, **kw)
        result = result if isinstance(result, tuple) else (result,)
        return [gpu.to_numpy(r) for r in result if r is not None]

    def copies() -> list[Any]:
        floats = lambda a: isinstance(a, np.ndarray) and a.dtype.kind == "f"
        return [gpu.place(a.copy()) if floats(a) else a for a in args]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu.kernels, "_launch", noted)
        with_kernels = run(copies())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu.kernels, "failure", "switched off")
        without = run(copies())
    return with_kernels, without, ran


def agree(gpu: Any, op: str, *args: Any, **kw: Any) -> list[str]:
    """Largest difference: some roundings of float32 along a row (the sums are of 2064 terms)."""
    mine, theirs, ran = both(gpu, op, *args, **kw)
    assert ran and all(name.startswith("pylora_") for name in ran)
    for a, b in zip(mine, theirs, strict=True):
        assert a.dtype == b.dtype == np.float32 and a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)
    return ran


@pytest.mark.parametrize("size", SIZES)
def test_norms(gpu: Any, rng: np.random.Generator, size: tuple[int, int]) -> None:
    m, k = size
    x, dy, add = (rng.standard_normal(size).astype(np.float32) for _ in range(3))
    w = rng.standard_normal(k).astype(np.float32)
    (name,) = agree(gpu, "rms_norm_forward", x, w, 1e-5)
    assert ("_block_" in name) == (k > 512) and name.endswith("4" if k % 4 == 0 else "1")
    rstd = (1 / np.sqrt((x * x).mean(axis=1) + 1e-5)).astype(np.float32)
    agree(gpu, "rms_norm_backward", dy, x, w, rstd)
    agree(gpu, "rms_norm_backward", dy, x, w, rstd, add)


@pytest.mark.parametrize("size", SIZES)
def test_swiglu(gpu: Any, rng: np.random.Generator, size: tuple[int, int]) -> None:
    dy, gate, up = (3 * rng.standard_normal(size).astype(np.float32) for _ in range(3))
    agree(gpu, "swiglu_forward", gate, up)
    agree(gpu, "swiglu_backward", dy, gate, up)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("D", [2, 6, 16])
def test_rope(gpu: Any, rng: np.random.Generator, D: int, layout: str) -> None:
    x = rng.standard_normal((9, 3 * D)).astype(np.float32)
    angle = rng.standard_normal((12, D // 2))
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    position = rng.integers(0, 12, 9)
    agree(gpu, "rope", x, cos, sin, position, D, layout)
    agree(gpu, "rope", x, cos, sin, position, D, layout, inverse=True)
    with pytest.raises(RangeError):
        gpu.rope(*(gpu.place(a) for a in (x, cos, sin)), position + 12, D, layout)


@pytest.mark.parametrize("size", SIZES)
def test_the_loss(gpu: Any, rng: np.random.Generator, size: tuple[int, int]) -> None:
    m, vocab = size
    logits = (4 * rng.standard_normal(size)).astype(np.float32)
    labels = rng.integers(0, vocab, m)
    labels[-1] = IGNORE
    weight = rng.uniform(0.1, 1, m).astype(np.float32)
    agree(gpu, "cross_entropy_forward", logits, labels)
    ran = agree(gpu, "cross_entropy", logits, labels, weight, overwrite=True)
    assert len(ran) == 2
    with pytest.raises(RangeError):
        gpu.cross_entropy_forward(gpu.place(logits), np.full(m, vocab))


def test_what_the_kernels_do_not_take_the_reference_does(
    gpu: Any, rng: np.random.Generator
) -> None:
    x, w = rng.standard_normal((4, 6)), rng.standard_normal(6)  # float64
    mine, theirs, ran = both(gpu, "rms_norm_forward", x, w, 1e-5)
    assert not ran and all((a == b).all() for a, b in zip(mine, theirs))


def test_without_a_compiler_the_reference_serves(
    gpu: Any, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("pylora.backends.cupy.kernels.SOURCE", tmp_path / "none.cu")
    kernels = Kernels(gpu.xp)
    assert not kernels.ready and "FileNotFoundError" in (kernels.failure or "")
    monkeypatch.setattr(gpu, "kernels", kernels)
    x = gpu.place(rng.standard_normal((3, 8)).astype(np.float32))
    y, _ = gpu.rms_norm_forward(x, gpu.place(np.ones(8, np.float32)), 1e-5)
    assert np.allclose((gpu.to_numpy(y) ** 2).mean(axis=1), 1, atol=1e-3)
