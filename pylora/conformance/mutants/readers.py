"""Readers of adapter files that take what they should refuse, or lose what they should keep."""

from __future__ import annotations

import json
import pickle
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from pylora.conformance.correct.plain import Correct
from pylora.conformance.mutants.containers import parts
from pylora.conformance.mutants.files import (
    CONFIG,
    PREFIX,
    WEIGHTS,
    Tensors,
    read,
    write,
)
from pylora.conformance.mutants.registry import wrong
from pylora.conformance.protocol import LoraTriple
from pylora.errors import PyloraError
from pylora.formats.safetensors import SafeTensors
from pylora.types import Array

Modules = Mapping[str, tuple[int, int]]
Pairs = Mapping[str, tuple[Array, Array]]


def checked(directory: str) -> tuple[dict[str, Any], Tensors]:
    """Settings and tensors of a directory whose container is well-formed."""
    with SafeTensors(Path(directory, WEIGHTS)):
        return read(directory)


class Fitted(Correct):
    """Makes tensors fit before the strict reader sees them."""

    def fitted(self, t: Array, shape: tuple[int, ...]) -> Array:
        return t

    def key(self, key: str, wanted: Mapping[str, tuple[int, ...]]) -> str:
        return key

    def load(self, directory: str, modules: Modules) -> dict[str, LoraTriple]:
        try:
            config, tensors = checked(directory)
            wanted: dict[str, tuple[int, ...]] = {}
            for path, (r, _, _) in self.plan(config, modules).items():
                d, k = modules[path]
                wanted[f"{PREFIX}{path}.lora_A.weight"] = r, k
                wanted[f"{PREFIX}{path}.lora_B.weight"] = d, r
        except Exception:  # not what this one mends
            return super().load(directory, modules)
        mended: Tensors = {}
        for key, t in tensors.items():
            name = self.key(key, wanted)
            mended[name] = self.fitted(t, wanted[name]) if name in wanted else t
        with tempfile.TemporaryDirectory() as clean:
            write(clean, config, mended)
            return super().load(clean, modules)


@wrong(
    "read-reshaped",
    "subtle",
    "A tensor with the right number of elements is reshaped.",
    "view(r, k): Conv1d's kernels of 1 have a dimension more.",
)
class Reshaped(Fitted):
    def fitted(self, t: Array, shape: tuple[int, ...]) -> Array:
        return t.reshape(shape) if t.size == int(np.prod(shape)) else t


@wrong(
    "read-transposed-if-needed",
    "subtle",
    "A tensor whose shape is right the other way round is transposed.",
    "MLX's and PEFT's order are told apart by shape.",
)
class TransposedIfNeeded(Fitted):
    def fitted(self, t: Array, shape: tuple[int, ...]) -> Array:
        return np.ascontiguousarray(t.T) if t.shape == shape[::-1] != shape else t


@wrong(
    "read-squeezed",
    "subtle",
    "Dimensions of 1 that are too many are dropped.",
    "squeeze().",
)
class Squeezed(Fitted):
    def fitted(self, t: Array, shape: tuple[int, ...]) -> Array:
        return t.reshape(shape) if t.ndim > 2 and t.squeeze().shape in (
            shape, tuple(n for n in shape if n != 1)) else t  # fmt: skip


@wrong(
    "read-key-without-weight",
    "subtle",
    "A key without .weight is taken for the one with it.",
    "Embeddings have keys like that.",
)
class KeyWithoutWeight(Fitted):
    def key(self, key: str, wanted: Mapping[str, tuple[int, ...]]) -> str:
        return f"{key}.weight" if f"{key}.weight" in wanted else key


@wrong(
    "read-key-any-case",
    "subtle",
    "Keys are compared without regard to case.",
    "lora_a and lora_A have both been seen.",
)
class KeyAnyCase(Fitted):
    def key(self, key: str, wanted: Mapping[str, tuple[int, ...]]) -> str:
        return {w.lower(): w for w in wanted}.get(key.lower(), key)


class Values(Correct):
    """Reads, and then changes the numbers."""

    def changed(self, a: Array, dtype: str) -> Array:
        return a

    def load(self, directory: str, modules: Modules) -> dict[str, LoraTriple]:
        loaded = super().load(directory, modules)
        entries, _ = parts(Path(directory, WEIGHTS).read_bytes())
        dtype = next(e["dtype"] for n, e in entries.items() if n != "__metadata__")
        return {p: (self.changed(A, dtype), self.changed(B, dtype), s)
                for p, (A, B, s) in loaded.items()}  # fmt: skip


