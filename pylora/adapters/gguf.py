"""LoRA adapters in GGUF files, as llama.cpp, llama-server, Ollama and LM Studio take them.

A tensor is "<name of the base's tensor>.lora_a" or ".lora_b"; rows of B are in llama.cpp's order;
one alpha serves all modules, divided by each rank, and without one the scale is 1. What PEFT's
settings say beyond that is multiplied into B (carry.py), and is kept in two keys of pylora's own,
which llama.cpp passes over: a file that was made here is read back as the adapter that it was, bit
for bit, as long as its tensors are still those. What llama.cpp cannot say is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pylora.adapters.carry import carry
from pylora.adapters.fit import misfit
from pylora.adapters.loraconfig import LoraConfig
from pylora.adapters.plan import resolve
from pylora.adapters.restore import Read, check_modules, restored
from pylora.adapters.settings import settings_of
from pylora.adapters.stacks import joined
from pylora.errors import FileFormatError, PlanError, PyloraError, UnsupportedError
from pylora.formats.base import Array, check_finite, widen
from pylora.formats.gguf import dequantize
from pylora.formats.gguf_header import GGUFHeader, read_header
from pylora.formats.gguf_names import architecture, as_hf, places
from pylora.model.config import LlamaConfig, ModuleSpec
from pylora.types import LoRA

OWN_CONFIG = "pylora.adapter_config"  # the adapter_config.json that the adapter had
OWN_BITS = "pylora.adapter_low_bits"  # what folding rounded away (carry.py)
ALPHA, _TOKENS = "adapter.lora.alpha", "adapter.alora.invocation_tokens"
_FLOATS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}


# ---- names ---------------------------------------------------------------------------------------


def homes(config: LlamaConfig) -> dict[str, tuple[str, int]]:
    """The base's tensor in a GGUF file -> module path, and which part of a parameter's rows it is:
    0 and 1 are gate and up of experts, which PEFT has as one."""
    modules, where = config.modules(), places(config)
    out: dict[str, tuple[str, int]] = {}
    for path, spec in modules.items():
        if spec.kind == "experts":
            for part, first in enumerate(_first_experts(path, config)):
                out[where[f"{first}.weight"][0]] = path, part
        elif f"{path}.weight" in where:  # a tied output layer has no tensor
            out[where[f"{path}.weight"][0]] = path, 0
    return out


def _first_experts(path: str, config: LlamaConfig) -> list[str]:
    """The modules of expert 0 that a parameter holds, by their paths in files."""
    names = config.names
    layer = path.removeprefix(f"{names.layer}.").split(".")[0]
    roles = ("expert_down",) if path.endswith(".down_proj") else ("expert_gate", "expert_up")
    return [f"{names.layer}.{layer}.{names.experts}.0.{getattr(names, role)}" for role in roles]


# ---- reading -------------------------------------------------------------------------------------


def read(path: Path, config: LlamaConfig) -> Read:
    """The adapter in a GGUF file, for a model of `config`: float32 whatever the file stores.

    Raises FileFormatError for a damaged file or a number that is not finite, PlanError, naming it,
    for a tensor that has no home or no other half or another shape than the model's, and
    UnsupportedError for what is not carried out.
    """
    header = read_header(path)
    alpha = _metadata(header, config)
    halves = _halves(header, config)
    for home, (a, b) in halves.items():
        if not a or not b:
            raise PlanError(f"{path}: {a or b!r} of {home[0]} is there without its other half")
    found = {home: (_numbers(header, a), _numbers(header, b)) for home, (a, b) in halves.items()}
    try:
        parts = _together(path, found, config, alpha)
    except PlanError as error:
        shapes: dict[str, tuple[int, ...]] = {}
        for (module, _), (A, B) in found.items():
            if A.ndim == 2 and B.ndim == 2 and config.modules()[module].kind == "linear":
                shapes[f"{module}.lora_A.weight"] = A.shape
                shapes[f"{module}.lora_B.weight"] = B.shape
        why = misfit(shapes, config.modules())
        if not why:
            raise
        raise PlanError(f"{path}: {why}") from error
    modules = config.modules()
    own = _as_it_was(header, parts, modules, alpha)
    if own is not None:
        return own
    chosen = {}
    for module, (A, _) in parts.items():
        r = A.shape[0] // modules[module].experts
        chosen[module] = r, (alpha / r if alpha else 1.0)
    said, plan = settings_of(chosen, modules, base=_base_name(header))
    return said, plan, {e.path: LoRA(*parts[e.path], scale=e.scale) for e in plan}


def _base_name(header: GGUFHeader) -> str | None:
    name = header.metadata.get("general.base_model.0.name")
    return name if isinstance(name, str) and name else None


def _metadata(header: GGUFHeader, config: LlamaConfig) -> float:
    """The file's alpha, 0 where it has none, after a look at all that must agree."""
    meta, path = header.metadata, header.path
    for key, wanted in (("general.type", "adapter"), ("adapter.type", "lora")):
        if meta.get(key) != wanted:
            raise FileFormatError(
                f"{path}: this GGUF file is no LoRA adapter: {key} is "
                f"{str(meta.get(key, 'missing'))[:80]!r}, not {wanted!r}"
            )
    arch = architecture(config)
    if meta.get("general.architecture") != arch:
        raise PlanError(
            f"{path}: the adapter is for the architecture "
            f"{str(meta.get('general.architecture', 'missing'))[:80]!r}, the model is a {arch}"
        )
    tokens = meta.get(_TOKENS)
    if tokens is not None and not (isinstance(tokens, (list, np.ndarray)) and len(tokens) == 0):
        raise UnsupportedError(
            f"{path}: {_TOKENS}: activated LoRA (aLoRA) switches the adapter on inside a sequence; "
            "it is not supported"
        )
    alpha = meta.get(ALPHA, 0.0)
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise PlanError(f"{path}: {ALPHA} is not a number")
    if alpha != 0 and not 1e-30 <= alpha <= 1e30:
        raise PlanError(f"{path}: {ALPHA} is {alpha:g}; it must be a positive number")
    return float(alpha)


