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


def _or_none(a: Any) -> Any:
    return None if a is None else tensor(a)


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
    dtypes = ("float32", "float64", "bfloat16", "float16", "complex128")

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
            rows = tensor(
                counted
            )  # left out, not multiplied by zero: their targets may be anything
            off = self._forward(tensor(x), W, A, B, scale)[rows] - tensor(target)[rows]
            (0.5 * (off**2).sum() / total).backward()
        return array(A.grad), array(B.grad)

    def merge(self, W: Any, A: Any, B: Any, scale: float) -> Any:
        W, A, B = map(tensor, (W, A, B))
        wide = torch.promote_types(W.dtype, torch.float32)
        return array((W.to(wide) + scale * (B.to(wide) @ A.to(wide))).to(W.dtype))

    def unmerge(self, W: Any, A: Any, B: Any, scale: float) -> Any:
        return self.merge(W, A, B, -scale)

    # ---- several adapters, biases of B, embeddings ---------------------------------------------

    def _each(self, x: Any, W: Any, adapters: Any, rows: Any, bias: Any) -> Any:
        """Row by row with its adapter (A, B, bias of B, scale), then put together."""
        if rows.size and not -1 <= rows.min() <= rows.max() < len(adapters):
            raise IndexError(f"there are {len(adapters)} adapters")
        y = torch.nn.functional.linear(x, W, bias)
        for i, (A, B, more, scale) in enumerate(adapters):
            at = torch.from_numpy(np.flatnonzero(rows == i))
            update = scale * torch.nn.functional.linear(x[at] @ A.T, B, more)
            y = y.index_add(0, at, update)
        return y

    def forward_mixed(self, x: Any, W: Any, adapters: Any, rows: Any, bias: Any = None) -> Any:
        with_none = [(A, B, None, s) for A, B, s in adapters]
        return self.bias_mixed(x, W, with_none, rows, bias)

    def bias_mixed(self, x: Any, W: Any, adapters: Any, rows: Any, bias: Any = None) -> Any:
        low = [(tensor(A), tensor(B), _or_none(b), s) for A, B, b, s in adapters]
        return array(self._each(tensor(x), tensor(W), low, np.asarray(rows), _or_none(bias)))

    def backward_mixed(self, dy: Any, x: Any, W: Any, adapters: Any, rows: Any) -> Any:
        x = tensor(x).requires_grad_()
        low = [
            (tensor(A).requires_grad_(), tensor(B).requires_grad_(), None, s)
            for A, B, s in adapters
        ]
        self._each(x, tensor(W), low, np.asarray(rows), None).backward(tensor(dy))
        return array(x.grad), [(array(A.grad), array(B.grad)) for A, B, _, _ in low]

    def bias_forward(
        self, x: Any, W: Any, A: Any, B: Any, bias_B: Any, scale: float, bias: Any = None
    ) -> Any:
        return self.bias_mixed(x, W, [(A, B, bias_B, scale)], np.zeros(len(x), int), bias)

    def bias_backward(
        self, dy: Any, x: Any, W: Any, A: Any, B: Any, bias_B: Any, scale: float
    ) -> Any:
        x, A, B, more = (tensor(a).requires_grad_() for a in (x, A, B, bias_B))
        y = self._each(x, tensor(W), [(A, B, more, scale)], np.zeros(len(x), int), None)
        y.backward(tensor(dy))
        return tuple(array(t.grad) for t in (x, A, B, more))

    def _embedded(self, ids: Any, W: Any, A: Any, B: Any, scale: float) -> Any:
        ids = torch.from_numpy(np.asarray(ids).astype(np.int64))
        embedding = torch.nn.functional.embedding
        return embedding(ids, W) + scale * (embedding(ids, A.T) @ B.T)

    def embedding_forward(self, ids: Any, W: Any, A: Any, B: Any, scale: float) -> Any:
        return array(self._embedded(ids, *map(tensor, (W, A, B)), scale))

    def embedding_backward(self, dy: Any, ids: Any, W: Any, A: Any, B: Any, scale: float) -> Any:
        A, B = tensor(A).requires_grad_(), tensor(B).requires_grad_()
        self._embedded(ids, tensor(W), A, B, scale).backward(tensor(dy))
        return array(A.grad), array(B.grad)

    def embedding_merge(self, W: Any, A: Any, B: Any, scale: float) -> Any:
        return self.merge(W, np.asarray(B).T, np.asarray(A).T, scale)

    # ---- single operations ---------------------------------------------------------------------

    def rms_norm(self, x: Any, w: Any, eps: float) -> Any:
        x, w = tensor(x), tensor(w)
        return array(torch.nn.functional.rms_norm(x, (x.shape[1],), w, eps))

    def swiglu(self, gate: Any, up: Any) -> Any:
        return array(torch.nn.functional.silu(tensor(gate)) * tensor(up))

    def swiglu_backward(self, dy: Any, gate: Any, up: Any) -> Any:
        gate, up = tensor(gate).requires_grad_(), tensor(up).requires_grad_()
        (torch.nn.functional.silu(gate) * up).backward(tensor(dy))
        return array(gate.grad), array(up.grad)

    def cross_entropy(self, logits: Any, labels: Any) -> Any:
        x, labels = tensor(logits).requires_grad_(), tensor(labels)
        nll = torch.nn.functional.cross_entropy(x, labels, reduction="none")
        (nll.sum() / max(1, int((labels != -100).sum()))).backward()
        return array(nll), array(x.grad)

    def adamw(self, p: Any, g: Any, m: Any, v: Any, o: Any) -> Any:
        p, g, m, v = map(tensor, (p, g, m, v))
        step = torch.tensor(float(o.step - 1))
        torch.optim._functional.adamw(
            [p], [g], [m], [v], [], [step], amsgrad=False, beta1=o.beta1, beta2=o.beta2,
            lr=o.lr, weight_decay=o.weight_decay, eps=o.eps, maximize=False,
        )  # fmt: skip
        return array(p), array(m), array(v)

    def clip(self, grads: Any, limit: float) -> Any:
        params = [torch.nn.Parameter(torch.zeros(g.shape, dtype=tensor(g).dtype)) for g in grads]
        for p, g in zip(params, grads):
            p.grad = tensor(g)
        torch.nn.utils.clip_grad_norm_(params, limit)
        return [array(p.grad) for p in params]

    def set_num_threads(self, n: int) -> None:
        torch.set_num_threads(n)


if __name__ == "__main__":
    from pylora.conformance.running.report import text
    from pylora.conformance.running.runner import run

    print(text(run(Torch)))
