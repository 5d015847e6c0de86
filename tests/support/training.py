"""A small training problem that several test files share: a tiny model that learns to count."""

from __future__ import annotations

from typing import Any

from pylora.adapters.adapter import Adapter
from pylora.adapters.loraconfig import LoraConfig
from pylora.adapters.plan import resolve
from pylora.model.config import LlamaConfig
from pylora.model.llama import Llama
from pylora.training.examples import Example
from pylora.training.train import StepInfo

VOCAB = LlamaConfig.tiny().vocab_size


def counting(n: int = 12, first: int = 0) -> list[Example]:
    """Sequences of several lengths in which each token is 7 more than the one before."""
    out = []
    for i in range(first, first + n):
        length = 3 + (5 * i) % 7
        tokens = [(11 * i + 7 * t) % VOCAB for t in range(length + 1)]
        out.append(Example.of(tokens, [False] * 2 + [True] * (length - 1), f"counting:{i}"))
    return out


def problem(ops: Any, *, seed: int = 0, **lora: Any) -> tuple[Llama, Adapter]:
    """A tiny random model on this backend and a fresh adapter for it."""
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
    config = LoraConfig(**{**settings, **lora})
    model = Llama.random(LlamaConfig.tiny(), seed=seed, backend=ops)
    return model, Adapter.init(resolve(config, model.config.modules()), config, seed=1)


def interrupt_after(step: int) -> Any:
    """An `on_step` that ends the run as Ctrl-C does."""

    def on_step(info: StepInfo) -> None:
        if info.step == step:
            raise KeyboardInterrupt

    return on_step


def bits(arrays: Any) -> dict[str, bytes]:
    """Names and bits, for comparisons that let nothing through."""
    return {name: array.tobytes() for name, array in arrays.items()}
