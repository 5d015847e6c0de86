"""Which settings teach SmolLM2 three small tasks, and what each costs: docs/recipes.md.

    python bench/recipes.py                     # everything that the results file lacks
    python bench/recipes.py --only ranks,rates  # some groups; "jobs" is the table of the defaults
    python bench/recipes.py --show              # the tables; --write docs/recipes.md

A cell is one setting on one task with one seed: 64 updates of 4 records, then exact match and loss
on 40 records held out. The tasks are those of bench/continual_smollm.py. Each setting differs from
the first in what its name says, and in nothing else. Each has a process of its own; a cell that is
finished is a line of the results file at once, and is not computed again. Seconds are processor
time of training alone, on one thread; memory is the most that the process held until its first cell
was trained, less what it held before the model was read.

"jobs": five jobs of 20 to 600 records with what `pylora train` chooses, beside other numbers of
updates and other rates. "muon": Muon on A and B (Jordan et al. 2024), with the update's size of
Liu et al. 2025, which is no setting of pylora: whether it earns its place.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

from memory import status

ROOT = Path(__file__).resolve().parents[1]
STEPS, BATCH, HELD_OUT, RECORDS, RATE = 64, 4, 40, 400, 2e-3
TASKS = ("notation", "dates", "orders")
JOBS = (("dates", 20), ("orders", 60), ("notation", 150), ("dates", 300), ("orders", 600))
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Setting:
    """What differs from rank 8, alpha 16, all linear modules, rate 2e-3 that falls by a cosine."""

    name: str
    lora: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    init: str = "kaiming"
    muon: bool = False


def _rank(r: int, alpha: float | None = None, rslora: bool = False) -> dict[str, Any]:
    return {"r": r, "lora_alpha": 2 * r if alpha is None else alpha, "use_rslora": rslora}


GROUPS: dict[str, tuple[Setting, ...]] = {
    "base": (Setting("as above"),),
    "ranks": tuple(Setting(f"r = {r}", _rank(r)) for r in (1, 2, 4, 16, 64)),
    "rslora": tuple(
        Setting(f"r = {r}, alpha 16{', rsLoRA' if rs else ''}", _rank(r, 16, rs))
        for r, rs in ((64, False), (64, True))
    ),
    "rates": tuple(
        Setting(f"rate {rate:g}", train={"learning_rate": rate})
        for rate in (5e-4, 1e-3, 4e-3)
    ),
    "alpha": tuple(Setting(f"alpha {a}", _rank(8, a)) for a in (8, 32)),
    "targets": (
        Setting("attention alone", {"target_modules": ATTENTION}),
        Setting(
            "attention alone, rate 4e-3", {"target_modules": ATTENTION}, {"learning_rate": 4e-3}
        ),
        Setting("MLP alone", {"target_modules": MLP}),
    ),
    "variants": (
        Setting("DoRA", {"use_dora": True}),
        Setting("init pissa", init="pissa"),
        Setting("init pissa, rate 5e-4", train={"learning_rate": 5e-4}, init="pissa"),
        Setting("init olora, rate 5e-4", train={"learning_rate": 5e-4}, init="olora"),
        Setting("LoRA+ 4, rate 1e-3", train={"lora_plus_ratio": 4.0, "learning_rate": 1e-3}),
        Setting("LoRA+ 16, rate 5e-4", train={"lora_plus_ratio": 16.0, "learning_rate": 5e-4}),
    ),
    "schedules": (
        Setting("linear", train={"schedule": "linear"}),
        Setting("constant", train={"schedule": "constant"}),
        Setting("warmup_stable_decay", train={"schedule": "warmup_stable_decay"}),
        Setting("cosine_with_restarts", train={"schedule": "cosine_with_restarts"}),
    ),
    "optimizers": (Setting("8-bit moments", train={"optimizer": "adamw_8bit"}),),
    "regularizers": (
        Setting("NEFTune 5", train={"neftune_noise_alpha": 5.0}),
        Setting("label smoothing 0.1", train={"label_smoothing_factor": 0.1}),
        Setting("dropout 0.1", {"lora_dropout": 0.1}),
        Setting("rank dropout 0.1", train={"rank_dropout": 0.1}),
    ),
    "muon": tuple(
        Setting(f"Muon, rate {rate:g}", train={"learning_rate": rate}, muon=True)
        for rate in (1e-3, 4e-3)
    ),
}  # fmt: skip
# The table of the defaults: what `pylora train` chooses, and one thing otherwise.
CHOICES: dict[str, dict[str, Any]] = {
    "the defaults": {},
    "30 updates": {"steps": 30},
    "240 updates": {"steps": 240},
    "rate 2e-4": {"learning_rate": 2e-4},
    "rate 3e-3": {"learning_rate": 3e-3},
}


# ---- a process of its own -----------------------------------------------------------------------


def orthogonal(G: np.ndarray, rounds: int = 5) -> np.ndarray:
    """Near the nearest matrix with orthonormal rows or columns, by Muon's quintic iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = G.shape[0] <= G.shape[1]
    X = np.ascontiguousarray(G if wide else G.T, np.float32)
    X = X / (np.linalg.norm(X) + 1e-7)
    for _ in range(rounds):
        S = X @ X.T
        X = a * X + (b * S + c * (S @ S)) @ X
    return X if wide else X.T


