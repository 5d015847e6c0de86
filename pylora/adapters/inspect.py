"""What an adapter does to a model, in numbers: how large each module's delta is, and its spectrum.

Nothing of size d x k is ever made: the singular values of s B A are those of an r x r matrix, got
from a QR factorization of A and of B. Reads an adapter; needs neither the model nor its weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pylora.adapters.locate import find_adapter
from pylora.adapters.loraconfig import LoraConfig
from pylora.adapters.peft import WEIGHTS, read_config
from pylora.adapters.plan import resolve
from pylora.errors import PlanError, expect
from pylora.formats.safetensors import SafeTensors
from pylora.model.config import LlamaConfig, ModuleSpec
from pylora.types import Array, LoRA, brief

_KEY = re.compile(
    r"base_model\.model\.(?P<path>.+)\."
    r"(?P<part>lora_embedding_[AB]|lora_[AB](?=\.weight)|base_layer\.bias)(?:\.weight)?"
)
# Parameters that hold experts, in the order in which a model has them.
_PARAMETERS = ("gate_up_proj", "down_proj")
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")


@dataclass(frozen=True)
class ModuleStats:
    """One module's delta s B A, of shape [d, k]."""

    __repr__ = brief

    path: str
    d: int
    k: int
    rank: int
    scale: float
    norm: float  # Frobenius
    singular_values: tuple[float, ...]  # min(d, k, r) of them, falling

    @property
    def kind(self) -> str:
        """The module's own name, such as "q_proj"."""
        return self.path.rsplit(".", 1)[-1]

    @property
    def layer(self) -> int | None:
        """Which transformer layer the module is in; None outside of them."""
        found = _LAYER.search(self.path)
        return int(found.group(1)) if found else None

    @property
    def stable_rank(self) -> float:
        """Squared Frobenius norm over squared spectral norm: 1 .. rank; 0 for a delta of zero."""
        largest = self.singular_values[0] if self.singular_values else 0.0
        return (self.norm / largest) ** 2 if largest > 0 else 0.0


def modules_of(directory: str | Path) -> dict[str, ModuleSpec]:
    """The modules that a PEFT directory has A and B for, by the shapes in its file.

    It stands in for a model's modules where there is no model to check the adapter against; names
    in the adapter's config that match none of these are then an error that a model would not give.
    """
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    with SafeTensors(find_adapter(directory) / WEIGHTS) as file:
        for key in file.tensors:
            if found := _KEY.fullmatch(key):
                shapes.setdefault(found["path"], {})[found["part"]] = file.shape(key)
        where = file.path
    modules = {}
    for path, parts in sorted(shapes.items(), key=lambda item: _by_number(item[0])):
        kind = "embedding" if "lora_embedding_A" in parts else "linear"
        A, B = (f"lora_{'embedding_' * (kind == 'embedding')}{letter}" for letter in "AB")
        if len(parts.get(A, ())) != 2 or len(parts.get(B, ())) != 2:
            raise PlanError(f"{where}: {path} needs both {A} and {B}, each with two dimensions")
        bias = "base_layer.bias" in parts
        modules[path] = ModuleSpec(kind, parts[B][0], parts[A][1], bias)
    ranks = {path: parts["lora_A"][0] for path, parts in shapes.items() if "lora_A" in parts}
    config = read_config(directory)
    return _with_experts(config, modules, ranks) if config.target_parameters else modules


