"""Adapter files: what is written, and what a reader lets pass."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pylora.conformance.correct.plain import Correct
from pylora.conformance.mutants.registry import wrong
from pylora.conformance.protocol import LoraTriple
from pylora.errors import FileFormatError
from pylora.formats.base import widen
from pylora.formats.safetensors import save
from pylora.types import Array

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
Modules = Mapping[str, tuple[int, int]]
Tensors = dict[str, Array]


def read(directory: str, *, repeated: bool = False) -> tuple[dict[str, Any], Tensors]:
    """Settings and tensors (float32) of a PEFT directory, unchecked.

    A repeated key raises, or, with `repeated`, the last one counts.
    """
    config = json.loads((Path(directory) / CONFIG).read_text(encoding="utf-8"))
    raw = (Path(directory) / WEIGHTS).read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    tensors: Tensors = {}
    pairs = json.loads(raw[8:end], object_pairs_hook=lambda found: found)
    for key, found in pairs:
        about = dict(found)
        if key in tensors and not repeated:
            raise FileFormatError(f"{directory}: {key!r} is there twice")
        if key != "__metadata__":
            first, last = about["data_offsets"]
            data = np.frombuffer(raw[end + first : end + last], DTYPES[about["dtype"]])
            data = data.reshape(about["shape"])
            tensors[key] = widen(data, "bf16") if data.dtype == np.uint16 else data.astype("f4")
    return config, tensors


def write(directory: str, config: Mapping[str, Any], tensors: Tensors) -> None:
    """A PEFT directory of just this."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    text = json.dumps(config)
    (Path(directory) / CONFIG).write_text(text, encoding="utf-8")
    save(Path(directory) / WEIGHTS, tensors, {"format": "pt"})


def rewritten(
    directory: str, change: Callable[[dict[str, Any], Tensors], tuple[dict[str, Any], Tensors]]
) -> None:
    """Writes the directory again, changed."""
    write(directory, *change(*read(directory)))


class Lenient(Correct):
    """A reader that mends what it reads before the strict one sees it."""

    repeated = False

    def mend(self, config: dict[str, Any], tensors: Tensors, modules: Modules) -> Tensors:
        return tensors

    def load(self, directory: str, modules: Modules) -> dict[str, LoraTriple]:
        config, tensors = read(directory, repeated=self.repeated)
        tensors = self.mend(config, tensors, modules)
        with tempfile.TemporaryDirectory() as clean:
            write(clean, config, tensors)
            return super().load(clean, modules)

    def wanted(self, config: dict[str, Any], modules: Modules) -> dict[str, tuple[int, int]]:
        """Key -> shape of every tensor that the settings imply."""
        out = {}
        for path, (r, _, _) in self.plan(config, modules).items():
            d, k = modules[path]
            out[f"{PREFIX}{path}.lora_A.weight"] = r, k
            out[f"{PREFIX}{path}.lora_B.weight"] = d, r
        return out


@wrong(
    "load-leftover-ignored",
    "subtle",
    "A tensor that belongs to no module is ignored.",
    "Names that differ by a prefix: nothing of the adapter is loaded, and the base answers.",
    "vllm-project/vllm#34186",
)
class LeftoverIgnored(Lenient):
    def mend(self, config: dict[str, Any], tensors: Tensors, modules: Modules) -> Tensors:
        wanted = self.wanted(config, modules)
        return {key: t for key, t in tensors.items() if key in wanted}


@wrong(
    "load-missing-is-zero",
    "subtle",
    "A tensor that the file lacks is zero.",
    "The model's initial values stay where the file says nothing; B = 0 is one of them.",
    "huggingface/transformers#34068",
)
class MissingIsZero(Lenient):
    def mend(self, config: dict[str, Any], tensors: Tensors, modules: Modules) -> Tensors:
        wanted = self.wanted(config, modules)
        zeros = {key: np.zeros(shape, np.float32) for key, shape in wanted.items()}
        return {**zeros, **tensors}


@wrong(
    "load-duplicate-accepted",
    "subtle",
    "Of a key that the header has twice the last one counts.",
    "A JSON parser's silence; two readers see two adapters in one file.",
)
class DuplicateAccepted(Lenient):
    repeated = True


@wrong(
    "load-shape-made-to-fit",
    "subtle",
    "A tensor of the wrong shape is cut, repeated or broadcast to the right one.",
    "A copy into a buffer of the right size.",
)
class ShapeMadeToFit(Lenient):
    def mend(self, config: dict[str, Any], tensors: Tensors, modules: Modules) -> Tensors:
        wanted = self.wanted(config, modules)
        return {
            key: np.resize(t, wanted[key]) if key in wanted and t.size else t
            for key, t in tensors.items()
        }


@wrong(
    "load-nan-accepted",
    "subtle",
    "NaN in a file becomes 0.",
    "A training that broke leaves a file that loads.",
)
class NanAccepted(Lenient):
    def mend(self, config: dict[str, Any], tensors: Tensors, modules: Modules) -> Tensors:
        return {key: np.nan_to_num(t) for key, t in tensors.items()}


