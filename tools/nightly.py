"""The nightly profile, law by law: it can be cut off at any time and goes on where it was.

    python tools/nightly.py --out nightly.jsonl --minutes 90 \\
        pylora.conformance.correct.plain:Correct
    python tools/nightly.py --out nightly.jsonl --table

Each law that finished is a line of JSON in the file. A law is run again only if the file has no
line of it for this implementation, this code, this seed and this number of examples; one that
failed is a result too. Every law is tried with a few examples first, which says how long it will
take: the quick ones come first, and one that would not end before the deadline is not begun.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

import pylora
from pylora.conformance.laws import registry
from pylora.conformance.protocol import find, name_of
from pylora.conformance.running.runner import NOT_TESTED, PASSED, PROFILES, run_law

PROBE = 30  # examples that say how long a law takes


def code() -> str:
    """A digest of pylora's own files: results of other code are not taken for this one's."""
    digest = hashlib.sha256()
    folder = Path(pylora.__file__).parent
    for path in sorted([*folder.rglob("*.py"), *folder.rglob("_core*.so")]):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def records(out: Path) -> list[dict[str, Any]]:
    """What the file holds. A line that a killed process left unfinished is passed over."""
    found = []
    for line in out.read_text().splitlines() if out.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def append(out: Path, record: dict[str, Any]) -> None:
    with out.open("a+") as file:
        file.seek(max(file.tell() - 1, 0))
        torn = file.read() not in ("", "\n")
        file.write("\n" * torn + json.dumps(record) + "\n")


def run_one(path: str, made: Any, law: Any, examples: int, seed: int) -> dict[str, Any]:
    outcome = run_law(made, law, examples=examples, seed=seed)
    out = {"implementation": path, "name": name_of(made), "law": law.id, "asked": examples}
    fields = dataclasses.asdict(dataclasses.replace(outcome, law=law.id))  # type: ignore[arg-type]
    out |= fields | {"seed": seed, "code": code(), "pylora": pylora.__version__}
    out |= {"numpy": np.__version__, "python": platform.python_version()}
    return out | {"date": time.strftime("%Y-%m-%d %H:%M:%S")}


def work(
    paths: list[str], wanted: list[str], examples: int, seed: int, out: Path, end: float
) -> None:
    chosen, this = registry.find(wanted), code()
    key = lambda r: (r["implementation"], r["law"], r["asked"])
    known = {key(r): r for r in records(out) if r["code"] == this and r["seed"] == seed}
    made = {path: find(path) for path in paths}

    def once(path: str, law: Any, number: int) -> dict[str, Any]:
        if (path, law.id, number) not in known:
            record = run_one(path, made[path], law, number, seed)
            known[key(record)] = record
            append(out, record)
            print(
                f"{path} {law.id} {number}: {record['status']}, {record['seconds']:.1f} s",
                flush=True,
            )
        return known[path, law.id, number]

    todo = []
    for path in paths:
        for law in chosen:
            if (path, law.id, examples) in known:
                continue
            first = once(path, law, min(PROBE, examples))
            if first["status"] != NOT_TESTED:
                todo.append((first["seconds"] / max(first["examples"], 1) * examples, path, law))
    todo.sort(key=lambda t: t[0])
    print(f"{len(todo)} to run, about {sum(t[0] for t in todo) / 60:.0f} minutes", flush=True)
    for seconds, path, law in todo:
        if time.time() + seconds > end:
            print(f"{path} {law.id}: not begun, it takes about {seconds:.0f} s", flush=True)
            continue
        once(path, law, examples)


def table(found: Iterable[dict[str, Any]], examples: int) -> str:
    """Markdown: what each implementation passed at so many examples, and what it was not asked."""
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for r in found:  # the record with the most examples counts, the later of equals
        laws_of = rows.setdefault(r["implementation"], {})
        if r["law"] not in laws_of or r["asked"] >= laws_of[r["law"]]["asked"]:
            laws_of[r["law"]] = r
    lines = [
        "| implementation | passed | other than passed | not asked | not run | minutes |",
        "|" + "---|" * 6,
    ]
    for path, by_law in rows.items():
        done = [r for r in by_law.values() if r["asked"] >= examples]
        absent = [r["law"] for r in by_law.values() if r["status"] == NOT_TESTED]
        bad = [f"{r['law']} {r['status']}" for r in done if r["status"] not in (PASSED, NOT_TESTED)]
        known = {*absent, *(r["law"] for r in done)}
        missing = [i for i in registry.LAWS if i not in known]
        passed = sum(r["status"] == PASSED for r in done)
        minutes = sum(r["seconds"] for r in done) / 60
        cells = [
            f"`{path}`",
            passed,
            ", ".join(bad),
            len(absent),
            " ".join(missing),
            f"{minutes:.0f}",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> int:
    parse = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parse.add_argument("implementations", nargs="*", help="package.module:Class")
    parse.add_argument("--out", type=Path, required=True, help="the file of results, JSON lines")
    parse.add_argument("--minutes", type=float, default=1e6, help="begin no law that ends later")
    parse.add_argument("--examples", type=int, default=PROFILES["nightly"])
    parse.add_argument("--law", action="append", default=[], help="only this law; may be repeated")
    parse.add_argument("--skip", action="append", default=[], help="not this law; may be repeated")
    parse.add_argument("--seed", type=int, default=0)
    parse.add_argument("--table", action="store_true", help="print what the file says, run nothing")
    a = parse.parse_args()
    if not a.table:
        sys.path.insert(0, os.getcwd())
        wanted = [law.id for law in registry.find(a.law) if law.id not in a.skip]
        work(a.implementations, wanted, a.examples, a.seed, a.out, time.time() + 60 * a.minutes)
    found = records(a.out)
    print(table(found, a.examples))
    return int(any(r["status"] not in (PASSED, NOT_TESTED) for r in found))


if __name__ == "__main__":
    sys.exit(main())
