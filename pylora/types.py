"""The plain data that operations take: adapters, sequences, attention and optimizer settings.

Letters as everywhere: m tokens, k input features, d output features, r rank.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pylora.errors import ConfigError

Array = Any  # numpy.ndarray, or cupy.ndarray on that backend


def brief(value: Any) -> str:
    """A dataclass on one line: the fields that are not at their default; of an array its dtype and
    shape, of a long list its length. Such a class says `__repr__ = brief`."""
    said = []
    for field in dataclasses.fields(value):
        got = getattr(value, field.name)
        if not field.repr or (isinstance(got, _PLAIN) and got == field.default):
            continue
        said.append(f"{field.name}={_short(got)}")
    return f"{type(value).__name__}({', '.join(said)})"


_PLAIN = (str, int, float, bool, tuple, type(None))


def _short(value: Any) -> str:
    if hasattr(value, "dtype") and isinstance(getattr(value, "shape", None), tuple):
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, str):
        return repr(value if len(value) <= 80 else value[:77] + "...")
    if isinstance(value, os.PathLike):
        return repr(str(value))
    if isinstance(value, (tuple, list, set, frozenset, Mapping)) and not hasattr(value, "plan"):
        plain = not isinstance(value, Mapping) and all(isinstance(v, _PLAIN) for v in value)
        if len(value) <= 8 and plain:
            return f"[{', '.join(map(_short, value))}]"
        return f"[{len(value)} items]" if value else "[]"
    said = repr(value)
    return said if len(said) <= 120 else f"{type(value).__name__}(...)"


@dataclass(frozen=True, eq=False)
class LoRA:
    """The low-rank update of one module: y = x Wᵀ + bias + scale * (x Aᵀ Bᵀ + bias_B).

    With a `magnitude` (DoRA) each row of W + scale B A is brought to that length: the product is
    multiplied by magnitude / norm, `norm` being the lengths of those rows, and the bias added last.
    `norm` belongs to one W: a module sets it for its own, and no file holds it.

    For an embedding, A is [r, vocab] and a token's x is its one-hot row.
    """

    __repr__ = brief

    A: Array  # [r, k], the down-projection
    B: Array  # [d, r], the up-projection
    scale: float  # alpha / r, or alpha / sqrt(r) with rsLoRA
    dropout: float = 0.0  # probability; only used while training
    bias: Array | None = None  # [d], the bias of B (PEFT's lora_bias)
    base_bias: Array | None = None  # [d], replaces the module's own bias (PEFT's bias="lora_only")
    magnitude: Array | None = None  # [d], PEFT's lora_magnitude_vector
    norm: Array | None = None  # [d], of the rows of W + scale B A; None: not known yet

    @property
    def rank(self) -> int:
        """r."""
        return int(self.A.shape[0])


@dataclass(frozen=True)
class Drop:
    """Dropout of the input of A: which Philox stream, and where the batch's rows start in it."""

    __repr__ = brief

    p: float
    seed: int
    stream: int
    row0: int = 0


@dataclass(eq=False, slots=True)  # each call makes one: a frozen one would take three times as long
class Projection:
    """One of the linear modules that read the same x: y = residual + x Wᵀ + bias + s h Bᵀ."""

    __repr__ = brief

    W: Any  # packed [d, k]
    bias: Array | None = None  # [d]
    lora: LoRA | None = None
    drop: Drop | None = None
    residual: Array | None = None  # [m, d]
    dtype: Any = None  # of y; None: the backend's own


@dataclass(frozen=True, eq=False)
class Norm:
    """A norm of rows: x rstd w (RMS), or (x - mean x) rstd w + b ("layer")."""

    __repr__ = brief

    w: Array  # [k]
    eps: float
    kind: str = "rms"  # or "layer"
    b: Array | None = None  # [k], of a LayerNorm
    # Tensors of w in their order, and of b, by name and shape, where they are trained themselves.
    trained: tuple[tuple[str, tuple[int, ...]], ...] = ()


@dataclass(frozen=True, eq=False)
class Rotation:
    """The rotary embedding of q and k: see `rope`. Tables of fewer columns than head_dim / 2 turn
    the first numbers of a head and leave the others."""

    __repr__ = brief

    cos: Array  # [rows, rotated / 2]
    sin: Array
    position: np.ndarray  # int64 [m]: a token's row of the tables
    head_dim: int
    layout: str = "half"  # or "interleaved"


@dataclass(frozen=True, eq=False)
class ProjectionGrad:
    """The same module's part of backward. Its adapter, if any, gets gradients of A and B."""

    __repr__ = brief

    dy: Array  # [m, d]
    W: Any = None  # needed for dx
    h: Array | None = None  # [m, r], needed with an adapter
    lora: LoRA | None = None
    drop: Drop | None = None


@dataclass(frozen=True, eq=False)
class Seqs:
    """n sequences, one behind the other: queries q_start[i]..q_start[i+1]-1 attend causally to the
    k_len[i] keys from row k_start[i] on, the last query seeing the last key. int64 arrays."""

    __repr__ = brief

    q_start: np.ndarray  # [n + 1]
    k_start: np.ndarray  # [n]
    k_len: np.ndarray  # [n]

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Seqs:
        """Sequences of these lengths whose keys lie where their queries lie."""
        n = np.asarray(lengths, np.int64).reshape(-1)
        start = np.concatenate([np.zeros(1, np.int64), np.cumsum(n)])
        return cls(start, start[:-1].copy(), n)


@dataclass(frozen=True)
class Attn:
    """Shape of an attention: heads % kv_heads == 0; window > 0 limits how many keys are seen."""

    __repr__ = brief

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int = 0
    softcap: float = 0.0  # scores become softcap tanh(scores / softcap); 0: they stay

    def __post_init__(self) -> None:
        if not 0 < self.scale <= sys.float_info.max:
            raise ConfigError(
                "attention's scale must be a positive finite number, usually "
                f"head_dim ** -0.5, got {self.scale!r}"
            )


@dataclass(frozen=True)
class AdamW:
    """Settings of one AdamW step; `step` is 1 for the first; grad_scale multiplies the gradient."""

    __repr__ = brief

    lr: float
    step: int
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    grad_scale: float = 1.0


@dataclass(frozen=True, eq=False)
class Residue:
    """What a merge rounded away: at flat `position` (ascending) the original element had `bits`."""

    __repr__ = brief

    position: np.ndarray  # int64 [n]
    bits: np.ndarray  # uint32 [n]
    norm: np.ndarray | None = None  # [d], with a magnitude: the lengths that it was divided by
