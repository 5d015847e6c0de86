"""One contender: a process that prepares a job once and does it whenever it is asked to.

    python worker.py pylora|peft|llama|ik|openvino      (started by contenders.py, not by hand)

Reads a JSON object a line, answers with one. {"job": NAME, "arguments": {...}, "at_least": S}
prepares and warms up; {"again": true} does the job and answers with the seconds it took, for each
of its parts. A short job is repeated until a sample lasts `at_least` seconds. An error is an answer
like any other.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))


def peak_bytes() -> int:
    """The most memory this process has held since the last `reset_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return 0


def reset_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass  # the peak then is that of the process's life: larger, never smaller


class Runner:
    """A job, how often it is repeated for one sample, and the peaks of its memory."""

    def __init__(self, engine: Any, ask: dict[str, Any]) -> None:
        began = time.perf_counter()
        self.job = engine.JOBS[ask["job"]](**ask["arguments"])
        built = time.perf_counter() - began
        self.job()
        first = time.perf_counter() - began - built
        self.inner, wanted = 1, float(ask.get("at_least", 0.0))
        if wanted:
            began = time.perf_counter()
            self.job()
            once = time.perf_counter() - began
            self.inner = max(1, min(10_000, int(wanted / max(once, 1e-7))))
        for _ in range(int(ask.get("warm", 0))):
            self.job()
        self.life_peak = peak_bytes()
        reset_peak()
        self.info = {"built_s": built, "first_s": first, "inner": self.inner}
        self.info |= getattr(self.job, "info", {})

    def sample(self) -> dict[str, Any]:
        if self.inner > 1:
            self.job()  # the others have used the caches meanwhile
        began = time.perf_counter()
        for _ in range(self.inner):
            parts = self.job()
        seconds = (time.perf_counter() - began) / self.inner
        peak = peak_bytes()
        self.life_peak = max(self.life_peak, peak)
        return {
            "seconds": parts if isinstance(parts, dict) else {"": seconds},
            "peak_rss_bytes": peak,
            "life_peak_rss_bytes": self.life_peak,
        }


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not be taken for an answer
    engine, runner = None, None
    for line in sys.stdin:
        ask = json.loads(line)
        try:
            engine = engine or importlib.import_module(f"engine_{sys.argv[1]}")
            if "job" in ask:
                runner = None
                gc.collect()
                runner = Runner(engine, ask)
                answer = {"info": runner.info, "versions": engine.versions()}
                answer["life_peak_rss_bytes"] = runner.life_peak
            else:
                assert runner is not None, "no job was prepared"
                answer = runner.sample()
        except Exception as error:
            traceback.print_exc(limit=-2)
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
        print(json.dumps(answer), file=replies, flush=True)


if __name__ == "__main__":
    main()
