"""LoRA as one writes it in PyTorch, with autograd's gradients.

PYTHONPATH=examples/conformance pylora conformance torch_plain:Torch
"""

from __future__ import annotations

from typing import Any

import numpy as np

try:
    import torch
except ImportError as error:
    raise SystemExit(f"this example needs PyTorch: {error}") from None

torch.set_num_threads(1)


def tensor(a: Any) -> Any:
    """A tensor of its own memory: torch takes neither negative strides nor read-only arrays."""
    a = np.array(a, order="C")
    if str(a.dtype) == "bfloat16":
        return torch.from_numpy(a.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(a)


def array(t: Any) -> Any:
    t = t.detach().contiguous()
    if t.dtype == torch.bfloat16:
        import ml_dtypes

        return t.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return t.numpy()


def seeded(seed: int) -> None:
    """Seeds PyTorch, whose generator on a CPU takes 32 bits of a seed and drops the others."""
    if not 0 <= seed < 1 << 32:
        raise ValueError(f"seed {seed}: PyTorch's generator on a CPU takes 0 to 2**32 - 1")
    torch.manual_seed(seed)


class Torch:
    name = "plain PyTorch"
    dtypes = ("float32", "float64", "bfloat16", "complex128")

    def _forward(self, x: Any, W: Any, A: Any, B: Any, scale: float, bias: Any = None) -> Any:
        linear = torch.nn.functional.linear
        return linear(x, W, bias) + scale * linear(linear(x, A), B)

    def forward(self, x: Any, W: Any, A: Any, B: Any, scale: float, bias: Any = None) -> Any:
        b = None if bias is None else tensor(bias)
        return array(self._forward(*map(tensor, (x, W, A, B)), scale, b))

    def base(self, x: Any, W: Any, bias: Any = None) -> Any:
        b = None if bias is None else tensor(bias)
        return array(torch.nn.functional.linear(tensor(x), tensor(W), b))

    def backward(self, dy: Any, x: Any, W: Any, A: Any, B: Any, scale: float) -> Any:
        x, A, B = (tensor(a).requires_grad_() for a in (x, A, B))
        self._forward(x, tensor(W), A, B, scale).backward(tensor(dy))
        return tuple(array(t.grad) for t in (x, A, B))

    def loss_gradients(self, batches: Any, W: Any, A: Any, B: Any, scale: float) -> Any:
        A, B, W = tensor(A).requires_grad_(), tensor(B).requires_grad_(), tensor(W)
        total = sum(int(c.sum()) for _, _, c in batches)
        for x, target, counted in batches:
            off = self._forward(tensor(x), W, A, B, scale) - tensor(target)
            (0.5 * (off**2).sum(dim=1)[tensor(counted)].sum() / total).backward()
        return array(A.grad), array(B.grad)

    def merge(self, W: Any, A: Any, B: Any, scale: float) -> Any:
        W, A, B = map(tensor, (W, A, B))
        wide = torch.promote_types(W.dtype, torch.float32)
        return array((W.to(wide) + scale * (B.to(wide) @ A.to(wide))).to(W.dtype))

    def unmerge(self, W: Any, A: Any, B: Any, scale: float) -> Any:
        return self.merge(W, A, B, -scale)

    def set_num_threads(self, n: int) -> None:
        torch.set_num_threads(n)


if __name__ == "__main__":
    from pylora.conformance.running.report import text
    from pylora.conformance.running.runner import run

    print(text(run(Torch)))