def _with_experts(
    config: LoraConfig, modules: Mapping[str, ModuleSpec], ranks: Mapping[str, int]
) -> dict[str, ModuleSpec]:
    """The same modules with those that PEFT's target_parameters made under their parameters' names.

    PEFT keeps a parameter's adapter at the module that has it, and wraps one around another: the
    deepest is the first. How many experts there are is the number of A's rows over the rank.
    """
    leaves = sorted(
        {str(name).rpartition(".")[2] for name in config.target_parameters or ()},
        key=lambda leaf: (_PARAMETERS.index(leaf) if leaf in _PARAMETERS else -1, leaf),
    )
    holders: dict[str, list[str]] = {}
    for path in modules:
        inner = re.sub(r"(\.base_layer)+$", "", path)
        if path != inner or inner.endswith(".experts"):
            holders.setdefault(inner, []).append(path)
    out: dict[str, ModuleSpec] = {}
    for path, spec in modules.items():
        inner = re.sub(r"(\.base_layer)+$", "", path)
        if path not in holders.get(inner, ()):
            out[path] = spec
            continue
        deepest = sorted(holders[inner], key=len, reverse=True)
        if len(deepest) != len(leaves):
            raise PlanError(
                f"{inner}: the file has adapters of {len(deepest)} of its parameters, and "
                f"target_parameters names {', '.join(leaves)}"
            )
        name = f"{inner}.{leaves[deepest.index(path)]}"
        alone = ModuleSpec("experts", spec.d, spec.k)
        (entry,) = resolve(
            replace(config, target_modules=None, target_parameters=[name]), {name: alone}
        ).entries
        if entry.r < 1 or ranks[path] % entry.r:
            raise PlanError(f"{name}: {ranks[path]} rows of A are not a multiple of r = {entry.r}")
        out[name] = replace(alone, experts=ranks[path] // entry.r)
    order = {name: _PARAMETERS.index(name.rpartition(".")[2]) for name in out
             if name.endswith(_PARAMETERS)}  # fmt: skip
    return dict(sorted(out.items(), key=lambda item: (
        _by_number(item[0].rpartition(".")[0] if item[0] in order else item[0]),
        order.get(item[0], -1),
    )))  # fmt: skip


def _by_number(path: str) -> list[tuple[int, str]]:
    """A sort key: layer 9 before layer 10, which files do not keep."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in path.split(".")]


def singular_values(lora: LoRA) -> Array:
    """The singular values of s B A, falling; float64 [min(d, k, r)].

    With B = Qb Rb and Aᵀ = Qa Ra, s B A = Qb (s Rb Raᵀ) Qaᵀ, and Q changes no singular value.
    """
    A, B = np.asarray(lora.A, np.float64), np.asarray(lora.B, np.float64)
    Rb: Array = np.linalg.qr(B, mode="r")  # [min(d, r), r]
    Ra: Array = np.linalg.qr(A.T, mode="r")  # [min(k, r), r]
    core = np.asarray(lora.scale * (Rb @ Ra.T), np.float64)
    return np.linalg.svd(core, full_matrices=False, compute_uv=False)


def _experts(lora: LoRA, n: int) -> list[LoRA]:
    """The adapters of the n experts that a parameter holds (PEFT's target_parameters)."""
    if n == 1:
        return [lora]
    r = lora.rank // n
    B = lora.B.reshape(lora.B.shape[0], r, n)
    return [LoRA(lora.A[e * r : (e + 1) * r], B[:, :, e], lora.scale) for e in range(n)]


def inspect(adapter: Mapping[str, LoRA]) -> list[ModuleStats]:
    """The statistics of each module of `adapter`, in its order; of a parameter that holds experts
    those of all their deltas together."""
    expect("adapter", adapter, "inspect(adapter)")
    plan = getattr(adapter, "plan", None)
    experts = {e.path: e.experts for e in plan.entries} if plan is not None else {}
    stats = []
    for path, lora in adapter.items():
        n = experts.get(path, 1)
        each = [singular_values(part) for part in _experts(lora, n)]
        values = np.sort(np.concatenate(each))[::-1]
        stats.append(
            ModuleStats(
                path=path,
                d=int(lora.B.shape[0]),
                k=int(lora.A.shape[1]),
                rank=lora.rank // n,
                scale=float(lora.scale),
                norm=math.sqrt(float(np.square(values).sum())),
                singular_values=tuple(float(v) for v in values),
            )
        )
    return stats


def count_parameters(d: int, k: int, r: int) -> tuple[int, int]:
    """(trainable, full): what LoRA of rank r trains for a weight [d, k], and what that holds."""
    return r * (d + k), d * k


@dataclass(frozen=True)
class Count:
    """One row of `numbers()`."""

    what: str
    rank: int
    trainable: int
    full: int


def numbers() -> list[Count]:
    """The parameter counts that LoRA is known by, computed: of single weights, and of a 7B Llama.

    The 7B rows go through `pylora.adapters.plan`, as an adapter of that model would.
    """
    rows = [
        Count(f"{n} × {n}", r, *count_parameters(n, n, r))
        for n, r in ((4096, 8), (1000, 4), (1000, 8), (1000, 16))
    ]
    llama = llama_7b()
    modules: dict[str, Any] = llama.modules()
    plan = resolve(LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]), modules)
    trainable = sum(count_parameters(e.d, e.k, e.r)[0] for e in plan.entries)
    adapted = sum(e.d * e.k for e in plan.entries)
    rows.append(Count("7B Llama: q and v, of these weights", 8, trainable, adapted))
    rows.append(Count("7B Llama: q and v, of the whole model", 8, trainable, llama.num_parameters))
    return rows


def llama_7b() -> LlamaConfig:
    """The geometry of the 7B Llama (Touvron et al. 2023, table 2)."""
    return LlamaConfig(
        model_type="llama",
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=128,
    )
