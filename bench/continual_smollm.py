"""The same question on a real model: SmolLM2 learns three small languages, one after the other.

    python bench/continual_smollm.py [MODEL.gguf] [--seeds 3] [--steps 80]

The tasks: the demo's notation; dates in English to ISO 8601; orders in English to JSON (both made
here). Ways: one LoRA trained on; the same with EWC on A and B; the same with replay; the same on
the last third of the layers alone; a LoRA per task. Accuracy is exact match of generated answers
on records held out. "Other abilities": the perplexity of English prose that no task has anything to
do with, before and after. Methods that need the gradients of all weights are left to
bench/continual.py: AdamW's state alone would be 1.6 GB here.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

from continual_methods import Training
from continual_show import forgetting, forward, interval

from pylora import Adapter, Llama, LoraConfig, open_checkpoint, resolve
from pylora.demo.fetch import SMOLLM2, cache_folder
from pylora.demo.items import answers, exact_match, read_items
from pylora.front.score import score_of
from pylora.training.examples import Example, load_examples
from pylora.training.step import step_gradients

ROOT = Path(__file__).resolve().parents[1]
Items = list[dict[str, str]]
BATCH, RANK, RATE = 16, 8, 2e-3
TEST = 50
MODULES = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()  # every linear one
MONTHS = ("January February March April May June July August September October November "
          "December").split()  # fmt: skip
NUMBERS = "one two three four five six seven eight nine ten eleven twelve".split()
GOODS = "apple pear plum lemon melon fig peach grape cherry onion carrot leek".split()
PROSE = (
    "The harbour was quiet when the last boat came in. Two men tied it to the pier, and a third "
    "carried the baskets up the steps, where the women waited with lamps. Nobody spoke of the "
    "storm. In the morning the market would open as on any other day, the children would go to "
    "school along the wall, and the old man who mended the nets would sit in the sun and tell "
    "whoever passed that the sea gives nothing for nothing."
)


def dates(rng: np.random.Generator) -> dict[str, str]:
    """ "the 3rd of March 2021" -> "2021-03-03", in three ways of saying it."""
    day, month, year = (
        int(rng.integers(1, 29)),
        int(rng.integers(12)),
        int(rng.integers(1900, 2100)),
    )
    end = {1: "st", 2: "nd", 3: "rd"}.get(day if day < 20 else day % 10, "th")
    name = MONTHS[month]
    said = (f"{name} {day}, {year}", f"the {day}{end} of {name} {year}", f"{day} {name} {year}")
    return {
        "prompt": f"{said[int(rng.integers(3))]} =",
        "completion": f" {year}-{month + 1:02}-{day:02}",
    }


def orders(rng: np.random.Generator) -> dict[str, str]:
    """ "two pears and a fig, please" -> {"pear": 2, "fig": 1}."""
    chosen = rng.choice(len(GOODS), int(rng.integers(1, 4)), replace=False)
    counts = [int(rng.integers(1, 13)) for _ in chosen]
    said = [
        f"{NUMBERS[n - 1]} {GOODS[g]}{'' if n == 1 else 'es' if GOODS[g] in ('peach',) else 's'}"
        for g, n in zip(chosen, counts, strict=True)
    ]
    said = [s.replace("cherrys", "cherries") for s in said]
    text = said[0] if len(said) == 1 else f"{', '.join(said[:-1])} and {said[-1]}"
    order = json.dumps({GOODS[g]: n for g, n in zip(chosen, counts, strict=True)})
    return {"prompt": f"{text}, please:", "completion": f" {order}"}


def notation(seed: int) -> tuple[Items, Items]:
    """The demo's records."""
    return read_items("train"), read_items("test", TEST)


def made(
    make: Callable[[np.random.Generator], dict[str, str]],
) -> Callable[[int], tuple[Items, Items]]:
    """600 records to learn and TEST held out, none in both."""

    def of(seed: int) -> tuple[Items, Items]:
        rng = np.random.default_rng([seed, 5])
        found: dict[str, dict[str, str]] = {}
        while len(found) < 600 + TEST:
            item = make(rng)
            found[item["prompt"]] = item
        items = list(found.values())
        return items[TEST:], items[:TEST]

    return of


TASKS: dict[str, Callable[[int], tuple[Items, Items]]] = {
    "notation": notation, "dates": made(dates), "orders": made(orders),
}  # fmt: skip