def _halves(header: GGUFHeader, config: LlamaConfig) -> dict[tuple[str, int], list[str]]:
    """(module path, part) -> the names of its lora_a and lora_b."""
    known = homes(config)
    halves: dict[tuple[str, int], list[str]] = {}
    for name in header.tensors:
        base, _, end = name.rpartition(".")
        home = known.get(base)
        if home is None or end not in ("lora_a", "lora_b"):
            tied = base == "output.weight" and config.tie_word_embeddings
            raise PlanError(
                f"{header.path}: tensor {name[:200]!r} is no lora_a or lora_b of a tensor that the "
                f"model has{', whose output layer is its embedding' if tied else ''}; nothing is "
                "left out in silence"
            )
        halves.setdefault(home, ["", ""])[end == "lora_b"] = name
    if not halves:
        raise PlanError(f"{header.path}: the adapter has no tensors")
    return halves


def _numbers(header: GGUFHeader, name: str) -> Array:
    """A tensor in float32, [.., rows, columns]; FileFormatError where one is not finite."""
    tensor, where = header.tensors[name], f"{header.path}: tensor {name!r}"
    if (stored := _FLOATS.get(tensor.kind)) is not None:
        kind = tensor.kind.lower()
        flat = widen(header.rows(name).view(stored).reshape(tensor.shape), kind)
    elif tensor.kind in ("I8", "I16", "I32", "I64", "F64"):
        raise PlanError(f"{where} is {tensor.kind}; expected F32, F16, BF16 or a quantized type")
    else:
        flat = dequantize(header.rows(name), tensor.kind.lower(), where).reshape(tensor.shape)
    return check_finite(flat, where)


def _together(
    path: Path,
    found: Mapping[tuple[str, int], tuple[Array, Array]],
    config: LlamaConfig,
    alpha: float,
) -> dict[str, tuple[Array, Array]]:
    """Module path -> A [r, k] and B [d, r] as PEFT has them, float32, in the model's order."""
    out: dict[str, tuple[Array, Array]] = {}
    for module, spec in config.modules().items():
        parts = [found.get((module, part)) for part in (0, 1)]
        if spec.kind == "experts":
            n = 1 if module.endswith(".down_proj") else 2
            there = [p for p in parts[:n] if p is not None]
            if there:
                out[module] = _experts(path, module, spec, parts[:n], alpha)
            continue
        if parts[0] is None:
            continue
        A, B = parts[0]
        if spec.kind == "embedding" and A.ndim == 2:
            A = A.T
        fits = A.ndim == B.ndim == 2 and A.shape == (B.shape[-1], spec.k)
        if not fits or B.shape[0] != spec.d:
            raise PlanError(
                f"{path}: {module}: lora_a has the shape {parts[0][0].shape} and lora_b {B.shape}; "
                f"the module has {spec.k} inputs and {spec.d} outputs"
            )
        B = as_hf(B, module, config)
        out[module] = _own(A), _own(B)
    return out


def _own(x: Array) -> Array:
    return np.array(x, np.float32, order="C")


def _experts(
    path: Path,
    module: str,
    spec: ModuleSpec,
    parts: list[tuple[Array, Array] | None],
    alpha: float,
) -> tuple[Array, Array]:
    """The parts of a parameter of experts, checked and joined (stacks.py)."""
    n, d = spec.experts, spec.d // len(parts)
    for part in parts:
        if part is None:
            continue
        A, B = part
        fits = A.ndim == B.ndim == 3 and A.shape == (n, B.shape[-1], spec.k)
        if not fits or B.shape[:2] != (n, d):
            raise PlanError(
                f"{path}: {module}: lora_a has the shape {A.shape} and lora_b {B.shape}; the "
                f"model has {n} experts of {spec.k} inputs and {d} outputs"
            )
    return joined(module, spec, parts, over_rank=bool(alpha))


def _as_it_was(
    header: GGUFHeader,
    parts: Mapping[str, tuple[Array, Array]],
    modules: Mapping[str, ModuleSpec],
    alpha: float,
) -> Read | None:
    """The adapter by the settings that are kept in the file; None where there are none, or where
    they are not (any more) what its tensors and alpha say: those count."""
    text, bits = header.metadata.get(OWN_CONFIG), header.metadata.get(OWN_BITS)
    if not isinstance(text, str) or not (bits is None or isinstance(bits, np.ndarray)):
        return None
    try:
        config = LoraConfig.from_json(text, OWN_CONFIG)
        plan = resolve(config, modules)
    except PyloraError:
        return None
    check_modules(f"{header.path}: {OWN_CONFIG}", plan, parts)
    folded = carry(plan.entries, over_rank=True)
    return restored(config, plan, parts, folded, float(np.float32(alpha)), bits)
