"""The plan: every target module with its rank, alpha, scale and the rule that gave each.

Matching is PEFT's. What PEFT passes over in silence or with a warning is an error here: a target,
an exclusion, a pattern or a layer that matches nothing. No array is touched.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from pylora.adapters.loraconfig import FROM_BASE, LoraConfig
from pylora.adapters.patterns import compiled
from pylora.errors import PlanError, UnsupportedError, expect
from pylora.model import families
from pylora.model.config import ModuleSpec

ALL_LINEAR = "all-linear"
_OUTPUT_LAYERS = frozenset(family.names.head for family in families.ALL.values())


@dataclass(frozen=True)
class PlanEntry:
    """One adapted module: A is [r, k], B is [d, r], the update is scale * B A."""

    path: str
    kind: str  # "linear", "embedding" or "experts"
    d: int
    k: int
    r: int
    alpha: float
    scale: float
    rule_target: str  # which entry of target_modules chose it
    rule_r: str
    rule_alpha: str
    rule_scale: str
    lora_bias: bool = False  # B has a bias
    base_bias: bool = False  # the adapter replaces the module's own bias
    experts: int = 1  # A has a block of r rows for each, B r columns
    dora: bool = False  # there is a magnitude [d]

    def __repr__(self) -> str:
        kind = "" if self.kind == "linear" else f" {self.kind}"
        return (
            f"PlanEntry({self.path}: [{self.d}, {self.k}]{kind}, r {self.r}, alpha {self.alpha:g}, "
            f"scale {self.scale:g})"
        )

    @property
    def parameters(self) -> int:
        """How many numbers the adapter trains in this module."""
        return self.experts * self.r * (self.d + self.k) + self.d * (
            self.lora_bias + self.base_bias + self.dora
        )


@dataclass(frozen=True)
class Plan:
    """The adapted modules in the model's order, and further modules of which only the bias is."""

    entries: tuple[PlanEntry, ...]
    bias_only: tuple[tuple[str, ModuleSpec], ...] = ()  # with bias="all": modules that have no LoRA

    def __iter__(self) -> Iterator[PlanEntry]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __repr__(self) -> str:
        def spread(values: Iterable[float]) -> str:
            found = sorted(set(values))
            if len(found) < 2:
                return f"{found[0]:g}" if found else "none"
            return f"{found[0]:g} to {found[-1]:g}"

        entries = self.entries
        more = f" and {len(self.bias_only)} biases" if self.bias_only else ""
        return (
            f"Plan({len(entries)} modules{more}, r {spread(e.r for e in entries)}, "
            f"alpha {spread(e.alpha for e in entries)}, scale {spread(e.scale for e in entries)}, "
            f"{self.num_parameters:,} parameters)"
        )

    @property
    def num_parameters(self) -> int:
        """How many numbers the adapter trains."""
        return sum(e.parameters for e in self.entries) + sum(s.d for _, s in self.bias_only)


def resolve(config: LoraConfig, modules: Mapping[str, ModuleSpec]) -> Plan:
    """The plan of `config` for a model with these modules (`LlamaConfig.modules()`).

    A module of modules_to_save is saved whole and gets no A and B, as in PEFT. Raises PlanError,
    naming it, for whatever matches no module, and UnsupportedError for an init_lora_weights that
    takes from the base's weights ("pissa", "olora": see inits.py), for lora_bias on an embedding,
    for adapters of tied layers that are to be one (ensure_weight_tying), and for fan_in_fan_out on
    a module that is not stored transposed. Where one is, the flag is PEFT's business: it says how
    PEFT merges.
    """
    expect("LoRA settings", config, "resolve(config, modules)")
    expect("modules", modules, "resolve(config, modules)")
    init = config.init_lora_weights
    if isinstance(init, str) and FROM_BASE.fullmatch(init):
        raise UnsupportedError(
            f"init_lora_weights = {init!r} changed the base weights before training, so A and "
            "B are an adapter of another base; reading it takes the base model's weights, to know "
            "what was taken from them: Adapter.load(directory, model, base=checkpoint.load)"
        )
    whole = modules
    held = {path: spec for path, spec in modules.items() if spec.kind == "experts"}
    modules = {path: spec for path, spec in modules.items() if path not in held}
    parameters = _parameters(config, held)
    if config.target_modules or not parameters:
        _check_names(config, modules)
        chosen = {path: rule for path in modules if (rule := _target_rule(config, path, modules))}
    else:
        chosen = {}
    chosen = {path: rule for path, rule in chosen.items() if not saved_whole(config, path)}
    chosen |= parameters
    modules |= held
    if not chosen:
        raise PlanError(
            f"no module is left to adapt: target_modules = {_show(config.target_modules)}, "
            f"exclude_modules = {_show(config.exclude_modules)}, "
            f"layers_to_transform = {_show(config.layers_to_transform)}"
        )
    for name in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, name):
            if not any(_ends_with(key, path, name) for path in chosen):
                raise PlanError(
                    f"{name} key {key!r} matches none of the {len(chosen)} target modules"
                    f"{_hint(key, chosen)}"
                )
    straight = [p for p in chosen if modules[p].kind == "linear" and not modules[p].transposed]
    _check_tying(config, modules, chosen)
    if config.fan_in_fan_out and straight:
        raise UnsupportedError(
            "fan_in_fan_out = true is for layers that store W as [in, out] (GPT-2's Conv1D); "
            f"{straight[0]} stores [out, in]: set it to false"
        )
    entries = tuple(_entry(config, path, modules[path], rule) for path, rule in chosen.items())
    others: tuple[tuple[str, ModuleSpec], ...] = ()
    if config.bias == "all":
        others = tuple((p, s) for p, s in modules.items() if s.bias and p not in chosen)
    order = {path: i for i, path in enumerate(whole)}
    entries = tuple(sorted(entries, key=lambda e: order[e.path]))
    return Plan(entries, others)


