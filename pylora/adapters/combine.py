"""Several adapters made into one: weighted sums, exact or of a given rank, TIES, DARE, pruning.

    combined = combine([(legal, 0.7), (verse, 0.3)], "ties", density=0.5)
    combined.adapter.save("both")

The methods are those of PEFT's `add_weighted_adapter`, and give what it gives, within rounding:
`docs/combine.md`. Adapters alone are read: no model is needed, and none is changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pylora.adapters import arithmetic
from pylora.adapters.adapter import Adapter, Item, gather, summed_config
from pylora.adapters.plan import resolve
from pylora.errors import ConfigError, PlanError, UnsupportedError
from pylora.model.config import ModuleSpec
from pylora.numbers import random
from pylora.types import LoRA

Array = np.ndarray[Any, Any]

_PLAIN = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
METHODS = ("cat", "svd", *_PLAIN, *(f"{name}_svd" for name in _PLAIN if name != "linear"))
_THINNING = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
_SIGNS = ("total", "frequency")


@dataclass(frozen=True)
class Combined:
    """One adapter of several, and what its rank could not hold."""

    adapter: Adapter
    lost: Mapping[str, float]  # module path -> relative Frobenius error of cutting to the rank
    total_lost: float  # the same of all modules together


@dataclass(frozen=True)
class _Job:
    """The settings of a combination, checked."""

    method: str
    density: float
    rank: int | None
    by_count: bool
    seed: int

    @property
    def base(self) -> str:
        """The method without the way in which its result becomes A and B."""
        return self.method.removesuffix("_svd")


def combine(
    items: Sequence[tuple[Adapter, float]],
    method: str = "cat",
    *,
    density: float | None = None,
    rank: int | None = None,
    majority_sign: str = "total",
    seed: int = 0,
) -> Combined:
    """One adapter that does what the (adapter, weight) pairs do together, by `method`:

    cat              the exact weighted sum; its rank is the sum of the ranks (`Adapter.stack`)
    svd              the best approximation of that sum whose rank is `rank` (default: the largest)
    linear           A's and B's summed, each with sqrt(|weight scale|); the ranks must be equal. It
                     is not the sum of the adapters: cross terms remain
    magnitude_prune  linear, of what is left of each A and B when the share `density` of the largest
                     magnitudes is kept
    ties             of what is so left, the mean of those that have the majority's sign:
                     `majority_sign` "total" (of the sum) or "frequency" (of the count)
    dare_linear      linear, of a random share `density` of the elements, divided by it
    dare_ties        ties, of the same
    NAME_svd         the method on the whole deltas scale B A, which are then cut to `rank`

    Modules that only some of the adapters have are combined from those. Weights may be negative: a
    single adapter with weight -1 is its opposite. The result's scales are 1, its numbers float32.
    The elements that DARE keeps depend on seed, module path, tensor and number of the adapter.

    Raises ConfigError for an unknown method or a setting that is missing, out of range or not the
    method's, PlanError where shapes or ranks do not agree, UnsupportedError for adapters that
    replace biases or have a bias of their own with a method other than "cat".
    """
    job = _checked(method, density, rank, majority_sign, seed)
    if method == "cat":
        exact = Adapter.stack(items)
        return Combined(exact, dict.fromkeys(exact, 0.0), 0.0)
    parts = gather(items)
    default = max(item.entry.r for found in parts.values() for item in found)
    modules: dict[str, ModuleSpec] = {}
    made: dict[str, LoRA] = {}
    norms: dict[str, tuple[float, float]] = {}  # of what was cut off, and of the whole
    for path, found in parts.items():
        if any(item.lora.bias is not None for item in found):
            raise UnsupportedError(
                f"{path}: an adapter whose B has a bias (lora_bias) is combined by 'cat' alone"
            )
        if method.endswith("svd"):
            A, B, cut, whole = _by_svd(path, found, job, rank or default)
            norms[path] = cut, whole
        else:
            A, B = _by_factors(path, found, job)
            norms[path] = 0.0, 0.0
        first = found[0].entry
        modules[path] = ModuleSpec(first.kind, first.d, first.k)
        made[path] = LoRA(A.astype(np.float32), B.astype(np.float32), 1.0, 0.0)
    ranks = {path: lora.A.shape[0] for path, lora in made.items()}
    config = summed_config([adapter.config for adapter, _ in items], ranks)
    return Combined(
        Adapter(config, resolve(config, modules), made),
        {path: _share(*pair) for path, pair in norms.items()},
        _share(*(math.hypot(*column) for column in zip(*norms.values(), strict=True))),
    )


def truncate(adapter: Adapter, rank: int) -> Combined:
    """The adapter with every module cut to `rank`: the nearest of that rank in Frobenius norm."""
    return combine([(adapter, 1.0)], "svd", rank=rank)


# ---- one module ----------------------------------------------------------------------------------


def _by_factors(path: str, found: Sequence[Item], job: _Job) -> tuple[Array, Array]:
    """A and B, each combined for itself."""
    ranks = {item.entry.r for item in found}
    if len(ranks) > 1:
        raise PlanError(
            f"{path}: the adapters have ranks {sorted(ranks)}; '{job.method}' adds A's to A's and "
            f"B's to B's, so ranks must agree: take cat, svd or {_with_svd(job.method)}"
        )
    factors = [item.weight * item.lora.scale for item in found]
    root = [math.sqrt(abs(f)) for f in factors]
    signed = [math.copysign(r, f) if f else r for r, f in zip(root, factors, strict=True)]
    thin = _thinning(path, job)
    A = _mixed([thin("A", item, item.lora.A) for item in found], signed, job)
    B = _mixed([thin("B", item, item.lora.B) for item in found], root, job)
    return A, B


def _by_svd(
    path: str, found: Sequence[Item], job: _Job, rank: int
) -> tuple[Array, Array, float, float]:
    """The deltas combined, and A and B of that."""
    if job.method == "svd":
        A = np.concatenate([np.asarray(item.lora.A, np.float64) for item in found])
        scaled = [
            item.lora.B.astype(np.float64) * (item.weight * item.lora.scale) for item in found
        ]
        return arithmetic.truncated(A, np.concatenate(scaled, axis=1), rank)
    thin = _thinning(path, job)
    deltas = [item.lora.B.astype(np.float64) @ item.lora.A * item.lora.scale for item in found]
    left = [thin("delta", item, delta) for item, delta in zip(found, deltas, strict=True)]
    mixed = _mixed(left, [item.weight for item in found], job)
    return arithmetic.factored(mixed, rank)


def _mixed(tensors: Sequence[Array], weights: Sequence[float], job: _Job) -> Array:
    if job.base.endswith("ties"):
        return arithmetic.elected(tensors, weights, by_count=job.by_count)
    return arithmetic.weighted_sum(tensors, weights)


def _thinning(path: str, job: _Job) -> Callable[[str, Item, Array], Array]:
    """What the method leaves of a tensor: (which one, whose, array) -> array."""

    def thin(which: str, item: Item, tensor: Array) -> Array:
        if job.density == 1:
            return tensor
        if job.base.startswith("dare"):
            stream = random.stream("dare", path, which, str(item.number))
            return arithmetic.drop_random(tensor, job.density, seed=job.seed, stream=stream)
        return arithmetic.prune_small(tensor, job.density)

    return thin


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


# ---- settings ------------------------------------------------------------------------------------


def _checked(
    method: str, density: float | None, rank: int | None, majority_sign: str, seed: int
) -> _Job:
    if method not in METHODS:
        raise ConfigError(
            f"unknown method {method!r} of combining adapters; there are {', '.join(METHODS)}"
        )
    base = method.removesuffix("_svd")
    number = isinstance(density, (int, float)) and not isinstance(density, bool)
    if base in _THINNING:
        if density is None or not number or not 0 < density <= 1:
            raise ConfigError(
                f"'{method}' needs density, the share of elements that are kept: above 0 and at "
                f"most 1, got {density!r:.60}"
            )
    elif density is not None:
        raise ConfigError(f"'{method}' keeps every element; density is for {', '.join(_THINNING)}")
    whole = isinstance(rank, (int, np.integer)) and not isinstance(rank, bool)
    if rank is not None and (not whole or rank < 1):
        raise ConfigError(f"rank must be a whole number from 1 on, got {rank!r:.60}")
    if rank is not None and not method.endswith("svd"):
        raise ConfigError(
            f"'{method}' gives the rank that it gives; rank is for svd and the methods ..._svd"
        )
    if majority_sign not in _SIGNS:
        raise ConfigError(
            f"majority_sign must be 'total' or 'frequency', got {majority_sign!r:.60}"
        )
    if majority_sign != "total" and not base.endswith("ties"):
        raise ConfigError(f"'{method}' elects no sign; majority_sign is for ties and dare_ties")
    random.check_seed(seed)
    kept = 1.0 if density is None else float(density)
    return _Job(method, kept, rank, majority_sign == "frequency", seed)


def _with_svd(method: str) -> str:
    return f"{method}_svd" if f"{method}_svd" in METHODS else "svd"
