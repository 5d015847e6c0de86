"""pylora's own kernels under CuPy: the CUDA library's source, compiled by NVRTC.

Only those that replace a chain of array operations by one pass over memory, and that compile in
seconds: norms, rotation, activations, the loss. The launches are those of csrc/cuda/norm.cu,
pointwise.cu, features.cu and loss.cu. They take float32 matrices that lie without gaps; for any
other the caller has the reference. CuPy keeps what it has compiled on disk.
"""

from __future__ import annotations

import gzip
import threading
from pathlib import Path
from typing import Any

import numpy as np

from pylora.types import Array

# Written into pylora/backends when pylora is built.
SOURCE = Path(__file__).resolve().parents[1] / "_cuda_kernels.cu.gz"
OPTIONS = ("-std=c++17", "-DPYLORA_SMALL_KERNELS")

# struct View of csrc/cuda/device.cuh; CuPy passes a structured array of one element by value.
VIEW = np.dtype(
    [("p", "<u8"), ("rows", "<i8"), ("cols", "<i8"), ("ld", "<i8"), ("dtype", "<i4")], align=True
)
_NONE = np.uint64(0)  # a null pointer
_NOTHING = np.zeros(1, VIEW)  # a View of no matrix
_WARP, _NORM_THREADS, _NORM_KEEP, _NORM_WARPS = 32, 512, 4, 4
_COVER, _LOSS_AHEAD, _MOST_ROWS = 256, 4, 65535