def saved_whole(config: LoraConfig, path: str) -> bool:
    """Whether modules_to_save names the module at a path, or one that it is in. A name matches
    every path that ends in it, without regard to dots ("norm": "model.norm", "input_layernorm")."""
    names = tuple(config.modules_to_save or ())
    parts = path.split(".")
    return bool(names) and any(
        ".".join(parts[:n]).endswith(names) for n in range(1, len(parts) + 1)
    )


def _check_tying(
    config: LoraConfig, modules: Mapping[str, ModuleSpec], chosen: Mapping[str, str]
) -> None:
    for path in chosen:
        table = modules[path].kind == "embedding" or path in _OUTPUT_LAYERS
        if config.ensure_weight_tying and table:
            raise UnsupportedError(
                f"ensure_weight_tying = true with LoRA on {path} is not supported: the adapters of "
                "tied layers share their tensors; merge this adapter into its base model with "
                "PEFT, or retrain without it"
            )


def _parameters(config: LoraConfig, held: Mapping[str, ModuleSpec]) -> dict[str, str]:
    """Path -> rule of the experts' parameters that target_parameters names, by their whole paths
    or the ends of them. PlanError for a name that matches none."""
    chosen: dict[str, str] = {}
    for name in config.target_parameters or ():
        found = [path for path in held if _is_or_ends(path, name)]
        if not found:
            there = ", ".join(sorted({p.rpartition(".")[2] for p in held})) or "none"
            raise PlanError(
                f"target_parameters: {name!r} matches no parameter of experts; there are {there}"
            )
        chosen |= {path: f"target_parameters {name!r}" for path in found if path not in chosen}
    return chosen


def named_targets(config: LoraConfig, plan: Plan) -> LoraConfig:
    """The config with the names of its modules in place of the word "all-linear"."""
    target = config.target_modules
    if not isinstance(target, str) or target.lower() != ALL_LINEAR:
        return config
    names = dict.fromkeys(e.path.rsplit(".", 1)[-1] for e in plan.entries)
    return dataclasses.replace(config, target_modules=tuple(names))


def _entry(config: LoraConfig, path: str, spec: ModuleSpec, rule: str) -> PlanEntry:
    if spec.kind == "embedding" and config.lora_bias:
        raise UnsupportedError(f"{path}: lora_bias is not defined for an embedding (as in PEFT)")
    r, rule_r = _pattern(config.rank_pattern, path, "rank_pattern", config.r, "default r")
    alpha, rule_alpha = _pattern(
        config.alpha_pattern, path, "alpha_pattern", config.lora_alpha, "default lora_alpha"
    )
    if config.use_rslora:
        scale, rule_scale = alpha / math.sqrt(r), "alpha / sqrt(r) (use_rslora)"
    else:
        scale, rule_scale = alpha / r, "alpha / r"
    return PlanEntry(
        path,
        spec.kind,
        spec.d,
        spec.k,
        int(r),
        alpha,
        scale,
        rule,
        rule_r,
        rule_alpha,
        rule_scale,
        lora_bias=config.lora_bias,
        base_bias=spec.bias and config.bias != "none",
        experts=spec.experts,
        dora=config.use_dora,
    )


