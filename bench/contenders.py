"""The parent's side of the contenders: processes that are asked in turn, A B A B ...

Each contender lives in a process of its own, so that its peak memory is its own; asking in turn
lets a change of the machine's speed meet all of them. One that fails is reported; the others go on.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from setting import TUNED

WORKER = Path(__file__).resolve().parent / "worker.py"
PAUSE = 0.02  # seconds between turns: a thread pool that spins after its work has gone to sleep


@dataclass(frozen=True)
class Contender:
    """Who does a job, and how: `engine` is "pylora", "peft" or "llama"."""

    engine: str
    precision: str
    variant: str = ""  # "", "tuned", "compiled", "fp32 adapters", ...
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        label = {"pylora": "pylora", "peft": "PEFT", "llama": "llama.cpp"}[self.engine]
        return f"{label} {self.precision}" + (f", {self.variant}" if self.variant else "")

    @property
    def environment(self) -> dict[str, str]:
        return TUNED if self.variant in ("tuned", "compiled") else {}


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


class Team:
    """Contenders that take turns at one job after another; a context that ends them all."""

    def __init__(self, pythons: dict[str, str], threads: int, say: Any = print) -> None:
        self.pythons, self.threads, self.say = pythons, threads, say
        self.workers: dict[str, Worker] = {}
        self.versions: dict[str, str] = {}

    def __enter__(self) -> Team:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers.values():
            worker.close()
        self.workers.clear()

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
    ) -> list[dict[str, Any]]:
        """One record for each contender and each part of the job; `key` are the job's arguments."""
        found: dict[str, dict[str, Any]] = {}
        errors: dict[str, str] = {}
        ask = {"job": job, "at_least": at_least, "warm": warm}
        for c in contenders:  # all prepare at the same time: nothing is timed yet
            if c.engine not in self.pythons:
                continue
            try:
                if c.name not in self.workers:
                    self.workers[c.name] = Worker(self.pythons[c.engine], c, self.threads)
                arguments = {"precision": c.precision, **key, **c.arguments}
                self.workers[c.name].tell(ask | {"arguments": arguments})
                found[c.name] = {"contender": c, "info": {}, "samples": []}
            except (Failed, OSError) as error:
                errors[c.name] = str(error)
        for name in list(found):
            self._try(name, found, errors, timeout, None)
        for _ in range(reps):
            for name in list(found):
                if name not in errors:
                    time.sleep(PAUSE)
                    self._try(name, found, errors, timeout, {"again": True})
        records = []
        for c in contenders:
            base = {"case": case, "contender": c.name, "engine": c.engine, "precision": c.precision}
            base |= {"variant": c.variant, "key": key}
            if c.name in errors:
                self.say(f"  {case} {key}: {c.name} failed: {errors[c.name]}")
                records.append(base | {"part": "", "error": errors[c.name]})
            samples = found.get(c.name, {}).get("samples", [])
            for part in samples[0]["seconds"] if samples else ():
                records.append(
                    base
                    | {
                        "part": part,
                        "seconds": [s["seconds"][part] for s in samples],
                        "peak_rss_bytes": max(s["peak_rss_bytes"] for s in samples),
                        "life_peak_rss_bytes": max(s["life_peak_rss_bytes"] for s in samples),
                        "info": found[c.name]["info"],
                    }
                )
        return records

    def _try(
        self,
        name: str,
        found: dict[str, dict[str, Any]],
        errors: dict[str, str],
        timeout: float,
        ask: dict[str, Any] | None,
    ) -> None:
        """Takes the answer to a preparation (ask None), or asks for a sample and takes it."""
        worker = self.workers[name]
        try:
            if ask is not None:
                worker.tell(ask)
            answer = worker.answer(timeout)
        except Failed as error:
            errors[name] = str(error)
            if worker.process.poll() is not None:
                del self.workers[name]
            return
        if ask is None:
            found[name]["info"] = answer["info"]
            self.versions |= answer["versions"]
        else:
            found[name]["samples"].append(answer)
