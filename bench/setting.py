"""What every contender is given: the model's shape, the adapter, a malloc that keeps its pages."""

from __future__ import annotations

import os

GEOMETRY = {  # SmolLM2-135M
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
}
HEAD_DIM = 64
TINY = bool(os.environ.get("PYLORA_BENCH_TINY"))  # run.py --tiny: shows that the programs run
if TINY:
    GEOMETRY |= {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256}
    GEOMETRY |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
RANK, ALPHA, LEARNING_RATE = 8, 16, 1e-4

# glibc gives large blocks back to the system at every free, and the next allocation faults its
# pages in again; with these settings it keeps them.
TUNED = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 33),
    "MALLOC_TOP_PAD_": str(1 << 28),
}
