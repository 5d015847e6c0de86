"""The kit's kill rate: perturbs correct implementations by rule and counts what the laws find.

    python tools/mutation.py --out mutation.jsonl --kinds size,dtype,source --sample 200 --jobs 2
    python tools/mutation.py --out mutation.jsonl --table

Each mutant is a line of JSON in the file, and is not run again while it is there. `--minutes` ends
it in time; `--table` prints the rate by kind of what is in the file, and who lives. The sample is
drawn from each kind by `--seed`. Exits with 1 if one is alive.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from pylora.conformance.perturb import judge as judging
from pylora.conformance.perturb import others, python, triggers
from pylora.conformance.perturb.python import Mutant

KINDS = ("source", "native", "others", *triggers.KINDS)


def every(kind: str) -> list[Mutant]:
    """All mutants of a kind."""
    if kind == "source":
        return python.mutants()
    if kind == "others":
        return list(others.mutants())
    if kind == "native":
        from pylora.conformance.perturb import native

        return native.mutants()
    return triggers.mutants(kind)


_REACHES: list[Any] = []


def _judge(task: tuple[str, str]) -> dict[str, Any]:
    kind, id = task
    if not _REACHES:
        _REACHES.extend(judging.reaches())
    mutant = next(m for m in every(kind) if m.id == id)
    one = judging.judge_apart if kind == "native" else judging.judge
    return asdict(one(mutant, _REACHES))


def run(tasks: list[tuple[str, str]], jobs: int, deadline: float) -> Iterator[dict[str, Any]]:
    """The verdicts as they come, until the deadline."""
    if jobs == 1:
        for task in tasks:
            if time.monotonic() > deadline:
                return
            yield _judge(task)
        return
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        for verdict in pool.imap_unordered(_judge, tasks):
            yield verdict
            if time.monotonic() > deadline:
                pool.terminate()
                return


def read(path: Path) -> list[dict[str, Any]]:
    """What is in the file; a line that was cut off is left out."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def table(verdicts: list[dict[str, Any]]) -> str:
    """The rate by kind, in Markdown, and below it who is alive."""
    lines = [
        "| kind | mutants | equivalent | within the bounds | killed | alive | rate |",
        "|---|---|---|---|---|---|---|",
    ]
    total = dict.fromkeys((judging.EQUIVALENT, judging.WITHIN, judging.KILLED, judging.ALIVE), 0)
    kinds = sorted({v["kind"] for v in verdicts})
    for kind in [*kinds, ""]:
        mine = [v for v in verdicts if v["kind"] == kind or not kind]
        count = {status: sum(v["status"] == status for v in mine) for status in total}
        wrong = count[judging.KILLED] + count[judging.ALIVE]
        rate = f"{100 * count[judging.KILLED] / wrong:.1f} %" if wrong else ""
        cells = [kind or "**all**", len(mine), *count.values(), rate]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    alive = [f"alive: {v['text']}" for v in verdicts if v["status"] == judging.ALIVE]
    return "\n".join([*lines, "", *alive])


def main() -> int:
    """Runs what is asked for and not there yet, then prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("mutation.jsonl"))
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--sample", type=int, default=50, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=600)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    kinds = args.kinds.split(",")
    for kind in kinds:
        if kind not in KINDS:
            parser.error(f"there is no kind {kind!r}; there are {', '.join(KINDS)}")
    if not args.table:
        done = {v["id"] for v in read(args.out)}
        tasks = [
            (kind, m.id)
            for kind in kinds
            for m in triggers.sample(every(kind), args.sample, args.seed)
            if m.id not in done
        ]
        random.Random(args.seed).shuffle(tasks)  # what is cut off is then of no kind
        deadline = time.monotonic() + 60 * args.minutes
        with args.out.open("a", encoding="utf-8") as out:
            for verdict in run(tasks, args.jobs, deadline):
                out.write(json.dumps(verdict) + "\n")
                out.flush()
                how = f"{verdict['status']} {verdict['law']}".strip()
                print(f"{how:24} {verdict['seconds']:6.1f} s  {verdict['text']}", flush=True)
    found = read(args.out)
    print(table(found))
    return 1 if any(v["status"] == judging.ALIVE for v in found) else 0


if __name__ == "__main__":
    sys.exit(main())
