"""The parent's side of the contenders: processes that are asked in turn, A B A B ...

Each contender lives in a process of its own, so that its peak memory is its own; asking in turn
lets a change of the machine's speed meet all of them. One that fails is reported; the others go on.
A case has a time by which it should end: repetitions are cut to what is left of it, and of the
settings of one peer those that are clearly slower leave after the first round.
"""

from __future__ import annotations

import json
import os
import queue
import statistics
import subprocess
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from setting import TUNED

WORKER = Path(__file__).resolve().parent / "worker.py"
PAUSE = 0.02  # seconds between turns: a thread pool that spins after its work has gone to sleep
LEAST = 30.0  # seconds that a preparation gets even where the case's time is over
SPARE = 1 << 30  # bytes that must be free before a process is started
SLOWER = 1.3  # a setting this many times as slow as the best of its peer leaves
LABELS = {
    "pylora": "pylora",
    "peft": "PEFT",
    "llama": "llama.cpp",
    "ik": "ik_llama.cpp",
    "openvino": "OpenVINO",
}


@dataclass(frozen=True)
class Contender:
    """Who does a job, and how: `engine` is a key of LABELS, `variant` a setting of it."""

    engine: str
    precision: str
    variant: str = ""  # "", "tuned", "compiled", "fp32 adapters", ...
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        label = f"{LABELS[self.engine]} {self.precision}"
        return label + (f", {self.variant}" if self.variant else "")

    @property
    def environment(self) -> dict[str, str]:
        return TUNED if self.variant in ("tuned", "compiled") else {}

    def record(self, case: str, key: dict[str, Any]) -> dict[str, Any]:
        """What every record of it holds."""
        own = {"case": case, "contender": self.name, "engine": self.engine, "part": ""}
        return own | {"precision": self.precision, "variant": self.variant, "key": key}


class Failed(Exception):
    """A contender that did not answer, or answered with an error."""


