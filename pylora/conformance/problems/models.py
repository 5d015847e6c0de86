"""Whole tiny transformers, as configurations: what a program that loads models may be given.

A configuration is data, in the fields that every program reads: Hugging Face's config.json and
PEFT's adapter_config.json. The strategy builds no model and has no law of its own; the user's test
loads both its own way, and pylora's tests hold its models to it.

    @given(tiny_transformers())
    def test_mine(p): model = my_model(p.config, p.tensors); model.adapt(p.lora)
"""

from __future__ import annotations

from typing import Any

from pylora.conformance.problems.layers import pick
from pylora.conformance.testcase import Problem
from pylora.extras import need
from pylora.model.config import LlamaConfig

st = need("hypothesis.strategies")

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_TARGETS = st.lists(st.sampled_from(LINEAR), min_size=1, max_size=7, unique=True)
_LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=3)
_EITHER, _SEEDS = st.booleans(), st.integers(0, 2**16)


@st.composite  # type: ignore[untyped-decorator]
def tiny_transformers(draw: Any) -> Problem:
    """A Llama, Mistral, Qwen2 or Qwen3 of 1 to 3 layers whose sizes are odd where they may be, an
    adapter for it, and a batch of 1 to 3 sequences.

    config: a config.json; lora: an adapter_config.json that names modules of the model (patterns,
    rsLoRA and rank above the sizes included); tensors: {name: shape} of the base weights, Hugging
    Face's names; lengths: of the sequences; seed: for the elements of all arrays, and for the ids.
    """
    kind = draw(pick(("llama", "mistral", "qwen2", "qwen3")))
    kv = draw(pick((1, 2, 3)))
    layers = draw(pick((1, 2, 3)))
    config = LlamaConfig.tiny(
        model_type=kind,
        vocab_size=draw(pick((7, 16, 33))),
        hidden_size=draw(pick((4, 7, 16, 24))),
        intermediate_size=draw(pick((5, 8, 33))),
        num_hidden_layers=layers,
        num_key_value_heads=kv,
        num_attention_heads=kv * draw(pick((1, 2, 3))),
        head_dim=draw(pick((2, 4, 6))),
        rope_theta=draw(pick((10000.0, 100.0))),
        tie_word_embeddings=draw(_EITHER),
        sliding_window=draw(pick((1, 3, 64))) if kind == "mistral" else None,
        qk_norm=kind == "qwen3",
        attention_bias=kind == "qwen2",
    )
    targets = draw(_TARGETS)
    lora: dict[str, Any] = {
        "peft_type": "LORA",
        "r": draw(pick((1, 2, 5, 40))),
        "lora_alpha": draw(pick((8, 1, 2.5))),
        "target_modules": targets,
        "use_rslora": draw(_EITHER),
    }
    if draw(_EITHER):
        lora["rank_pattern"] = {draw(pick(tuple(targets))): 3}
    if draw(_EITHER):
        layer = draw(pick(tuple(range(layers))))
        lora["alpha_pattern"] = {rf"layers\.{layer}\..*{targets[0]}": 16}
    return Problem(
        config=config.to_hf(),
        lora=lora,
        tensors=config.tensors(),
        lengths=tuple(draw(_LENGTHS)),
        seed=draw(_SEEDS),
    )