# ---- matching, as PEFT does it -------------------------------------------------------------------


def _target_rule(config: LoraConfig, path: str, modules: Mapping[str, ModuleSpec]) -> str | None:
    """Which entry of target_modules chooses this module; None if none does."""
    target = config.target_modules
    if _excluded(config, path):
        return None
    if isinstance(target, str):
        if target.lower() == ALL_LINEAR:
            linear = modules[path].kind == "linear" and path not in _OUTPUT_LAYERS
            return f"target_modules {target!r}" if linear else None
        return f"target_modules {target!r}" if _full(target, path, "target_modules") else None
    names = target or ()
    if path in names:  # a whole path is chosen whatever layers_to_transform says
        return f"target_modules {path!r}"
    name = next((n for n in names if path.endswith("." + n)), None)
    if name is None:
        return None
    if config.layers_to_transform is None:
        return f"target_modules {name!r}"
    layer = _layer(config, path)
    if layer not in config.layers_to_transform:
        return None
    return f"target_modules {name!r}, layers_to_transform {layer}"


def _excluded(config: LoraConfig, path: str) -> bool:
    names = config.exclude_modules
    if isinstance(names, str):
        return bool(names) and _full(names, path, "exclude_modules")
    return any(_is_or_ends(path, name) for name in names or ())


def _is_or_ends(path: str, name: str) -> bool:
    return path == name or path.endswith("." + name)


def _full(pattern: str, path: str, name: str) -> bool:
    return compiled(pattern, name).fullmatch(path) is not None


def _ends_with(key: str, path: str, name: str) -> bool:
    """PEFT's rule for keys of patterns: the key matches the whole path or its end after a dot."""
    return compiled(key, f"{name} key", (r"(.*\.)?(", ")$")).match(path) is not None


def _pattern(
    patterns: Mapping[str, float], path: str, name: str, default: float, rule: str
) -> tuple[float, str]:
    """The value for a module and its rule: the first key that matches, or the default."""
    hits = [key for key in patterns if _ends_with(key, path, name)]
    if not hits:
        return default, rule
    among = f" (first of {len(hits)} that match)" if len(hits) > 1 else ""
    return patterns[hits[0]], f"{name} {hits[0]!r}{among}"


def _layer(config: LoraConfig, path: str) -> int | None:
    """The index of the layer that a module is in, by layers_pattern or, without it, the first."""
    patterns = config.layers_pattern
    if not patterns:
        match = re.match(r".*?\.[^.]*\.(\d+)\.", path)
        return int(match[1]) if match else None
    for pattern in patterns:
        frame = r"(?:^|.*?\.)", r"\.(?P<idx>\d+)\."
        if found := compiled(pattern, "layers_pattern", frame).match(path):
            return None if found["idx"] is None else int(found["idx"])
    return None


# ---- names that match nothing --------------------------------------------------------------------


def _check_names(config: LoraConfig, modules: Mapping[str, ModuleSpec]) -> None:
    """PlanError for a target, an exclusion or a layer that matches nothing."""
    if not config.target_modules:
        raise PlanError(
            "target_modules is not given; name the modules to adapt, for example "
            "['q_proj', 'v_proj'] or 'all-linear'"
        )
    for name in ("target_modules", "exclude_modules"):
        value = getattr(config, name)
        if isinstance(value, str):
            whole = name == "target_modules" and value.lower() == ALL_LINEAR
            if value and not whole and not any(_full(value, path, name) for path in modules):
                raise PlanError(f"{name}: the regular expression {value!r} matches no module path")
            continue
        for entry in value or ():
            if not any(_is_or_ends(path, entry) for path in modules):
                raise PlanError(
                    f"{name}: {entry!r} matches no module that can take LoRA{_hint(entry, modules)}"
                )
    if config.layers_to_transform is not None:
        layers = {layer for path in modules if (layer := _layer(config, path)) is not None}
        if not layers:
            raise PlanError(f"layers_pattern {_show(config.layers_pattern)} matches no module path")
        for layer in config.layers_to_transform:
            if layer not in layers:
                raise PlanError(
                    f"layers_to_transform: the model has no layer {layer}; "
                    f"its layers are {min(layers)} to {max(layers)}"
                )


def _hint(name: str, paths: Mapping[str, object]) -> str:
    known = sorted({path.rsplit(".", 1)[-1] for path in paths})
    close = difflib.get_close_matches(name.rsplit(".", 1)[-1], known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(known)}"


def _show(value: object) -> str:
    return repr(list(value) if isinstance(value, tuple) else value)
