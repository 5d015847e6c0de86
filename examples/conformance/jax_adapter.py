"""LoRA in JAX, with its gradients and complex numbers.

    PYTHONPATH=examples/conformance pylora conformance jax_adapter:Jax

Every new shape is compiled by XLA, which takes most of the time: try it with few examples.
"""

from __future__ import annotations

from typing import Any

import numpy as np

try:
    import jax
except ImportError as error:
    raise SystemExit(f"this example needs JAX (pip install jax): {error}") from None

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_default_matmul_precision", "highest")


def forward(x: Any, W: Any, A: Any, B: Any, scale: float, bias: Any = None) -> Any:
    y = x @ W.T + scale * ((x @ A.T) @ B.T)
    return y if bias is None else y + bias


class Jax:
    name = f"JAX {jax.__version__}"
    dtypes = ("float32", "float64", "complex128")

    def forward(self, x: Any, W: Any, A: Any, B: Any, scale: float, bias: Any = None) -> Any:
        arrays = [jax.numpy.asarray(np.array(a)) for a in (x, W, A, B)]
        b = None if bias is None else jax.numpy.asarray(np.array(bias))
        return np.asarray(forward(*arrays, scale, b))

    def backward(self, dy: Any, x: Any, W: Any, A: Any, B: Any, scale: float) -> Any:
        dy, x, W, A, B = (jax.numpy.asarray(np.array(a)) for a in (dy, x, W, A, B))
        _, pull = jax.vjp(lambda x, A, B: forward(x, W, A, B, scale), x, A, B)
        return tuple(np.asarray(g) for g in pull(dy))


if __name__ == "__main__":
    from pylora.conformance.running.report import text
    from pylora.conformance.running.runner import run

    print(text(run(Jax, examples=20)))
