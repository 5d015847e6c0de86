"""A hundred adapters on one base, a batch in which each prompt names its own, and what it costs.

    python examples/10_many_adapters.py

The base is a small random model and the adapters are random too: the point is that each prompt gets
what its adapter alone would give it, bit for bit, and that the base weights exist once.
"""

from __future__ import annotations

import time

import numpy as np

from pylora import AdapterPool, Llama, LlamaConfig, LoraConfig, resolve
from pylora.generation.generate import generate
from pylora.types import LoRA

CONFIG = LlamaConfig.tiny(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=256,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
)
ADAPTERS, PROMPTS, TOKENS = 100, 32, 16


def adapter(seed: int) -> dict[str, LoRA]:
    """Random A and B for q, k, v and o of every layer; the rank differs from one to the next."""
    rng = np.random.default_rng(seed)
    rank = (4, 8, 16)[seed % 3]
    lora = LoraConfig(r=rank, target_modules=("q_proj", "k_proj", "v_proj", "o_proj"))
    return {
        e.path: LoRA(
            rng.standard_normal((rank, e.k), np.float32),
            rng.standard_normal((e.d, rank), np.float32) / np.float32(rank),
            e.scale,
        )
        for e in resolve(lora, CONFIG.modules()).entries
    }


def main() -> None:
    model = Llama.random(CONFIG, seed=0)
    pool = AdapterPool(model)
    for i in range(ADAPTERS):
        pool.add(f"user-{i}", adapter(i))
    print(f"{len(pool)} adapters, {pool.nbytes / ADAPTERS / 1e3:.0f} kB each; one base model")

    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, CONFIG.vocab_size, 5 + i % 4).tolist() for i in range(PROMPTS)]
    names = [None if i % 8 == 0 else f"user-{rng.integers(ADAPTERS)}" for i in range(PROMPTS)]
    began = time.perf_counter()
    mixed = generate(model, prompts, TOKENS, pool=pool, adapters=names, eos_ids=())
    seconds = time.perf_counter() - began
    kinds = len(set(names))
    print(
        f"{PROMPTS} prompts, {kinds} different adapters (the base is one) in one batch: "
        f"{PROMPTS * TOKENS / seconds:.0f} tokens/s"
    )

    # Alone, with the adapter attached to the model: the same tokens.
    for prompt, name, got in zip(prompts, names, mixed, strict=True):
        model.detach() if name is None else model.attach(adapter(int(name.split("-")[1])))
        assert generate(model, [prompt], TOKENS, eos_ids=()) == [got]
    model.detach()
    print("each prompt has what it has alone: yes")

    # For one conversation: the adapter in use is a name, and changing it costs a look-up.
    began = time.perf_counter()
    for i in range(1000):
        pool.use(f"user-{i % ADAPTERS}")
    each = (time.perf_counter() - began) / 1000
    pool.use("user-7")
    assert generate(model, prompts[:1], TOKENS, pool=pool, eos_ids=()) != mixed[:1]
    print(f"changing the adapter in use: {1e6 * each:.1f} µs")

    pool.remove("user-7")
    assert len(pool) == ADAPTERS - 1 and pool.active is None


if __name__ == "__main__":
    main()
