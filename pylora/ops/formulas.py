"""The operations that families add to Llama's, in array notation: LayerNorm, activations, caps.

`Reference` is made of these, and so is a backend that computes on arrays of such a namespace and
has no kernels of its own for them. They are written to be right, not fast.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pylora.errors import BackendError
from pylora.numbers.precision import as_dtype
from pylora.ops.features import ACTIVATIONS
from pylora.types import Array


class Formulas:
    """The operations over the array namespace `xp`."""

    xp: Any
    swiglu_forward: Any
    swiglu_backward: Any

    def layer_norm_forward(
        self, x: Array, w: Array, b: Array | None, eps: float, dtype: Any = None
    ) -> tuple[Array, Array]:
        """c = x - mean(x); rstd = 1 / sqrt(mean(c²) + eps) [m]; y = c rstd w + b (Ba et al. 2016).

        b may be None. Returns y, rstd.
        """
        c = x - x.mean(axis=1)[:, None]
        rstd = 1 / self.xp.sqrt((c * c).mean(axis=1) + x.dtype.type(eps))
        y = c * rstd[:, None] * w
        return as_dtype(y if b is None else y + b, dtype), rstd

    def layer_norm_backward(
        self, dy: Array, x: Array, w: Array, rstd: Array, add: Array | None = None
    ) -> Array:
        """dx = add + rstd (g - mean(g) - n mean(g n)), g = dy w, n = (x - mean(x)) rstd."""
        r, g = rstd[:, None], dy * w
        n = (x - x.mean(axis=1)[:, None]) * r
        dx = r * (g - g.mean(axis=1)[:, None] - n * (g * n).mean(axis=1)[:, None])
        return dx if add is None else add + dx

    def activation_forward(self, x: Array, up: Array | None, kind: str, dtype: Any = None) -> Array:
        """act(x) up, or act(x) where up is None. "silu" x sigmoid(x); "gelu_tanh" x sigmoid(2u),
        u = sqrt(2/pi) (x + 0.044715 x³); "gelu_erf" x (1 + erf(x / sqrt 2)) / 2 (Hendrycks & Gimpel
        2016); "relu2" max(x, 0)² (So et al. 2021)."""
        if kind == "silu" and up is not None:
            return self.swiglu_forward(x, up, dtype)
        y, _ = self._activation(x, kind)
        return as_dtype(y if up is None else y * up, dtype)

    def activation_backward(
        self, dy: Array, x: Array, up: Array | None, kind: str, dtype: Any = None
    ) -> tuple[Array, Array | None]:
        """dx = dy up act'(x), dup = dy act(x); without up dx alone, and None."""
        if kind == "silu" and up is not None:
            both: tuple[Array, Array | None] = self.swiglu_backward(dy, x, up, dtype)
            return both
        y, slope = self._activation(x, kind)
        if up is None:
            return as_dtype(dy * slope, dtype), None
        return as_dtype(dy * up * slope, dtype), as_dtype(dy * y, dtype)

    def _activation(self, x: Array, kind: str) -> tuple[Array, Array]:
        """act(x) and its derivative."""
        xp = self.xp
        if kind == "silu":
            sigma = self._sigmoid(x)
            return x * sigma, sigma * (1 + x * self._sigmoid(-x))
        if kind == "gelu_tanh":
            c, d = x.dtype.type(2 * math.sqrt(2 / math.pi)), x.dtype.type(0.044715)
            u = c * (x + d * x * x * x)
            sigma = self._sigmoid(u)
            r = xp.where(abs(x.real) < 20, x, 0 * x)  # beyond, a sigmoid is 0 and x² may overflow
            return x * sigma, sigma * (1 + r * self._sigmoid(-u) * c * (1 + 3 * d * r * r))
        if kind == "gelu_erf":
            half, density = self._normal(x)
            return x * half, half + x * density
        if kind == "relu2":
            r = xp.where(x.real > 0, x, 0 * x)
            return r * r, 2 * r
        raise BackendError(f"activation {kind!r} is none of {', '.join(ACTIVATIONS)}")

    def _normal(self, x: Array) -> tuple[Array, Array]:
        """The standard normal's distribution function and density. NumPy has no erf: the C
        library's is taken number by number, and continued analytically for complex numbers whose
        imaginary part is a step of differentiation."""
        xp, t = self.xp, x.dtype.type
        density = xp.exp(-x * x / 2) * t(1 / math.sqrt(2 * math.pi))
        real = np.asarray(x.real.get() if hasattr(x, "get") else x.real, np.float64)
        flat = np.array([math.erfc(-v / math.sqrt(2)) / 2 for v in real.ravel().tolist()])
        below = xp.asarray(flat.reshape(real.shape)).astype(x.real.dtype)
        if x.dtype.kind == "c":
            below = below + 1j * x.imag * density.real
        return below, density

    def soft_cap_forward(self, x: Array, multiplier: float, cap: float) -> Array:
        """cap tanh(multiplier x / cap); without a cap (0) multiplier x, and x itself for 1."""
        if multiplier != 1:
            x = x * x.dtype.type(multiplier)
        return self.capped(x, cap)

    def soft_cap_backward(self, dy: Array, y: Array, multiplier: float, cap: float) -> Array:
        """dx of `soft_cap_forward`, whose result was y: multiplier dy (1 - (y / cap)²)."""
        if cap:
            dy = dy * (1 - (y / y.dtype.type(cap)) ** 2)
        return dy if multiplier == 1 else dy * dy.dtype.type(multiplier)

    def capped(self, x: Array, cap: float) -> Array:
        """cap tanh(x / cap); x where cap is 0."""
        if not cap:
            return x
        c = x.dtype.type(cap)
        return c * self.xp.tanh(x / c)

    def _sigmoid(self, x: Array) -> Array:
        xp = self.xp
        if x.dtype.kind == "c":  # complex step: one formula, analytic everywhere
            return 1 / (1 + xp.exp(-x))
        e = xp.exp(-abs(x))  # at most 1: no overflow
        return xp.where(x >= 0, 1, e) / (1 + e)
