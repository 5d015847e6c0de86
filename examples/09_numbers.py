"""The numbers that LoRA is known by, computed from shapes and plans, none typed in.

    python examples/09_numbers.py

Nothing is trained and no weight is loaded: a plan is enough to count what would be trained.
"""

from __future__ import annotations

from pylora.adapters.loraconfig import LoraConfig
from pylora.adapters.plan import resolve
from pylora.model.config import LlamaConfig, ModuleSpec


def count(modules: dict[str, ModuleSpec], **settings: object) -> tuple[int, int]:
    """(trainable parameters, parameters of the target weights) of a LoRA on `modules`."""
    plan = resolve(LoraConfig(**settings), modules)
    return plan.num_parameters, sum(e.d * e.k for e in plan)


def square(n: int) -> dict[str, ModuleSpec]:
    return {"proj": ModuleSpec(kind="linear", d=n, k=n)}


def main() -> None:
    trainable, full = count(square(4096), r=8, target_modules=["proj"])
    print(f"4096 x 4096, r = 8: {trainable:,} trainable against {full:,}", end=" ")
    print(f"({full // trainable} times fewer)")
    assert (trainable, full) == (65_536, 16_777_216)

    for r, expected in ((4, 8_000), (8, 16_000), (16, 32_000)):
        trainable, full = count(square(1000), r=r, target_modules=["proj"])
        print(f"1000 x 1000, r = {r:2}: {trainable:,} of {full:,} ({100 * trainable / full:.1f} %)")
        assert trainable == expected

    llama_7b = LlamaConfig.tiny(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=128,
        tie_word_embeddings=False,
    )
    total = llama_7b.num_parameters
    trainable, _ = count(llama_7b.modules(), r=8, target_modules=["q_proj", "v_proj"])
    print(f"Llama 7B ({total:,} parameters), q and v, r = 8: {trainable:,}", end=" ")
    print(f"({100 * trainable / total:.3f} %), {trainable * 4 / 1e6:.1f} MB in float32")
    assert trainable == 4_194_304


if __name__ == "__main__":
    main()
