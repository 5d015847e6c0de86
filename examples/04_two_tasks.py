"""Two tasks, two adapters, one frozen base: each is trained, saved and swapped in, and neither
disturbs the other.

    python examples/04_two_tasks.py

The base is a tiny random model. Task "up" continues 3 4 5 with 6 7 8, task "down" continues 8 7 6
with 5 4 3, both modulo the number of tokens, both after the same first token.
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

import numpy as np

from pylora import Adapter, Llama, LlamaConfig, LoraConfig, resolve
from pylora.generation.generate import generate
from pylora.training.examples import Example
from pylora.training.train import TrainConfig, train

TOKENS, LENGTH = 24, 8
CONFIG = LlamaConfig.tiny(vocab_size=TOKENS, hidden_size=48, intermediate_size=96, head_dim=12)


def sequence(start: int, direction: int, length: int = LENGTH) -> list[int]:
    return [(start + direction * i) % TOKENS for i in range(length)]


def examples(direction: int) -> list[Example]:
    """One for each first token. The second token tells nothing yet, so it does not count."""
    counted = [False, False] + [True] * (LENGTH - 2)
    return [Example.of(sequence(start, direction), counted) for start in range(TOKENS)]


def score(model: Llama, direction: int) -> float:
    """The share of two-token prompts that are continued rightly, four tokens on."""
    prompts = [sequence(start, direction, 2) for start in range(TOKENS)]
    answers = [sequence(start, direction, 6)[2:] for start in range(TOKENS)]
    right = [got == want for got, want in zip(generate(model, prompts, 4, eos_ids=()), answers)]
    return sum(right) / len(right)


def base_bits(model: Llama) -> str:
    """A digest of every frozen weight that an adapter could sit on."""
    sha = hashlib.sha256()
    for module in model.modules.values():
        sha.update(model.ops.to_numpy(model.ops.unpack(module.W)).tobytes())
    return sha.hexdigest()


def main() -> None:
    model = Llama.random(CONFIG, seed=0)
    before = base_bits(model)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    plan = resolve(lora, CONFIG.modules())

    with tempfile.TemporaryDirectory() as folder:
        digests = {}
        for name, direction in (("up", 1), ("down", -1)):
            adapter = Adapter.init(plan, lora, seed=1)
            result = train(
                model,
                adapter,
                examples(direction),
                TrainConfig(steps=150, batch_size=TOKENS, learning_rate=5e-3),
            )
            adapter.save(Path(folder) / name)
            digests[name] = adapter.digest()
            print(
                f"{name:4}: loss {result.losses[0]:.2f} -> {result.losses[-1]:.3f}, "
                f"{adapter.num_parameters:,} of {CONFIG.num_parameters:,} parameters"
            )
        model.detach()

        # From disk, swapped in and out on the one base: by reference, nothing is copied.
        loaded = {name: Adapter.load(Path(folder) / name, CONFIG.modules()) for name in digests}
        assert {name: a.digest() for name, a in loaded.items()} == digests
        print("\n            task up  task down")
        scores = {}
        for name in ("base", "up", "down", "up again"):
            model.detach() if name == "base" else model.attach(loaded[name.split()[0]])
            scores[name] = [score(model, direction) for direction in (1, -1)]
            print(f"  {name:9} {scores[name][0]:7.0%}  {scores[name][1]:9.0%}")

    assert scores["up"][0] > 0.9 and scores["down"][1] > 0.9, "each adapter does its own task"
    assert scores["up"][1] < 0.2 and scores["down"][0] < 0.2, "and not the other's"
    assert scores["base"][0] < 0.2 and scores["base"][1] < 0.2
    assert scores["up again"] == scores["up"]
    assert base_bits(model) == before
    model.detach()
    fresh, _ = Llama.random(CONFIG, seed=0).forward(np.arange(TOKENS))
    assert np.array_equal(model.forward(np.arange(TOKENS))[0], fresh)
    print("\nthe base: not one bit changed")


if __name__ == "__main__":
    main()