class Kernels:
    """The compiled kernels; `failure` says why there are none. Compiled at the first use."""

    def __init__(self, xp: Any) -> None:
        self._xp, self._lock = xp, threading.Lock()
        self._module: Any = None
        self._functions: dict[str, Any] = {}
        self.failure: str | None = None

    @property
    def ready(self) -> bool:
        if self._module is None and self.failure is None:
            with self._lock:
                self._compile()
        return self.failure is None

    def _compile(self) -> None:
        if self._module is not None or self.failure is not None:
            return
        try:
            code = gzip.decompress(SOURCE.read_bytes()).decode()
            module = self._xp.RawModule(code=code, options=OPTIONS, backend="nvrtc")
            module.compile()
            self._module = module
        except Exception as error:  # no file, no NVRTC, a compiler's message: the reference serves
            self.failure = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"

    def fit(self, *arrays: Array) -> bool:
        """Whether the kernels are there and can take these: float32, row by row, not empty."""
        plain = all(a.dtype == np.float32 and a.flags.c_contiguous and a.size for a in arrays)
        return plain and self.ready

    def _launch(self, name: str, grid: tuple[int, ...], threads: int, *args: Any) -> None:
        if name not in self._functions:
            self._functions[name] = self._module.get_function(name)
        self._functions[name](grid, (threads,), args)

    # ---- norms: pylora_cuda_rms_norm_* --------------------------------------------------------

    @staticmethod
    def _norm(k: int, m: int, four: bool) -> tuple[str, tuple[int], int]:
        vectors = _pieces(k, 4)
        if vectors > 4 * _WARP:  # a block for each row, else a warp
            threads = _pieces(_pieces(vectors, _NORM_KEEP), _WARP) * _WARP
            return f"_block_{4 if four else 1}", (m,), min(_NORM_THREADS, threads)
        return f"_warp_{4 if four else 1}", (_pieces(m, _NORM_WARPS),), _NORM_WARPS * _WARP

    def rms_norm_forward(self, x: Array, w: Array, eps: float) -> tuple[Array, Array]:
        (m, k), y = x.shape, self._xp.empty_like(x)
        rstd = self._xp.empty(m, np.float32)
        tail, grid, threads = self._norm(k, m, _by_fours(k, x, w, y))
        name = "pylora_rms_norm_forward" + tail
        self._launch(name, grid, threads, _view(x), w, np.float32(eps), _view(y), rstd)
        return y, rstd

    def rms_norm_backward(
        self, dy: Array, x: Array, w: Array, rstd: Array, add: Array | None
    ) -> Array:
        (m, k), dx = x.shape, self._xp.empty_like(x) if add is None else add
        tail, grid, threads = self._norm(k, m, _by_fours(k, dy, x, w, dx))
        name, adds = "pylora_rms_norm_backward" + tail, np.int32(add is not None)
        self._launch(name, grid, threads, _view(dy), _view(x), w, rstd, _view(dx), adds)
        return dx

    def layer_norm_forward(
        self, x: Array, w: Array, b: Array | None, eps: float
    ) -> tuple[Array, Array]:
        (m, k), y = x.shape, self._xp.empty_like(x)
        rstd = self._xp.empty(m, np.float32)
        more = _NONE if b is None else b
        tail, grid, threads = self._norm(k, m, _by_fours(k, x, w, y, w if b is None else b))
        name, least = "pylora_layer_norm_forward" + tail, np.float32(eps)
        self._launch(name, grid, threads, _view(x), w, more, least, _view(y), rstd)
        return y, rstd

    def layer_norm_backward(
        self, dy: Array, x: Array, w: Array, rstd: Array, add: Array | None
    ) -> Array:
        (m, k), dx = x.shape, self._xp.empty_like(x) if add is None else add
        tail, grid, threads = self._norm(k, m, _by_fours(k, dy, x, w, dx))
        name, adds = "pylora_layer_norm_backward" + tail, np.int32(add is not None)
        self._launch(name, grid, threads, _view(dy), _view(x), w, rstd, _view(dx), adds)
        return dx

    # ---- elementwise: pylora_cuda_rope, pylora_cuda_swiglu_* ------------------------------------

    def rope(
        self, x: Array, cos: Array, sin: Array, position: Array, D: int, layout: str, inverse: bool
    ) -> Array:
        """`position` was checked."""
        y, half = self._xp.empty_like(x), D // 2
        turn = np.float32(-1 if inverse else 1)
        if layout == "half":
            four = half % 4 == 0 and _by_fours(x.shape[1], x, y, cos, sin)
            each = 8 if four else 2
        else:
            four = D % 4 == 0 and _by_fours(x.shape[1], x, y)
            each = 4 if four else 2
        grid, lanes = _cover(x.shape[0], x.shape[1] // each)
        name = f"pylora_rope_{layout}_{4 if four else 1}"
        views = _view(x), _view(cos), _view(sin), position, np.int32(half), turn, _view(y)
        self._launch(name, grid, _COVER, *views, np.int32(lanes), _NONE)
        return y

    def swiglu_forward(self, gate: Array, up: Array) -> Array:
        y = self._xp.empty_like(gate)
        self._pointwise("pylora_swiglu_forward", gate, up, y)
        return y

    def swiglu_backward(self, dy: Array, gate: Array, up: Array) -> tuple[Array, Array]:
        dgate, dup = self._xp.empty_like(gate), self._xp.empty_like(gate)
        self._pointwise("pylora_swiglu_backward", dy, gate, up, dgate, dup)
        return dgate, dup

    def activation_forward(self, kind: int, x: Array, up: Array | None) -> Array:
        y = self._xp.empty_like(x)
        self._pointwise("pylora_activation_forward", x, up, y, kind=kind)
        return y

    def activation_backward(
        self, kind: int, dy: Array, x: Array, up: Array | None
    ) -> tuple[Array, Array | None]:
        dx, dup = self._xp.empty_like(x), None if up is None else self._xp.empty_like(x)
        self._pointwise("pylora_activation_backward", dy, x, up, dx, dup, kind=kind)
        return dx, dup

    def _pointwise(self, name: str, *arrays: Array | None, kind: int | None = None) -> None:
        """Of matrices of one shape; None: one that is not there."""
        there = [a for a in arrays if a is not None]
        n = there[0].size
        four = _by_fours(n, *there)
        grid, lanes = _cover(1, n // 4 if four else n)
        rows = [_NOTHING if a is None else _view(a.reshape(1, n)) for a in arrays]
        first = () if kind is None else (np.int32(kind),)
        self._launch(f"{name}_{4 if four else 1}", grid, _COVER, *first, *rows, np.int32(lanes))

    # ---- the loss: pylora_cuda_cross_entropy_* ---------------------------------------------------

    @staticmethod
    def _loss_threads(vocab: int) -> int:
        return min(1024, _pieces(_pieces(_pieces(vocab, 4), _LOSS_AHEAD), _WARP) * _WARP)

    def cross_entropy_forward(self, logits: Array, labels: Array) -> tuple[Array, Array]:
        m, vocab = logits.shape
        nll, lse = self._xp.empty(m, np.float32), self._xp.empty(m, np.float32)
        name = f"pylora_cross_entropy_forward_{4 if _by_fours(vocab, logits) else 1}"
        args = _view(logits), labels, nll, lse, _NONE
        self._launch(name, (m,), self._loss_threads(vocab), *args)
        return nll, lse

    def cross_entropy_backward(
        self, logits: Array, labels: Array, lse: Array, weight: Array
    ) -> Array:
        """dlogits, in `logits`: the caller gives them away."""
        m, vocab = logits.shape
        four = _by_fours(vocab, logits)
        name = f"pylora_cross_entropy_backward_{4 if four else 1}"
        args = _view(logits), labels, lse, weight, _view(logits), np.int32(four), _NONE
        self._launch(name, (m,), self._loss_threads(vocab), *args)
        return logits


def _pieces(n: int, size: int) -> int:
    """How many pieces of `size` cover n."""
    return -(-n // size)


def _view(a: Array) -> np.ndarray:
    """struct View of a float32 matrix that lies without gaps."""
    rows, cols = a.shape
    return np.array([(a.data.ptr, rows, cols, cols, 0)], VIEW)  # 0: PYLORA_F32


def _by_fours(cols: int, *arrays: Array) -> bool:
    """Whether rows of `cols` can be read four numbers at a time."""
    return cols % 4 == 0 and all(a.data.ptr % 16 == 0 for a in arrays)


def _cover(rows: int, vectors: int) -> tuple[tuple[int, int], int]:
    """Grid and lanes for all elements of a matrix: csrc/cuda/cover.h."""
    lanes = 1
    while lanes < _COVER and lanes < vectors:
        lanes *= 2
    down = _pieces(rows, _COVER // lanes)
    return (_pieces(vectors, lanes), min(down, _MOST_ROWS)), lanes
