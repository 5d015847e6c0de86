"""A model with an adapter's weights in place of its own is the model that is made with them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from adapters_made import make
from whole_model import ARCHITECTURES

from pylora.adapters.adapter import Adapter
from pylora.errors import PlanError, UnsupportedError
from pylora.generation.generate import generate
from pylora.model.config import LlamaConfig
from pylora.model.llama import Llama, random_weights
from pylora.model.whole import Whole, grown, replaced

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "tie_word_embeddings": False,
}
CONFIG = LlamaConfig.tiny(**SIZES)
STRUCTURES: dict[str, dict[str, Any]] = ARCHITECTURES | {
    "experts": {
        "model_type": "qwen3_moe", "qk_norm": True, "head_dim": 8, "experts": 3,
        "experts_per_token": 2, "expert_size": 16,
    },
    "gpt2": {
        "model_type": "gpt2", "norm": "layer", "norm_bias": True, "gated": False,
        "activation": "gelu_tanh", "learned_positions": True, "attention_bias": True,
        "attention_out_bias": True, "mlp_bias": True, "fused_qkv": "blocks",
    },
}  # fmt: skip
IDS = [1, 2, 3, 4]


def some(config: LlamaConfig, *names: str, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = config.tensors()
    return {n: rng.standard_normal(shapes[n]).astype(np.float32) for n in names}


def pair(config: LlamaConfig, tensors: dict[str, np.ndarray], **how: Any) -> tuple[Llama, Llama]:
    """The base, and a model that was made with these tensors."""
    weights = random_weights(config, 3)
    return (
        Llama(config, weights, **how),
        Llama(config, lambda n: tensors[n] if n in tensors else weights(n), **how),
    )


def with_whole(adapter: Adapter, whole: Whole) -> Adapter:
    return Adapter(adapter.config, adapter.plan, dict(adapter), whole)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
def test_it_has_the_bits_of_one_that_is_made_so(precision: str) -> None:
    new = some(CONFIG, "lm_head.weight", "model.norm.weight", "model.layers.1.mlp.up_proj.weight")
    model, direct = pair(CONFIG, new, backend="c", precision=precision)
    before = model.forward(IDS)[0].copy()
    plain = make(1, modules=CONFIG.modules(), init_lora_weights=False)
    direct.attach(plain)
    model.attach(with_whole(plain, Whole(new)))
    assert np.array_equal(model.forward(IDS)[0], direct.forward(IDS)[0])
    assert generate(model, [IDS], 5) == generate(direct, [IDS], 5)
    model.attach(plain)
    assert not np.array_equal(model.forward(IDS)[0], direct.forward(IDS)[0])
    model.detach()
    assert np.array_equal(model.forward(IDS)[0], before)


@pytest.mark.parametrize("name", STRUCTURES)
def test_every_structure_shares_what_is_not_replaced(name: str) -> None:
    config = LlamaConfig.tiny(**STRUCTURES[name])
    tensors = list(config.tensors())
    chosen = [tensors[0], *[t for t in tensors if len(config.tensors()[t]) == 1][-1:]]
    if config.tie_word_embeddings:
        chosen = chosen[1:]
    new = some(config, *chosen)
    model, direct = pair(config, new, backend="numpy")
    made = model.with_whole(Whole(new))
    assert np.array_equal(made.forward(IDS)[0], direct.forward(IDS)[0])
    for path, module in model.modules.items():
        if hasattr(module, "W") and f"{path}.weight" not in new:
            assert made.modules[path].W is module.W  # type: ignore[union-attr]


def test_what_does_not_fit_changes_nothing() -> None:
    model, _ = pair(CONFIG, {})
    plain = make(1, modules=CONFIG.modules())
    good = Whole(some(CONFIG, "lm_head.weight"))
    bad = {
        "which the model has not": Whole({"model.nothing.weight": np.zeros(3, np.float32)}),
        "shape": Whole({"lm_head.weight": np.zeros((3, 64), np.float32)}),
        "no 'lm_head.weight'": Whole(
            {"model.embed_tokens.weight": np.zeros((70, 64), np.float32)}, vocab=70
        ),
    }
    for message, whole in bad.items():
        with pytest.raises(PlanError, match=message):
            model.attach(with_whole(plain, whole))
        assert model.adapter is None and model.whole is None
    own = model.with_whole(good)
    assert own.with_whole(good) is own
    with pytest.raises(UnsupportedError, match="already"):
        own.attach(with_whole(plain, Whole(some(CONFIG, "model.norm.weight"))))
    own.attach(with_whole(plain, good))
    own.detach()
    assert own.whole is good


def test_a_tied_head_follows_or_stays() -> None:
    tied = LlamaConfig.tiny(**(SIZES | {"tie_word_embeddings": True}))
    new = some(tied, "model.embed_tokens.weight")
    model, _ = pair(tied, {})
    follows = model.with_whole(Whole(new, was_tied=True))
    assert follows.lm_head.W is follows.embed_tokens.W
    stays = model.with_whole(Whole(new, tied=False, was_tied=True))
    assert stays.lm_head.W is model.embed_tokens.W
    assert stays.embed_tokens.W is not model.embed_tokens.W
    # A merge that unties gives the head what it had.
    untied = grown(CONFIG, Whole(new, was_tied=True))
    assert set(replaced(untied, Whole(new, was_tied=True))) == {
        "model.embed_tokens.weight", "lm_head.weight",
    }  # fmt: skip
