"""Adapters: A and B by module path, as plain data. Made, loaded, saved, summed.

An adapter does not know a model: attaching is `Llama.attach(adapter)`, merging is in merge.py.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pylora.adapters import gguf, mlx, peft
from pylora.adapters.locate import GGUF, PEFT, SPOKEN, find_adapter, form_of
from pylora.adapters.loraconfig import LoraConfig
from pylora.adapters.peft import Array, Load
from pylora.adapters.plan import Plan, PlanEntry, named_targets, resolve
from pylora.adapters.whole import tensors_of
from pylora.errors import ConfigError, PlanError, UnsupportedError, expect, wrong_type
from pylora.model.config import LlamaConfig, ModuleSpec
from pylora.model.whole import Whole
from pylora.numbers import random
from pylora.numbers.lengths import row_squares
from pylora.types import LoRA

__all__ = ["Adapter", "LoraConfig", "parameters"]


class Adapter(Mapping[str, LoRA]):
    """Module path -> LoRA, with the config and plan that it was made by.

    The arrays are the adapter's own, float32 and C-contiguous: training writes to them.
    """

    def __init__(
        self,
        config: LoraConfig,
        plan: Plan,
        modules: Mapping[str, LoRA],
        whole: Whole | None = None,
    ) -> None:
        """`whole`: the base's tensors that the adapter brings in place of them. Raises PlanError
        unless `modules` has what the plan says, in the plan's shapes."""
        expect("LoRA settings", config, "Adapter(config, plan, modules)")
        expect("plan", plan, "Adapter(config, plan, modules)")
        expect("adapter", modules, "Adapter(config, plan, modules)")
        self.config, self.plan, self.whole = config, plan, whole
        self._modules = dict(modules)
        # Of modules whose adapter stays as it is in part, how many rows of A are trained.
        self.held: dict[str, int] = {}
        paths = [e.path for e in plan.entries] + [path for path, _ in plan.bias_only]
        if sorted(paths) != sorted(self._modules):
            odd = sorted(set(paths) ^ set(self._modules))
            raise PlanError(f"the plan and the adapter's modules differ: {', '.join(odd[:5])}")
        for key, (path, field, shape) in peft.tensor_names(plan).items():
            array = getattr(self._modules[path], field)
            if array is None or array.shape != shape:
                got = None if array is None else array.shape
                raise PlanError(f"{key}: got shape {got}, the plan says {shape}")

    def __getitem__(self, path: str) -> LoRA:
        return self._modules[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    def __repr__(self) -> str:
        plan = repr(self.plan).removeprefix("Plan(").removesuffix(")")
        base = self.config.base_model_name_or_path
        n = 0 if self.whole is None else len(self.whole.tensors)
        more = f", {n} whole weights" if n else ""
        return f"Adapter({plan}{more}{f', for {base}' if base else ''})"

    @classmethod
    def init(
        cls,
        plan: Plan,
        config: LoraConfig,
        seed: int = 0,
        *,
        base: Load | None = None,
        whole: Whole | None = None,
    ) -> Adapter:
        """A fresh adapter, which changes nothing (unless init_lora_weights is False): B = 0.

        A is Kaiming-uniform, U(-1/sqrt(k), 1/sqrt(k)) (True), or N(0, 1/r²) ("gaussian"); with
        False B and its bias are random too, U(-1/sqrt(r), 1/sqrt(r)). Of an embedding A = 0 (random
        with False) and B ~ N(0, 1). The numbers depend on seed, module path and element alone: the
        streams are ("init", path) for A, ("init", path, "B") and ("init", path, "bias").

        `base` gives the base model's tensors by name; it is needed where config.bias is not "none"
        and the model has biases, which start as the base's, and with use_dora, whose magnitudes
        start as the lengths of the rows of W + s B A. Where the model computes with other numbers
        than the file has (int8, bf16), give those: `Llama.load`.

        `whole`: what config.modules_to_save and config.trainable_token_indices name, which
        `fresh_whole` of pylora.adapters.whole makes of the base.
        """
        expect("plan", plan, "Adapter.init(plan, config)")
        expect("LoRA settings", config, "Adapter.init(plan, config)")
        for name in ("modules_to_save", "trainable_token_indices"):
            if getattr(config, name) and whole is None:
                raise ConfigError(
                    f"{name} = {getattr(config, name)!r:.100}: these weights begin as the base "
                    "model's; give whole=fresh_whole(config, llama_config, checkpoint.load) of "
                    "pylora.adapters.whole"
                )
        peft.refuse_both(plan, whole)
        arrays: dict[str, Array] = {}
        entries = {e.path: e for e in plan.entries}
        for key, (path, field, shape) in peft.tensor_names(plan).items():
            if field == "magnitude":
                head = key.removesuffix("lora_magnitude_vector")
                arrays[key] = _lengths(entries[path], arrays, head, base)
            elif field == "base_bias":
                arrays[key] = _own_bias(path, shape, config, base)
            else:
                arrays[key] = _initial(entries[path], field, shape, config, seed)
        return cls(config, plan, peft.assemble(config, plan, arrays), whole)

    @classmethod
    def load(
        cls,
        directory: str | os.PathLike[str],
        modules: Mapping[str, ModuleSpec] | LlamaConfig,
        *,
        base: Load | None = None,
    ) -> Adapter:
        """The adapter in a PEFT directory, a GGUF file or a folder of mlx-lm's, for a model of this
        LlamaConfig. Its modules alone (`LlamaConfig.modules()`) are enough for PEFT's form without
        whole weights.

        `base` (Checkpoint.load) is needed where the file carries copies of base weights, as PEFT
        writes for adapted embeddings. Errors: see `read` of `pylora.adapters.peft`, `gguf`, `mlx`.
        """
        config = modules if isinstance(modules, LlamaConfig) else None
        modules = modules.modules() if isinstance(modules, LlamaConfig) else modules
        expect("modules", modules, "Adapter.load(directory, modules)")
        if base is not None and not callable(base):
            wrong_type("Adapter.load(base=...)", "checkpoint.load", base)
        place = find_adapter(directory)
        form = form_of(place)
        if form == PEFT and config is not None:
            return cls(*peft.read_all(place, config, base))
        if form == PEFT:
            return cls(*peft.read(place, modules, base))
        if config is None:
            raise UnsupportedError(
                f"{place} is {SPOKEN[form]}, whose names and order depend on the base model: give "
                "its LlamaConfig (on the command line: --model), or convert the adapter first"
            )
        return cls(*(gguf.read if form == GGUF else mlx.read)(place, config))

    def without_whole(self) -> Adapter:
        """A and B alone, on a base that has the whole weights already; the arrays are shared."""
        if self.whole is None:
            return self
        config = dataclasses.replace(
            self.config,
            modules_to_save=None,
            trainable_token_indices=None,
            ensure_weight_tying=False,
            target_modules=tuple(e.path for e in self.plan if e.kind != "experts") or None,
            exclude_modules=None,
            layers_to_transform=None,
            layers_pattern=None,
        )
        return Adapter(config, self.plan, self._modules)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes a PEFT directory, float32; loading it gives the same bits. The word "all-linear"
        is written as the names that it stood for, as PEFT does: servers do not know the word."""
        expect("path", directory, "Adapter.save(directory)")
        arrays = parameters(self)
        if self.whole is not None:
            arrays |= tensors_of(self.whole, {e.path for e in self.plan.entries})
        peft.write(directory, named_targets(self.config, self.plan), arrays)

    @property
    def beside(self) -> dict[str, Array]:
        """The arrays that are trained beside A and B, by name: of whole weights, their rows."""
        return {} if self.whole is None else dict(self.whole.trained)

    @property
    def num_parameters(self) -> int:
        """How many numbers the adapter holds, those of whole weights included."""
        held = sum(array.size for array in parameters(self).values())
        if self.whole is None:
            return held
        rows = self.whole.rows
        whole = (
            len(rows[name]) * array.shape[1] if name in rows else array.size
            for name, array in self.whole.tensors.items()
        )
        return int(held + sum(whole))

    def digest(self) -> str:
        """SHA-256, in hex, of names, shapes, bits and scales: equal for equal adapters."""
        sha = hashlib.sha256()
        for key, array in sorted(parameters(self).items()):
            sha.update(f"{key} {array.shape} ".encode())
            sha.update(np.ascontiguousarray(array, "<f4").tobytes())
        for path in sorted(self):
            sha.update(f"{path} {float(self[path].scale).hex()} ".encode())
        if self.whole is not None:
            for name, array in sorted(self.whole.tensors.items()):
                sha.update(f"{name} {array.shape} {self.whole.tied} ".encode())
                sha.update(np.ascontiguousarray(array, "<f4").tobytes())
        return sha.hexdigest()

    @staticmethod
    def stack(items: Sequence[tuple[Adapter, float]]) -> Adapter:
        """The weighted sum of adapters as one: A's and B's concatenated along the rank.

        sum_i weight_i scale_i B_i A_i; scales and weights are folded into B (rounded once to
        float32), so every scale of the result is 1. The adapters may target different modules. The
        result has no dropout: it is for generation, merging and further training without.
        Raises ConfigError for an empty list or a weight that is not finite, PlanError where module
        shapes differ, UnsupportedError where an adapter replaces biases of the base.
        """
        return _stack(items)


def parameters(adapter: Adapter) -> dict[str, Array]:
    """PEFT key -> array, the arrays themselves: writing to them changes the adapter."""
    expect("whole adapter", adapter, "parameters(adapter)")
    names = peft.tensor_names(adapter.plan)
    return {key: getattr(adapter[path], field) for key, (path, field, _) in names.items()}


def _initial(
    e: PlanEntry, field: str, shape: tuple[int, ...], config: LoraConfig, seed: int
) -> Array:
    """The first values of A, B or the bias of B, as PEFT fills them."""
    how: Any = config.init_lora_weights
    how = how.lower() if isinstance(how, str) else how
    if not isinstance(how, bool) and how != "gaussian":
        raise UnsupportedError(
            f"init_lora_weights = {how!r} is only read from files; a fresh adapter can be made "
            "with true, false or 'gaussian'"
        )
    parts = ("init", e.path) if field == "A" else ("init", e.path, field)
    stream = random.stream(*parts)
    if e.kind == "embedding":
        if field == "A" and how is not False:
            return np.zeros(shape, np.float32)
        return random.normal(shape, 1.0, seed=seed, stream=stream)
    if field != "A":
        if how is not False:
            return np.zeros(shape, np.float32)
        return random.uniform(shape, 1 / math.sqrt(e.r), seed=seed, stream=stream)
    if how == "gaussian":
        return random.normal(shape, 1 / e.r, seed=seed, stream=stream)
    return random.uniform(shape, 1 / math.sqrt(e.k), seed=seed, stream=stream)


def _lengths(e: PlanEntry, arrays: Mapping[str, Array], head: str, base: Load | None) -> Array:
    """The lengths of the rows of W + s B A, of an embedding those of its columns."""
    if base is None:
        raise ConfigError(
            "use_dora = true starts from the lengths of the base model's weights: give "
            f"base=checkpoint.load, or base=llama.load of a loaded model (needed for {e.path})"
        )
    W = peft.base_weight(base, e.path)
    if e.kind == "embedding":
        W, names = W.T, ("lora_embedding_A", "lora_embedding_B")
    else:
        names = "lora_A.weight", "lora_B.weight"
    if W.shape != (e.d, e.k):
        raise PlanError(f"{e.path}: the base's weight has shape {W.shape}, expected {(e.d, e.k)}")
    A, B = (arrays[head + name] for name in names)
    some = A.any() and B.any()
    squares = row_squares(W, A if some else None, B if some else None, float(np.float32(e.scale)))
    return np.sqrt(squares).astype(np.float32)


def _own_bias(path: str, shape: tuple[int, ...], config: LoraConfig, base: Load | None) -> Array:
    if base is None:
        raise ConfigError(
            f"bias = {config.bias!r} trains the base model's biases, so the adapter starts from "
            f"them: give base=checkpoint.load (needed for {path}.bias)"
        )
    bias = np.array(base(f"{path}.bias"), np.float32, order="C")
    if bias.shape != shape:
        raise PlanError(f"{path}.bias has shape {bias.shape}, expected {shape}")
    return bias


@dataclass(frozen=True)
class Item:
    """One adapter's part of a module, in a combination of several."""

    number: int  # of the adapter in the list
    entry: PlanEntry
    lora: LoRA
    weight: float


def gather(items: Sequence[tuple[Adapter, float]]) -> dict[str, list[Item]]:
    """What each of the adapters has for a module: path -> items. Errors: those of `stack`."""
    pairs = "a list of (adapter, weight)"
    if not isinstance(items, (list, tuple)):
        wrong_type("Adapter.stack", pairs, items, "write [(one, 0.5), (other, 0.5)]")
    for item in items:
        if not isinstance(item, (list, tuple)) or len(item) != 2:
            wrong_type("Adapter.stack", f"{pairs}, and in it", item, "write (adapter, 1.0)")
        expect("whole adapter", item[0], "Adapter.stack, first of a pair,")
        if not isinstance(item[1], (int, float)):
            wrong_type("Adapter.stack", "a number as the weight", item[1])
    if not items:
        raise ConfigError("nothing to stack: give at least one (adapter, weight)")
    parts: dict[str, list[Item]] = {}
    for number, (adapter, weight) in enumerate(items):
        if not math.isfinite(weight):
            raise ConfigError(f"the weight {weight!r} of an adapter is not a finite number")
        if adapter.whole is not None:
            raise UnsupportedError(
                f"an adapter that brings {next(iter(adapter.whole.tensors))!r} whole "
                "(modules_to_save, trainable_token_indices, a resized vocabulary) replaces the "
                "base model's, and replacements cannot be summed; use it alone, or merge it"
            )
        biases = [e.path for e in adapter.plan.entries if e.base_bias]
        if biases or adapter.plan.bias_only:
            raise UnsupportedError(
                f"an adapter with bias = {adapter.config.bias!r} replaces the base model's biases, "
                "and replacements cannot be summed; combine adapters with bias = 'none'"
            )
        for e in adapter.plan.entries:
            if e.dora:
                raise UnsupportedError(
                    f"{e.path}: an adapter of DoRA (use_dora) divides by the lengths of W + s B A, "
                    "so that adapters do not add up to one; merge them one after the other"
                )
            if e.kind == "experts":
                raise UnsupportedError(
                    f"{e.path}: adapters of experts' parameters are not summed; merge one after "
                    "the other"
                )
            found = parts.setdefault(e.path, [])
            found.append(Item(number, e, adapter[e.path], float(weight)))
            first = found[0].entry
            if (e.kind, e.d, e.k) != (first.kind, first.d, first.k):
                raise PlanError(
                    f"{e.path}: the adapters are for different models, {(e.d, e.k)} against "
                    f"{(first.d, first.k)}"
                )
    return parts


def _stack(items: Sequence[tuple[Adapter, float]]) -> Adapter:
    parts = gather(items)
    modules = {
        path: ModuleSpec(found[0].entry.kind, found[0].entry.d, found[0].entry.k)
        for path, found in parts.items()
    }
    ranks = {path: sum(item.entry.r for item in found) for path, found in parts.items()}
    config = summed_config([adapter.config for adapter, _ in items], ranks)
    summed = {path: _sum(found, config.lora_bias) for path, found in parts.items()}
    return Adapter(config, resolve(config, modules), summed)


def summed_config(configs: Sequence[LoraConfig], ranks: Mapping[str, int]) -> LoraConfig:
    """Every module by its whole path, alpha = r everywhere: scale 1, also when PEFT reads it."""
    common = Counter(ranks.values()).most_common(1)[0][0]
    other = {path: r for path, r in ranks.items() if r != common}
    return LoraConfig(
        r=common,
        lora_alpha=common,
        target_modules=tuple(ranks),
        rank_pattern=other,
        alpha_pattern=dict(other),
        lora_bias=any(c.lora_bias for c in configs),
        task_type=configs[0].task_type,
        base_model_name_or_path=configs[0].base_model_name_or_path,
    )


def _sum(found: Sequence[Item], biased: bool) -> LoRA:
    def scaled(array: Array, item: Item) -> Array:
        return array.astype(np.float64) * (item.weight * item.lora.scale)

    A = np.concatenate([item.lora.A for item in found], axis=0)
    B = np.concatenate([scaled(item.lora.B, item) for item in found], axis=1)
    bias = None
    if biased:
        bias = np.zeros(B.shape[0])
        for item in found:
            if item.lora.bias is not None:
                bias = bias + scaled(item.lora.bias, item)
    as_float = np.float32
    return LoRA(A, B.astype(as_float), 1.0, 0.0, None if bias is None else bias.astype(as_float))
