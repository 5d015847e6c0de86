"""Writes LoRA adapters as GGUF files, for llama.cpp; pylora/adapters/gguf.py reads them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pylora.adapters.carry import carry, fold, low_bits
from pylora.adapters.gguf import ALPHA, OWN_BITS, OWN_CONFIG, homes
from pylora.adapters.loraconfig import LoraConfig
from pylora.adapters.plan import Plan, PlanEntry
from pylora.errors import UnsupportedError
from pylora.files.whole import atomic_write
from pylora.formats.base import Array
from pylora.formats.gguf_names import architecture, as_gguf
from pylora.formats.gguf_write import write_gguf
from pylora.model.config import LlamaConfig
from pylora.types import LoRA


def write(
    path: Path,
    config: LoraConfig,
    plan: Plan,
    loras: Mapping[str, LoRA],
    model: LlamaConfig,
    *,
    name: str | None = None,
) -> None:
    """Writes an adapter of a model as a GGUF file, float32, whole or not at all.

    Raises UnsupportedError, naming the module, for what llama.cpp cannot say: see docs/convert.md.
    """
    where = {home: base for base, home in homes(model).items()}
    if model.tie_word_embeddings:
        _refuse_tied(plan, model)
    refuse_biases(plan, loras, "llama.cpp's adapters have")
    rescaled = [e.path for e in plan if e.dora]
    if rescaled:
        raise UnsupportedError(
            f"{rescaled[0]}: this adapter is of DoRA (use_dora), whose rescaled rows are no "
            "product of an A and a B, so that llama.cpp has no adapter for it; merge it into a "
            "GGUF model instead (pylora merge --to model.gguf)"
        )
    carried = carry(plan.entries, over_rank=True)
    tensors: dict[str, Array] = {}
    bits: list[Array] = []
    for e in plan:
        lora = loras[e.path]
        B = fold(lora.B, carried.factors[e.path], e.path)
        if e.path in carried.inexact:
            bits.append(low_bits(lora.B, B, carried.factors[e.path]))
        for part, (A, rows) in enumerate(_parts(e, lora.A, as_gguf(B, e.path, model))):
            base = where[e.path, part]
            tensors[f"{base}.lora_a"], tensors[f"{base}.lora_b"] = A, rows
    metadata: dict[str, Any] = {
        "general.type": "adapter",
        "general.architecture": architecture(model),
        "adapter.type": "lora",
        ALPHA: float(carried.common),
        "general.file_type": 0,
    }
    if name:
        metadata["general.name"] = name
    if config.base_model_name_or_path:
        metadata["general.base_model.count"] = 1
        metadata["general.base_model.0.name"] = config.base_model_name_or_path
    metadata[OWN_CONFIG] = config.to_json()
    if bits:
        metadata[OWN_BITS] = np.concatenate(bits)
    specs = {name: ("F32", array.shape) for name, array in tensors.items()}
    with atomic_write(path) as beside:
        write_gguf(beside, metadata, specs, lambda name: tensors[name].astype("<f4", copy=False))


def _parts(e: PlanEntry, A: Array, B: Array) -> list[tuple[Array, Array]]:
    """lora_a and lora_b of each tensor of the base that a module is."""
    if e.kind == "embedding":
        return [(np.ascontiguousarray(A.T), B)]
    if e.kind != "experts":
        return [(A, B)]
    stack = np.ascontiguousarray(A.reshape(e.experts, e.r, e.k))
    rows = B.reshape(e.d, e.r, e.experts).transpose(2, 0, 1)  # [experts, d, r]
    n = 1 if e.path.endswith(".down_proj") else 2
    return [(stack, np.ascontiguousarray(half)) for half in np.split(rows, n, axis=1)]


def _refuse_tied(plan: Plan, model: LlamaConfig) -> None:
    """A tied model has one tensor for its embedding and its output layer, and llama.cpp adds an
    adapter of it in both places."""
    names = model.names
    for path in (names.embedding, names.head):
        if any(e.path == path for e in plan):
            raise UnsupportedError(
                f"{path}: the model's embedding is its output layer, too, and llama.cpp knows no "
                "adapter of one of the two; merge this adapter (pylora merge --to), which unties "
                "them"
            )


def refuse_biases(plan: Plan, loras: Mapping[str, LoRA], who: str) -> None:
    """UnsupportedError for biases, but for those of B that are all zero."""
    biased = [e.path for e in plan if e.base_bias] + [path for path, _ in plan.bias_only]
    for path, lora in loras.items():
        own = lora.bias is not None and not _is_zero(lora.bias)
        if own or path in biased:
            what = "a bias of B (lora_bias)" if own else "biases of the base that were trained"
            raise UnsupportedError(
                f"{path}: this adapter has {what}, and {who} no place for one; merge it instead"
            )


def _is_zero(x: Array) -> bool:
    return not np.ascontiguousarray(x, np.float32).view(np.uint32).any()
