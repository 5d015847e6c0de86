"""What a converter made of an adapter, as numbers: s B A of each module, in float64.

Reads what converters write: a PEFT folder, MLX's, a GGUF adapter, or a whole model that the adapter
was merged into (GGUF or Hugging Face). Each reader is the least that this needs; none runs anything
that is in a file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pylora.adapters import peft
from pylora.conformance.suite.bases import gguf_name
from pylora.errors import FileFormatError, PyloraError, UnsupportedError
from pylora.formats import open_checkpoint
from pylora.formats.gguf import deinterleave, dequantize
from pylora.formats.gguf_header import GGUFHeader, read_header
from pylora.formats.safetensors import SafeTensors
from pylora.model.config import LlamaConfig

Array = np.ndarray[Any, Any]
_ROUNDING = {"f64": 2.0**-53, "f32": 2.0**-24, "f16": 2.0**-11, "bf16": 2.0**-8, "q8_0": 0.5 / 127}


@dataclass
class Deltas:
    """kind: what was read; update: module -> s B A [d, k]; bias: module -> what its bias becomes;
    added: module -> what is added to it; rounding: of the numbers in the file, a share of
    themselves (of the largest of its block)."""

    kind: str
    update: dict[str, Array] = field(default_factory=dict)
    bias: dict[str, Array] = field(default_factory=dict)
    added: dict[str, Array] = field(default_factory=dict)
    replaced: dict[str, Array] = field(default_factory=dict)  # by tensor, of a merged model
    rounding: float = 2.0**-24


def read(place: Path, base: Path) -> Deltas:
    """What lies at `place`: a file, or a folder with the file in it. `base`: the base model's
    Hugging Face folder. PyloraError where nothing is there that can be read."""
    if not place.exists():
        raise FileFormatError(f"{place}: the command has written nothing there")
    if place.is_dir():
        if (place / "config.json").is_file():
            return _merged(place, base)
        if (place / "adapters.safetensors").is_file():
            return _mlx(place, base)
        found = sorted(place.glob("*.gguf"))
        if found:
            place = found[0]
        else:
            return _peft(place, base)
    if place.suffix == ".safetensors":
        return (
            _mlx(place.parent, base)
            if place.name == "adapters.safetensors"
            else _peft(place.parent, base)
        )
    header = read_header(place)
    if header.metadata.get("general.type") == "adapter":
        return _gguf(header, base)
    return _merged(place, base)


def _config(base: Path) -> LlamaConfig:
    return LlamaConfig.from_hf(json.loads((base / "config.json").read_text(encoding="utf-8")))


def _peft(folder: Path, base: Path) -> Deltas:
    with open_checkpoint(base) as checkpoint:
        _, _, loras = peft.read(folder, _config(base).modules(), checkpoint.load)
    with SafeTensors(folder / peft.WEIGHTS) as file:
        rounding = max(_ROUNDING[file.dtype(n)] for n in file.tensors)
    out = Deltas("PEFT", rounding=rounding)
    for path, lora in loras.items():
        if lora.rank:
            out.update[path] = lora.scale * (lora.B.astype(np.float64) @ lora.A.astype(np.float64))
        if lora.bias is not None:
            out.added[path] = lora.scale * lora.bias.astype(np.float64)
        if lora.base_bias is not None:
            out.bias[path] = lora.base_bias.astype(np.float64)
    _rescale(out, {p: x.magnitude for p, x in loras.items() if x.magnitude is not None}, base)
    return out


def _mlx(folder: Path, base: Path) -> Deltas:
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        scale, kind = (
            float(config["lora_parameters"]["scale"]),
            config.get("fine_tune_type", "lora"),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileFormatError(f"{folder / 'adapter_config.json'}: {error!r}") from None
    if kind not in ("lora", "dora"):
        raise UnsupportedError(f"{folder}: an MLX adapter of type {kind!r} is not compared")
    halves: dict[str, dict[str, Array]] = {}
    worst = 0.0
    with SafeTensors(folder / "adapters.safetensors") as file:
        for name in file.tensors:
            path, _, which = name.rpartition(".")
            if which not in ("lora_a", "lora_b", *(["m"] if kind == "dora" else [])):
                raise FileFormatError(f"{folder}: tensor {name!r} is neither lora_a nor lora_b")
            halves.setdefault(path, {})[which] = file.load(name).astype(np.float64).T
            worst = max(worst, _ROUNDING[file.dtype(name)])
    out = Deltas("MLX", rounding=worst)
    for path, ab in halves.items():
        if len(ab) != (3 if kind == "dora" else 2):
            raise FileFormatError(f"{folder}: of {path} there is {', '.join(ab)} alone")
        if math.isfinite(scale):
            out.update[path] = scale * (ab["lora_b"] @ ab["lora_a"])
    magnitudes = {path: ab["m"] for path, ab in halves.items() if "m" in ab}
    _rescale(out, magnitudes, base)
    return out


def _rescale(out: Deltas, magnitudes: Mapping[str, Array], base: Path) -> None:
    """DoRA: in place of an update the weight that it comes to, rows brought to their lengths."""
    if not magnitudes:
        return
    with open_checkpoint(base) as checkpoint:
        for path, m in magnitudes.items():
            W = peft.base_weight(checkpoint.load, path).astype(np.float64)
            moved = W + out.update.pop(path)
            length = np.linalg.norm(moved, axis=1, keepdims=True)
            out.replaced[f"{path}.weight"] = m.astype(np.float64)[:, None] * moved / length


def _gguf(header: GGUFHeader, base: Path) -> Deltas:
    config = _config(base)
    names = {gguf_name(f"{path}.weight", config): path for path in config.modules()}
    permuted = config.family.gguf is not None and config.family.gguf.permuted
    alpha = float(header.metadata.get("adapter.lora.alpha", 0.0))
    halves: dict[str, dict[str, Array]] = {}
    worst = 0.0
    for name, tensor in header.tensors.items():
        stem, _, which = name.rpartition(".")
        if which not in ("lora_a", "lora_b") or stem not in names:
            raise FileFormatError(f"{header.path}: tensor {name!r} is of no module of the base")
        halves.setdefault(names[stem], {})[which] = _numbers(header, name)
        worst = max(worst, _ROUNDING.get(tensor.kind.lower(), 0.5 / 7.5))
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    out = Deltas("GGUF", rounding=worst)
    for path, ab in halves.items():
        if len(ab) != 2:
            raise FileFormatError(f"{header.path}: of {path} there is {', '.join(ab)} alone")
        A, B = ab["lora_a"], ab["lora_b"]
        A = A.T if path == "model.embed_tokens" else A
        if permuted and path.rsplit(".", 1)[-1] in heads:
            B = deinterleave(B, heads[path.rsplit(".", 1)[-1]])
        # llama.cpp: the rank is B's; without an alpha the scale is 1.
        out.update[path] = (alpha / B.shape[1] if alpha else 1.0) * (B @ A)
    return out


def _numbers(header: GGUFHeader, name: str) -> Array:
    tensor = header.tensors[name]
    rows, kind = header.rows(name), tensor.kind.lower()
    if kind in ("f32", "f16"):
        return rows.view("<f4" if kind == "f32" else "<f2").reshape(tensor.shape).astype(np.float64)
    if kind == "bf16":
        wide = rows.view("<u2").astype(np.uint32) << 16
        return wide.view(np.float32).reshape(tensor.shape).astype(np.float64)
    flat = dequantize(rows, kind, f"{header.path}: tensor {name!r}")
    return flat.reshape(tensor.shape).astype(np.float64)


def _merged(place: Path, base: Path) -> Deltas:
    """A whole model: what it has beside the base's weights."""
    out = Deltas("a merged model")
    try:
        with open_checkpoint(place) as model, open_checkpoint(base) as before:
            known = set(before.names())
            for name in model.names():
                if model.dtype(name) not in _ROUNDING:
                    raise UnsupportedError(
                        f"{place}: a merged model of {model.dtype(name)} numbers"
                    )
                out.rounding = max(out.rounding, _ROUNDING[model.dtype(name)])
                W = model.load(name).astype(np.float64)
                tied = name == "lm_head.weight" and name not in known
                old = "model.embed_tokens.weight" if tied else name
                if old not in known and not name.endswith(".bias"):
                    raise FileFormatError(f"{place}: the base has no tensor {name!r}")
                if old not in known or not np.array_equal(W, before.load(old)):
                    out.replaced[name] = W
    except KeyError as error:
        raise FileFormatError(f"{place}: {error}") from None
    return out


__all__ = ["Deltas", "PyloraError", "read"]
