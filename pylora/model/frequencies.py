"""The frequencies of rotary embeddings and what each kind of scaling makes of them.

Radians per position of each rotated pair, in float64, by the formulas of the papers as transformers
applies them: linear (positions divided), dynamic NTK (a base that grows with the sequence), llama3
(long wavelengths divided), YaRN (Peng et al. 2023), LongRoPE (Ding et al. 2024; a factor for each
pair, another set beyond the original length).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np


def inverse_frequencies(
    rotary_dim: int,
    theta: float,
    scaling: Mapping[str, Any] | None = None,
    *,
    length: int = 0,
    trained: int = 0,
) -> np.ndarray:
    """Radians per position of each pair, float64 [rotary_dim / 2]: theta^(-2i / rotary_dim),
    scaled.

    `length` is that of the sequence, which "dynamic" and "longrope" look at; `trained` the length
    that a dynamic one starts from (max_position_embeddings).
    """
    kind = None if scaling is None else scaling["rope_type"]
    if kind == "dynamic" and length > trained:
        assert scaling is not None
        stretch = float(scaling["factor"]) * length / trained - (float(scaling["factor"]) - 1)
        theta = (
            float(theta) * stretch ** (rotary_dim / (rotary_dim - 2)) if rotary_dim > 2 else theta
        )
    # Python's power is the C library's, as in csrc/files/rope.c; NumPy's has another last bit on
    # some processors.
    powers = [float(theta) ** (-i / rotary_dim) for i in range(0, rotary_dim, 2)]
    frequency = np.array(powers, np.float64)
    if scaling is None or kind == "dynamic":
        return frequency
    if kind == "longrope":
        name = (
            "long_factor"
            if length > scaling["original_max_position_embeddings"]
            else "short_factor"
        )
        return frequency / np.array(scaling[name], np.float64)
    factor = float(scaling["factor"])
    if kind == "linear":
        return frequency / factor
    if kind == "yarn":
        return _yarn(frequency, rotary_dim, float(theta), scaling)
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
    blend = np.clip((turns - low) / (high - low), 0, 1)  # 0: stretched, 1: left as it is
    frequency *= (1 - blend) / factor + blend
    return frequency


def _yarn(
    frequency: np.ndarray, rotary_dim: int, theta: float, scaling: Mapping[str, Any]
) -> np.ndarray:
    """Pairs that turn often within the original length stay, slow ones are divided by the factor,
    and between them is a ramp."""
    original, factor = float(scaling["original_max_position_embeddings"]), float(scaling["factor"])

    def pair_of(turns: float) -> float:  # the pair that turns so often in the original length
        return rotary_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = pair_of(float(scaling.get("beta_fast") or 32))
    high = pair_of(float(scaling.get("beta_slow") or 1))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    width = high - low if high != low else 0.001
    ramp = np.clip((np.arange(rotary_dim // 2, dtype=np.float64) - low) / width, 0, 1)
    scaled: np.ndarray = frequency * (ramp / factor + (1 - ramp))
    return scaled


def attention_factor(scaling: Mapping[str, Any] | None) -> float:
    """What cos and sin are multiplied by: sharper or softer attention beyond the trained length."""
    if scaling is None or scaling["rope_type"] not in ("yarn", "longrope"):
        return 1.0
    if (given := scaling.get("attention_factor")) is not None:
        return float(given)
    factor = float(scaling["factor"])
    if scaling["rope_type"] == "longrope":
        original = float(scaling["original_max_position_embeddings"])
        return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    m, all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if m and all_dim:
        return _mscale(factor, float(m)) / _mscale(factor, float(all_dim))
    return _mscale(factor, 1.0)


def _mscale(factor: float, m: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0
