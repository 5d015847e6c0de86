"""One step of training on one long sequence: memory and time by its length (docs/training.md).

    python bench/long_context.py [MODEL.gguf] [--lengths 4096,8192,16384,32768]

With recomputation, rank 8 on all linear modules, in bf16 where that is fast. Each length has a
process of its own: the most that it held (VmHWM), what was estimated, processor time of the step.
Attention's work grows with the square of the length; everything else, and memory, with the length.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from memory import status


def work(path: Path, length: int, precision: str) -> dict[str, Any]:
    """One length, in this process."""
    import numpy as np

    from pylora import Adapter, Llama, LoraConfig, open_checkpoint, resolve
    from pylora.training.config import TrainConfig
    from pylora.training.estimate import estimate
    from pylora.training.examples import Example
    from pylora.training.longer import stretched
    from pylora.training.train import train

    with open_checkpoint(path) as checkpoint:
        checkpoint.config = stretched(checkpoint.config, length)
        lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
        plan = resolve(lora, checkpoint.config.modules())
        ids = np.random.default_rng(0).integers(0, checkpoint.config.vocab_size, length + 1)
        examples = [Example(ids[:-1], ids[1:])]
        config = TrainConfig(steps=1, learning_rate=1e-4, batch_size=1, recompute=True)
        said = estimate(checkpoint, plan, precision, config, [length]).total
        model = Llama.from_checkpoint(checkpoint, precision=precision)
    adapter = Adapter.init(plan, lora, seed=0)
    began, clock = time.process_time(), time.perf_counter()
    result = train(model, adapter, examples, config)
    return {
        "length": length, "loss": result.losses[0], "seconds": time.process_time() - began,
        "wall": time.perf_counter() - clock, "measured": status("VmHWM"), "estimated": said,
        "precision": model.precision_report,
    }  # fmt: skip


def main() -> int:
    from pylora.demo.fetch import SMOLLM2, cache_folder

    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    default = cache_folder() / SMOLLM2.name
    p.add_argument("model", nargs="?", type=Path, default=default)
    p.add_argument("--lengths", default="4096,8192,16384,32768")
    p.add_argument("--precision", default="bf16")
    p.add_argument("--one", type=int, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.one:
        print(json.dumps(work(a.model, a.one, a.precision)))
        return 0
    print("| tokens | MB held | estimated | processor seconds | wall |\n|---:|---:|---:|---:|---:|")
    for length in map(int, a.lengths.split(",")):
        command = [sys.executable, __file__, str(a.model), "--one", str(length)]
        command += ["--precision", a.precision]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        r = json.loads(done.stdout.splitlines()[-1])
        print(
            f"| {length:,} | {r['measured'] / 1e6:.0f} | {r['estimated'] / 1e6:.0f} "
            f"| {r['seconds']:.0f} | {r['wall']:.0f} |",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
