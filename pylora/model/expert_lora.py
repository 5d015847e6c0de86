"""An adapter of a parameter that holds all experts of a layer (PEFT's target_parameters).

A [experts * r, k] has r rows for each expert; of B [d, r * experts] column j * experts + e is
column j of expert e. Each expert's modules get views of the two, so that training is seen at once;
where a parameter holds two modules (gate and up), both have the expert's A and their own rows of
its B.
"""

from __future__ import annotations

from collections.abc import Sequence

from pylora.errors import PlanError, expect
from pylora.model.config import LlamaConfig
from pylora.model.linear import Grads, LoRAGrad, LoRALinear, add_grad
from pylora.ops.protocol import Backend
from pylora.types import Array, LoRA


def split(lora: LoRA, experts: Sequence[Sequence[tuple[str, int]]]) -> dict[str, LoRA]:
    """Path -> its part, views, of a parameter whose expert e has the modules experts[e]: a path
    and a number of outputs each."""
    n, out = len(experts), {}
    r = lora.A.shape[0] // n
    B = lora.B.reshape(lora.B.shape[0], r, n)
    for e, expert in enumerate(experts):
        first = 0
        for path, d in expert:
            rows = B[first : first + d, :, e]
            out[path] = LoRA(lora.A[e * r : (e + 1) * r], rows, lora.scale)
            first += d
    return out


def parts_of(config: LlamaConfig, path: str, lora: LoRA) -> dict[str, LoRA]:
    """The same of a parameter of a model that is not loaded, by the names of its files' tensors."""
    names = config.names
    layer = path.removeprefix(f"{names.layer}.").split(".")[0]
    roles = ("expert_down",) if path.endswith(".down_proj") else ("expert_gate", "expert_up")
    d = lora.B.shape[0] // len(roles)
    at = f"{names.layer}.{layer}.{names.experts}"
    return split(
        lora,
        [[(f"{at}.{e}.{getattr(names, r)}", d) for r in roles] for e in range(config.experts)],
    )


class ExpertParameter:
    """The modules of one parameter: `experts[e]` are expert e's, in the order of its rows."""

    def __init__(self, path: str, experts: Sequence[Sequence[LoRALinear]], *, ops: Backend) -> None:
        self.path, self.experts, self.ops = path, experts, ops
        self.d, self.k = sum(p.d for p in experts[0]), experts[0][0].k
        self._lora: LoRA | None = None

    def __repr__(self) -> str:
        adapter = "no adapter" if self._lora is None else f"adapter of rank {self._lora.rank}"
        return (
            f"ExpertParameter({self.path}: {len(self.experts)} x [{self.d}, {self.k}], {adapter})"
        )

    @property
    def lora(self) -> LoRA | None:
        """The adapter, or None. Assigning checks it: PlanError, WrongTypeError."""
        return self._lora

    @lora.setter
    def lora(self, lora: LoRA | None) -> None:
        parts = {} if lora is None else self.split(lora)
        for expert in self.experts:
            for p in expert:
                p.lora = parts.get(p.path)
        self._lora = lora

    def check(self, lora: LoRA) -> None:
        """PlanError unless the adapter fits these experts."""
        expect("LoRA", lora, self.path)
        n, rows = len(self.experts), lora.A.shape[0] if lora.A.ndim == 2 else 0
        want_A, want_B = (rows, self.k), (self.d, rows)
        fits = tuple(lora.A.shape) == want_A and tuple(lora.B.shape) == want_B and rows % n == 0
        if not fits:
            raise PlanError(
                f"{self.path}: A has shape {list(lora.A.shape)} and B {list(lora.B.shape)}, "
                f"expected [{n} r, {self.k}] and [{self.d}, {n} r] for {n} experts"
            )
        more = (lora.bias, lora.base_bias, lora.magnitude)
        if lora.dropout or any(array is not None for array in more):
            raise PlanError(f"{self.path}: experts take no biases, no magnitude and no dropout")

    def measured(self, lora: LoRA) -> LoRA:
        """The adapter itself: experts take no magnitude."""
        return lora

    def split(self, lora: LoRA) -> dict[str, LoRA]:
        """Module path -> its part of the adapter: views."""
        self.check(lora)
        return split(lora, [[(p.path, p.d) for p in expert] for expert in self.experts])

    def gather(self, grads: Grads) -> None:
        """Puts the gradients of the experts' modules together; of experts that no token chose they
        are zero."""
        if self._lora is None:
            return
        n, xp = len(self.experts), self.ops.xp
        dA, dB = xp.zeros_like(self._lora.A), xp.zeros_like(self._lora.B)
        r = dA.shape[0] // n
        parts: Array = dB.reshape(self.d, r, n)
        for e, expert in enumerate(self.experts):
            first = 0
            for p in expert:
                if (grad := grads.pop(p.path, None)) is not None:
                    dA[e * r : (e + 1) * r] += grad.A
                    parts[first : first + p.d, :, e] = grad.B
                first += p.d
        add_grad(grads, self.path, LoRAGrad(dA, dB))
