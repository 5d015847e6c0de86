"""Adapters add up: stack several into one along the rank, each with a weight.

    python examples/05_stack_and_weight.py

The sum of w₁ s₁ B₁ A₁ and w₂ s₂ B₂ A₂ is again one pair: A's stacked as rows, B's as columns. So
blending adapters costs no code in the model, and the result is an ordinary adapter file.
"""

from __future__ import annotations

import tempfile

import numpy as np

from pylora import Adapter, Llama, LlamaConfig, LoRA, LoraConfig, resolve

CONFIG = LlamaConfig.tiny()


def some_adapter(seed: int, **settings: object) -> Adapter:
    """An adapter that does something: with init_lora_weights=False B is random, not zero."""
    config = LoraConfig(init_lora_weights=False, **settings)
    return Adapter.init(resolve(config, CONFIG.modules()), config, seed=seed)


def delta(lora: LoRA | None) -> np.ndarray | float:
    """scale B A in float64, or 0 where the adapter has nothing."""
    if lora is None:
        return 0.0
    return lora.scale * (lora.B.astype(np.float64) @ lora.A.astype(np.float64))


def main() -> None:
    # Different ranks, scales and targets: any two adapters of one model can be stacked.
    first = some_adapter(1, r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    second = some_adapter(
        2, r=2, lora_alpha=4, target_modules=["v_proj", "o_proj"], use_rslora=True
    )
    both = Adapter.stack([(first, 1.0), (second, -0.5)])
    print(f"{len(first)} + {len(second)} modules give {len(both)}; ranks", end=" ")
    print(sorted({lora.rank for lora in both.values()}))
    for path, lora in both.items():
        want = delta(first.get(path)) - 0.5 * delta(second.get(path))
        assert np.allclose(delta(lora), want, rtol=0, atol=1e-6 * np.abs(want).max())

    # The stack is an adapter like any other: it can be saved, loaded and attached.
    model = Llama.random(CONFIG)
    ids = np.arange(12)
    with tempfile.TemporaryDirectory() as folder:
        both.save(folder)
        model.attach(Adapter.load(folder, CONFIG.modules()))
    stacked, _ = model.forward(ids)
    model.attach(both)
    assert np.array_equal(stacked, model.forward(ids)[0])

    # A weight is a dial. At zero the model is the base, bit for bit.
    model.detach()
    base, _ = model.forward(ids)
    print("weight of the first adapter, and how far the logits move:")
    moved = []
    for weight in (0.0, 0.25, 0.5, 1.0):
        model.attach(Adapter.stack([(first, weight)]))
        moved.append(float(np.abs(model.forward(ids)[0] - base).max()))
        print(f"  {weight:4.2f}  {moved[-1]:.4f}")
    assert moved[0] == 0.0 and moved == sorted(moved)


if __name__ == "__main__":
    main()
