"""Weights, adapters and tiny models that tests of merging have in common."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, settings

from pylora.adapters.adapter import Adapter, parameters
from pylora.adapters.loraconfig import LoraConfig
from pylora.adapters.plan import resolve
from pylora.formats import narrow, open_checkpoint
from pylora.formats.safetensors import Bf16, SafeTensors, save
from pylora.merging.merge import merge_checkpoint
from pylora.model.config import LlamaConfig
from pylora.model.llama import random_weights
from pylora.types import LoRA

DTYPES = ["f32", "f16", "bf16"]
stateless = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # `ops` is


def case(
    seed: int, d: int, k: int, r: int, size: float, dtype: str, kind: str
) -> tuple[np.ndarray, LoRA]:
    """A stored weight and an adapter whose delta has about this size."""
    rng = np.random.default_rng(seed)
    W = (rng.standard_normal((d, k)) * 0.02).astype(np.float32)
    a, b = (k, d) if kind == "linear" else (d, k)
    A = rng.standard_normal((r, a)).astype(np.float32)
    B = (rng.standard_normal((b, r)) * size).astype(np.float32)
    return narrow(W, dtype), LoRA(A, B, 1.5)


def write_model(where: Path, dtype: str = "f32", **over: Any) -> LlamaConfig:
    """A random tiny model as a Hugging Face directory; norms are always float32."""
    config = LlamaConfig.tiny(**over)
    tensors: dict[str, Any] = {}
    weights = random_weights(config)
    for name in config.tensors():
        a = weights(name)
        stored = narrow(a, dtype) if a.ndim == 2 else a
        tensors[name] = Bf16(stored) if dtype == "bf16" and a.ndim == 2 else stored
    where.mkdir()
    (where / "config.json").write_text(json.dumps(config.to_hf()))
    (where / "tokenizer.json").write_text("{}")
    save(where / "model.safetensors", tensors)
    return config


def adapter_for(config: LlamaConfig, base: Any = None, **fields: Any) -> Adapter:
    settings = LoraConfig(**{"r": 3, "target_modules": "all-linear", **fields})
    adapter = Adapter.init(resolve(settings, config.modules()), settings, base=base)
    rng = np.random.default_rng(9)
    for array in parameters(adapter).values():
        array += (rng.standard_normal(array.shape) * 0.05).astype(np.float32)
    return adapter


def tensors_of(where: Path) -> dict[str, tuple[bytes, str]]:
    with open_checkpoint(where) as c:
        return {n: (c.raw(n)[0].tobytes(), c.dtype(n)) for n in c.names()}


def merged_model(tmp_path: Path, **over: Any) -> Path:
    config = write_model(tmp_path / "base", **over)
    adapter_for(config).save(tmp_path / "adapter")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    return tmp_path / "merged"


def altered(directory: Path, file: str, name: str, change: Any) -> None:
    """Rewrites one tensor of a safetensors file."""
    with SafeTensors(directory / file) as f:
        tensors: dict[str, Any] = {n: np.array(f.view(n)) for n in f.tensors}
        metadata = dict(f.metadata)
    tensors[name] = change(tensors[name])
    save(directory / file, tensors, metadata)


def flip(a: np.ndarray) -> np.ndarray:
    a.reshape(-1).view(np.uint8)[0] ^= 1
    return a


UP = "model.layers.0.mlp.up_proj"