class Way:
    """One way of learning the tasks in a row."""

    def __init__(self, label: str, *, apart: bool = False, replay: int = 0, ewc: float = 0.0,
                 last: bool = False) -> None:  # fmt: skip
        self.label, self.apart, self.replay, self.ewc, self.last = label, apart, replay, ewc, last

    def fresh(self, model: Llama, seed: int) -> Adapter:
        """An adapter that is zero."""
        layers = model.config.num_hidden_layers
        some = list(range(layers - layers // 3, layers)) if self.last else None
        lora = LoraConfig(
            r=RANK, lora_alpha=2 * RANK, target_modules=MODULES, layers_to_transform=some
        )
        return Adapter.init(resolve(lora, model.config.modules()), lora, seed=seed)


WAYS = (
    Way("one LoRA for all"),
    Way("one LoRA, last third of the layers", last=True),
    Way("one LoRA, EWC", ewc=3e5),
    Way("one LoRA, replay", replay=40),
    Way("LoRA per task", apart=True),
)


class Learner:
    """A model, what was read for each task, and the run of one way."""

    def __init__(self, model: Llama, tokenizer: Any, seed: int, steps: int) -> None:
        self.model, self.tokenizer, self.seed, self.steps = model, tokenizer, seed, steps
        self.items = {name: make(seed) for name, make in TASKS.items()}
        self.examples = {
            name: list(load_examples(train, tokenizer)) for name, (train, _) in self.items.items()
        }

    def score(self, name: str, adapter: Adapter | None) -> float:
        """Exact match on the task's held-out records."""
        self.model.attach(adapter) if adapter is not None else self.model.detach()
        test = self.items[name][1]
        return exact_match(test, answers(self.model, self.tokenizer, test))

    def prose(self, adapter: Adapter | None) -> float:
        """Perplexity of English prose."""
        return score_of(self.model, self.tokenizer, adapter, PROSE).perplexity

    def batches(self, name: str, way: Way, buffer: list[Example]) -> Iterator[list[Example]]:
        """`steps` batches; with replay half of each is stored examples."""
        rng = np.random.default_rng([self.seed, len(buffer), 11])
        own = self.examples[name]
        for _ in range(self.steps):
            n = BATCH // 2 if buffer else BATCH
            chosen = [own[i] for i in rng.integers(0, len(own), n)]
            chosen += [buffer[i] for i in rng.integers(0, len(buffer), BATCH - n)] if buffer else []
            yield chosen

    def gradients(self, batch: list[Example]) -> dict[tuple[str, str], np.ndarray]:
        """Of the mean loss over the batch's labels."""
        _, _, grads = step_gradients(self.model, batch, (tuple(range(len(batch))),))
        return {(p, n): getattr(g, n) for p, g in grads.items() for n in ("A", "B")}

    def run(self, way: Way) -> dict[str, Any]:
        """All tasks in a row: the accuracy matrix, and what it cost."""
        matrix, adapters = [], {}
        buffer: list[Example] = []
        fisher: dict[Any, np.ndarray] = {}
        anchored: dict[Any, np.ndarray] = {}
        adapter = way.fresh(self.model, self.seed)
        seconds = 0.0
        for number, name in enumerate(TASKS):
            began = time.process_time()
            if way.apart:
                adapter = way.fresh(self.model, self.seed + number)
            self.model.attach(adapter)
            training = Training(self.model, adapter, ("A", "B"), RATE)
            for batch in self.batches(name, way, buffer):
                grads = self.gradients(batch)
                for key, param in training.parameters().items():
                    if key in fisher:
                        pull = fisher[key] * param - anchored[key]
                        grads[key] = grads[key] + np.float32(way.ewc) * pull
                training.update(grads, self.steps)
            if way.ewc:
                for i in range(32):
                    grads = self.gradients([self.examples[name][i]])
                    for key, param in training.parameters().items():
                        f = grads[key] ** 2 / np.float32(32)
                        fisher[key] = fisher.get(key, np.float32(0)) + f
                        anchored[key] = anchored.get(key, np.float32(0)) + f * param
            buffer += self.examples[name][: way.replay]
            adapters[name] = adapter
            seconds += time.process_time() - began
            row = [self.score(n, adapters.get(n) if way.apart else adapter) for n in TASKS]
            matrix.append(row)
            print(f"    after {name}: {' '.join(f'{r:.2f}' for r in row)}", flush=True)
        numbers = sum(a.A.size + a.B.size for a in adapter.values())
        return {
            "method": way.label, "seed": self.seed, "matrix": matrix, "seconds": seconds,
            "trained": numbers, "prose": self.prose(adapter),
        }  # fmt: skip


def show(document: dict[str, Any]) -> None:
    """The table of a run."""
    base = [b["prose"] for b in document["base"]]
    print("\n| | average | forgetting | forward | trained | prose, perplexity | seconds |")
    print("|---|---|---|---|---|---|---|")
    for way in dict.fromkeys(r["method"] for r in document["runs"]):
        runs = [r for r in document["runs"] if r["method"] == way]
        print(
            f"| {way} | {interval([float(np.mean(r['matrix'][-1])) for r in runs])} "
            f"| {interval([forgetting(r) for r in runs])} "
            f"| {interval([forward(r) for r in runs])} | {runs[0]['trained']:,} "
            f"| {np.mean([r['prose'] for r in runs]):.1f} "
            f"| {np.mean([r['seconds'] for r in runs]):.0f} |"
        )
    print(f"\nThe base: perplexity {np.mean(base):.1f}")


def main() -> int:
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    default = cache_folder() / SMOLLM2.name
    p.add_argument("model", nargs="?", type=Path, default=default)
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--steps", type=int, default=80)
    p.add_argument("--precision", default="auto")
    labels = [w.label for w in WAYS]
    p.add_argument("--only", nargs="*", default=labels, choices=labels, help="ways, by name")
    p.add_argument("--out", type=Path, default=None)
    a = p.parse_args()
    today = date.today().isoformat()
    out = a.out or ROOT / "bench" / "results" / f"continual-smollm-{today}.json"
    document: dict[str, Any] = {"date": today, "steps": a.steps, "runs": [], "base": []}
    with open_checkpoint(a.model) as checkpoint:
        tokenizer = checkpoint.tokenizer()
        model = Llama.from_checkpoint(checkpoint, precision=a.precision)
    document["precision"] = model.precision_report
    for seed in range(a.seeds):
        learner = Learner(model, tokenizer, seed, a.steps)
        before = [learner.score(n, None) for n in TASKS]
        document["base"].append({"seed": seed, "scores": before, "prose": learner.prose(None)})
        for way in (w for w in WAYS if w.label in a.only):
            print(f"  seed {seed}, {way.label}", flush=True)
            document["runs"].append({**learner.run(way), "base": before})
            out.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    show(document)
    print(f"written: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
