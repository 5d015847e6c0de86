"""loralib (microsoft/LoRA), the paper's own code, under the kit.

PYTHONPATH=examples/conformance pylora conformance loralib_adapter:LoraLib
"""

from __future__ import annotations

from typing import Any

try:
    import loralib
    from torch_plain import array, seeded, tensor
except ImportError as error:
    raise SystemExit(f"this example needs PyTorch and loralib: {error}") from None


class LoraLib:
    """One loralib.Linear for each call, its arrays put in."""

    name = "loralib"
    dtypes = ("float32", "float64", "bfloat16")

    def _layer(
        self, W: Any, bias: Any = None, lora: Any = None, p: float = 0.0, fresh: bool = False
    ) -> Any:
        d, k = W.shape
        r = 0 if lora is None else lora[0].shape[0]
        alpha = 1 if lora is None else lora[2] * r
        layer = loralib.Linear(k, d, r=r, lora_alpha=alpha, lora_dropout=p, bias=bias is not None)
        W = tensor(W)
        layer.to(W.dtype)
        layer.weight.data = W
        if bias is not None:
            layer.bias.data = tensor(bias)
        if lora is not None:
            layer.lora_A.data, layer.lora_B.data = tensor(lora[0]), tensor(lora[1])
        return layer

    def forward(self, x: Any, W: Any, A: Any, B: Any, scale: float, bias: Any = None) -> Any:
        return array(self._layer(W, bias, (A, B, scale))(tensor(x)))

    def base(self, x: Any, W: Any, bias: Any = None) -> Any:
        return array(self._layer(W, bias)(tensor(x)))

    def backward(self, dy: Any, x: Any, W: Any, A: Any, B: Any, scale: float) -> Any:
        return self.dropout_backward(dy, x, W, A, B, scale, 0.0, 0)

    def scaling(self, alpha: float, r: int, use_rslora: bool) -> float:
        if use_rslora:
            raise NotImplementedError("loralib has no rsLoRA")
        return float(loralib.Linear(1, 1, r=r, lora_alpha=alpha).scaling)

    def init(self, d: int, k: int, r: int, seed: int, method: str) -> Any:
        seeded(seed)
        layer = loralib.Linear(k, d, r=r)  # Kaiming; it has no other way
        if method == "gaussian":
            raise NotImplementedError("loralib has no gaussian initial values")
        return array(layer.lora_A), array(layer.lora_B)

    def merge(self, W: Any, A: Any, B: Any, scale: float) -> Any:
        layer = self._layer(W, None, (A, B, scale))
        layer.eval()  # merging is what eval() does in loralib
        return array(layer.weight)

    def unmerge(self, W: Any, A: Any, B: Any, scale: float) -> Any:
        layer = self._layer(W, None, (A, B, scale))
        layer.merged = True
        layer.train()
        return array(layer.weight)

    def dropout_forward(
        self, x: Any, W: Any, A: Any, B: Any, scale: float, p: float, seed: int
    ) -> Any:
        layer = self._layer(W, None, (A, B, scale), p)
        seeded(seed)
        return array(layer(tensor(x)))

    def dropout_backward(
        self, dy: Any, x: Any, W: Any, A: Any, B: Any, scale: float, p: float, seed: int
    ) -> Any:
        layer, x = self._layer(W, None, (A, B, scale), p), tensor(x).requires_grad_()
        seeded(seed)
        layer(x).backward(tensor(dy))
        dW = None if layer.weight.grad is None else array(layer.weight.grad)
        return array(x.grad), array(layer.lora_A.grad), array(layer.lora_B.grad), dW


if __name__ == "__main__":
    from pylora.conformance.running.report import text
    from pylora.conformance.running.runner import run

    print(text(run(LoraLib)))
