"""Where the tensors of a model come from: a function from Hugging Face tensor name to array."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pylora.errors import ShapeError, UnsupportedError
from pylora.model.config import LlamaConfig
from pylora.numbers.precision import QUANTIZED, Stored, weights_of
from pylora.numbers.quantize import quantize
from pylora.ops.protocol import Backend
from pylora.types import Array, Norm

# Hugging Face tensor name -> array; a matrix may also be what a file stores (Stored).
Weights = Callable[[str], Any]


_CHUNK = 1 << 17  # numbers drawn at a time


_BYTES = {"fp32": 4.0, "fp32x3": 4.0, "bf16": 2.0, "fp16": 2.0, "int8": 34 / 32, "int4": 20 / 32}


def weight_bytes(config: LlamaConfig, precision: str) -> int:
    """Bytes that the packed weights of a model take in a precision; vectors are float32."""
    total = 0.0
    for shape in config.tensors().values():
        n = float(np.prod(shape, dtype=np.float64))
        total += n * (_BYTES[weights_of(precision)] if len(shape) == 2 else 4)
    return int(total)


def checked_weights(config: LlamaConfig, weights: Weights) -> Weights:
    """`weights`, with a ShapeError that names a tensor that is not as `config` says."""
    shapes = config.tensors()

    def checked(name: str) -> Any:
        array = weights(name)
        if tuple(array.shape) != tuple(shapes[name]):
            raise ShapeError(
                f"the tensor {name!r} has shape {list(array.shape)}, the model's config says "
                f"{list(shapes[name])}"
            )
        return array

    return checked


def remembering(
    config: LlamaConfig, weights: Weights, vectors: dict[str, np.ndarray[Any, Any]]
) -> Weights:
    """`weights`, which puts a copy of each tensor that is never packed into `vectors`."""

    def remembered(name: str) -> Any:
        array = weights(name)
        if len(array.shape) == 1 or is_norm(config, name):
            vectors[name] = np.array(array)
        return array

    return remembered


class FromCheckpoint:
    """The tensors of an open checkpoint, as a model of `precision` wants them.

    In int8 and int4, blocks of the kinds in numbers/blocks.py are taken as the file has them, and
    numbers are quantized (Q8_0, Q4_1). Blocks of other kinds become Q8_0, a few rows at a time. In
    bf16, bfloat16 is taken as it is. `stored_as` counts the matrices by kind, `sources` by what the
    file had.
    """

    def __init__(self, checkpoint: Any, precision: str) -> None:
        self.checkpoint, self.precision = checkpoint, precision
        self.stored_as: dict[str, int] = {}
        self.sources: dict[tuple[str, str], int] = {}  # (the file's kind, the kind here)

    def __call__(self, name: str) -> Any:
        if len(self.checkpoint.shape(name)) != 2 or is_norm(self.checkpoint.config, name):
            return self.checkpoint.load(name)
        kind, W = self._matrix(name)
        self.stored_as[kind] = self.stored_as.get(kind, 0) + 1
        way = self.checkpoint.form(name), kind
        self.sources[way] = self.sources.get(way, 0) + 1
        return W

    def _matrix(self, name: str) -> tuple[str, Any]:
        keeps = {"int8": "q8_0", "int4": "q4_1", "bf16": "bf16"}.get(
            weights_of(self.precision), "f32"
        )
        plain = self.checkpoint.dtype(name) in ("f32", "f16", "bf16")
        if keeps == "f32" or (plain and keeps != "bf16"):  # blocks are the only other use of stored
            return keeps, self.checkpoint.load(name)
        stored: Stored | None = self.checkpoint.stored(name)
        if stored is not None and (stored.kind == "bf16") == (keeps == "bf16"):
            return stored.kind, stored
        if keeps == "bf16":
            return keeps, self.checkpoint.load(name)
        parts = [quantize(part, "q8_0").rows for part in self.checkpoint.parts(name)]
        d, k = self.checkpoint.shape(name)
        return "q8_0", Stored("q8_0", np.concatenate(parts), (d, k))


class FromPacked:
    """The tensors of a packed model (formats/packed.py) on the backend whose kernels read them."""

    def __init__(self, checkpoint: Any, ops: Any, precision: str) -> None:
        self.checkpoint, self.ops, self.precision = checkpoint, ops, precision
        self.stored_as: dict[str, int] = {}

    def __call__(self, name: str) -> Any:
        found = self.checkpoint.panels(name)
        if found is None:
            return self.checkpoint.load(name)
        self.stored_as[found[0]] = self.stored_as.get(found[0], 0) + 1
        return self.ops.adopt(*found, self.checkpoint.shape(name), self.precision)


def source_of(checkpoint: Any, ops: Any, precision: str) -> FromCheckpoint | FromPacked:
    """The tensors of an open checkpoint for a model of `precision` on a backend: those of a packed
    model in place where they fit, else the numbers that they stand for. UnsupportedError where that
    would not be what was asked for."""
    packed_as, where = getattr(checkpoint, "packed_as", None), checkpoint.path
    if packed_as is None:
        return FromCheckpoint(checkpoint, precision)
    if ops.name == "c" and ops.computes(weights_of(precision)) == packed_as:
        return FromPacked(checkpoint, ops, precision)
    if packed_as == "fp32x3" and ops.name == "c" and ops.computes(packed_as) != packed_as:
        raise UnsupportedError(
            f"{where} is packed in fp32x3, which this machine computes as strict fp32, having no "
            "bfloat16 tiles (AMX); pack the model that it was made of in fp32"
        )
    if (precision in QUANTIZED and packed_as in QUANTIZED) or packed_as == "fp32x3":
        raise UnsupportedError(
            f"{where} is packed in {packed_as} for the c backend, not in {precision} for "
            f"{ops.name}; load it in {packed_as} on c, or load the model that it was made of"
        )
    return FromCheckpoint(checkpoint, precision)


def norm_of(
    config: LlamaConfig, weights: Weights, path: str, ops: Backend, kind: str | None = None
) -> Norm:
    """The norm at a path, as operations take it; of the model's kind, if no other is given."""
    kind = config.norm if kind is None else kind
    w = vector(weights, f"{path}.weight", ops)
    if config.family.unit_offset:
        w = w + w.dtype.type(1)
    bias = kind == "layer" and config.norm_bias
    b = vector(weights, f"{path}.bias", ops) if bias else None
    return Norm(w, config.rms_norm_eps, kind, b)


