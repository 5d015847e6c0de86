"""Each objective of training on data made of the demo's notation: a metric before and after.

    python bench/objectives.py MODEL [--out FILE.json] [--only dpo,kto] [--steps 60] [--threads 1]

MODEL is a model file such as SmolLM2-135M-Instruct.Q4_1.gguf. Every run begins with a fresh adapter
of rank 8 on all linear modules and has the same number of updates; the metric is measured on
records that were not trained on. Preferences, also those of kto, are judged by one figure: how
often the model finds the right translation likelier, per token, than one with a
mistake in it. The teacher of distill is the same base with an adapter of rank 16 that was trained
on translations; its student has rank 8 and never sees a label.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from objective_data import CLASSES, made, notation

from pylora import backends
from pylora.adapters.adapter import Adapter
from pylora.adapters.loraconfig import LoraConfig
from pylora.adapters.own_tokenizer import tokenizer_of
from pylora.adapters.plan import resolve
from pylora.formats import open_checkpoint
from pylora.model.llama import Llama
from pylora.training.examples import load_examples
from pylora.training.objectives.choose import choose, loader, read
from pylora.training.objectives.distill import teach
from pylora.training.train import TrainConfig, train

PREFERENCES = ("dpo", "ipo", "simpo", "orpo", "kto")
RATES = {"dpo": 5e-4, "ipo": 5e-4, "simpo": 5e-4, "orpo": 1e-3, "kto": 5e-4}
RATES |= {"classify": 1e-3, "regress": 1e-3, "distill": 1e-3, "teacher": 1e-3}
LONGER = {"kto": 2}  # times as many updates: a verdict says less than a pair
TRAINED, HELD = 480, 100


class Bench:
    """A base model, and what is trained on it."""

    def __init__(self, path: Path, steps: int, precision: str) -> None:
        with open_checkpoint(path) as checkpoint:
            self.tokenizer = tokenizer_of(checkpoint, ())
            self.model = Llama.from_checkpoint(checkpoint, precision=precision)
        self.steps, self.data = steps, made()

    def adapter(self, rank: int = 8) -> Adapter:
        config = LoraConfig.fresh(rank, None, "all-linear")
        return Adapter.init(resolve(config, self.model.config.modules()), config, seed=0)

    def items(self, name: str, kind: str) -> tuple[Any, Any]:
        load, records = loader(name), self.data[kind]
        return tuple(  # type: ignore[return-value]
            load(records[split][:n], self.tokenizer)
            for split, n in (("train", TRAINED), ("test", HELD))
        )

    def config(self, name: str) -> TrainConfig:
        steps = self.steps * LONGER.get(name, 1)
        return TrainConfig(
            learning_rate=RATES[name], steps=steps, batch_size=8, warmup_steps=3, seed=0
        )


def preferences(bench: Bench, name: str) -> dict[str, Any]:
    """Trains on pairs (kto: on single answers with verdicts); the figure is that of pairs."""
    items, _ = bench.items(name, "verdicts" if name == "kto" else "pairs")
    _, held = bench.items("dpo", "pairs")
    judge, adapter = choose("simpo"), bench.adapter()
    bench.model.attach(adapter)
    before = judge.evaluate(bench.model, held, 8).metrics["accuracy"]
    result = train(bench.model, adapter, items, bench.config(name), objective=choose(name))
    after = judge.evaluate(bench.model, held, 8).metrics["accuracy"]
    return {"metric": "right above mistaken", "before": before, "after": after, **of(result)}


def of(result: Any) -> dict[str, Any]:
    """The loss at both ends, each the mean of up to five steps, and the time."""
    n = min(5, len(result.losses))
    return {
        "loss_first": sum(result.losses[:n]) / n,
        "loss_last": sum(result.losses[-n:]) / n,
        "steps": result.steps,
        "tokens": result.tokens,
    }


def labelled(bench: Bench, name: str) -> dict[str, Any]:
    """classify: which relation a sentence states; regress: how many symbols its translation has."""
    kind = "classes" if name == "classify" else "numbers"
    records = bench.data[kind]
    items, held = read(
        name, records["train"][:TRAINED], records["test"][:HELD], bench.tokenizer,
        **({"classes": CLASSES} if name == "classify" else {}),
    )  # fmt: skip
    objective, model = choose(name), bench.model
    config = LoraConfig.fresh(8, None, "all-linear")
    adapter = objective.fresh(
        resolve(config, model.config.modules()), config, 0, model, items, None
    )
    model.attach(adapter)
    metric = "accuracy" if name == "classify" else "r2"
    before = objective.evaluate(model, held or [], 8).metrics[metric]
    result = train(model, adapter, items, bench.config(name), objective=objective)
    after = objective.evaluate(model, held or [], 8).metrics[metric]
    return {"metric": metric, "before": before, "after": after, **of(result)}


def distilled(bench: Bench, name: str) -> dict[str, Any]:
    """A teacher's likeliest token, and how often the student's is the same."""
    examples, held = (
        load_examples(notation(split)[:n], bench.tokenizer)
        for split, n in (("train", TRAINED), ("test", HELD))
    )
    teacher = bench.adapter(16)
    train(bench.model, teacher, examples, bench.config("teacher"))
    items, tests = (teach(bench.model, e, top_k=32, temperature=1.0) for e in (examples, held))
    objective, adapter = choose(name), bench.adapter()
    bench.model.attach(adapter)
    before = objective.evaluate(bench.model, tests, 8).metrics["agreement"]
    result = train(bench.model, adapter, items, bench.config(name), objective=objective)
    after = objective.evaluate(bench.model, tests, 8).metrics["agreement"]
    return {"metric": "agrees with its teacher", "before": before, "after": after, **of(result)}


RUNS: dict[str, Callable[[Bench, str], dict[str, Any]]] = {
    **dict.fromkeys(PREFERENCES, preferences),
    "classify": labelled,
    "regress": labelled,
    "distill": distilled,
}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as docs/objectives.md has them."""
    lines = [
        "| objective | on held-out records | before | after | loss | updates | CPU s |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        loss = f"{r['loss_first']:.3f} → {r['loss_last']:.3f}"
        lines.append(
            f"| {r['objective']} | {r['metric']} | {r['before']:.3f} | {r['after']:.3f} | "
            f"{loss} | {r['steps']} | {r['cpu_seconds']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", default=",".join(RUNS))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", default="auto")
    args = parser.parse_args()
    backends.get().set_num_threads(args.threads)  # type: ignore[attr-defined]
    bench, rows = Bench(args.model, args.steps, args.precision), []
    for name in args.only.split(","):
        began = time.process_time()
        row = {"objective": name, **RUNS[name](bench, name)}
        rows.append(row | {"cpu_seconds": time.process_time() - began})
        print(json.dumps(rows[-1]), flush=True)
        if args.out is not None:
            setting = {
                "model": args.model.name,
                "precision": bench.model.precision_report,
                "processor": platform.processor() or platform.machine(),
                "threads": args.threads,
            }
            args.out.write_text(json.dumps({"setting": setting, "rows": rows}, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