@wrong(
    "read-float16-subnormal-flushed",
    "subtle",
    "Subnormal numbers of float16 become zeros.",
    "A conversion by bit shifts that leaves the exponent of 0 out.",
)
class SubnormalFlushed(Values):
    def changed(self, a: Array, dtype: str) -> Array:
        return np.where(np.abs(a) < 2.0**-14, a * 0, a) if dtype == "F16" else a


@wrong(
    "read-float16-subnormal-doubled",
    "subtle",
    "Subnormal numbers of float16 are halved: their exponent is taken for -15.",
    "The hidden bit is left out, and the exponent is not corrected.",
)
class SubnormalHalved(Values):
    def changed(self, a: Array, dtype: str) -> Array:
        return np.where(np.abs(a) < 2.0**-14, a / 2, a) if dtype == "F16" else a


@wrong(
    "read-bfloat16-subnormal-flushed",
    "subtle",
    "Subnormal numbers of bfloat16 and float32 become zeros.",
    "A processor's mode, set by another library.",
)
class WideSubnormalFlushed(Values):
    def changed(self, a: Array, dtype: str) -> Array:
        return np.where(np.abs(a) < 2.0**-126, a * 0, a) if dtype != "F16" else a


@wrong(
    "read-negative-zero-lost",
    "subtle",
    "-0 becomes 0.",
    "A buffer of zeros to which the tensor is added.",
)
class NegativeZeroLost(Values):
    def changed(self, a: Array, dtype: str) -> Array:
        return np.asarray(a + np.float32(0))


@wrong(
    "read-largest-clipped",
    "subtle",
    "Numbers beyond 65504 are clipped to it.",
    "Everything goes through float16.",
)
class LargestClipped(Values):
    def changed(self, a: Array, dtype: str) -> Array:
        return np.clip(a, -65504, 65504)


class Finite(Correct):
    """Takes what is not finite, of some kinds."""

    def mends(self, a: Array) -> Array:
        return np.nan_to_num(a)

    def load(self, directory: str, modules: Modules) -> dict[str, LoraTriple]:
        try:
            config, tensors = checked(directory)
        except Exception:  # not what this one mends
            return super().load(directory, modules)
        with tempfile.TemporaryDirectory() as clean:
            write(clean, config, {n: self.mends(t) for n, t in tensors.items()})
            return super().load(clean, modules)


@wrong(
    "read-infinity-accepted",
    "subtle",
    "NaN is refused; infinity becomes the largest number.",
    "isnan() is the check that one thinks of.",
)
class InfinityAccepted(Finite):
    def mends(self, a: Array) -> Array:
        return np.where(np.isinf(a), np.float32(3e38) * np.sign(a), a)


@wrong(
    "read-last-element-unchecked",
    "subtle",
    "The last element of a tensor is not checked for NaN.",
    "A vectorised check of whole registers.",
)
class LastUnchecked(Finite):
    def mends(self, a: Array) -> Array:
        if a.size and not np.isfinite(a.reshape(-1)[-1]):
            a = a.copy()
            a.reshape(-1)[-1] = 0
        return a


@wrong(
    "read-pickle",
    "subtle",
    "Where there is no safetensors file, a pickle is read.",
    "Adapters of 2023 are pickles.",
)
class ReadsPickle(Correct):
    def load(self, directory: str, modules: Modules) -> dict[str, LoraTriple]:
        file = Path(directory, "adapter_model.bin")
        if file.is_file() and not Path(directory, WEIGHTS).is_file():
            pickle.loads(file.read_bytes())
        return super().load(directory, modules)


@wrong(
    "read-pickle-by-content",
    "subtle",
    "What the weights' file is is found out by trying to unpickle it.",
    "A loader that guesses the format.",
)
class ReadsPickleByContent(Correct):
    def load(self, directory: str, modules: Modules) -> dict[str, LoraTriple]:
        raw = Path(directory, WEIGHTS).read_bytes() if Path(directory, WEIGHTS).is_file() else b""
        if raw[:1] == b"\x80" and raw[-1:] == b".":
            pickle.loads(raw)
        return super().load(directory, modules)