def head_norm(config: LlamaConfig, weights: Weights, path: str, ops: Backend) -> Norm:
    """The norm of q or k at a path. Those of each head, which are LayerNorms, have their weights
    one behind the other, whether the file has a matrix or vectors (`Family.listed_norms`)."""
    if config.qk_norm_of != "each":
        return norm_of(config, weights, path, ops, "rms")
    names = [name for name in config.tensors() if name.startswith(f"{path}.")]
    w = ops.xp.concatenate([ops.asarray(weights(name)).reshape(-1) for name in names])
    return Norm(w, config.rms_norm_eps, "layer")


def is_norm(config: LlamaConfig, name: str) -> bool:
    """Whether a tensor is the norms of q's or k's heads, which may be a matrix and is no weight."""
    names = config.names
    return name.endswith((f".{names.q_norm}.weight", f".{names.k_norm}.weight"))


def vector(weights: Weights, name: str, ops: Backend) -> Array:
    """A norm's weight, copied: the array may be a view that would keep a whole file mapped."""
    return ops.asarray(weights(name)).copy()


def random_weights(config: LlamaConfig, seed: int = 0, dtype: Any = np.float32) -> Weights:
    """Seeded random tensors for tests and docs: matrices N(0, 1/columns), norms near 1.

    Drawn in float64 a few rows at a time, so that no more than the result exists at once.
    """
    shapes = config.tensors()
    index = {name: i for i, name in enumerate(shapes)}

    def weights(name: str) -> np.ndarray:
        shape = shapes[name]
        rng = np.random.default_rng([seed, index[name]])
        if len(shape) == 1:
            values = rng.standard_normal(shape) * 0.1
            return (values + (1.0 if name.endswith("norm.weight") else 0.0)).astype(dtype)
        out = np.empty(shape, dtype)
        step = max(1, _CHUNK // max(1, shape[1]))
        for i in range(0, shape[0], step):
            values = rng.standard_normal((min(step, shape[0] - i), shape[1]))
            out[i : i + step] = values / np.sqrt(shape[1])
        return out

    return weights
