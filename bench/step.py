"""A training step of pylora beside one of PyTorch + PEFT, in turn, in one run.

    python bench/step.py [--peer-python PYTHON] [--reps 7] [--out FILE.json]

SmolLM2-135M's geometry with random weights, fp32, r = 8 on q, k, v, o, 4 sequences of 256 tokens,
AdamW. Each contender lives in a process of its own, so that peak memory is its own; the parent
asks them for a step in turn (A B A B ...), so that a change of the machine's speed meets both.
PyTorch is measured with the default malloc and with one tuned to keep its pages. Medians and ratios
are printed; the peers need torch, peft and transformers in the interpreter of --peer-python.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

GEOMETRY = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
RANK, ALPHA, LR = 8, 16, 1e-4
# glibc returns large blocks to the system at every free; these settings keep them.
TUNED = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 33),
    "MALLOC_TOP_PAD_": str(1 << 28),
}


def pylora_step(batch: int, length: int) -> Callable[[], float]:
    """A function that does one training step and returns its loss."""
    import numpy as np

    import pylora
    from pylora.optimizer import Optimizer, gradients, trainable
    from pylora.train_config import TrainConfig
    from pylora.types import Seqs

    config = pylora.LlamaConfig(model_type="llama", head_dim=64, **GEOMETRY)
    model = pylora.Llama.random(config, seed=0, backend="c")
    lora = pylora.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS)
    adapter = pylora.Adapter.init(pylora.resolve(lora, config.modules()), lora, seed=0)
    model.attach(adapter)
    parameters = trainable(adapter)
    optimizer = Optimizer(model.ops, parameters, TrainConfig(steps=1, learning_rate=LR))
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (batch, length))
    labels = np.full_like(tokens, pylora.IGNORE)
    labels[:, :-1] = tokens[:, 1:]
    seqs, state = Seqs.of([length] * batch), {"step": 0}

    def step() -> float:
        state["step"] += 1
        nll, grads = model.loss(tokens.reshape(-1), labels.reshape(-1), seqs)
        optimizer.update(gradients(grads, parameters), 0.0, state["step"], LR)
        return float(nll.sum() / (labels != pylora.IGNORE).sum())

    return step


def peer_step(batch: int, length: int) -> Callable[[], float]:
    """The same with PyTorch + PEFT (sdpa attention, fused AdamW)."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    base = LlamaForCausalLM._from_config(LlamaConfig(**GEOMETRY), attn_implementation="sdpa")
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, config)
    model.config.use_cache = False
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LR, fused=True)
    ids = torch.randint(0, GEOMETRY["vocab_size"], (batch, length))

    def step() -> float:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss)

    return step


def work(which: str, batch: int, length: int) -> None:
    """One contender: a JSON line per line of standard input."""
    step = (pylora_step if which == "pylora" else peer_step)(batch, length)
    for _ in range(2):  # warm-up
        step()
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        loss = step()
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"seconds": seconds, "loss": loss, "peak_rss_bytes": peak}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-python", default=sys.executable, help="has torch, peft")
    parser.add_argument("--reps", type=int, default=7)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    parser.add_argument("--worker", choices=["pylora", "peer"], help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.worker:
        return work(a.worker, a.batch, a.length)

    env = dict(os.environ, OMP_NUM_THREADS=str(a.threads), PYLORA_NUM_THREADS=str(a.threads))
    contenders = {
        "pylora": (sys.executable, "pylora", env),
        "PyTorch + PEFT": (a.peer_python, "peer", env),
        "PyTorch + PEFT, tuned malloc": (a.peer_python, "peer", {**env, **TUNED}),
    }
    size = ["--batch", str(a.batch), "--length", str(a.length)]
    workers = {
        name: subprocess.Popen(
            [python, "-W", "ignore", __file__, "--worker", which, *size],
            env=e,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for name, (python, which, e) in contenders.items()
    }
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
    for p in workers.values():
        if '"ready"' not in p.stdout.readline():
            sys.exit("a contender did not start; its error is above")
    for _ in range(a.reps):
        for name, p in workers.items():
            print("step", file=p.stdin, flush=True)
            rows[name].append(json.loads(p.stdout.readline()))
    for p in workers.values():
        p.stdin.close()
        p.wait()

    tokens, report = a.batch * a.length, {}
    for name, got in rows.items():
        report[name] = {
            "median_seconds": statistics.median(r["seconds"] for r in got),
            "tokens_per_second": tokens / statistics.median(r["seconds"] for r in got),
            "peak_rss_bytes": max(r["peak_rss_bytes"] for r in got),
        }
    print(f"{'':30} {'tokens/s':>9} {'peak MB':>8}   pylora is (median of the pairs)")
    for name, r in report.items():
        pairs = [b["seconds"] / o["seconds"] for b, o in zip(rows[name], rows["pylora"])]
        r["pylora_speedup"] = statistics.median(pairs)
        r["pylora_memory_share"] = report["pylora"]["peak_rss_bytes"] / r["peak_rss_bytes"]
        print(
            f"{name:30} {r['tokens_per_second']:9.1f} {r['peak_rss_bytes'] / 1e6:8.0f}"
            f"   {r['pylora_speedup']:.2f} x as fast, {r['pylora_memory_share']:.2f} x the memory"
        )
    import pylora

    report["setting"] = {
        **{k: getattr(a, k) for k in ("reps", "batch", "length", "threads")},
        "machine": pylora.build_info()["processor"],
        "date": time.strftime("%Y-%m-%d"),
    }
    if a.out:
        a.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
