"""Small models of any family in files, for the C library's tests, and what is asked of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clibrary import CError, CModel, greedy, python_model

from pylora.formats.hfnames import transposed
from pylora.formats.safetensors import save
from pylora.model.config import LlamaConfig

IDS = [3, 17, 4, 29, 29, 8, 1, 30]
SIZES = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": 2,
}  # fmt: skip
LONG = {
    "rope_type": "longrope", "short_factor": [1.0 + i / 16 for i in range(16)],
    "long_factor": [1.5 + i * i / 8 for i in range(16)],
}  # fmt: skip
OWN = {  # keys that a family spells otherwise
    "gpt2": {"n_embd": "hidden_size", "n_head": "num_attention_heads",
             "n_layer": "num_hidden_layers", "n_positions": "max_position_embeddings"},
    "gpt_neox": {"layer_norm_eps": "rms_norm_eps"},
}  # fmt: skip


def write(path: Path, settings: dict[str, Any]) -> None:
    """A directory of random weights for a config.json of these settings."""
    path.mkdir()
    own = OWN.get(settings["model_type"], {})
    spelt = {k: v for k, v in settings.items() if k not in own.values()}
    spelt |= {k: settings[common] for k, common in own.items() if common in settings}
    if settings["model_type"] == "gpt2":
        spelt = {k: v for k, v in spelt.items() if k not in ("head_dim", "intermediate_size")}
    (path / "config.json").write_text(json.dumps(spelt))
    rng = np.random.default_rng(7)
    config = LlamaConfig.from_hf(spelt)
    tensors = {
        name: (rng.standard_normal(shape) * 0.3).astype(np.float32)
        for name, shape in config.tensors().items()
    }
    save(
        path / "model.safetensors",
        {n: np.ascontiguousarray(t.T) if transposed(config, n) else t for n, t in tensors.items()},
        {"format": "pt"},
    )


def same(path: Path, precision: str) -> None:
    tokens, logits = greedy(python_model(path, precision), IDS, 4)
    with CModel(path, precision) as model:
        got_tokens, got = model.generate(IDS, 4)
    assert got_tokens == tokens
    assert got.tobytes() == logits.tobytes()


def refused(path: Path) -> str:
    with pytest.raises(CError) as caught, CModel(path):
        pass
    return str(caught.value)
