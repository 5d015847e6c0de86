"""pylora's own backends under the kit.

PYTHONPATH=examples/conformance pylora conformance pylora_backends:C
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pylora import backends, random
from pylora.conformance.correct import Correct
from pylora.types import Drop, LoRA


class _Backend(Correct):
    """The methods that a backend computes; files, plan and initial values are not a backend's."""

    dtypes: tuple[str, ...] = ("float32",)

    def __init__(self, name: str) -> None:
        self.name = f"pylora, backend {name}"
        self.ops: Any = backends.get(name)

    def _forward(self, x: Any, W: Any, bias: Any, lora: LoRA | None, drop: Any = None) -> Any:
        return self.ops.lora_forward(x, self.ops.pack(W), bias, lora, drop)[0]

    def forward(self, x: Any, W: Any, A: Any, B: Any, scale: float, bias: Any = None) -> Any:
        return self._forward(x, W, bias, LoRA(A, B, scale))

    def base(self, x: Any, W: Any, bias: Any = None) -> Any:
        return self._forward(x, W, bias, None)

    def dropout_forward(
        self, x: Any, W: Any, A: Any, B: Any, scale: float, p: float, seed: int
    ) -> Any:
        drop = Drop(p, seed, random.stream("dropout", "module", "0")) if p else None
        return self._forward(x, W, None, LoRA(A, B, scale, p), drop)

    def dropout_backward(
        self, dy: Any, x: Any, W: Any, A: Any, B: Any, scale: float, p: float, seed: int
    ) -> Any:
        ops, lora = self.ops, LoRA(A, B, scale, p)
        drop = Drop(p, seed, random.stream("dropout", "module", "0")) if p else None
        packed = ops.pack(W)
        _, h = ops.lora_forward(x, packed, None, lora, drop)
        return ops.lora_backward(dy, x, h, packed, lora, drop)

    def forward_stacked(self, x: Any, W: Any, adapters: Any, bias: Any = None) -> Any:
        if not adapters:
            return self.base(x, W, bias)
        A = np.concatenate([A for A, _, _ in adapters])
        B = np.concatenate([B * np.float32(s) for _, B, s in adapters], axis=1)
        return self.forward(x, W, A, B, 1.0, bias)

    # Reference packs nothing; a backend's linear operations take packed weights.
    def attention(self, x: Any, weights: Any, adapters: Any, shape: Any) -> Any:
        return super().attention(x, self._pack(weights), adapters, shape)

    def attention_backward(self, dy: Any, x: Any, weights: Any, adapters: Any, shape: Any) -> Any:
        return super().attention_backward(dy, x, self._pack(weights), adapters, shape)

    def _pack(self, weights: Any) -> Any:
        return {name: self.ops.pack(W) for name, W in weights.items()}


class NumPy(_Backend):
    def __init__(self) -> None:
        super().__init__("numpy")


class C(_Backend):
    def __init__(self) -> None:
        super().__init__("c")

    def set_num_threads(self, n: int) -> None:
        self.ops.set_num_threads(n)


if __name__ == "__main__":
    from pylora.conformance.report import text
    from pylora.conformance.runner import run

    reports = [run(NumPy), run(C)]
    print(*map(text, reports))
    assert all(report.ok for report in reports)