@wrong(
    "load-rslora-forgotten",
    "subtle",
    "load computes the scale without use_rslora.",
    "The writer knows the setting, the reader is older.",
    "vllm-project/vllm#55545",
)
class LoadRsloraForgotten(Correct):
    def load(self, directory: str, modules: Modules) -> dict[str, LoraTriple]:
        config, _ = read(directory)
        loaded = super().load(directory, modules)
        if not config.get("use_rslora"):
            return loaded
        return {p: (A, B, s / math.sqrt(A.shape[0])) for p, (A, B, s) in loaded.items()}


@wrong(
    "load-alpha-pattern-forgotten",
    "subtle",
    "load takes lora_alpha for every module.",
    "The pattern is used where adapters are made, not where they are read.",
)
class LoadAlphaPatternForgotten(Correct):
    def load(self, directory: str, modules: Modules) -> dict[str, LoraTriple]:
        config, _ = read(directory)
        loaded = super().load(directory, modules)
        plain = self.plan({k: v for k, v in config.items() if k != "alpha_pattern"}, modules)
        return {path: (A, B, plain[path][2]) for path, (A, B, _) in loaded.items()}


@wrong(
    "save-float16",
    "subtle",
    "Tensors are rounded to float16 in the file.",
    "To halve the file. Small values become zeros.",
    "kohya-ss/sd-scripts#93",
)
class SaveFloat16(Correct):
    def save(
        self, directory: str, adapters: Mapping[str, tuple[Array, Array]], config: dict[str, Any]
    ) -> None:
        with np.errstate(over="ignore"):
            small = {
                p: (A.astype("f2").astype("f4"), B.astype("f2").astype("f4"))
                for p, (A, B) in adapters.items()
            }
        super().save(directory, small, config)


@wrong(
    "save-prefix-missing",
    "subtle",
    "Keys are written without base_model.model, and read so too.",
    "A round trip works; no other program finds the tensors.",
    "NVIDIA-NeMo/Automodel#3595",
)
class SavePrefixMissing(Correct):
    def save(
        self, directory: str, adapters: Mapping[str, tuple[Array, Array]], config: dict[str, Any]
    ) -> None:
        super().save(directory, adapters, config)
        rewritten(directory, lambda c, t: (c, {k.removeprefix(PREFIX): v for k, v in t.items()}))

    def load(self, directory: str, modules: Modules) -> dict[str, LoraTriple]:
        config, tensors = read(directory)
        with tempfile.TemporaryDirectory() as whole:
            write(whole, config, {PREFIX + k.removeprefix(PREFIX): v for k, v in tensors.items()})
            return super().load(whole, modules)


@wrong(
    "save-transposed",
    "subtle",
    "A and B are written transposed, and read so too.",
    "Another framework's order under PEFT's names.",
)
class SaveTransposed(Correct):
    def save(
        self, directory: str, adapters: Mapping[str, tuple[Array, Array]], config: dict[str, Any]
    ) -> None:
        super().save(directory, adapters, config)
        rewritten(directory, _transposed)

    def load(self, directory: str, modules: Modules) -> dict[str, LoraTriple]:
        config, tensors = read(directory)
        with tempfile.TemporaryDirectory() as turned:
            write(turned, *_transposed(config, tensors))
            return super().load(turned, modules)


def _transposed(config: dict[str, Any], tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
    return config, {key: np.ascontiguousarray(t.T) for key, t in tensors.items()}


@wrong(
    "save-alpha-truncated",
    "subtle",
    "lora_alpha is written as an integer.",
    "The field's annotation says int, and 0.5 becomes 0.",
)
class SaveAlphaTruncated(Correct):
    def save(
        self, directory: str, adapters: Mapping[str, tuple[Array, Array]], config: dict[str, Any]
    ) -> None:
        super().save(directory, adapters, config)
        rewritten(directory, lambda c, t: ({**c, "lora_alpha": int(c["lora_alpha"])}, t))


@wrong(
    "save-patterns-lost",
    "subtle",
    "alpha_pattern is not written.",
    "The settings are written from the layer's fields, which are resolved already.",
)
class SavePatternsLost(Correct):
    def save(
        self, directory: str, adapters: Mapping[str, tuple[Array, Array]], config: dict[str, Any]
    ) -> None:
        super().save(directory, adapters, config)
        rewritten(directory, lambda c, t: ({**c, "alpha_pattern": {}}, t))


@wrong(
    "save-scale-folded",
    "subtle",
    "B is written with the scale in it, and lora_alpha as it was.",
    "The reader scales once more.",
)
class SaveScaleFolded(Correct):
    def save(
        self, directory: str, adapters: Mapping[str, tuple[Array, Array]], config: dict[str, Any]
    ) -> None:
        plan = self.plan(config, {p: (B.shape[0], A.shape[1]) for p, (A, B) in adapters.items()})
        folded = {p: (A, B * B.dtype.type(plan[p][2])) for p, (A, B) in adapters.items()}
        super().save(directory, folded, config)
