"""Adapters of the tiny model, whose every array is random so that they do something."""

from __future__ import annotations

from typing import Any

import numpy as np

from pylora.adapters.adapter import Adapter, parameters
from pylora.adapters.loraconfig import LoraConfig
from pylora.adapters.plan import resolve
from pylora.model.config import LlamaConfig

MODULES = LlamaConfig.tiny().modules()


def make(seed: int = 0, base: Any = None, modules: Any = MODULES, **fields: Any) -> Adapter:
    fields.setdefault("target_modules", ["q_proj", "down_proj"])
    config = LoraConfig(**fields)
    return Adapter.init(resolve(config, modules), config, seed, base=base)


def filled(seed: int, **fields: Any) -> Adapter:
    """An adapter whose every array is random, so that it does something."""
    adapter = make(seed, **fields)
    rng = np.random.default_rng(seed)
    for array in parameters(adapter).values():
        array[...] = rng.standard_normal(array.shape)
    return adapter


def delta(adapter: Adapter, path: str) -> np.ndarray:
    lora = adapter[path]
    return lora.scale * (lora.B.astype(np.float64) @ lora.A.astype(np.float64))
