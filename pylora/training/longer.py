"""Sequences beyond a model's positions: a rotation goes on by its rule, a table of positions ends.

Nothing is interpolated: whoever wants frequencies that are made for longer sequences (linear, YaRN,
...) gives a config.json that says so. What a model makes of positions it has never seen is for
training to teach.
"""

from __future__ import annotations

from dataclasses import replace

from pylora.model.config import LlamaConfig

_PLAIN = ("default", "linear", "llama3", "yarn")  # whose angles do not depend on the longest length


def stretched(config: LlamaConfig, length: int) -> LlamaConfig:
    """The configuration with room for a sequence of so many tokens; itself where there is room, or
    where there cannot be any (learned positions; rotations that follow the length)."""
    if length <= config.max_positions or config.learned_positions or not config.rotated:
        return config
    for scaling in (config.rope_scaling, config.local_rope_scaling):
        if scaling is None:
            continue
        if scaling["rope_type"] not in _PLAIN or scaling.get("llama_4_scaling_beta"):
            return config
    return replace(config, max_position_embeddings=length)
