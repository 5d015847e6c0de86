"""Writes LoRA adapters as mlx-lm's folders: see pylora/adapters/mlx.py, which reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pylora.adapters.carry import carry, fold, low_bits
from pylora.adapters.gguf_writing import refuse_biases
from pylora.adapters.loraconfig import LoraConfig
from pylora.adapters.mlx import BITS, CONFIG, DORA, OWN, WEIGHTS
from pylora.adapters.mlx_names import homes, in_layer, layer_prefix
from pylora.adapters.plan import Plan, PlanEntry
from pylora.errors import UnsupportedError
from pylora.files.whole import atomic_dir
from pylora.formats.base import Array
from pylora.formats.safetensors import save
from pylora.model.config import LlamaConfig
from pylora.types import LoRA


def write(
    folder: Path, config: LoraConfig, plan: Plan, loras: Mapping[str, LoRA], model: LlamaConfig
) -> None:
    """Writes an adapter of a model as mlx-lm's folder, float32, whole or not at all.

    Raises UnsupportedError, naming the module, for what mlx-lm cannot say: see docs/convert.md.
    """
    names = model.names
    if model.tie_word_embeddings:
        for path in (names.embedding, names.head):
            if any(e.path == path for e in plan):
                raise UnsupportedError(
                    f"{path}: the model's embedding is its output layer, too, and mlx-lm knows no "
                    "adapter of one of the two; merge this adapter, which unties them"
                )
    refuse_biases(plan, loras, "mlx-lm's adapters have")
    for e in plan:
        if e.dora and e.kind != "linear":
            raise UnsupportedError(
                f"{e.path}: mlx-lm's DoRA of an {e.kind} rescales other rows than PEFT's, so that "
                "its adapters cannot say this one; merge it instead"
            )
    modules = {home: name for name, home in homes(model).items()}
    carried = carry(plan.entries, over_rank=False)
    rank = max(e.r for e in plan)
    tensors: dict[str, Array] = {}
    bits: list[Array] = []
    for e in plan:
        B = fold(loras[e.path].B, carried.factors[e.path], e.path)
        if e.path in carried.inexact:
            bits.append(low_bits(loras[e.path].B, B, carried.factors[e.path]))
        for part, (a, b) in enumerate(_parts(e, loras[e.path].A, B, rank)):
            name = modules[e.path, part]
            tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"] = a, b
            if e.dora:
                tensors[f"{name}.m"] = np.asarray(loras[e.path].magnitude, np.float32)
    prefix = layer_prefix(model)
    places = [in_layer(name.rpartition(".")[0], prefix) for name in tensors]
    first = min((layer for layer, _ in places if layer >= 0), default=model.num_hidden_layers - 1)
    settings = {
        "fine_tune_type": DORA if config.use_dora else "lora",
        "num_layers": model.num_hidden_layers - first,
        "lora_parameters": {
            "rank": rank,
            "scale": carried.common,
            "dropout": float(config.lora_dropout),
            "keys": sorted({inner for _, inner in places}),
        },
        "model": config.base_model_name_or_path,
        OWN: {"adapter_config": config.to_dict()},
    }
    text = json.dumps(settings, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_dir(folder) as beside:
        save(beside / WEIGHTS, tensors, {"format": "mlx"})
        (beside / CONFIG).write_text(text, encoding="utf-8")
        if bits:
            save(beside / BITS, {"low_bits": np.concatenate(bits)}, {"format": "np"})


def _parts(e: PlanEntry, A: Array, B: Array, rank: int) -> list[tuple[Array, Array]]:
    """lora_a and lora_b of each of mlx-lm's modules that a module is, filled up to the rank."""
    more = rank - e.r
    if e.kind != "experts":
        a, b = np.pad(A.T, ((0, 0), (0, more))), np.pad(B.T, ((0, more), (0, 0)))
        return [(np.ascontiguousarray(a), np.ascontiguousarray(b))]
    a = np.pad(A.reshape(e.experts, e.r, e.k), ((0, 0), (0, more), (0, 0)))
    rows = B.reshape(e.d, e.r, e.experts).transpose(2, 0, 1)
    n = 1 if e.path.endswith(".down_proj") else 2
    halves = np.split(np.pad(rows, ((0, 0), (0, 0), (0, more))), n, axis=1)
    return [(np.ascontiguousarray(a), np.ascontiguousarray(half)) for half in halves]