def muon() -> type:
    """An optimizer for `train`: Nesterov momentum 0.95, made orthogonal, with AdamW's size."""
    from pylora.training.optimizer import Optimizer

    class Muon(Optimizer):
        def apply(self, updates: Any) -> None:
            for name, p, grad, o in updates:
                m = self.m[name]
                m *= np.float32(0.95)
                m += grad * np.float32(o.grad_scale)
                step = orthogonal(grad * np.float32(o.grad_scale) + np.float32(0.95) * m)
                p -= np.float32(o.lr * 0.2 * max(p.shape) ** 0.5) * step

    return Muon


class Bench:
    """A model, and the cells that are computed with it."""

    def __init__(self, path: Path, precision: str) -> None:
        from continual_smollm import TASKS as MADE

        from pylora import Llama, open_checkpoint

        self.idle = status("VmRSS")
        self.checkpoint = open_checkpoint(path)
        self.tokenizer = self.checkpoint.tokenizer()
        self.model = Llama.from_checkpoint(self.checkpoint, precision=precision)
        self.made, self.peak = MADE, 0
        self.begun: dict[int, Any] = {}

    def items(self, task: str, seed: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
        train, test = self.made[task](seed)
        order = np.random.default_rng([seed, 3]).permutation(len(train))
        return [train[i] for i in order[:RECORDS]], test[:HELD_OUT]

    def adapter(self, setting: Setting, seed: int) -> Any:
        """A fresh one; what is taken from the base's weights is the same for every seed."""
        from pylora import LoraConfig
        from pylora.training.beginnings import begin

        if setting.init in ("pissa", "olora") and self.begun:
            adapter, (before, lower) = self.begun["adapter"], self.begun["arrays"]
            for path, lora in adapter.items():
                lora.A[...], lora.B[...] = before[path], lower[path]
            return adapter
        lora = {"target_modules": "all-linear", **_rank(8), **setting.lora}
        made = begin(setting.init, LoraConfig(**lora), self.model, self.checkpoint.load, (), seed)
        if setting.init in ("pissa", "olora"):
            self.begun["adapter"] = made
            self.begun["arrays"] = (
                {p: x.A.copy() for p, x in made.items()},
                {p: x.B.copy() for p, x in made.items()},
            )
        return made

    def cell(self, setting: Setting, task: str, seed: int, count: int | None) -> dict[str, Any]:
        """One setting on one task with one seed; count: of a job, whose length is chosen."""
        from pylora.demo.items import answers, exact_match
        from pylora.training import train as module
        from pylora.training.config import TrainConfig
        from pylora.training.evaluate import evaluate
        from pylora.training.examples import load_examples

        train, test = self.items(task, seed)
        if count is not None:
            train = (train + self.made[task](seed)[0][RECORDS:])[:count]
        examples = list(load_examples(train, self.tokenizer))
        chosen: dict[str, Any] = {"seed": seed}  # a job has the defaults
        if count is None:
            chosen |= {"batch_size": BATCH, "steps": STEPS, "learning_rate": RATE}
        adapter = self.adapter(setting, seed)
        usual = module.optimizer_of
        if setting.muon:
            module.optimizer_of = muon()
        began = time.process_time()
        try:
            config = TrainConfig(**{**chosen, **setting.train})
            result = module.train(self.model, adapter, examples, config)
        finally:
            module.optimizer_of = usual
        seconds = time.process_time() - began
        self.peak = self.peak or status("VmHWM") - self.idle
        trained = sum(a.A.size + a.B.size for a in adapter.values())
        trained += sum(0 if a.magnitude is None else a.magnitude.size for a in adapter.values())
        return {
            "right": exact_match(test, answers(self.model, self.tokenizer, test)),
            "loss": evaluate(self.model, list(load_examples(test, self.tokenizer))).nll,
            "steps": result.steps, "trained_loss": float(np.mean(result.losses[-5:])),
            "seconds": seconds, "peak": self.peak, "bytes": 4 * trained,
        }  # fmt: skip


def wanted(groups: list[str], seeds: int) -> Iterator[tuple[str, Setting, list[dict[str, Any]]]]:
    """(group, setting, its cells) in the order in which they are computed."""
    for group in groups:
        if group == "jobs":
            for name, train in CHOICES.items():
                yield group, Setting(name, train=train), [
                    {"task": task, "count": count, "seed": 0} for task, count in JOBS
                ]  # fmt: skip
            continue
        for setting in GROUPS[group]:
            cells = [
                {"task": task, "count": None, "seed": seed}
                for seed in range(seeds)
                for task in TASKS
            ]
            yield group, setting, cells


def work(a: argparse.Namespace) -> None:
    """One setting's cells, in this process."""
    done = finished(a.out)
    bench = Bench(a.model, a.precision)
    for group, setting, cells in wanted([a.group], a.seeds):
        if setting.name != a.setting:
            continue
        for cell in cells:
            key = {"group": group, "setting": setting.name, **cell}
            if _key(key) in done:
                continue
            found = bench.cell(setting, cell["task"], cell["seed"], cell["count"])
            record = {**key, **found, "precision": bench.model.precision_report}
            with open(a.out, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            print(f"  {cell['task']} {cell['seed']}: {found['right']:.2f}, "
                  f"{found['seconds']:.1f} s", flush=True)  # fmt: skip


# ---- all of them --------------------------------------------------------------------------------


def _key(record: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(record[n] for n in ("group", "setting", "task", "count", "seed"))


def records(path: Path) -> list[dict[str, Any]]:
    """What the results file has; a line that was half written is passed over."""
    found = []
    for line in path.read_text("utf-8").splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def finished(path: Path) -> set[tuple[Any, ...]]:
    return {_key(r) for r in records(path)}


def settings_table(found: list[dict[str, Any]]) -> list[str]:
    """The lines of the table of settings."""
    lines = ["| | notation | dates | orders | mean | loss | s | MB held | MB adapter |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for group, settings in GROUPS.items():
        for setting in settings:
            mine = [r for r in found if (r["group"], r["setting"]) == (group, setting.name)]
            seeds = [r["seed"] for r in mine]
            mine = [r for r in mine if seeds.count(r["seed"]) == len(TASKS)]  # whole ones
            if mine:
                lines.append(_row(setting.name, mine))
    return lines


def jobs_table(found: list[dict[str, Any]]) -> list[str]:
    """Those of the table of the defaults; none where no job is there."""
    jobs = [r for r in found if r["group"] == "jobs"]
    names = [name for name in CHOICES if any(r["setting"] == name for r in jobs)]
    if not names:
        return []
    lines = ["| | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    for task, count in JOBS:
        row = []
        for name in names:
            mine = [r for r in jobs if (r["setting"], r["task"], r["count"]) == (name, task, count)]
            row.append(f"{100 * mine[0]['right']:.0f} ({mine[0]['steps']})" if mine else "")
        lines.append(f"| {count} records, {task} | {' | '.join(row)} |")
    return lines


def write(path: Path, found: list[dict[str, Any]]) -> None:
    """Puts the tables between a page's marks."""
    text = path.read_text("utf-8")
    for name, lines in (("settings", settings_table(found)), ("jobs", jobs_table(found))):
        first, last = f"<!-- recipes: {name} -->", f"<!-- end of {name} -->"
        before, rest = text.split(first, 1)
        after = rest.split(last, 1)[1]
        text = "".join((before, first, "\n", *(f"{line}\n" for line in lines), last, after))
    path.write_text(text, "utf-8")


def _row(name: str, mine: list[dict[str, Any]]) -> str:
    parts = [[100 * r["right"] for r in mine if r["task"] == task] for task in TASKS]
    each = [f"{np.mean(p):.0f} ({min(p):.0f}–{max(p):.0f})" if p else "" for p in parts]
    seeds = sorted({r["seed"] for r in mine})
    means = [np.mean([100 * r["right"] for r in mine if r["seed"] == s]) for s in seeds]
    spread = f" ± {np.std(means, ddof=1):.1f}" if len(means) > 1 else ""
    seconds, peak = np.mean([r["seconds"] for r in mine]), max(r["peak"] for r in mine)
    loss = np.mean([r["loss"] for r in mine])
    return (
        f"| {name} | {' | '.join(each)} | {np.mean(means):.1f}{spread} | {loss:.3f} "
        f"| {seconds:.1f} | {peak / 1e6:.0f} | {mine[0]['bytes'] / 1e6:.1f} |"
    )


def main() -> int:
    from pylora.demo.fetch import SMOLLM2, cache_folder

    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    default = cache_folder() / SMOLLM2.name
    p.add_argument("model", nargs="?", type=Path, default=default)
    p.add_argument("--only", help=f"groups: {', '.join([*GROUPS, 'jobs'])}")
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--precision", default="auto")
    p.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "recipes.jsonl")
    p.add_argument("--show", action="store_true", help="the tables, and nothing is computed")
    p.add_argument("--write", type=Path, help="also put the tables into this page")
    p.add_argument("--group", help=argparse.SUPPRESS)
    p.add_argument("--setting", help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.setting:
        work(a)
        return 0
    groups = a.only.split(",") if a.only else [*GROUPS, "jobs"]
    if unknown := [g for g in groups if g not in {*GROUPS, "jobs"}]:
        raise SystemExit(f"there is no group {unknown[0]}: {', '.join([*GROUPS, 'jobs'])}")
    a.out.parent.mkdir(parents=True, exist_ok=True)
    environment = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYLORA_NUM_THREADS": "1"}
    for group, setting, cells in [] if a.show else wanted(groups, a.seeds):
        keys = {_key({"group": group, "setting": setting.name, **cell}) for cell in cells}
        if keys <= finished(a.out):
            continue
        print(f"{group}: {setting.name}", flush=True)
        command = [
            sys.executable, __file__, str(a.model), "--out", str(a.out), "--seeds", str(a.seeds),
            "--precision", a.precision, "--group", group, "--setting", setting.name,
        ]  # fmt: skip
        if subprocess.run(command, env={**os.environ, **environment}).returncode:
            print(f"{group}: {setting.name} failed", file=sys.stderr)
    found = records(a.out)
    print("\n".join([*settings_table(found), "", *jobs_table(found)]))
    if a.write:
        write(a.write, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
