"""Learning task after task: seven ways and LoRA, on one small transformer, five tasks, five seeds.

    python bench/continual.py [--seeds 5] [--steps 300] [--only METHOD ...] [--out FILE.json]
    python bench/continual.py --show FILE.json     # the tables and pictures of a run, again

Writes bench/results/continual-<date>.json, prints its tables and draws
docs/img/continual*.png. Accuracy is the share of right answer tokens on records never trained on,
with the right answers before it (chance: a tenth). R[i][j] is that of task j after task i.

    average     mean over j of R[last][j]
    forgetting  mean over j < last of  max over i of R[i][j]  -  R[last][j]
    forward     mean over j > 0 of     R[j - 1][j]  -  the base's accuracy on task j

Intervals are 95 %, by Student's t over the seeds. Everything but the seconds is the same on every
run of the same program. Also, on the same base: rank against quality, alpha as a volume knob, which
layers, and what a task's adapter costs in bytes.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

import continual_base
import continual_show
from continual_columns import Progressive
from continual_methods import (
    Ewc,
    Freeze,
    Full,
    Heads,
    LoraInARow,
    LoraPerTask,
    Method,
    Replay,
    Training,
    accuracy,
    low_rank,
)
from continual_tasks import SKILLS, TASKS, records

from pylora.adapters.adapter import Adapter
from pylora.adapters.loraconfig import LoraConfig
from pylora.adapters.plan import resolve
from pylora.model.config import ModuleSpec

ROOT = Path(__file__).resolve().parents[1]
METHODS: tuple[type[Method], ...] = (
    Full, Freeze, Ewc, Replay, Progressive, Heads, LoraInARow, LoraPerTask,
)  # fmt: skip
TRAIN, TEST = 1000, 200  # records of a task
RANKS = (1, 2, 4, 8, 16, 32, 64)
RATES = (1e-2, 3e-3, 1e-3)  # of the study of ranks; the others take LoraPerTask's, the first
VOLUMES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)
PLACES: dict[str, Any] = {
    "all": "all-linear",
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "mlp": ["gate_proj", "up_proj", "down_proj"],
    "last layer": r".*\.layers\.2\..*_proj",
}


class Material:
    """The base and the records of one seed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.model = continual_base.made(seed)
        self.train = [records(n, TRAIN, seed, "train") for n in TASKS]
        self.test = [records(n, TEST, seed, "test") for n in TASKS]
        self.skills = [records(n, TEST, seed, "test") for n in SKILLS]


def in_a_row(material: Material, kind: type[Method], steps: int) -> dict[str, Any]:
    """One method's run through all tasks: its accuracy matrix and what it cost."""
    method = kind(material.model, material.seed, steps)
    method.model.attach({})
    base = [accuracy(material.model, t) for t in material.test]
    matrix, seconds = [], 0.0
    for task, train in enumerate(material.train):
        at = time.process_time()
        method.learn(task, train)
        seconds += time.process_time() - at
        matrix.append([method.score(j, t) for j, t in enumerate(material.test)])
    return {
        "method": kind.label, "seed": material.seed, "base": base, "matrix": matrix,
        "trained": method.trained, "kept": method.kept, "seconds": seconds,
        "knows_the_task": kind.knows_the_task,
    }  # fmt: skip


def one_task(
    material: Material,
    task: int,
    steps: int,
    rank: int = 8,
    targets: Any = "all-linear",
    rate: float = LoraPerTask.rate,
) -> Adapter:
    """A LoRA trained on one task alone."""
    adapter = low_rank(material.model, rank, material.seed, targets)
    method = LoraPerTask(material.model, material.seed, steps)
    training = Training(material.model, adapter, ("A", "B"), rate)
    method.fit(training, task, material.train[task])
    return adapter


def by_rank(material: Material, steps: int) -> list[dict[str, Any]]:
    """Accuracy on each task of a LoRA of each rank, at each rate."""
    out = []
    for rank, rate in itertools.product(RANKS, RATES):
        got = []
        for task, test in enumerate(material.test):
            adapter = one_task(material, task, steps, rank, rate=rate)
            got.append(accuracy(material.model, test))
        nbytes = sum(a.A.nbytes + a.B.nbytes for a in adapter.values())
        out.append({"rank": rank, "rate": rate, "seed": material.seed, "accuracy": got,
                    "bytes": nbytes})  # fmt: skip
    return out


