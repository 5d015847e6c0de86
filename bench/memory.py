"""Peak memory of training, estimated beforehand and measured: docs/training.md, "Memory".

    python bench/memory.py [MODEL.gguf]

Twelve settings of batch, length, precision, recomputing, rank and packing. Each is measured in a
process of its own: Linux's VmHWM (the most that was ever resident) once it has trained two steps,
beside what `pylora plan` and `pylora train` say of it before. Both are of the whole process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# precision, examples a step, tokens of each, micro-batches, recompute, rank, other settings
SETTINGS: tuple[tuple[str, int, int, int, bool, int, dict[str, Any]], ...] = (
    ("fp32", 4, 128, 1, False, 8, {}),
    ("fp32", 16, 128, 1, False, 8, {}),
    ("fp32", 16, 128, 4, False, 8, {}),
    ("fp32", 16, 128, 1, True, 8, {}),
    ("bf16", 8, 128, 1, False, 8, {}),
    ("bf16", 4, 512, 1, False, 8, {}),
    ("bf16", 1, 2048, 1, True, 8, {}),
    ("bf16", 8, 128, 1, False, 64, {}),
    ("bf16", 8, 128, 1, False, 64, {"optimizer": "adamw_8bit"}),
    ("int8", 8, 128, 1, False, 16, {}),
    ("int4", 8, 128, 1, False, 8, {}),
    ("int4", 12, 100, 2, False, 8, {"packing": True, "max_tokens": 600}),
)  # fmt: skip


def status(what: str) -> int:
    """Bytes by /proc/self/status: VmRSS, VmHWM."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {what}: this is measured on Linux")


def work(model: Path, number: int) -> dict[str, Any]:
    """One setting, in this process."""
    import numpy as np

    from pylora import Adapter, Llama, LoraConfig, open_checkpoint, resolve
    from pylora.training.config import TrainConfig
    from pylora.training.estimate import estimate
    from pylora.training.examples import Example
    from pylora.training.train import train

    precision, batch, length, parts, recompute, rank, more = SETTINGS[number]
    rng = np.random.default_rng(0)
    with open_checkpoint(model) as checkpoint:
        lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
        plan = resolve(lora, checkpoint.config.modules())
        config = TrainConfig(
            steps=2, learning_rate=1e-4, batch_size=batch, accumulation=parts, recompute=recompute,
            **more,
        )  # fmt: skip
        rows = [rng.integers(0, checkpoint.config.vocab_size, length + 1) for _ in range(2 * batch)]
        examples = [Example(ids[:-1], ids[1:]) for ids in rows]
        said = estimate(checkpoint, plan, precision, config, [len(e) for e in examples])
        before = status("VmHWM")
        llama = Llama.from_checkpoint(checkpoint, precision=precision)
    loaded = status("VmHWM"), status("VmRSS")
    train(llama, Adapter.init(plan, lora, seed=0), examples, config)
    return {
        "setting": number, "estimate": said.total, "measured": status("VmHWM"), "before": before,
        "loaded": loaded, "parts": said.parts(),
    }  # fmt: skip


def main() -> int:
    from pylora.demo.fetch import SMOLLM2, cache_folder

    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    default = cache_folder() / SMOLLM2.name
    p.add_argument("model", nargs="?", type=Path, default=default)
    p.add_argument("--out", type=Path, default=None, help="a JSON file of the figures")
    p.add_argument("--only", type=lambda t: [int(n) for n in t.split(",")], default=None)
    p.add_argument("--one", type=int, default=None, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.one is not None:
        print(json.dumps(work(a.model, a.one)))
        return 0
    found, worst = [], 0.0
    print("| precision | batch × length | parts | recompute | r | | estimated | measured | off |")
    print("|---|---|---:|---|---:|---|---:|---:|---:|")
    for number, (precision, batch, length, parts, recompute, rank, more) in enumerate(SETTINGS):
        if a.only is not None and number not in a.only:
            continue
        command = [sys.executable, __file__, str(a.model), "--one", str(number)]
        done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
        if done.returncode:
            raise SystemExit(done.stderr)
        one = json.loads(done.stdout)
        found.append(one)
        off = one["estimate"] / one["measured"] - 1
        worst = max(worst, abs(off))
        other = ", ".join(f"{k} {v}" for k, v in more.items())
        print(
            f"| {precision} | {batch} × {length} | {parts} | {'yes' if recompute else 'no'} "
            f"| {rank} | {other} | {one['estimate'] / 1e6:.0f} MB | {one['measured'] / 1e6:.0f} MB "
            f"| {100 * off:+.1f} % |",
            flush=True,
        )
    print(f"\nworst: {100 * worst:.1f} %")
    if a.out is not None:
        a.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
