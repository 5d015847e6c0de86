"""A fine-tune of 200 steps on the demo's task, in every precision: the same batches, initial
adapter, learning rates and clipping; only the arithmetic differs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from accuracy_logits import shared_weights
from setting import ALPHA, RANK, TARGETS

import pylora
from pylora.demo.items import DATA, exact_match, read_items
from pylora.demo.items import answers as answered
from pylora.formats import open_checkpoint
from pylora.training.batching import epoch_steps
from pylora.training.config import TrainConfig
from pylora.training.examples import load_examples
from pylora.training.optimizer import Optimizer, gradients, trainable
from pylora.training.schedule import learning_rate
from pylora.types import Seqs

BATCH, PEAK = 8, 2e-3
CONFIG = TrainConfig(learning_rate=PEAK, batch_size=BATCH)  # clipping, AdamW's constants


def measure(
    precisions: list[str], model: Path, steps: int, peer: Any, answers: int = 0, seeds: int = 1
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """{contender: the loss of each step}, of seed 0; and, where `answers` > 0, {contender: the
    share of so many held-out statements answered exactly, for each seed}.

    A seed chooses the initial adapter and the order of the examples, the same for all contenders.
    pylora answers with every adapter in float32, PEFT's read from what it saved: what is compared
    is what was learnt, not who multiplies.
    """
    curves: dict[str, list[float]] = {}
    exact: dict[str, list[float]] = {}
    with open_checkpoint(model) as checkpoint:
        tokenizer = checkpoint.tokenizer()
        examples = load_examples(DATA / "train.jsonl", tokenizer)
        modules = checkpoint.config.modules()
        items = read_items("test", answers) if answers else []
        lora = pylora.LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS), task_type="CAUSAL_LM"
        )
        judge = pylora.Llama.from_checkpoint(checkpoint, backend="c") if items else None

        def note(name: str, seed: int, losses: list[float], adapter: Any) -> None:
            print(f"  seed {seed}, {name}: loss {losses[0]:.6f} ... {losses[-1]:.4f}", flush=True)
            if seed == 0:
                curves[name] = losses
            if judge is not None:
                judge.attach(adapter)
                share = exact_match(items, answered(judge, tokenizer, items))
                exact.setdefault(name, []).append(share)
                print(f"  seed {seed}, {name}: {share:.1%} exact", flush=True)

        for seed in range(seeds):
            batches = chosen(examples, steps, seed)

            def initial(seed: int = seed) -> Any:
                return pylora.Adapter.init(pylora.resolve(lora, modules), lora, seed=seed)

            for precision in precisions:
                kw = {} if precision == "fp32" else {"precision": precision}
                llama = pylora.Llama.from_checkpoint(checkpoint, backend="c", **kw)
                adapter = initial()
                note(f"pylora {precision}", seed, train(llama, adapter, batches), adapter)
                del llama
            if peer.python is None:
                continue
            shared_weights(model, peer.folder)
            initial().save(peer.folder / "adapter")
            rows = [[(e.ids.tolist(), e.labels.tolist()) for e in batch] for batch in batches]
            rates = [rate(step, steps) for step in range(1, steps + 1)]
            task = {"batches": rows, "rates": rates, "max_grad_norm": CONFIG.max_grad_norm}
            for precision in [p for p in ("fp32", "bf16") if p in precisions]:
                label = f"{precision}-{seed}"
                (peer.folder / "loss.json").write_text(json.dumps(task | {"label": label}))
                found = peer.run("loss", precision)
                if found is not None:
                    trained = pylora.Adapter.load(peer.folder / f"trained-{label}", modules)
                    note(f"PEFT {precision}", seed, found["loss"].tolist(), trained)
    return curves, exact


def chosen(examples: Any, steps: int, seed: int = 0) -> list[list[Any]]:
    """The examples of each step, as `pylora train` would shuffle them."""
    out: list[list[Any]] = []
    epoch = 0
    while len(out) < steps:
        lengths = [len(e) for e in examples]
        for step in epoch_steps(lengths, seed=seed, epoch=epoch, batch_size=BATCH):
            out.append([examples[i] for micro in step for i in micro])
        epoch += 1
    return out[:steps]


def rate(step: int, steps: int) -> float:
    return learning_rate(step, steps, peak=PEAK, warmup_steps=10, floor=0.05 * PEAK)


def train(model: Any, adapter: Any, batches: list[list[Any]]) -> list[float]:
    model.attach(adapter)
    parameters = trainable(adapter)
    optimizer = Optimizer(model.ops, parameters, CONFIG)
    losses = []
    for step, batch in enumerate(batches, 1):
        ids = np.concatenate([e.ids for e in batch])
        labels = np.concatenate([e.labels for e in batch])
        nll, grads = model.loss(ids, labels, Seqs.of([len(e) for e in batch]))
        g = gradients(grads, parameters)
        optimizer.update(g, optimizer.norm(g), step, rate(step, len(batches)))
        counted = int((labels != pylora.IGNORE).sum())
        losses.append(float(np.asarray(nll, np.float64).sum() / counted))
    return losses
