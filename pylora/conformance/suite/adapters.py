"""Draws the tensors of a case for a base, and says what they mean: float64 weights and updates.

The size of an update is that of the weight that it is added to, whatever its scale, so that every
wrong way of using it gives clearly other numbers. DoRA is Liu et al. 2024, eq. 5, as PEFT has it:
row i of W' is m[i] (W + s B A)[i] / |(W + s B A)[i]|.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from pylora.adapters import peft
from pylora.adapters.loraconfig import LoraConfig
from pylora.adapters.plan import Plan, resolve
from pylora.conformance.suite import tokenizer
from pylora.conformance.suite.bases import Arrays, Base, grid
from pylora.conformance.suite.cases import Case
from pylora.numbers.random import normal, stream, unit
from pylora.types import LoRA

_PREFIX = "base_model.model."
_EMBEDDING, _HEAD = "model.embed_tokens", "lm_head"


@dataclass(frozen=True, eq=False)
class Meaning:
    """What a model with an adapter is: updates of modules, and weights in place of the base's."""

    loras: Mapping[str, LoRA] = field(default_factory=dict)  # float64
    weights: Mapping[str, np.ndarray[Any, Any]] = field(default_factory=dict)  # by tensor, float64
    tied: bool | None = None  # None: as the base


@dataclass(frozen=True, eq=False)
class Adapter:
    """A case on a base: its settings, its plan and its tensors (float32)."""

    case: Case
    base: Base
    plan: Plan
    loras: dict[str, LoRA]
    magnitudes: Arrays  # module -> m, of DoRA
    saved: Arrays  # tensor of the base -> what replaces it

    @property
    def name(self) -> str:
        return self.case.name

    @property
    def config(self) -> dict[str, Any]:
        """The content of adapter_config.json."""
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": None,
            "inference_mode": True,
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": False,
            "use_rslora": False,
            **self.case.config,
            **self.case.extra,
        }

    def tensors(self) -> Arrays:
        """The tensors of adapter_model.safetensors, float32, by PEFT's keys."""
        out: Arrays = {}
        for key, (path, name, _) in peft.tensor_names(self.plan).items():
            out[key] = getattr(self.loras[path], name)
        for path, m in self.magnitudes.items():
            out[f"{_PREFIX}{path}.lora_magnitude_vector"] = m
        return out | {_PREFIX + name: w for name, w in self.saved.items()}

    def meaning(self) -> Meaning:
        """What the adapter means, by the specification."""
        loras = {path: wide(lora) for path, lora in self.loras.items()}
        weights = {name: w.astype(np.float64) for name, w in self.saved.items()}
        for path, m in self.magnitudes.items():
            moved = self.moved(path)
            length = np.linalg.norm(moved, axis=1, keepdims=True)
            weights[f"{path}.weight"] = m.astype(np.float64)[:, None] * moved / length
            del loras[path]
        return Meaning(loras, weights)

    def moved(self, path: str) -> np.ndarray[Any, Any]:
        """W + s B A of a linear module, float64."""
        lora = wide(self.loras[path])
        W = self.base.weights[f"{path}.weight"].astype(np.float64)
        out: np.ndarray[Any, Any] = W + lora.scale * (lora.B @ lora.A)
        return out


def wide(lora: LoRA) -> LoRA:
    """The same in float64."""
    arrays = {n: getattr(lora, n) for n in ("A", "B", "bias", "base_bias")}
    return replace(lora, **{n: a.astype(np.float64) for n, a in arrays.items() if a is not None})


def draw(case: Case, base: Base, seed: int) -> Adapter:
    """The adapter of a case on a base. Its bits are a function of both names and the seed."""
    plan = resolve(LoraConfig.from_dict(case.config), base.config.modules())
    where = (base.name, case.draw or case.name)

    def some(what: str, shape: tuple[int, ...], std: float) -> np.ndarray[Any, Any]:
        return grid(normal(shape, std, seed=seed, stream=stream("suite", *where, what)))

    scales = {e.path: e.scale for e in plan.entries}
    arrays: dict[str, Any] = {}
    for key, (path, name, shape) in peft.tensor_names(plan).items():
        std = _deviation(path, name, shape, scales.get(path, 1.0))
        arrays[key] = some(key, shape, std)
        if path == _HEAD and name == "B":
            arrays[key] *= np.array(tokenizer.readable(), np.float32)[:, None]
    loras = peft.assemble(LoraConfig.from_dict(case.config), plan, arrays)
    saved: Arrays = {}
    for module in case.extra.get("modules_to_save", ()):
        name = f"{module}.weight"
        W = some(name, base.weights[name].shape, 3.0 / base.config.hidden_size**0.5)
        saved[name] = W * np.array(tokenizer.readable(), np.float32)[:, None]
    adapter = Adapter(case, base, plan, loras, {}, saved)
    if case.extra.get("use_dora"):
        for path in loras:
            length = np.linalg.norm(adapter.moved(path), axis=1)
            u = unit(seed, stream("suite", *where, path, "m"), 0, length.size)
            adapter.magnitudes[path] = grid((length * (0.4 + 1.2 * u)).astype(np.float32))
    return adapter


def _deviation(path: str, name: str, shape: tuple[int, ...], scale: float) -> float:
    """So that s B A x is about as large as W x: A keeps the size of x, B makes up for the scale."""
    if name in ("bias", "base_bias"):
        return 0.8 / (scale if name == "bias" else 1.0)
    if name == "A":
        return 1.0 if path == _EMBEDDING else shape[1] ** -0.5
    gain = {_EMBEDDING: 0.3, _HEAD: 2.5}.get(path, 1.2)
    return float(gain / (scale * shape[1] ** 0.5))
