"""One training step of a model with Llama-3-8B's shape, in 4 bits on a CPU: time and peak memory.

    python bench/llama8b_step.py [--tokens 512] [--layers 32] [--rank 16] [--blocks q4_k]

The weights are random blocks (Q4_1, or Q4_K), made as such: nothing of the model ever exists in
float32. Values have mean 0 and variance 1 / inputs, so that activations stay of size 1. The adapter
is on all linear modules of every block; the forward of each block is run again in backward. Needs
8 GB.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time

import numpy as np

import pylora
from pylora.numbers.blocks import BLOCKS, row_bytes
from pylora.numbers.precision import Stored
from pylora.training.config import TrainConfig
from pylora.training.optimizer import Optimizer, gradients, trainable
from pylora.types import Seqs

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def config(layers: int) -> pylora.LlamaConfig:
    return pylora.LlamaConfig(
        model_type="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336,
        num_hidden_layers=layers, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
        max_position_embeddings=8192, rms_norm_eps=1e-5, rope_theta=500000.0,
    )  # fmt: skip


class RandomBlocks:
    """Tensors by name: matrices as random blocks of Q4_1 or Q4_K, norms of ones."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], kind: str = "q4_1") -> None:
        self.shapes, self.kind, self.rng = shapes, kind, np.random.default_rng(0)

    def __call__(self, name: str) -> np.ndarray | Stored:
        shape = self.shapes[name]
        if len(shape) == 1:
            return np.ones(shape, np.float32)
        (d, k), kind = shape, self.kind
        rows = np.frombuffer(bytearray(self.rng.bytes(d * row_bytes(kind, k))), np.uint8)
        blocks = rows.reshape(-1, BLOCKS[kind][1])
        scale = 1 / np.sqrt(21.25 * k)  # codes 0 .. 15 have the variance (16² - 1) / 12
        least = -7.5 * scale
        if kind == "q4_k":  # every group's scale and minimum are 32 of these
            scale, least = scale / 32, -least / 32
            blocks[:, 4:12], blocks[:, 12:16] = 160, 0
        blocks[:, :4] = np.array([scale, least], "<f2").view(np.uint8)
        return Stored(kind, rows.reshape(d, -1), (d, k))


def peak_rss() -> int:
    """Bytes; the system counts in KiB, macOS in bytes."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(most if sys.platform == "darwin" else most * 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--blocks", choices=("q4_1", "q4_k"), default="q4_1")
    args = parser.parse_args()
    shape = config(args.layers)
    began = time.perf_counter()
    model = pylora.Llama(
        shape, RandomBlocks(shape.tensors(), args.blocks), backend="c", precision="int4"
    )
    lora = pylora.LoraConfig(
        r=args.rank, lora_alpha=2 * args.rank, target_modules=TARGETS, init_lora_weights=False
    )
    adapter = pylora.Adapter.init(pylora.resolve(lora, shape.modules()), lora)
    model.attach(adapter)
    parameters = trainable(adapter)
    settings = TrainConfig(steps=1, learning_rate=1e-4)
    optimizer = Optimizer(model.ops, parameters, settings)
    loaded = time.perf_counter() - began
    ids = np.random.default_rng(1).integers(0, shape.vocab_size, args.tokens)
    labels = np.append(ids[1:], pylora.IGNORE)
    began, cpu = time.perf_counter(), time.process_time()
    nll, grads = model.loss(ids, labels, Seqs.of([args.tokens]), recompute=True)
    assert grads is not None
    optimizer.update(gradients(grads, parameters), 0.0, 1, settings.learning_rate)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    norm = np.sqrt(sum(float(np.vdot(g, g)) for g in gradients(grads, parameters).values()))
    result = {
        "tokens": args.tokens, "layers": args.layers, "rank": args.rank,
        "blocks": args.blocks,
        "load_s": round(loaded, 1), "step_s": round(seconds, 1),
        "step_cpu_s": round(cpu, 1),
        "tokens_per_s": round(args.tokens / seconds, 2),
        "peak_rss_gb": round(peak_rss() / 1e9, 2),
        "loss": round(float(np.mean(nll[:-1])), 3), "gradient_norm": float(f"{norm:.4g}"),
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
