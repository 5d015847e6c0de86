"""What a module starts with, by its path, and the biases that an adapter's file replaces: pylora's
own adapters, asked one module at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pylora.adapters.adapter import Adapter
from pylora.adapters.loraconfig import LoraConfig
from pylora.adapters.plan import Plan, resolve
from pylora.model.config import ModuleSpec
from pylora.types import Array, LoRA

_HOW = {"kaiming": True, "gaussian": "gaussian", "false": False}


class Beginnings:
    """The methods initial, save_biases and load_biases."""

    def initial(
        self, kind: str, path: str, d: int, k: int, r: int, seed: int, method: str, lora_bias: bool
    ) -> tuple[Array, Array, Array | None]:
        config = LoraConfig.from_dict(
            {
                "r": r,
                "target_modules": [path],
                "init_lora_weights": _HOW[method],
                "lora_bias": lora_bias,
            }
        )
        made = Adapter.init(resolve(config, {path: ModuleSpec(kind, d, k)}), config, seed)[path]
        return made.A, made.B, made.bias

    def save_biases(
        self,
        directory: str,
        adapters: Mapping[str, tuple[Array, Array]],
        biases: Mapping[str, Array],
        config: dict[str, Any],
    ) -> None:
        sizes = {path: (B.shape[0], A.shape[1]) for path, (A, B) in adapters.items()}
        sizes |= {path: (len(b), 1) for path, b in biases.items() if path not in sizes}
        lora, plan = self._with_biases(config, sizes)
        parts = {
            e.path: LoRA(*adapters[e.path], scale=e.scale, base_bias=biases[e.path]) for e in plan
        }
        for path, spec in plan.bias_only:
            A, B = np.zeros((0, spec.k), np.float32), np.zeros((spec.d, 0), np.float32)
            parts[path] = LoRA(A, B, scale=1.0, base_bias=biases[path])
        Adapter(lora, plan, parts).save(directory)

    def load_biases(
        self, directory: str, modules: Mapping[str, tuple[int, int]]
    ) -> dict[str, Array]:
        specs = {path: ModuleSpec("linear", *size, bias=True) for path, size in modules.items()}
        adapter = Adapter.load(directory, specs)
        return {p: lora.base_bias for p, lora in adapter.items() if lora.base_bias is not None}

    def _with_biases(
        self, config: dict[str, Any], sizes: Mapping[str, tuple[int, int]]
    ) -> tuple[LoraConfig, Plan]:
        lora = LoraConfig.from_dict(config)
        specs = {path: ModuleSpec("linear", *size, bias=True) for path, size in sizes.items()}
        return lora, resolve(lora, specs)
