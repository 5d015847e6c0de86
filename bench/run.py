"""Every figure of pylora's speed in one run: pylora, its peers and what the machine can do.

    python bench/run.py [--peer-python PYTHON] [--llama-python PYTHON] [--ik-python PYTHON]
                        [--openvino-python PYTHON] [--quick] [--only CASE ...] [--minutes N]

Contenders are processes that are asked in turn (A B A B ...), so that a change of the machine's
speed meets all of them. PyTorch + PEFT runs as it comes, with a malloc that keeps its pages, and
compiled (--no-compile and --quick leave that one out and say so); llama.cpp and ik_llama.cpp have
settings of their own. Of a peer's settings those that are clearly slower in the first round are
asked no more; the report names the best. A run ends within --minutes (24; --quick: 6): each case
has a share of what is left, repetitions are cut to it, and what would take minutes a time (bfloat16
in PyTorch on a processor without instructions for it) is found by a short product first, left out
and named. The peers need torch, peft and transformers in the interpreter of --peer-python,
llama-cpp-python in that of --llama-python (built for this machine: CMAKE_ARGS=-DGGML_NATIVE=ON),
ik-llama-cpp-python and openvino-genai in theirs; a contender that is not there is reported, and the
others go on. --model takes another geometry than SmolLM2's (random weights) for all cases that are
not about a file.

Writes bench/results/speed-<machine>-<date>.json after every case and prints each figure beside its
bar. bench/report.py prints that again from the file, bench/figures.py draws it. End other programs
first: a figure of a busy machine says nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import cases
import cases_files
import ceilings
import gguf_files
from cases import Options
from contenders import Team
from setting import GEOMETRIES

from pylora.numbers.precision import PRECISIONS

DEFAULT = "smollm2-135m"
# In this order, and how much of the time each may have beside the others.
CASES: dict[str, tuple[Callable[[Options], Iterator[dict[str, Any]]], float]] = {
    "step": (cases.step, 340),
    "step-memory": (cases.step_memory, 70),
    "generate": (cases.generate, 90),
    "gguf": (cases_files.gguf, 380),
    "adapter-cost": (cases_files.adapter_cost, 110),
    "geometries": (cases.geometries, 170),
    "resident": (cases.resident, 100),
    "linear": (cases.linear, 70),
    "merge": (cases.merge, 20),
    "by-length": (cases.by_length, 40),
    "by-rank": (cases.by_rank, 30),
    "by-adapters": (cases.by_adapters, 20),
}
QUICK = ("step", "generate", "gguf", "adapter-cost", "geometries", "linear", "merge")
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
PROBED = ("step", "step-memory", "generate", "geometries", "resident", "by-length", "by-rank",
          "adapter-cost")  # fmt: skip
CEILINGS = 15.0  # seconds for the ceilings after the last case


def main() -> int:
    a = arguments()
    if a.tiny:
        os.environ["PYLORA_BENCH_TINY"] = "1"  # for the contenders
    os.environ["PYLORA_BENCH_MODEL"] = a.model
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))
    began = time.monotonic()
    document = head(a)
    what = "speed" if a.model == DEFAULT else f"model-speed-{a.model}"
    out = a.out or RESULTS / f"{what}-{document['machine']['name']}-{document['date']}.json"
    document["model"] = a.model
    pythons = {"pylora": sys.executable, "peft": a.peer_python, "llama": a.llama_python}
    pythons |= {"ik": a.ik_python, "openvino": a.openvino_python}
    pythons = {e: python for e, python in pythons.items() if python and e not in a.without}

    say(f"{document['machine']['processor']}, {a.threads} threads, {document['date']} -> {out}")
    if a.no_compile:
        say("without torch.compile (--no-compile, --quick)")
    document["ceilings"] = measured_ceilings(a)

    teams: list[Team] = []
    clock = {"until": None}  # when the case at hand should end

    def team() -> Team:
        teams.append(Team(pythons, a.threads, say, clock["until"]))
        return teams[-1]

    options = Options(
        quick=a.quick,
        compile=not a.no_compile,
        tiny=a.tiny,
        amx="AMX bf16" in document["ceilings"],
        precisions=tuple(a.precisions),
        engines=tuple(pythons),
        file=lambda model, kind: gguf_files.get(model, kind, pythons.get("llama"), say),
        team=team,
    )
    if "peft" in pythons and any(n in PROBED for n in chosen(a)):
        document["records"] += cases.probe(options)
        bf16, fp32 = (options.rates.get(p, {}).get("rows", 1.0) for p in ("bf16", "fp32"))
        options = replace(options, bf16=bf16 > cases.SLOW * fp32)
    ends = began + 60 * a.minutes - (0 if a.quick or a.tiny else CEILINGS)
    for name in chosen(a):
        at = time.monotonic()
        error = None
        rest = chosen(a)[chosen(a).index(name) :]
        clock["until"] = at + (ends - at) * CASES[name][1] / sum(CASES[n][1] for n in rest)
        try:
            for record in CASES[name][0](options):
                document["records"].append(record)
        except Exception as problem:  # one case must not take the others with it
            error = f"{type(problem).__name__}: {problem}"
            say(f"  {name} failed: {error}")
        for t in teams:
            document["versions"] |= t.versions
        seconds = time.monotonic() - at
        document["cases"][name] = {"seconds": round(seconds, 1), "error": error}
        document["seconds"] = round(time.monotonic() - began, 1)
        save(out, document)
        say(f"{name}: {seconds:.0f} s")
    if not a.quick and not a.tiny:
        document["ceilings_after"] = measured_ceilings(a)
    document["seconds"] = round(time.monotonic() - began, 1)
    save(out, document)
    say(f"{document['seconds']:.0f} s in all; {out}\n")
    return show(out, a.draw)


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--peer-python", default=sys.executable, help="has torch, peft, transformers")
    p.add_argument("--llama-python", help="has llama-cpp-python (default: --peer-python)")
    p.add_argument("--ik-python", help="has ik-llama-cpp-python; none: without it")
    p.add_argument("--openvino-python", help="has openvino-genai; none: without it")
    p.add_argument("--quick", action="store_true", help="fewer cases and repetitions")
    p.add_argument("--only", nargs="+", choices=CASES, metavar="CASE", help=", ".join(CASES))
    p.add_argument("--model", default=DEFAULT, choices=GEOMETRIES, help="the geometry")
    p.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    p.add_argument("--without", nargs="+", default=[], choices=["peft", "llama"])
    p.add_argument("--minutes", type=float, help="the run ends within (default: 24; --quick 6)")
    p.add_argument("--precisions", nargs="+", default=[p for p in PRECISIONS if p != "fp16"])
    p.add_argument("--tiny", action="store_true", help="two small layers: shows that it runs")
    p.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    p.add_argument("--out", type=Path, help="the JSON file")
    p.add_argument(
        "--draw", type=Path, help="folder for the pictures; none without (see figures.py)"
    )
    a = p.parse_args()
    a.no_compile = a.no_compile or a.quick  # compiling takes longer than all else of --quick
    a.llama_python = a.llama_python or a.peer_python
    a.minutes = a.minutes or (6.0 if a.quick else 24.0)
    return a


def chosen(a: argparse.Namespace) -> list[str]:
    if a.model != DEFAULT:  # the other cases are about SmolLM2's file, or of no model
        return a.only or ["step", "generate"]
    return a.only or list(QUICK if a.quick else CASES)


def head(a: argparse.Namespace) -> dict[str, Any]:
    """What the figures depend on beside the program."""
    import pylora

    info = pylora.build_info()
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=RESULTS,
        capture_output=True,
        text=True,
        check=False,
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "machine": {
            "name": re.sub(r"[^a-z0-9]+", "-", info["processor"].lower()).strip("-"),
            "processor": info["processor"],
            "cores": len(os.sched_getaffinity(0)),
            "threads": a.threads,
            "memory_bytes": memory,
            "isa": info.get("isa"),
            "kernel": platform.release(),
        },
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python", "bench/run.py", *sys.argv[1:]]),
        "commit": commit.stdout.strip(),
        "quick": a.quick,
        "tiny": a.tiny,
        "compiled": not a.no_compile,
        "load_before": os.getloadavg()[0],
        "versions": {"python": platform.python_version()},
        "ceilings": {},
        "cases": {},
        "records": [],
    }


def measured_ceilings(a: argparse.Namespace) -> dict[str, Any]:
    try:
        reps, megabytes = (2, 16) if a.tiny else (5 if a.quick else 9, 512)
        found = ceilings.measure(a.threads, reps, megabytes)
    except (OSError, subprocess.CalledProcessError) as error:
        say(f"  no ceilings: {error}")
        return {}
    say("; ".join(f"{name} {row['best']:.0f} {row['unit']}" for name, row in found.items()))
    return found


def save(out: Path, document: dict[str, Any]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_suffix(".part")
    beside.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    beside.replace(out)


def show(out: Path, draw: Path | None) -> int:
    """The table, and the pictures where they are wanted; by their own programs."""
    here = Path(__file__).resolve().parent
    status = subprocess.run([sys.executable, str(here / "report.py"), str(out)]).returncode
    if draw is not None:
        command = [sys.executable, str(here / "figures.py"), str(out), "--out", str(draw)]
        status = status or subprocess.run(command).returncode
    return status


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
