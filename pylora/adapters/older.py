"""Adapters under other names than the model's: of a language model inside a multimodal one, and of
experts that were modules each.

Both become an adapter under the names that the model has here, with settings that say so: what is
loaded is saved as PEFT reads it on transformers 5.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from pylora.adapters.loraconfig import LoraConfig
from pylora.adapters.plan import Plan, PlanEntry, resolve
from pylora.errors import PlanError, UnsupportedError
from pylora.model.config import ModuleSpec
from pylora.types import Array

Modules = Mapping[str, ModuleSpec]

# What a whole model calls its language model, in place of "model".
_PARTS = ("model.language_model", "language_model.model", "model.text_model")
# An expert as a module of its own, as transformers 4 had them; which parameter it is a part of.
_EXPERT = re.compile(
    r"(?P<layer>.+\.\d+)\.(?P<at>(?:mlp|block_sparse_moe)\.experts)\.(?P<e>\d+)\."
    r"(?P<leaf>w1|w2|w3|gate_proj|up_proj|down_proj)$"
)
_GATE, _UP, _DOWN = ("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")


def text_part(paths: Iterable[str], modules: Modules) -> Callable[[str], str]:
    """How an adapter with modules at `paths` calls a module of the model: by its name, unless the
    adapter is of a multimodal model and the model has its language model alone."""
    paths = list(paths)
    for part in _PARTS:
        mine = any(path.startswith(f"{part}.") for path in modules)
        if not mine and any(path.startswith(f"{part}.") for path in paths):
            head = part.rpartition(".")[0] if part.endswith(".model") else ""

            def called(path: str, part: str = part, head: str = head) -> str:
                if path.startswith("model."):
                    return f"{part}.{path.removeprefix('model.')}"
                return f"{head}.{path}" if head else path

            return called
    return lambda path: path


def under_names(
    config: LoraConfig, modules: Modules, called: Callable[[str], str]
) -> tuple[LoraConfig, Plan]:
    """The plan of settings that were written for other names of the modules, under their own; and
    settings that give it under these."""
    back = {called(path): path for path in modules}
    there = resolve(config, {called(path): spec for path, spec in modules.items()})
    entries = tuple(dataclasses.replace(e, path=back[e.path]) for e in there.entries)
    plan = Plan(entries, tuple((back[path], spec) for path, spec in there.bias_only))
    return _explicit(config, plan), plan


def _explicit(config: LoraConfig, plan: Plan) -> LoraConfig:
    """Settings that name each module of the plan."""
    parameters = [e.path for e in plan if e.kind == "experts"]
    return dataclasses.replace(
        config,
        target_modules=tuple(e.path for e in plan if e.kind != "experts") or None,
        target_parameters=tuple(parameters) or None,
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        rank_pattern={re.escape(e.path): e.r for e in plan if e.r != config.r},
        alpha_pattern={re.escape(e.path): e.alpha for e in plan if e.alpha != config.lora_alpha},
        lora_dropout=0.0 if parameters else config.lora_dropout,
    )


# ---- experts that were modules -------------------------------------------------------------------


def with_experts(paths: Iterable[str], modules: Modules) -> Modules | None:
    """The modules with each expert's in place of the parameters that hold them, under the names
    that an older adapter's `paths` have; None where it has none of these."""
    found = next((m for path in paths if (m := _EXPERT.match(path))), None)
    held = {path: spec for path, spec in modules.items() if spec.kind == "experts"}
    if found is None or not held:
        return None
    leaves = [side[found["leaf"].endswith("_proj")] for side in (_GATE, _UP, _DOWN)]
    out = {path: spec for path, spec in modules.items() if path not in held}
    for path, spec in held.items():
        layer = path.split(".mlp.experts.")[0]
        down = path.endswith(".down_proj")
        one = ModuleSpec("linear", spec.d if down else spec.d // 2, spec.k)
        for e in range(spec.experts):
            for leaf in leaves[2:] if down else leaves[:2]:
                out[f"{layer}.{found['at']}.{e}.{leaf}"] = one
    return out


def fold_experts(
    config: LoraConfig, plan: Plan, arrays: Mapping[tuple[str, str], Array], modules: Modules
) -> tuple[LoraConfig, Plan, dict[tuple[str, str], Array]]:
    """The adapter of experts' modules as that of the parameters that hold them: of gate and up A's
    rows follow each other and B is block diagonal, so that its rank is twice theirs. Parameters
    have no dropout (as in PEFT), so that the settings lose it.

    `arrays` and the result: by (module, field of LoRA). UnsupportedError where the modules of one
    parameter have ranks or scales that differ, which no parameter can have.
    """
    groups: dict[str, dict[tuple[int, int], PlanEntry]] = {}
    for entry in plan:
        if (m := _EXPERT.match(entry.path)) is None:
            continue
        down = m["leaf"] in _DOWN
        held = f"{m['layer']}.mlp.experts.{'down_proj' if down else 'gate_up_proj'}"
        side = 0 if down or m["leaf"] in _GATE else 1
        groups.setdefault(held, {})[int(m["e"]), side] = entry
    out = {key: array for key, array in arrays.items() if not _EXPERT.match(key[0])}
    entries = [e for e in plan if not _EXPERT.match(e.path)]
    for path, parts in groups.items():
        entry = _entry(path, list(parts.values()), modules[path])
        entries.append(entry)
        out[path, "A"], out[path, "B"] = _blocks(entry, parts, arrays)
    order = {path: i for i, path in enumerate(modules)}
    new = Plan(tuple(sorted(entries, key=lambda e: order[e.path])), plan.bias_only)
    return _explicit(config, new), new, out


def _entry(path: str, parts: list[PlanEntry], spec: ModuleSpec) -> PlanEntry:
    first = parts[0]
    if first.dora:
        raise UnsupportedError(
            f"{path}: this adapter has experts' modules with DoRA (use_dora), which an adapter of "
            "all experts together cannot have; merge it with PEFT"
        )
    if any((e.r, e.scale, e.lora_bias) != (first.r, first.scale, False) for e in parts):
        raise UnsupportedError(
            f"{path}: this adapter has experts' modules with ranks, scales or biases that differ, "
            "which an adapter of all experts together cannot have"
        )
    sides = 1 if path.endswith(".down_proj") else 2
    r = sides * first.r
    root = "sqrt" in first.rule_scale
    return dataclasses.replace(
        first,
        path=path,
        kind="experts",
        d=spec.d,
        k=spec.k,
        r=r,
        alpha=first.scale * (math.sqrt(r) if root else r),
        rule_r=f"{first.rule_r}, of each expert's modules",
        rule_alpha=f"{first.rule_alpha}, of each expert's modules",
        experts=spec.experts,
    )


def _blocks(
    entry: PlanEntry,
    parts: Mapping[tuple[int, int], PlanEntry],
    arrays: Mapping[tuple[str, str], Array],
) -> tuple[Array, Array]:
    """A [experts * r, k] and B [d, r * experts], column j * experts + e of B being column j of
    expert e's; zeros for what the adapter has nothing of."""
    n, r = entry.experts, entry.r
    A = np.zeros((n, r, entry.k), np.float32)
    B = np.zeros((entry.d, r, n), np.float32)
    for (e, side), part in parts.items():
        if e >= n:
            raise PlanError(f"{part.path}: the model has {n} experts")
        rows, outputs = slice(side * part.r, (side + 1) * part.r), slice(side * part.d, None)
        A[e, rows] = arrays[part.path, "A"]
        B[outputs, rows, e][: part.d] = arrays[part.path, "B"]
    return A.reshape(n * r, entry.k), B.reshape(entry.d, r * n)
