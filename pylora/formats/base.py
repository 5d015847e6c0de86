"""What every checkpoint offers, and the check of its tensors against its configuration.

A checkpoint reads the weights of one base model under Hugging Face names and in Hugging Face
layout, whatever the file calls them. Nothing is read before it is asked for, nothing is kept.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pylora.errors import ConfigError, FileFormatError, UnsupportedError
from pylora.model.config import LlamaConfig
from pylora.numbers.precision import Stored

if TYPE_CHECKING:
    from pylora.text.tokenizer import Tokenizer

Shape = tuple[int, ...]
Array = np.ndarray[Any, Any]


class Checkpoint(ABC):
    """The weights, configuration and tokenizer of a base model. A context manager.

    Arrays may be read-only views of a memory-mapped file: the file must not be changed while they
    live. They stay valid after `close`.
    """

    path: Path
    config: LlamaConfig
    packed_as: str | None = None  # the precision of a packed model, whose own it is
    notes: tuple[str, ...] = ()  # what a user should know of files that lie beside the weights

    @property
    def settings(self) -> Mapping[str, Any]:
        """The content of the model's config.json, whole; {} where there is none."""
        return {}

    def __repr__(self) -> str:
        c = self.config
        return (
            f"{type(self).__name__}({str(self.path)!r}: {c.model_type}, {c.num_hidden_layers} "
            f"layers, {c.num_parameters:,} parameters)"
        )

    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """The tensor names, Hugging Face's, in the order of `config.tensors()`."""

    @abstractmethod
    def shape(self, name: str) -> Shape:
        """The shape that `load` gives. Raises FileFormatError for an unknown name."""

    @abstractmethod
    def dtype(self, name: str) -> str:
        """How the file stores it: "f32", "f16", "bf16", "q4_1", ..."""

    def form(self, name: str) -> str:
        """What the file holds: as `dtype`, but for weights that are dequantized, such as "nf4"."""
        return self.dtype(name)

    def dequantizes(self, name: str) -> bool:
        """Whether the tensor's numbers, of `dtype`, are worked out from codes and scales."""
        return self.form(name) != self.dtype(name)

    @abstractmethod
    def load(self, name: str) -> Array:
        """The tensor as C-contiguous float32; a read-only view where the file allows it."""

    @abstractmethod
    def raw(self, name: str) -> tuple[Array, str]:
        """The tensor as stored and its dtype, "f32", "f16" or "bf16" (as uint16 bits).

        Raises UnsupportedError for a quantized tensor.
        """

    def parts(self, name: str) -> Iterator[Array]:
        """The rows of a matrix as `load` gives them, some at a time: float32 [rows, k]."""
        yield self.load(name)

    def stored(self, name: str) -> Stored | None:
        """A matrix as the file stores it, where that is bfloat16 or blocks that can be multiplied
        as they are (Stored); None: only `load` gives it."""
        if self.dtype(name) != "bf16" or len(self.shape(name)) != 2:
            return None
        bits, _ = self.raw(name)
        d, k = bits.shape
        return Stored("bf16", np.ascontiguousarray(bits).view(np.uint8).reshape(d, 2 * k), (d, k))

    @abstractmethod
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer; needs the extra "text". FileFormatError if there is none."""

    @abstractmethod
    def close(self) -> None:
        """Lets go of the files. Views that were handed out keep their mapping alive."""

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def widen(stored: Array, dtype: str) -> Array:
    """A stored "f32", "f16" or "bf16" (uint16 bits) array as float32: exact, a view if possible."""
    if dtype == "bf16":
        bits = stored.astype(np.uint32)
        bits <<= 16
        return bits.view(np.float32)
    return np.require(stored, np.float32, ["C", "A"])


def check_finite(tensor: Array, where: str) -> Array:
    """The tensor of an adapter itself; FileFormatError where a number of it is not finite."""
    if not np.isfinite(tensor).all():
        raise FileFormatError(
            f"{where} contains NaN or infinity; the training that wrote it diverged, or the file "
            "is damaged"
        )
    return tensor


def narrow(x: Array, dtype: str) -> Array:
    """float32 `x` rounded to nearest, ties to even, as "f32", "f16" or "bf16" (uint16 bits).

    NaN stays NaN; what is too large becomes infinite, as in hardware.
    """
    if dtype == "f32":
        return np.ascontiguousarray(x, np.float32)
    if dtype == "f16":
        with np.errstate(over="ignore"):
            return np.ascontiguousarray(x, np.float16)
    if dtype != "bf16":
        raise ValueError(f"dtype {dtype!r} is none of f32, f16, bf16")
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    # Adding 0x7fff plus the lowest kept bit carries into the kept half exactly when rounding up.
    rounded = ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)
    quiet = ((bits >> 16) | 0x40).astype(np.uint16)
    result: Array = np.where((bits & 0x7FFFFFFF) > 0x7F800000, quiet, rounded)
    return result


def read_config(where: Path, content: Mapping[str, Any]) -> LlamaConfig:
    """LlamaConfig.from_hf, whose errors then say which file: ConfigError becomes FileFormatError,
    since the user wrote no configuration, and UnsupportedError stays one."""
    try:
        return LlamaConfig.from_hf(content)
    except (ConfigError, UnsupportedError) as error:
        kind = FileFormatError if isinstance(error, ConfigError) else UnsupportedError
        raise kind(f"{where}: {str(error).removeprefix('config.json: ')}") from error


def check_tensors(where: Path, config: LlamaConfig, found: Mapping[str, Shape]) -> tuple[str, ...]:
    """The names that `config` asks for, in its order, if `found` has all of them and no others.

    Raises FileFormatError naming missing, unexpected and misshapen tensors. The number of layers
    is compared with the number of tensors first, so that an absurd one costs nothing.
    """
    if config.num_hidden_layers > len(found):
        raise FileFormatError(
            f"{where}: the configuration says {config.num_hidden_layers} layers, "
            f"but there are only {len(found)} tensors"
        )
    expected = config.tensors()
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    if missing or extra:
        parts = [
            f"{what}: {_some(names)}"
            for what, names in (("missing tensors", missing), ("unexpected tensors", extra))
            if names
        ]
        raise FileFormatError(
            f"{where}: the tensors are not those of a {config.model_type} model with "
            f"{config.num_hidden_layers} layers; {'; '.join(parts)}"
        )
    for name, shape in expected.items():
        if tuple(found[name]) != tuple(shape):
            raise FileFormatError(
                f"{where}: tensor {name!r} has shape {tuple(found[name])}, "
                f"but the configuration implies {tuple(shape)}"
            )
    return tuple(expected)


def _some(names: list[str]) -> str:
    shown = ", ".join(repr(name[:200]) for name in names[:5])
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")
