"""On one GPU, in one process and in turn: pylora, PyTorch + PEFT (also compiled), the ceilings.

    python bench/gpu.py [--seconds 300] [--only linear step decode merge ceilings] [--out FILE]
    python bench/gpu.py --tiny          the same programs on small shapes, wherever they can run

Times are those of CUDA events on the stream that all contenders share; figures are medians of
samples taken A B A B ... . Cases run in the order of --only until the time is used up; what was
left out is in the file. Weights are random. Every sample goes to a file, by default
bench/results/gpu-<device>-<date>.json; a table is printed. Without torch and PEFT what is there is
measured and the rest is named.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import gpu_clock
import gpu_report
import gpu_shapes as shapes

RESULTS = Path(__file__).resolve().parent / "results"
Engines = dict[str, Any]


class Bench:
    """Runs cases of several contenders in turn and keeps every sample."""

    def __init__(self, clock: Any, seconds: float) -> None:
        self.clock, self.end = clock, time.monotonic() + seconds
        self.records: list[dict[str, Any]] = []
        self.left_out: list[str] = []

    def case(self, name: str, key: dict[str, Any], makers: dict[str, Callable[[], Any]]) -> None:
        """Makes each contender's job, then samples them in turn. One that fails (memory, say) is
        recorded with its reason and the others go on."""
        label = f"{name} {key}"
        if time.monotonic() > self.end:
            self.left_out.append(label)
            return
        jobs = {}
        for contender, make in makers.items():
            record = {"case": name, "key": key, "contender": contender, "seconds": []}
            self.records.append(record)
            try:
                self.clock.start_memory()
                job = make()
                job()  # what is compiled, captured or chosen at the first call
                job()
                jobs[contender] = job, record
            except Exception as error:
                record["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"
                if not gpu_clock.out_of_memory(error):
                    traceback.print_exc()
            record["peak_bytes"] = self.clock.peak_memory()
            if key.get("alone"):  # too large to lie beside another
                if contender in jobs:
                    self._sample({contender: jobs.pop(contender)})
                job = None
                self.clock.free()
        self._sample(jobs)
        jobs.clear()
        self.clock.free()

    def _sample(self, jobs: dict[str, Any]) -> None:
        """Rounds of one sample each, until they have taken a while."""
        began, rounds, inner = time.monotonic(), 0, {}
        for contender, (job, _) in jobs.items():
            once = self.clock.seconds(job)
            inner[contender] = max(1, min(50, int(2e-3 / max(once, 1e-6))))
        while jobs and (rounds < 5 or (time.monotonic() - began < 0.4 and rounds < 30)):
            for contender, (job, record) in jobs.items():
                n = inner[contender]
                record["seconds"].append(self.clock.seconds(lambda j=job, n=n: _times(j, n)) / n)
            rounds += 1


def _times(job: Callable[[], Any], n: int) -> None:
    for _ in range(n):
        job()


# ---- cases ---------------------------------------------------------------------------------------


def ceilings(bench: Bench, engines: Engines) -> None:
    for name, job in bench.clock.ceilings(shapes.CEILING).items():
        bench.case("ceiling", {"what": name}, {"device": lambda job=job: job})


def linear(bench: Bench, engines: Engines) -> None:
    """One LoRA linear: forward, forward and backward. Compiled: at one rank, to bound the time."""
    for key in shapes.linears():
        makers = {}
        for name, engine in engines.items():
            if "compiled" in name and (key["rank"] != shapes.COMPILED_RANK or not key["backward"]):
                continue
            makers[name] = lambda engine=engine, key=key: engine.linear(**key)
        bench.case("linear", key, makers)


def step(bench: Bench, engines: Engines) -> None:
    """A training step of Llama-3-8B's shape."""
    for key in shapes.steps():
        sizes = {k: v for k, v in key.items() if k != "alone"}
        makers = {
            name: lambda engine=engine, sizes=sizes: engine.step(**sizes)
            for name, engine in engines.items()
        }
        bench.case("step", key, makers)


def decode(bench: Bench, engines: Engines) -> None:
    """One token of each of some sequences, which use 1, 8 or 64 adapters."""
    for key in shapes.decodes():
        sizes = {k: v for k, v in key.items() if k != "alone"}
        makers = {
            name: lambda engine=engine, sizes=sizes: engine.decode(**sizes)
            for name, engine in engines.items()
            if "compiled" not in name
        }
        bench.case("decode", key, makers)


def merge(bench: Bench, engines: Engines) -> None:
    for key in shapes.merges():
        for part in ("merge", "unmerge"):
            makers = {
                name: lambda engine=engine, key=key, part=part: engine.merge(part, **key)
                for name, engine in engines.items()
                if "compiled" not in name
            }
            bench.case(part, key, makers)


CASES = {"ceilings": ceilings, "merge": merge, "linear": linear, "decode": decode, "step": step}


# ---- the run -------------------------------------------------------------------------------------


def contenders(backend: str, compiled: bool) -> Iterator[tuple[str, Any]]:
    """What can run here; a missing one is named on standard error."""
    try:
        import gpu_pylora

        yield "pylora", gpu_pylora.Engine(backend)
    except Exception as error:
        print(f"pylora cannot run here: {error}", file=sys.stderr)
    try:
        import gpu_peft
    except ImportError as error:
        print(f"PyTorch + PEFT are left out: {error}", file=sys.stderr)
        return
    yield "PEFT", gpu_peft.Engine(False)
    if compiled:
        yield "PEFT compiled", gpu_peft.Engine(True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=300.0, help="no case begins after this")
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--backend", default="cuda", help="pylora's: cuda, cupy")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--tiny", action="store_true", help="small shapes: shows that all runs")
    parser.add_argument("--out", type=Path, help="the file of results")
    args = parser.parse_args()
    if args.tiny:
        shapes.tiny()
    try:
        clock = gpu_clock.make(allow_host=args.tiny)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 2
    bench, began = Bench(clock, args.seconds), time.monotonic()
    with clock.stream():
        engines = dict(contenders(args.backend, not args.no_compile))
        if not engines:
            return 1
        for name in args.only:
            CASES[name](bench, engines)
    versions = {k: v for engine in engines.values() for k, v in engine.versions().items()}
    result = {
        "device": clock.device, "date": date.today().isoformat(), "versions": versions,
        "driver": clock.driver, "tiny": args.tiny, "seconds": round(time.monotonic() - began, 1),
        "left_out": bench.left_out, "records": bench.records,
    }  # fmt: skip
    name = re.sub(r"[^a-z0-9]+", "-", clock.device.lower()).strip("-")
    out = args.out or RESULTS / f"gpu-{name}-{result['date']}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(gpu_report.table(result))
    print(f"written: {out}")
    return 0 if any(r["seconds"] for r in bench.records if r["contender"] == "pylora") else 1


if __name__ == "__main__":
    sys.exit(main())
