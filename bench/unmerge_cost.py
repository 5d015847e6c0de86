"""What exact unmerge costs: how many elements rounding would not give back, and their bytes.

    python bench/unmerge_cost.py [--model MODEL --adapter DIR]

Without arguments: random weights of deviation 0.02 and random deltas of several sizes. With them:
every module of a trained adapter on its real weights, in float32 and rounded to bfloat16 first.
Prints Markdown tables. It measures merge only; it writes no file.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable

import numpy as np

from pylora import backends
from pylora.types import LoRA

BYTES = 8 + 4  # of an element kept aside: its position and its bits


def to_bf16(W: np.ndarray) -> np.ndarray:
    """float32 to bfloat16 bits, to nearest even."""
    u = np.ascontiguousarray(W, np.float32).view(np.uint32)
    return ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype(np.uint16)


def stored(W: np.ndarray, dtype: str) -> np.ndarray:
    return {"f32": lambda: W, "f16": lambda: W.astype(np.float16), "bf16": lambda: to_bf16(W)}[
        dtype
    ]()


def kept(W: np.ndarray, lora: LoRA, dtype: str) -> int:
    """How many elements of W a merge with `lora` must keep aside; checks the way back."""
    ops, base = backends.get(None), stored(W, dtype)
    merged, residue = ops.merge(base, lora, dtype)
    back = ops.unmerge(merged, lora, residue, dtype)
    assert back.tobytes() == base.tobytes(), "unmerge did not restore the weight"
    return len(residue.position)


def synthetic(n: int, rank: int) -> None:
    rng = np.random.default_rng(0)
    W = rng.normal(0, 0.02, (n, n)).astype(np.float32)
    A = rng.normal(0, 1, (rank, n)).astype(np.float32)
    B = rng.normal(0, 1, (n, rank)).astype(np.float32)
    print("| size of the delta | float32 | float16 | bfloat16 |\n|---|---|---|---|")
    for size in (1e-6, 1e-5, 1e-4, 1e-3, 1e-2):
        lora = LoRA(A, B, size / rank**0.5)
        cells = [f"{100 * kept(W, lora, dtype) / W.size:.2f} %" for dtype in ("f32", "f16", "bf16")]
        print(f"| {size:.0e} | {' | '.join(cells)} |")


def trained(modules: Iterable[tuple[str, np.ndarray, LoRA]]) -> None:
    print("\n| module | modules | mean size of the delta | float32 | bfloat16 |")
    print("|---|---|---|---|---|")
    table: dict[str, list[float]] = {}
    for path, W, lora in modules:
        row = table.setdefault(path.rsplit(".", 1)[-1], [0.0] * 5)
        delta = lora.scale * (lora.B.astype(np.float64) @ lora.A.astype(np.float64))
        values = (
            1,
            float(np.abs(delta).sum()),
            W.size,
            kept(W, lora, "f32"),
            kept(W, lora, "bf16"),
        )
        table[path.rsplit(".", 1)[-1]] = [a + b for a, b in zip(row, values)]
    total = [sum(column) for column in zip(*table.values())]
    for name, (count, delta, size, f32, bf16) in [*table.items(), ("**all**", total)]:
        shares = f"{100 * f32 / size:.2f} % | {100 * bf16 / size:.2f} %"
        print(f"| {name} | {count:.0f} | {delta / size:.1e} | {shares} |")
    print(
        f"\nkept aside: {total[3] * BYTES / 1e6:.2f} MB for {total[2] * 4 / 1e6:.1f} MB of float32,"
        f" {total[4] * BYTES / 1e6:.2f} MB for {total[2] * 2 / 1e6:.1f} MB of bfloat16"
    )


def real(model: str, adapter_dir: str) -> Iterable[tuple[str, np.ndarray, LoRA]]:
    from pylora.adapters.adapter import Adapter
    from pylora.formats import open_checkpoint

    with open_checkpoint(model) as checkpoint:
        for path, lora in Adapter.load(adapter_dir, checkpoint.config.modules()).items():
            yield path, checkpoint.load(f"{path}.weight"), lora


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", help="GGUF file or Hugging Face directory")
    parser.add_argument("--adapter", help="PEFT directory of an adapter trained on it")
    parser.add_argument("--size", type=int, default=1024, help="of the random square weight")
    parser.add_argument("--rank", type=int, default=8)
    args = parser.parse_args()
    if (args.model is None) != (args.adapter is None):
        parser.error("--model and --adapter belong together")
    synthetic(args.size, args.rank)
    if args.model:
        trained(real(args.model, args.adapter))


if __name__ == "__main__":
    main()
