"""An adapter and the modules of a model: whether it fits, and its arrays where the model computes.

Nothing is computed, and no module is changed here: `Llama.attach` does that with what it gets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from pylora.errors import DtypeError, PlanError
from pylora.model.embedding import Embedding
from pylora.model.expert_lora import ExpertParameter
from pylora.model.linear import LoRALinear, check_lora
from pylora.model.tensors import ModuleSpec
from pylora.ops.protocol import Backend
from pylora.types import LoRA

Module = LoRALinear | Embedding | ExpertParameter  # what an adapter may sit on
ARRAYS = ("A", "B", "bias", "base_bias", "magnitude")  # of a LoRA
GRADS = (*ARRAYS, "weight")  # of a LoRAGrad


def check_fits(
    adapter: Mapping[str, LoRA],
    modules: Mapping[str, Module],
    dtype: np.dtype,
    sizes: Mapping[str, ModuleSpec] | None = None,
) -> None:
    """PlanError for a module that is not among `modules` or an array that does not fit its own;
    DtypeError for an array of another dtype than `dtype`.

    `sizes`: of embedding and head, where the adapter brings them in another size.
    """
    unknown = [path for path in adapter if path not in modules]
    if unknown:
        raise PlanError(
            f"the adapter has modules that the model does not: {', '.join(unknown[:5])}"
            f"{' ...' if len(unknown) > 5 else ''} ({len(unknown)} of {len(adapter)})"
        )
    for path, lora in adapter.items():
        if sizes is None or not isinstance(modules[path], (LoRALinear, Embedding)):
            modules[path].check(lora)
        else:
            check_lora(path, lora, sizes[path].d, sizes[path].k)
        for name in ARRAYS:
            array = getattr(lora, name)
            if array is not None and array.dtype != dtype:
                raise DtypeError(
                    f"{path}: {name} is {array.dtype} but the model is {dtype}; convert "
                    "the adapter's arrays first"
                )


def place(lora: LoRA, ops: Backend) -> LoRA:
    """The adapter of one module with its arrays where `ops` computes: itself, where they are."""
    arrays: dict[str, Any] = {name: getattr(lora, name) for name in ARRAYS}
    moved: dict[str, Any] = {n: None if a is None else ops.place(a) for n, a in arrays.items()}
    return lora if all(moved[n] is arrays[n] for n in arrays) else replace(lora, **moved)


def computed(modules: Mapping[str, Module], name: str, ops: Backend) -> np.ndarray:
    """A module's weight or bias, by its tensor's name, as the model computes with it: float32 on
    the host, a copy. KeyError for what is no such tensor."""
    path, _, part = name.rpartition(".")
    module = modules.get(path)
    if part == "weight" and isinstance(module, (LoRALinear, Embedding)):
        return np.array(ops.to_numpy(ops.unpack(module.W)), np.float32)
    if part == "bias" and isinstance(module, LoRALinear) and module.bias is not None:
        return np.array(ops.to_numpy(module.bias), np.float32)
    raise KeyError(name)


def bring_back(placed: LoRA, own: LoRA, ops: Backend) -> None:
    """Writes the numbers of `place`'s copies into the arrays that they are copies of."""
    for name in ARRAYS:
        array = getattr(placed, name)
        if array is not getattr(own, name):
            getattr(own, name)[...] = ops.to_numpy(array)