class Worker:
    """A contender's process. Its errors go to the terminal as they are."""

    def __init__(self, python: str, contender: Contender, threads: int) -> None:
        self.contender, n = contender, str(threads)
        env = dict(os.environ, OMP_NUM_THREADS=n, MKL_NUM_THREADS=n, PYLORA_NUM_THREADS=n)
        self.process = subprocess.Popen(
            [python, "-W", "ignore", str(WORKER), contender.engine],
            env={**env, **contender.environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._answers.put(line)
        self._answers.put("")  # it has ended

    def tell(self, ask: dict[str, Any]) -> None:
        try:
            print(json.dumps(ask), file=self.process.stdin, flush=True)
        except OSError as error:
            raise Failed(f"the process has ended ({error})") from error

    def answer(self, timeout: float) -> dict[str, Any]:
        try:
            line = self._answers.get(timeout=timeout)
        except queue.Empty:
            self.close()
            raise Failed(f"no answer in {timeout:.0f} s") from None
        if not line:
            raise Failed(f"the process ended with status {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Failed(answer["error"])
        return answer

    def close(self) -> None:
        """Ends the process; kindly first."""
        try:
            if self.process.stdin:
                self.process.stdin.close()
            self.process.wait(timeout=5)
        except (OSError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()


@dataclass
class _Entry:
    """One contender while it is being measured."""

    contender: Contender
    info: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    error: str = ""
    dropped: str = ""  # the better setting of the same peer

    @property
    def runs(self) -> bool:
        return not self.error and not self.dropped

    def records(self, case: str, key: dict[str, Any]) -> Iterable[dict[str, Any]]:
        base, samples = self.contender.record(case, key), self.samples
        if self.error:
            yield base | {"error": self.error}
        for part in samples[0]["seconds"] if samples else ():
            more = {"dropped": self.dropped} if self.dropped else {}
            yield (
                base
                | more
                | {
                    "part": part,
                    "seconds": [s["seconds"][part] for s in samples],
                    "peak_rss_bytes": max(s["peak_rss_bytes"] for s in samples),
                    "life_peak_rss_bytes": max(s["life_peak_rss_bytes"] for s in samples),
                    "info": self.info,
                }
            )


class Team:
    """Contenders that take turns at one job after another; a context that ends them all.

    `until` is when it should be done, by time.monotonic(); None: whenever.
    """

    def __init__(
        self, pythons: dict[str, str], threads: int, say: Any = print, until: float | None = None
    ) -> None:
        self.pythons, self.threads, self.say, self.until = pythons, threads, say, until
        self.workers: dict[str, Worker] = {}
        self.versions: dict[str, str] = {}
        self.peaks: dict[str, int] = {}  # the most memory that a process of an engine has taken

    def __enter__(self) -> Team:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers.values():
            worker.close()
        self.workers.clear()

    def left(self, jobs: float = 1.0) -> float:
        """Seconds for this job, `jobs` being how many of its length are still to come with it."""
        if self.until is None:
            return float("inf")
        return (self.until - time.monotonic()) / jobs

    def measure(
        self,
        case: str,
        job: str,
        contenders: list[Contender],
        key: dict[str, Any],
        *,
        reps: int,
        at_least: float = 0.0,
        warm: int = 0,
        timeout: float = 300.0,
        jobs: float = 1.0,
        rivals: bool = False,
        one_by_one: bool = False,
    ) -> list[dict[str, Any]]:
        """One record for each contender and each part of the job; `key` are the job's arguments.

        rivals: the settings (variants) of one engine in one precision compete, and one that is
        clearly slower in the first round is asked no more. one_by_one: they prepare one after the
        other, so that their peaks of memory do not meet; else all at once, as nothing is timed yet.
        """
        began = time.monotonic()
        allowed = self.left(jobs)
        entries = {c.name: _Entry(c) for c in contenders if c.engine in self.pythons}
        ask = {"job": job, "at_least": at_least, "warm": warm}

        def first_answer(e: _Entry) -> None:
            rest = allowed - (time.monotonic() - began)
            answer = self._ask(e, None, min(timeout, max(rest, LEAST)))
            if answer is not None:
                e.info = answer["info"]
                self.versions |= answer["versions"]
                peak = max(self.peaks.get(e.contender.engine, 0), answer["life_peak_rss_bytes"])
                self.peaks[e.contender.engine] = peak

        if allowed <= 0:
            for e in entries.values():
                e.error = "no time was left for it in this run (--minutes)"
        for e in entries.values():
            if not e.error:
                self._start(e, ask, key)
                if one_by_one:
                    first_answer(e)
        for e in entries.values():
            if e.runs and not one_by_one:
                first_answer(e)
        for n in range(reps):
            round_began = time.monotonic()
            for e in entries.values():
                if e.runs:
                    time.sleep(PAUSE)
                    answer = self._ask(e, {"again": True}, timeout)
                    if answer is not None:
                        e.samples.append(answer)
            if n == 0 and rivals:
                self._drop(entries)
            now = time.monotonic()
            if now + (now - round_began) > began + allowed:
                break  # another round would take longer than this job may
        records = []
        for e in entries.values():
            if e.error:
                self.say(f"  {case} {key}: {e.contender.name} left out: {e.error}")
            records += list(e.records(case, key))
        return records

    def _start(self, e: _Entry, ask: dict[str, Any], key: dict[str, Any]) -> None:
        c = e.contender
        needs, free = max(self.peaks.get(c.engine, 0), SPARE), free_bytes()
        if free < needs and c.name not in self.workers:
            e.error = f"{free / 1e9:.1f} GB of memory are free, and it needs {needs / 1e9:.1f}"
            return
        try:
            if c.name not in self.workers:
                self.workers[c.name] = Worker(self.pythons[c.engine], c, self.threads)
            arguments = {"precision": c.precision, **key, **c.arguments}
            self.workers[c.name].tell(ask | {"arguments": arguments})
        except (Failed, OSError) as error:
            e.error = str(error)

    def _ask(self, e: _Entry, ask: Any, timeout: float) -> dict[str, Any] | None:
        """The answer to a preparation (ask None) or to a request for a sample; None: it failed."""
        if e.error:
            return None
        worker = self.workers[e.contender.name]
        try:
            if ask is not None:
                worker.tell(ask)
            return worker.answer(timeout)
        except Failed as error:
            e.error = str(error)
            if worker.process.poll() is not None:
                del self.workers[e.contender.name]
            return None

    def _drop(self, entries: dict[str, _Entry]) -> None:
        """Ends the settings that are clearly slower than another of the same peer and precision."""
        for e in entries.values():
            own = [
                other
                for other in entries.values()
                if other.samples
                and other.runs
                and (other.contender.engine, other.contender.precision)
                == (e.contender.engine, e.contender.precision)
            ]
            if not e.samples or not e.runs or len(own) < 2:
                continue
            best = min(own, key=_seconds)
            if best is not e and _seconds(e) > SLOWER * _seconds(best):
                e.dropped = best.contender.name
                self.say(f"  {e.contender.name} leaves: {best.contender.name} is faster here")
                worker = self.workers.pop(e.contender.name, None)
                if worker is not None:
                    worker.close()


def free_bytes() -> int:
    """Memory that a new process can have without others being moved out of it."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    return 1 << 62


def _seconds(e: _Entry) -> float:
    """Of a sample, all parts together."""
    return statistics.median(sum(s["seconds"].values()) for s in e.samples)
