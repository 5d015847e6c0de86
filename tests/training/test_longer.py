"""Longer sequences than a model has positions: where they are allowed, and what stays."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pylora import Llama, LlamaConfig
from pylora.model.llama import random_weights
from pylora.training.longer import stretched

CONFIG = LlamaConfig.tiny()  # 128 positions


def test_short_sequences_are_computed_as_before() -> None:
    longer = stretched(CONFIG, 300)
    assert longer.max_positions == 300 and stretched(CONFIG, 128) is CONFIG
    weights = random_weights(CONFIG, 0)
    short, long = Llama(CONFIG, weights), Llama(longer, weights)
    ids = np.arange(300) % CONFIG.vocab_size
    a, b = short.forward(ids[:100])[0], long.forward(ids[:100])[0]
    assert a.tobytes() == b.tobytes()
    assert np.isfinite(long.forward(ids)[0]).all()


def test_where_positions_end_they_end() -> None:
    dynamic = replace(CONFIG, rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    assert stretched(dynamic, 300) is dynamic  # 256 is where it ends
    assert stretched(dynamic, 200) is dynamic
    linear = replace(CONFIG, rope_scaling={"rope_type": "linear", "factor": 2.0})
    assert stretched(linear, 300).max_positions == 300
