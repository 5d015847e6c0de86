"""The settings of an adapter that came without any: a LoraConfig for modules, ranks and scales.

Files of other forms say what each module's A, B and scale are, and not by which rules. The config
made here gives the same ranks and scales through `resolve`, and is as short as it can be: names
that PEFT's users would write where all modules of a name are there, whole paths where not.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping

from pylora.adapters.loraconfig import LoraConfig
from pylora.adapters.plan import Plan, resolve
from pylora.errors import PlanError
from pylora.model.config import ModuleSpec

_LAYER = re.compile(r"^.*?\.[^.]*\.(\d+)\.(.+)$")  # as PEFT finds the number of a layer


def settings_of(
    chosen: Mapping[str, tuple[int, float]],
    modules: Mapping[str, ModuleSpec],
    *,
    dropout: float = 0.0,
    base: str | None = None,
    dora: bool = False,
) -> tuple[LoraConfig, Plan]:
    """The config of an adapter whose module `path` has (rank, scale) = chosen[path]; its plan.

    Raises PlanError where there is none, or a scale is none that a config can say.
    """
    if not chosen:
        raise PlanError("the adapter has no tensors")
    alphas = {path: _alpha(path, r, scale) for path, (r, scale) in chosen.items()}
    ranks = {path: r for path, (r, _) in chosen.items()}
    r, alpha = _commonest(ranks.values()), _commonest(alphas.values())
    held = [path for path in chosen if modules[path].kind == "experts"]
    plain = [path for path in chosen if modules[path].kind != "experts"]
    names, layers = _targets(plain, [p for p, s in modules.items() if s.kind != "experts"])
    parameters, _ = _targets(held, [p for p, s in modules.items() if s.kind == "experts"], False)
    linear = [modules[path] for path in plain if modules[path].kind == "linear"]
    config = LoraConfig(
        r=int(r),
        lora_alpha=_whole(alpha),
        target_modules=names or None,
        target_parameters=parameters or None,
        layers_to_transform=layers,
        rank_pattern={key: int(v) for key, v in _pattern(ranks, r).items()},
        alpha_pattern={key: _whole(v) for key, v in _pattern(alphas, alpha).items()},
        lora_dropout=0.0 if held else dropout,
        fan_in_fan_out=bool(linear) and not held and all(spec.transposed for spec in linear),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        use_dora=dora,
    )
    plan = resolve(config, modules)
    if {e.path: (e.r, e.scale) for e in plan} != dict(chosen):
        raise PlanError("the adapter's ranks and scales are none that PEFT's settings can say")
    return config, plan


def _alpha(path: str, r: int, scale: float) -> float:
    """The alpha for which alpha / r is the scale, bit for bit."""
    for alpha in (scale * r, *(math.nextafter(scale * r, end) for end in (0.0, math.inf))):
        if alpha / r == scale and alpha > 0:
            return alpha
    raise PlanError(f"{path}: the scale {scale!r} of rank {r} is none that alpha / r gives")


def _whole(value: float) -> float:
    return int(value) if float(value).is_integer() and abs(value) < 1 << 53 else value


def _commonest(values: Iterable[float]) -> float:
    return Counter(values).most_common(1)[0][0]


def _targets(
    chosen: list[str], every: list[str], by_layer: bool = True
) -> tuple[tuple[str, ...], tuple[int, ...] | None]:
    """Names that stand for exactly these of the paths, and the layers that they are limited to."""
    if not chosen:
        return (), None
    names = _short(chosen, every)
    if names is not None:
        return names, None
    layers = sorted({_place(path)[0] for path in chosen})
    if by_layer and layers[0] >= 0:
        some = _short(chosen, [path for path in every if _place(path)[0] in layers])
        if some is not None:
            return some, tuple(layers)
    return tuple(chosen), None


def _short(chosen: list[str], every: list[str]) -> tuple[str, ...] | None:
    """The last words of the paths, or their paths in a layer, if those mean no other module."""
    wanted, names = set(chosen), []
    for path in chosen:
        inner = _place(path)[1]
        for name in dict.fromkeys((path.rpartition(".")[2], inner)):
            meant = {p for p in every if p == name or p.endswith(f".{name}")}
            if path in meant and meant <= wanted:
                names.append(name)
                break
        else:
            return None
    return tuple(dict.fromkeys(names))


def _place(path: str) -> tuple[int, str]:
    found = _LAYER.match(path)
    return (int(found[1]), found[2]) if found else (-1, path)


def _pattern(values: Mapping[str, float], common: float) -> dict[str, float]:
    """Keys for what differs from the common value: of a name where all modules of it do."""
    by_name: dict[str, set[float]] = {}
    for path, value in values.items():
        by_name.setdefault(path.rpartition(".")[2], set()).add(value)
    out: dict[str, float] = {}
    for path, value in values.items():
        if value != common:
            name = path.rpartition(".")[2]
            out[name if len(by_name[name]) == 1 else path] = value
    return out
