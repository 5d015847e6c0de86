"""AdamW over the arrays of an adapter, in place, with LoRA+ rates and clipping by the global norm.

The moments are float32 arrays where the parameters are, by the same names:
"<module path>.A", ".B", ".bias" (of B), ".base_bias" and ".magnitude" (of DoRA); of whole weights
the names of their tensors, "<module path>.weight" and ".bias".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pylora.errors import DtypeError, PlanError
from pylora.model.attach import ARRAYS
from pylora.training.config import TrainConfig
from pylora.types import AdamW, Array, LoRA


def trainable(adapter: Mapping[str, LoRA]) -> dict[str, Array]:
    """The adapter's arrays themselves, by name, in the adapter's order.

    Raises PlanError if there are none, DtypeError for one that cannot be updated in place.
    """
    found = {
        f"{path}.{field}": getattr(lora, field)
        for path, lora in adapter.items()
        for field in ARRAYS
        if getattr(lora, field) is not None and getattr(lora, field).size
    }
    found |= getattr(adapter, "beside", {})  # whole weights; a head (objectives/headed.py)
    if not found:
        raise PlanError("the adapter has no modules, so there is nothing to train")
    for name, array in found.items():
        # A GPU's arrays are always writeable.
        ready = getattr(array.flags, "writeable", True) and array.flags.c_contiguous
        if array.dtype != np.float32 or not ready:
            raise DtypeError(
                f"{name} is trained in place, so it must be a writeable C-contiguous float32 "
                f"array; it is {array.dtype} of shape {array.shape}"
            )
    return found


def gradients(grads: Mapping[str, Any], names: Mapping[str, Array]) -> dict[str, Array]:
    """The model's Grads by parameter name, in the order of `names`."""
    out = {}
    for name in names:
        path, _, field = name.rpartition(".")
        grad = getattr(grads[path], field) if path in grads else None
        if grad is None:
            raise PlanError(f"the model gave no gradient for {name}; is this adapter attached?")
        out[name] = grad.astype(np.float32, order="C", copy=False)
    return out


class Optimizer:
    """The moments of a run and the update rule.

    Rates: A, biases and whole weights lr, B and magnitudes lora_plus_ratio * lr (Hayou et al. 2024,
    "LoRA+"; PEFT puts the magnitudes there). Weight decay is decoupled (Loshchilov & Hutter 2019)
    and applies to A, B, magnitudes and whole matrices, not to biases and norms: as transformers'
    Trainer has it.
    """

    def __init__(self, ops: Any, parameters: dict[str, Array], config: TrainConfig) -> None:
        self.ops, self.parameters, self.config = ops, parameters, config
        self.m = {name: ops.xp.zeros_like(p) for name, p in parameters.items()}
        self.v = {name: ops.xp.zeros_like(p) for name, p in parameters.items()}

    def norm(self, grads: dict[str, Array]) -> float:
        """The global L2 norm; summed in float64 in the order of the parameters."""
        return math.sqrt(self.ops.total_squares([grads[name] for name in self.parameters]))

    def update(self, grads: dict[str, Array], norm: float, step: int, lr: float) -> None:
        """One update, `step` counted from 1; the gradient is scaled down to max_grad_norm."""
        c, limit = self.config, self.config.max_grad_norm
        scale = 1.0 if limit is None or norm <= limit else limit / norm
        updates = []
        for name, p in self.parameters.items():
            is_m = name.endswith(".magnitude")
            is_B, decays = is_m or name.endswith(".B"), is_m or p.ndim == 2
            settings = AdamW(
                lr=lr * c.lora_plus_ratio if is_B else lr,
                step=step,
                beta1=c.beta1,
                beta2=c.beta2,
                eps=c.eps,
                weight_decay=c.weight_decay if decays else 0.0,
                grad_scale=scale,
            )
            updates.append((name, p, grads[name], settings))
        self.apply(updates)

    def apply(self, updates: Sequence[tuple[str, Array, Array, AdamW]]) -> None:
        """AdamW's step on each (name, parameter, gradient, settings)."""
        self.ops.adamw_steps([(p, g, self.m[n], self.v[n], o) for n, p, g, o in updates])

    def state(self) -> dict[str, np.ndarray]:
        """The moments as "m.<name>" and "v.<name>", on the host."""
        return {name: self.ops.to_numpy(a) for name, a in self._moments().items()}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Takes moments in, as `state` gives them."""
        for name, a in self._moments().items():
            self.ops.assign(a, state[name])

    def _moments(self) -> dict[str, Array]:
        return {f"{k}.{n}": a for k, d in (("m", self.m), ("v", self.v)) for n, a in d.items()}
