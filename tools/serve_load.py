"""Many clients on one server for a while: is each answer the one that its request gets alone?

    python tools/serve_load.py [--seconds 600] [--clients 64] [--adapters 32] [--model MODEL]

Starts `pylora serve` in a process of its own, asks each of some requests alone, then lets the
clients ask them in any order, streaming or not, while other adapters are loaded, replaced and
unloaded. Every answer is compared: text and log-probabilities, bit for bit. Memory is looked at
when a quarter of the time has gone and at the end. Then the server is killed (SIGKILL) and started
again: the adapters' files must be what they were, and so must the answers. Without --model a tiny
one is made.

Writes what it found as JSON, and ends with 1 where an answer was wrong, a request failed, or memory
grew by more than --growth.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))

PROMPTS = ("truth exists:", "life is", "time", "nothing but", "the sea is " * 6)
_SHOWN = 5  # wrong answers that are reported in full


class Process:
    """`pylora serve` on its way."""

    def __init__(self, model: Path, adapters: Path, spare: Path, precision: str) -> None:
        args = [sys.executable, "-m", "pylora", "serve", str(model), "--adapters", str(adapters)]
        args += ["--load-from", str(spare), "--port", "0", "--name", "base", "--queue", "1024"]
        args += ["--precision", precision, "--log-format", "json", "--kv-memory", "256"]
        self.process = subprocess.Popen(args, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        said: list[str] = []
        for line in self.process.stderr:
            said.append(line)
            if '"listening"' in line:
                break
        found = re.search(r"http://([\d.]+):(\d+)", said[-1] if said else "")
        if found is None:
            raise SystemExit("the server did not start:\n" + "".join(said))
        self.host, self.port = found[1], int(found[2])
        self._reader = threading.Thread(target=self._drain, daemon=True)
        self._reader.start()

    def _drain(self) -> None:
        assert self.process.stderr is not None
        for _ in self.process.stderr:
            pass

    def rss(self) -> int:
        """Bytes of memory that it has, of its own."""
        with open(f"/proc/{self.process.pid}/status", encoding="ascii") as status:
            return next(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon"))

    def end(self, number: int = signal.SIGTERM) -> int:
        """Ends it by a signal; its exit code."""
        self.process.send_signal(number)
        return self.process.wait(60)


class Client:
    """A connection that stays open."""

    def __init__(self, server: Process) -> None:
        self._wire = http.client.HTTPConnection(server.host, server.port, timeout=300)

    def post(self, path: str, body: Any) -> tuple[int, bytes]:
        """(status, bytes)."""
        data = json.dumps(body).encode()
        self._wire.request("POST", path, data, {"Content-Type": "application/json"})
        answer = self._wire.getresponse()
        return answer.status, answer.read()

    def choices(self, body: dict[str, Any]) -> Any:
        """What was answered, without ids and times. A stream is put together again."""
        status, data = self.post("/v1/completions", body)
        if status != 200:
            raise RuntimeError(f"{status}: {data[:300]!r}")
        if not body.get("stream"):
            return [_plain(c) for c in json.loads(data)["choices"]]
        events = [json.loads(e[6:]) for e in data.decode().split("\n\n") if e.startswith("data: {")]
        whole: dict[str, Any] = {"text": "", "tokens": [], "token_logprobs": [], "reason": None}
        for event in events:
            if "error" in event:
                raise RuntimeError(str(event["error"]))
            for choice in event["choices"]:
                part = _plain(choice)
                for name in ("text", "tokens", "token_logprobs"):
                    whole[name] += part[name]
                whole["reason"] = part["reason"] or whole["reason"]
        return [whole]


def _plain(choice: dict[str, Any]) -> dict[str, Any]:
    logs = choice["logprobs"] or {"tokens": [], "token_logprobs": []}
    return {
        "text": choice["text"],
        "tokens": logs["tokens"],
        "token_logprobs": logs["token_logprobs"],
        "reason": choice["finish_reason"],
    }


def requests(adapters: list[str], n: int, longest: int) -> list[dict[str, Any]]:
    """n requests: every adapter, mixtures, greedy and drawn, short and long."""
    chance = random.Random(0)
    made = []
    for i in range(n):
        body: dict[str, Any] = {
            "prompt": chance.choice(PROMPTS),
            "max_tokens": chance.randint(1, longest),
            "seed": i,
            "temperature": chance.choice([0, 0.7, 1.3]),
            "logprobs": chance.choice([0, 2]),
            "top_p": chance.choice([1, 0.9]),
        }
        if i % 8 == 7:
            some = chance.sample(adapters, min(2, len(adapters)))
            body["adapters"] = [{"name": a, "weight": 0.5} for a in some]
        else:
            body["model"] = adapters[i % len(adapters)] if i % 9 else "base"
        made.append(body)
    return made


def digest(folder: Path) -> str:
    """Of all files below a folder."""
    made = hashlib.sha256()
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        made.update(str(file.relative_to(folder)).encode() + b"\0" + file.read_bytes())
    return made.hexdigest()


class Load:
    """What the clients do, and what they found."""

    def __init__(self, server: Process, asks: list[dict[str, Any]], alone: list[Any]) -> None:
        self.server, self.asks, self.alone = server, asks, alone
        self.counts: Counter[str] = Counter()
        self.wrong: list[Any] = []
        self.over = threading.Event()
        self._lock = threading.Lock()

    def client(self, number: int) -> None:
        """Asks until it is over."""
        chance, client = random.Random(number), Client(self.server)
        while not self.over.is_set():
            i = chance.randrange(len(self.asks))
            try:
                got = client.choices({**self.asks[i], "stream": chance.random() < 0.5})
            except (RuntimeError, OSError, http.client.HTTPException, ValueError) as error:
                with self._lock:
                    self.counts["failed"] += 1
                    self.wrong.append(["failed", self.asks[i], str(error)])
                client = Client(self.server)
                continue
            with self._lock:
                self.counts["answers"] += 1
                self.counts["tokens"] += len(got[0]["tokens"])
                if got != self.alone[i]:
                    self.counts["wrong"] += 1
                    self.wrong.append([self.asks[i], self.alone[i], got])

    def swaps(self, spare: list[Path]) -> None:
        """Loads, replaces and unloads adapters that are asked once each."""
        client, i = Client(self.server), 0
        while not self.over.wait(0.05):
            name, i = f"swap-{i % 3}", i + 1
            body = {
                "lora_name": name,
                "lora_path": str(spare[i % len(spare)]),
                "load_inplace": True,
            }
            status, data = client.post("/v1/load_lora_adapter", body)
            ask = {"model": name, "prompt": "truth", "max_tokens": 2}
            asked, _ = client.post("/v1/completions", ask)
            gone, _ = client.post("/v1/unload_lora_adapter", {"lora_name": name})
            self.counts["swaps"] += 1
            if (status, asked, gone) != (200, 200, 200):
                self.counts["failed"] += 1
                self.wrong.append(
                    ["swap", status, asked, gone, data[:300].decode("utf-8", "replace")]
                )


def run(args: argparse.Namespace, where: Path) -> dict[str, Any]:
    """All of it."""
    from served import write_adapter
    from tiny_model import write_tiny_model

    model = args.model or write_tiny_model(where / "model", max_position_embeddings=512)
    names = [f"a{i}" for i in range(args.adapters)]
    size = 0.5 if args.model is None else 0.01
    for folder, some in (("adapters", names), ("spare", ["s0", "s1"])):
        (where / folder).mkdir()
        for i, name in enumerate(some):
            write_adapter(model, where / folder / name, seed=i + len(folder), size=size)
    before = digest(where / "adapters")
    server = Process(model, where / "adapters", where / "spare", args.precision)
    try:
        asks = requests(names, args.requests, args.tokens)
        alone = [Client(server).choices(ask) for ask in asks]
        load = Load(server, asks, alone)
        jobs = [threading.Thread(target=load.client, args=(i,)) for i in range(args.clients)]
        spare = [where / "spare" / name for name in ("s0", "s1")]
        jobs.append(threading.Thread(target=load.swaps, args=(spare,)))
        began = time.monotonic()
        for job in jobs:
            job.start()
        time.sleep(args.seconds / 4)
        early = server.rss()
        time.sleep(max(0.0, began + args.seconds - time.monotonic()))
        late, seconds = server.rss(), time.monotonic() - began
        load.over.set()
        for job in jobs:
            job.join()
        server.end(signal.SIGKILL)
        server = Process(model, where / "adapters", where / "spare", args.precision)
        again = [Client(server).choices(ask) for ask in asks[:16]]
    finally:
        if server.process.poll() is None:
            code = server.end()
    return {
        "seconds": round(seconds, 1),
        "clients": args.clients,
        "adapters": args.adapters,
        **{name: load.counts[name] for name in ("answers", "tokens", "swaps", "wrong", "failed")},
        "tokens_per_second": round(load.counts["tokens"] / seconds, 1),
        "rss_early": early,
        "rss_late": late,
        "growth": round(late / early - 1, 4),
        "files_unchanged": digest(where / "adapters") == before,
        "same_after_kill": again == alone[:16],
        "exit_code": code,
        "first_wrong": load.wrong[:_SHOWN],
    }


def main(given: list[str] | None = None) -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--adapters", type=int, default=32)
    parser.add_argument("--requests", type=int, default=256, help="different ones")
    parser.add_argument("--tokens", type=int, default=24, help="of an answer, at most")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--growth", type=float, default=0.02, help="of memory, as a share")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(given)
    os.environ.setdefault("PYTHONPATH", str(ROOT))
    with tempfile.TemporaryDirectory(prefix="pylora-load-") as where:
        found = run(args, Path(where))
    text = json.dumps(found, indent=1)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n", encoding="utf-8")
    good = not found["wrong"] and not found["failed"] and found["files_unchanged"]
    good = good and found["same_after_kill"] and found["growth"] <= args.growth
    return int(not (good and found["answers"]))


if __name__ == "__main__":
    sys.exit(main())
