"""Where the tensors of a model come from: a function from Hugging Face tensor name to array."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pylora.backends.protocol import Backend
from pylora.config import LlamaConfig
from pylora.errors import ShapeError
from pylora.types import Array

Weights = Callable[[str], np.ndarray]  # Hugging Face tensor name -> array


def checked_weights(config: LlamaConfig, weights: Weights) -> Weights:
    """`weights`, with a ShapeError that names a tensor that is not as `config` says."""
    shapes = config.tensors()

    def checked(name: str) -> np.ndarray:
        array = weights(name)
        if array.shape != shapes[name]:
            raise ShapeError(
                f"the tensor {name!r} has shape {list(array.shape)}, the model's config says "
                f"{list(shapes[name])}"
            )
        return array

    return checked


def vector(weights: Weights, name: str, ops: Backend) -> Array:
    """A norm's weight, copied: the array may be a view that would keep a whole file mapped."""
    return ops.asarray(weights(name)).copy()


def random_weights(config: LlamaConfig, seed: int = 0, dtype: Any = np.float32) -> Weights:
    """Seeded random tensors for tests and docs: matrices N(0, 1/columns), norms near 1."""
    shapes = config.tensors()
    index = {name: i for i, name in enumerate(shapes)}

    def weights(name: str) -> np.ndarray:
        shape = shapes[name]
        values = np.random.default_rng([seed, index[name]]).standard_normal(shape)
        if len(shape) == 2:
            values /= np.sqrt(shape[1])
        else:
            values = values * 0.1 + (1.0 if name.endswith("norm.weight") else 0.0)
        return values.astype(dtype)

    return weights
