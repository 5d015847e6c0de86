"""Training in several processes: measured here, and what a network would make of it.

    python bench/parallel.py [MODEL.gguf] [--rank 8] [--steps 6] [--out FILE.json]

Times one step of 4 x 256 tokens in two micro-batches, computed by one process of one thread, one
of two threads, and two of one thread, in turn. Then says what a step would take on N nodes, each
computing as this process of two threads does one micro-batch of 2 x 256 tokens: its time, and that
of the network, from the bytes that must travel.

    bytes sent by each node     2 * 4 * P * (N - 1) / N        P: numbers in the adapter
    time                        bytes / bandwidth + 2 * (N - 1) * latency

(each node adds one slice of the gradient: N - 1 messages to bring the slices there, N - 1 to bring
the sums back). Needs mpi4py and an mpiexec.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
NETWORKS = {  # Gbit/s -> seconds of latency that such a network has
    1: 50e-6, 10: 20e-6, 25: 10e-6, 100: 3e-6, 400: 2e-6,
}  # fmt: skip
NODES = (8, 32, 128, 512, 1024)
LENGTH, EXAMPLES = 256, 4


def worker(model: str, rank: int, steps: int) -> None:
    """One of the processes: rank 0 prints {"seconds": [...], "numbers": P}."""
    from pylora import Adapter, Llama, LoraConfig, open_checkpoint, resolve
    from pylora.training.examples import Example
    from pylora.training.mpi import world
    from pylora.training.train import TrainConfig, train

    checkpoint = open_checkpoint(model)
    llama = Llama.from_checkpoint(checkpoint)
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    adapter = Adapter.init(resolve(lora, llama.config.modules()), lora, seed=0)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, llama.config.vocab_size, (EXAMPLES, LENGTH))
    examples = [Example.of(row.tolist(), [True] * LENGTH) for row in ids]
    seconds: list[float] = []
    at = [time.perf_counter()]

    def on_step(info: Any) -> None:
        now = time.perf_counter()
        seconds.append(now - at[0])
        at[0] = now

    config = TrainConfig(steps=steps + 1, batch_size=EXAMPLES, accumulation=2)
    train(llama, adapter, examples, config, on_step=on_step, ranks=world())
    if world().rank == 0:
        numbers = sum(lora.A.size + lora.B.size for lora in adapter.values())
        print(json.dumps({"seconds": seconds[1:], "numbers": numbers}))


def measured(model: str, rank: int, steps: int, processes: int, threads: int) -> dict[str, Any]:
    """What one run of the workers says."""
    beside = Path(sys.executable).parent / "mpiexec"
    mpiexec = str(beside) if beside.exists() else shutil.which("mpiexec")
    if mpiexec is None:
        raise SystemExit("no mpiexec: pip install mpich")
    words = [sys.executable, __file__, model, "--rank", str(rank), "--steps", str(steps), "--work"]
    if processes > 1:
        words = [mpiexec, "-n", str(processes), *words]
    env = os.environ | {"PYLORA_NUM_THREADS": str(threads)}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
    with tempfile.TemporaryFile("w+") as said:
        subprocess.run(words, env=env, check=True, stdout=said)
        said.seek(0)
        return json.loads(said.read().strip().splitlines()[-1])  # type: ignore[no-any-return]


def network(numbers: int, nodes: int, gbit: int) -> float:
    """Seconds that a step's sums take."""
    sent = 2 * 4 * numbers * (nodes - 1) / nodes
    return sent / (gbit * 1e9 / 8) + 2 * (nodes - 1) * NETWORKS[gbit]


def main() -> int:
    from pylora.demo.fetch import SMOLLM2, cache_folder

    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    default = cache_folder() / SMOLLM2.name
    p.add_argument("model", nargs="?", default=str(default))
    p.add_argument("--rank", type=int, default=8)
    p.add_argument("--steps", type=int, default=6)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--out", type=Path, default=None)
    p.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.work:
        worker(a.model, a.rank, a.steps)
        return 0
    ways = {"1 process, 1 thread": (1, 1), "1 process, 2 threads": (1, 2),
            "2 processes, 1 thread": (2, 1)}  # fmt: skip
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    numbers = 0
    for _ in range(a.rounds):
        for way, (processes, threads) in ways.items():
            got = measured(a.model, a.rank, a.steps, processes, threads)
            seconds[way] += got["seconds"]
            numbers = got["numbers"]
    medians = {way: statistics.median(s) for way, s in seconds.items()}
    tokens = EXAMPLES * LENGTH
    print(f"\n{numbers:,} numbers in the adapter, {4 * numbers / 1e6:.1f} MB of gradients\n")
    print("| | a step | tokens/s |\n|---|---|---|")
    for way, s in medians.items():
        print(f"| {way} | {s:.3f} s | {tokens / s:.0f} |")
    one = medians["1 process, 2 threads"] / 2  # one of the two micro-batches
    print(f"\nOne micro-batch of {tokens // 2} tokens on a node: {one:.2f} s.")
    print("Share of the time that is not the network:\n")
    print("| nodes | " + " | ".join(f"{g} Gbit/s" for g in NETWORKS) + " |")
    print("|---|" + "---|" * len(NETWORKS))
    table = {n: {g: one / (one + network(numbers, n, g)) for g in NETWORKS} for n in NODES}
    for n, row in table.items():
        print(f"| {n} | " + " | ".join(f"{100 * share:.1f} %" for share in row.values()) + " |")
    today = date.today().isoformat()
    out = a.out or ROOT / "bench" / "results" / f"parallel-{today}.json"
    document = {"date": today, "model": Path(a.model).name, "rank": a.rank, "numbers": numbers,
                "seconds": seconds, "share": table}  # fmt: skip
    out.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