def by_volume(material: Material, steps: int) -> list[dict[str, Any]]:
    """Accuracy on the task and on the base's skills as the adapter's scale is turned."""
    out = []
    for task, test in enumerate(material.test):
        adapter = one_task(material, task, steps)
        for volume in VOLUMES:
            turned = {p: dataclasses.replace(a, scale=a.scale * volume) for p, a in adapter.items()}
            material.model.attach(turned)
            out.append({
                "volume": volume, "seed": material.seed, "task": task,
                "accuracy": accuracy(material.model, test),
                "skills": continual_base.skills(material.model, material.skills),
            })  # fmt: skip
    return out


def by_place(material: Material, steps: int) -> list[dict[str, Any]]:
    """Accuracy on each task of a LoRA on some of the modules."""
    out = []
    for place, targets in PLACES.items():
        got = []
        for task, test in enumerate(material.test):
            adapter = one_task(material, task, steps, targets=targets)
            got.append(accuracy(material.model, test))
        out.append({
            "place": place, "seed": material.seed, "accuracy": got,
            "trained": sum(a.A.size + a.B.size for a in adapter.values()),
        })  # fmt: skip
    return out


def bytes_per_task() -> list[dict[str, int]]:
    """The adapter of one 1000 x 1000 weight in float32, by rank: its arrays' own bytes."""
    out = []
    for rank in (4, 8, 10, 16):
        config = LoraConfig(r=rank, target_modules=["proj"])
        plan = resolve(config, {"proj": ModuleSpec("linear", 1000, 1000)})
        adapter = Adapter.init(plan, config, seed=0)
        out.append({"rank": rank, "bytes": sum(a.A.nbytes + a.B.nbytes for a in adapter.values())})
    return out


STUDIES: dict[str, Callable[[Material, int], list[dict[str, Any]]]] = {
    "rank": by_rank,
    "volume": by_volume,
    "place": by_place,
}


def main() -> int:
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("--seeds", type=int, default=5)
    p.add_argument("--steps", type=int, default=300, help="updates of a task")
    p.add_argument("--only", nargs="*", default=None, help="names of methods and studies")
    p.add_argument("--out", type=Path, default=None)
    p.add_argument("--show", type=Path, default=None, help="a file of results; nothing is run")
    p.add_argument("--img", type=Path, default=ROOT / "docs" / "img")
    a = p.parse_args()
    if a.show:
        continual_show.show(json.loads(a.show.read_text("utf-8")), a.img)
        return 0
    known = [m.label for m in METHODS] + list(STUDIES)
    wrong = [n for n in a.only or () if n not in known]
    if wrong:
        p.error(f"{wrong[0]!r} is none of: {', '.join(known)}")
    today = date.today().isoformat()
    out = a.out or ROOT / "bench" / "results" / f"continual-{today}.json"
    document: dict[str, Any] = {"date": today, "steps": a.steps, "runs": [], "base": []}
    document["bytes"] = bytes_per_task()
    for seed in range(a.seeds):
        began = time.perf_counter()
        material = Material(seed)
        material.model.attach({})
        able = continual_base.skills(material.model, material.skills)
        document["base"].append({"seed": seed, "skills": able})
        print(f"seed {seed}: base {able:.3f} on its skills", flush=True)
        for kind in METHODS:
            if a.only is None or kind.label in a.only:
                run = in_a_row(material, kind, a.steps)
                document["runs"].append(run)
                last = np.mean(run["matrix"][-1])
                print(f"  {kind.label}: {last:.3f} in {run['seconds']:.0f} s", flush=True)
        for name, study in STUDIES.items():
            if a.only is None or name in a.only:
                document.setdefault(name, []).extend(study(material, a.steps))
                print(f"  {name}: done", flush=True)
        print(f"  {time.perf_counter() - began:.0f} s", flush=True)
        out.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    continual_show.show(document, a.img)
    print(f"written: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
