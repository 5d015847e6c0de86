"""An adapter as files: PEFT's, llama.cpp's GGUF, MLX's. What a form cannot say is named, not bent.

Each form says the same update. Where a format has one scale for all modules and the adapter has
several, the scales are multiplied into B; where it has one rank, smaller ones are filled up with
zeros; both are exact but for a rounding of float32.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pylora.conformance.suite.adapters import Adapter
from pylora.conformance.suite.bases import gguf_name, interleave
from pylora.conformance.suite.gguf_writer import write_gguf
from pylora.formats.base import narrow
from pylora.formats.safetensors import Bf16, save

_EMBEDDING, _HEAD = "model.embed_tokens", "lm_head"


class CannotSay(Exception):
    """The form has no way to say this adapter; the text is the reason."""


def write_peft(adapter: Adapter, folder: Path) -> None:
    """`adapter_config.json` and `adapter_model.safetensors`."""
    folder.mkdir(parents=True)
    text = json.dumps(adapter.config, indent=1, ensure_ascii=False) + "\n"
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")
    tensors = {k: _stored(a, adapter.case.dtype) for k, a in adapter.tensors().items()}
    save(folder / "adapter_model.safetensors", tensors, {"format": "pt"})


def write_gguf_lora(adapter: Adapter, folder: Path) -> None:
    """`adapter.gguf`, as llama.cpp reads it."""
    arch = adapter.base.gguf_arch
    if arch is None:
        raise CannotSay("the family has no architecture in GGUF that pylora knows")
    _only_updates(adapter, "a GGUF adapter has A and B alone")
    if adapter.base.tied and _HEAD in adapter.loras:
        raise CannotSay("a GGUF model with a tied head has no tensor for the head's update")
    alpha = float(adapter.config["lora_alpha"])
    plain = all(lora.scale == alpha / lora.rank for lora in adapter.loras.values())
    metadata: dict[str, Any] = {
        "general.type": "adapter",
        "general.architecture": arch,
        "general.name": adapter.name,
        "adapter.type": "lora",
    }
    if plain:  # without it the scale is 1
        metadata["adapter.lora.alpha"] = alpha
    tensors: dict[str, Any] = {}
    for path, lora in adapter.loras.items():
        B = lora.B if plain else (lora.B * np.float64(lora.scale)).astype(np.float32)
        heads, name = adapter.base.heads(path), gguf_name(f"{path}.weight", adapter.base.config)
        # The embedding's rows are looked up, so there A lies the other way round.
        tensors[f"{name}.lora_a"] = lora.A.T if path == _EMBEDDING else lora.A
        tensors[f"{name}.lora_b"] = interleave(B, heads) if heads else B
    folder.mkdir(parents=True)
    write_gguf(folder / "adapter.gguf", metadata, tensors)


def write_mlx(adapter: Adapter, folder: Path) -> None:
    """`adapters.safetensors` and `adapter_config.json`, as mlx-lm reads them."""
    if adapter.saved or any(_has_bias(lora) for lora in adapter.loras.values()):
        raise CannotSay("an MLX adapter has lora_a, lora_b and DoRA's m alone")
    if adapter.base.tied and {_HEAD, _EMBEDDING} & set(adapter.loras):
        raise CannotSay("MLX applies an update of a tied embedding to the head, too")
    if adapter.magnitudes and {_HEAD, _EMBEDDING} & set(adapter.loras):
        raise CannotSay("DoRA on an embedding")
    loras = adapter.loras
    rank = max(lora.rank for lora in loras.values())
    scales = {lora.scale for lora in loras.values()}
    scale = scales.pop() if len(scales) == 1 else 1.0
    keys, tensors = [], {}
    for path, lora in loras.items():
        keys.append(path.split(".", 3)[3] if ".layers." in path else path)
        B = (lora.B * np.float64(lora.scale / scale)).astype(np.float32)
        fill = rank - lora.rank
        dtype = adapter.case.dtype if scale == lora.scale else "f32"
        tensors[f"{path}.lora_a"] = _stored(np.pad(lora.A, ((0, fill), (0, 0))).T, dtype)
        tensors[f"{path}.lora_b"] = _stored(np.pad(B, ((0, 0), (0, fill))).T, dtype)
        if path in adapter.magnitudes:
            tensors[f"{path}.m"] = adapter.magnitudes[path]
    parameters = {"rank": rank, "scale": scale, "dropout": 0.0, "keys": list(dict.fromkeys(keys))}
    config = {
        "fine_tune_type": "dora" if adapter.magnitudes else "lora",
        "num_layers": adapter.base.config.num_hidden_layers,
        "lora_parameters": parameters,
    }
    folder.mkdir(parents=True)
    text = json.dumps(config, indent=1) + "\n"
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")
    save(folder / "adapters.safetensors", tensors, {"format": "mlx"})


FORMS: dict[str, Callable[[Adapter, Path], None]] = {
    "peft": write_peft,
    "gguf": write_gguf_lora,
    "mlx": write_mlx,
}


def _only_updates(adapter: Adapter, why: str) -> None:
    if adapter.saved or adapter.magnitudes or any(map(_has_bias, adapter.loras.values())):
        raise CannotSay(why)


def _has_bias(lora: Any) -> bool:
    return lora.bias is not None or lora.base_bias is not None


def _stored(array: Any, dtype: str) -> Any:
    kept = narrow(np.ascontiguousarray(array), dtype)
    return Bf16(kept) if dtype == "bf16" else kept