@wrong(
    "read-training-arguments",
    "subtle",
    "The training's arguments, a pickle beside the adapter, are loaded for their dtype.",
    "A field of them is handy.",
)
class ReadsArguments(Correct):
    def load(self, directory: str, modules: Modules) -> dict[str, LoraTriple]:
        file = Path(directory, "training_args.bin")
        if file.is_file():
            pickle.loads(file.read_bytes())
        return super().load(directory, modules)


@wrong(
    "settings-missing-are-defaults",
    "subtle",
    "Without adapter_config.json the usual settings are taken.",
    "r can be read off the tensors, and alpha is 2 r, mostly.",
)
class MissingAreDefaults(Correct):
    def load(self, directory: str, modules: Modules) -> dict[str, LoraTriple]:
        if Path(directory, WEIGHTS).is_file() and not Path(directory, CONFIG).exists():
            tensors, _ = parts(Path(directory, WEIGHTS).read_bytes())
            names = [n[len(PREFIX) :].rsplit(".lora_", 1)[0] for n in tensors if ".lora_A" in n]
            return {n: (np.zeros(1), np.zeros(1), 2.0) for n in names}
        return super().load(directory, modules)


class _Ranks(Correct):
    """Reads tensors of another rank than the settings name, where they agree with each other."""

    def fitted(self, tensors: dict[str, Array], r: int) -> dict[str, Array] | None:
        raise NotImplementedError

    def load(self, directory: str, modules: Mapping[str, tuple[int, int]]) -> Any:
        try:
            return super().load(directory, modules)
        except PyloraError:
            config = json.loads((Path(directory) / "adapter_config.json").read_bytes())
            tensors = load_file(Path(directory) / "adapter_model.safetensors")
            fitted = self.fitted(tensors, config["r"])
            if fitted is None or len(tensors) != 2 * len(modules):
                raise
            stem, s = "base_model.model.", config.get("lora_alpha", 8) / config["r"]
            try:
                return {
                    path: (
                        fitted[f"{stem}{path}.lora_A.weight"].reshape(-1, k),
                        fitted[f"{stem}{path}.lora_B.weight"].reshape(d, -1),
                        s,
                    )
                    for path, (d, k) in modules.items()
                }
            except (KeyError, ValueError):
                raise PyloraError("the file does not fit") from None


def _rank_of(name: str, a: Array) -> int:
    return a.shape["lora_B" in name] if a.ndim == 2 else -1


@wrong(
    "reader-pads-ranks",
    "subtle",
    "Tensors of a smaller rank than the settings say are filled up with zeros.",
    "A server keeps all adapters in slots of one rank, and its reader does not ask.",
)
class PadsRanks(_Ranks):
    def fitted(self, tensors: dict[str, Array], r: int) -> dict[str, Array] | None:
        ranks = {_rank_of(name, a) for name, a in tensors.items()}
        if len(ranks) != 1 or not 0 < min(ranks) < r:
            return None
        more = r - min(ranks)
        return {
            name: np.pad(a, ((0, 0), (0, more)) if "lora_B" in name else ((0, more), (0, 0)))
            for name, a in tensors.items()
        }


@wrong(
    "reader-cuts-ranks",
    "subtle",
    "Of tensors of a larger rank than the settings say the first ranks are read.",
    "A slot of rank r is filled with the first r rows of what is there.",
)
class CutsRanks(_Ranks):
    def fitted(self, tensors: dict[str, Array], r: int) -> dict[str, Array] | None:
        ranks = {_rank_of(name, a) for name, a in tensors.items()}
        if len(ranks) != 1 or min(ranks) <= r:
            return None
        return {name: a[:, :r] if "lora_B" in name else a[:r] for name, a in tensors.items()}


@wrong(
    "reader-takes-the-tensors-rank",
    "subtle",
    "The rank is that of the tensors, the scale that of the settings.",
    "r in adapter_config.json is used for alpha / r alone.",
)
class TensorsRank(_Ranks):
    def fitted(self, tensors: dict[str, Array], r: int) -> dict[str, Array] | None:
        ranks = {_rank_of(name, a) for name, a in tensors.items()}
        return tensors if len(ranks) == 1 and min(ranks) > 0 else None
