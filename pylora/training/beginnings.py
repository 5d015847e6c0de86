"""Fresh adapters that are not random: PiSSA, OLoRA, LoftQ and EVA, of a model and its data.

What is computed is in adapters/inits.py. The result is always a plain adapter of the base as it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pylora.adapters import inits
from pylora.adapters.adapter import Adapter
from pylora.adapters.inits import check_head, doubled, taken, takes_from_base
from pylora.adapters.loraconfig import LoraConfig
from pylora.adapters.peft import base_weight
from pylora.adapters.plan import Plan, PlanEntry, resolve
from pylora.adapters.whole import fresh_whole
from pylora.errors import ConfigError, UnsupportedError
from pylora.model.llama import Llama
from pylora.model.watch import watching
from pylora.model.whole import Whole
from pylora.numbers.precision import QUANTIZED
from pylora.training.examples import Example
from pylora.types import Array

Load = Callable[[str], Array]  # Checkpoint.load

NAMES = ("kaiming", "gaussian", "pissa", "olora", "eva", "loftq")
EVA_TOKENS = 1024  # whose inputs are looked at
_MOST = 256 << 20  # bytes of inputs that are kept at a time


def check_init(how: str, config: LoraConfig, precision: str) -> None:
    """ConfigError, before anything is read, for a beginning that there is not or that does not go
    with the other settings."""
    if how not in NAMES:
        raise ConfigError(f"init {how!r} is not known; choose one of {', '.join(NAMES)}")
    if how in ("pissa", "olora") and config.lora_dropout:
        raise ConfigError(
            f"init {how} takes no dropout: what was taken from the base must be given back whole"
        )
    if how in ("pissa", "olora", "loftq") and config.use_dora:
        raise ConfigError(
            f"init {how} and DoRA both begin from the base's weights in their own way: choose one"
        )
    if how == "loftq" and precision not in QUANTIZED:
        raise ConfigError(
            f"init loftq makes up for what quantizing takes from the weights, and {precision} does "
            f"not quantize: give --precision {' or '.join(sorted(QUANTIZED))}, or another init"
        )


def of_config(config: LoraConfig, how: str) -> tuple[LoraConfig, str]:
    """Settings without a beginning that takes from the base, and which: that of the settings,
    unless another is asked for than "kaiming"."""
    said = config.init_lora_weights
    if not isinstance(said, str) or said == "gaussian":
        return config, how
    own = takes_from_base(config) or said.lower()
    plain = dataclasses.replace(config, init_lora_weights=True)
    return plain, own if how == "kaiming" else how


def begin(
    how: str,
    config: LoraConfig,
    model: Llama,
    base: Load,
    examples: Sequence[Example] = (),
    seed: int = 0,
) -> Adapter:
    """A fresh adapter that begins as `how` says (`NAMES`).

    "pissa" and "olora" give an adapter of twice the rank, of which `Adapter.held` says how much is
    trained; it computes exactly what the base does, but for rounding. "loftq": B A makes up for
    what the model's precision takes from `base`, as far as the rank goes. "eva": A has the
    directions in which the inputs of `examples` vary, B = 0. Experts' parameters and embeddings
    are refused. What the settings train whole begins as in `base`. `resolve`'s errors, and those of
    `check_init` and `fresh_whole`.
    """
    check_init(how, config, model.precision)
    whole = fresh_whole(config, model.home_config, base)
    if config.use_dora:  # its lengths are those of the weights that the model computes with
        base = model.load
    if how in ("kaiming", "gaussian"):
        init = config.init_lora_weights if how == "kaiming" else how
        config = dataclasses.replace(config, init_lora_weights=init)
        plan = resolve(config, model.config.modules())
        return Adapter.init(plan, config, seed, base=base, whole=whole)
    config = dataclasses.replace(config, init_lora_weights=True)
    plan = resolve(config, model.config.modules())
    for e in plan.entries:
        if e.kind != "linear":
            raise UnsupportedError(
                f"{e.path}: init {how} is for linear modules; leave it out of the targets"
            )
    if how in ("pissa", "olora"):
        return _taken(how, config, plan, model, base, seed, whole)
    adapter = Adapter.init(plan, config, seed, base=base, whole=whole)
    if how == "loftq":
        _loftq(adapter, model, base)
    else:
        _eva(adapter, model, examples)
    return adapter


def _taken(
    how: str,
    config: LoraConfig,
    plan: Plan,
    model: Llama,
    base: Load,
    seed: int,
    whole: Whole | None,
) -> Adapter:
    check_head(model.config, plan, how)
    new = doubled(config)
    modules = model.config.modules()
    adapter = Adapter.init(resolve(new, modules), new, seed, base=base, whole=whole)
    for e in plan.entries:
        A, B = taken(how, base_weight(base, e.path), e)
        low = adapter[e.path]
        low.A[: e.r], low.A[e.r :] = A, A
        low.B[:, : e.r], low.B[:, e.r :] = B, -B
    adapter.held = {e.path: e.r for e in plan.entries}
    return adapter


def _loftq(adapter: Adapter, model: Llama, base: Load) -> None:
    for e in adapter.plan.entries:
        module: Any = model.modules[e.path]
        W, low = base_weight(base, e.path), adapter[e.path]
        quantized = model.ops.to_numpy(model.ops.unpack(module.W))
        r = min(e.r, *W.shape)
        low.A[r:] = 0
        low.A[:r], low.B[:, :r] = inits.loftq(W, quantized, r, e.scale)


def _eva(adapter: Adapter, model: Llama, examples: Sequence[Example]) -> None:
    """Goes over the data once for as many modules as their inputs have room."""
    rows, ids = 0, []
    for example in examples:
        ids.append(np.asarray(example.ids)[: EVA_TOKENS - rows])
        rows += ids[-1].size
        if rows >= EVA_TOKENS:
            break
    most = max((e.r for e in adapter.plan.entries), default=0)
    if rows <= most:
        raise ConfigError(
            f"init eva looks at the inputs of the training data, which has {rows} tokens: fewer "
            f"than it takes for rank {most}"
        )
    waiting = list(adapter.plan.entries)
    while waiting:
        some: list[PlanEntry] = []
        size = 0
        while waiting and (not some or size + 4 * rows * waiting[0].k <= _MOST):
            size += 4 * rows * waiting[0].k
            some.append(waiting.pop(0))
        seen = _inputs(model, ids, {e.path for e in some})
        made: dict[tuple[int, ...], Array] = {}  # modules that read the same have the same A
        for e in some:
            parts = seen[e.path]
            key = (*map(id, parts), e.r)
            if key not in made:
                made[key] = _directions(np.concatenate(parts), e.r)
            adapter[e.path].A[...] = made[key]


def _inputs(
    model: Llama, ids: Sequence[np.ndarray], paths: set[str]
) -> dict[str, list[np.ndarray[Any, Any]]]:
    """What the modules at `paths` are given, float32 [tokens, k] of each sequence."""
    seen: dict[str, list[np.ndarray[Any, Any]]] = {path: [] for path in paths}
    last: list[Any] = [None, None]

    def take(path: str, x: Array) -> None:
        if path in paths:
            if x is not last[0]:  # q, k and v are given one x, which is kept once
                last[:] = x, np.array(model.ops.to_numpy(model.ops.cast(x, np.float32)))
            seen[path].append(last[1])

    with watching(model, take):
        for one in ids:
            model.forward(one, rows=[0])
    return seen


def _directions(X: Array, r: int) -> Array:
    """The r directions in which the rows of X [n, k] vary most, [r, k]."""
    X = X.astype(np.float64) - X.mean(axis=0, dtype=np.float64)
    _, _, Vt = inits.principal(X, r)
    if Vt.shape[0] < r:  # no wider than the module
        Vt = np.concatenate([Vt, np.zeros((r - Vt.shape[0], X.shape[1]))])
    return inits.upright(Vt)
