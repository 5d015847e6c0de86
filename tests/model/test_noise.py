"""NEFTune's noise: its size, transformers' formula, and where it is added."""

from __future__ import annotations

import numpy as np
import pytest

from pylora import Adapter, Llama, LlamaConfig, LoraConfig, resolve
from pylora.model.linear import DropKey
from pylora.model.noise import neftune
from pylora.types import Seqs

MODEL = Llama.random(LlamaConfig.tiny(), seed=1)


def test_each_sequence_has_its_own_bound() -> None:
    seqs = Seqs.of([300, 7])
    noise = neftune(5.0, seqs, 16, seed=1, step=2, row0=0)
    for rows, length in ((noise[:300], 300), (noise[300:], 7)):
        bound = 5 / np.sqrt(length * 16)
        assert np.abs(rows).max() <= bound
        assert np.abs(rows).max() > 0.9 * bound and abs(rows.mean()) < bound / 5
        assert abs(rows.std() / (bound / np.sqrt(3)) - 1) < 0.15  # uniform
    part = neftune(5.0, Seqs.of([7]), 16, seed=1, step=2, row0=300)
    assert part.tobytes() == noise[300:].tobytes()
    assert (neftune(5.0, seqs, 16, seed=1, step=3, row0=0) != noise).any()


@pytest.mark.parity
def test_is_as_large_as_transformers() -> None:
    torch = pytest.importorskip("torch")
    hook = pytest.importorskip("transformers.integrations.neftune").neftune_post_forward_hook
    embedding = torch.nn.Embedding(10, 64)
    embedding.neftune_noise_alpha = 5.0
    torch.manual_seed(0)
    zeros = torch.zeros(1, 40, 64)
    theirs = hook(embedding, None, zeros).numpy()
    mine = neftune(5.0, Seqs.of([40]), 64, seed=0, step=1, row0=0)
    assert mine.std() == pytest.approx(theirs.std(), rel=0.03)
    assert np.abs(mine).max() == pytest.approx(np.abs(theirs).max(), rel=0.01)


def test_it_is_added_to_the_embeddings_of_a_training_step_alone() -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    MODEL.attach(Adapter.init(resolve(config, MODEL.config.modules()), config, seed=0))
    ids = np.arange(1, 9)
    plain, _ = MODEL.forward(ids)
    same, _ = MODEL.forward(ids, drop=DropKey(0, 1))
    noisy, _ = MODEL.forward(ids, drop=DropKey(0, 1, noise=5.0))
    assert plain.tobytes() == same.tobytes() and (plain != noisy).any()
    noise = neftune(5.0, Seqs.of([8]), MODEL.config.hidden_size, seed=0, step=1, row0=0)
    x, _ = MODEL.embed_tokens.forward(ids)
    seqs = Seqs.of([8])
    drop, n = DropKey(0, 1, noise=5.0), len(MODEL.blocks)
    blocks, MODEL.trunk.blocks = MODEL.trunk.blocks, []
    try:
        got, _ = MODEL.trunk.forward(ids, seqs, np.arange(8), drop, n, False)
    finally:
        MODEL.trunk.blocks = blocks
    assert got.tobytes() == (x + noise).tobytes()
