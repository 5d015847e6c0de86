"""Serving: tokens/s, time to the first token, time between tokens; pylora beside other servers.

    python bench/serve.py MODEL.gguf [--hf DIRECTORY] [--peer-python PYTHON] [--clients 1 8 32]

pylora's server, llama_cpp.server (llama-cpp-python[server]) on the same quantized file and, with
--hf, `transformers serve` are started one after the other, in alternating rounds, and asked the
same by OpenAI's streams over a socket: each of n clients asks one question after another, and its
answers are as long as they may be. Before the clock runs each model has answered once. pylora is
asked for one adapter, for distinct ones and for the base, drawn, with logprobs, with a schema; the
others for the base, since they cannot mix adapters. The peers get all cores, and llama_cpp.server
is told not to break an answer off when another request comes, which it does otherwise.

Beside it stand what the engine itself decodes at that batch, what `generate` does for one prompt,
the time of a request for one token less the engine's own (what HTTP costs), and the times between
tokens of four clients while a prompt of 2,000 tokens comes every two seconds.

--peer-python: an interpreter that has the peers. Writes bench/results/serve-<date>.json.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests" / "support")]
os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
RESULTS = HERE / "results"

QUESTION = "Tell me a long story about {} and the sea, with many turns."
LONG = "word " * 1990  # a prompt of about 2,000 tokens
EVERY = 2.0  # seconds between two of them
SCHEMA = {
    "type": "object", "additionalProperties": False, "required": ["title", "lines"],
    "properties": {"title": {"type": "string"}, "lines": {
        "type": "array", "minItems": 30, "items": {"type": "string", "minLength": 20}}},
}  # fmt: skip
# What is asked of pylora besides: name -> fields of the body.
KINDS: dict[str, dict[str, Any]] = {
    "drawn": {"temperature": 0.8, "top_p": 0.95},
    "logprobs": {"logprobs": True, "top_logprobs": 5},
    "schema": {"ignore_eos": False, "response_format": {
        "type": "json_schema", "json_schema": {"name": "story", "schema": SCHEMA}}},
    "whole": {"stream": False},
}  # fmt: skip
SUBJECTS = ("a fox", "a clock", "two brothers", "an island", "a baker", "rain", "a map", "winter")


def free_port() -> int:
    """A port that nobody has just now."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


class Server:
    """A server in a process of its own; `port` is where."""

    def __init__(self, args: list[str], port: int, log: Path, ready: str = "/v1/models") -> None:
        self.port = port
        with log.open("wb") as out:
            self.process = subprocess.Popen(args, stdout=out, stderr=out)
        end = time.monotonic() + 300
        while time.monotonic() < end and self.process.poll() is None:
            try:
                if get(port, ready) is not None:
                    return
            except OSError:
                pass
            time.sleep(0.2)
        self.stop()
        raise SystemExit(f"{args[0]} did not start:\n{log.read_text(errors='replace')[-2000:]}")

    def stop(self) -> None:
        """Ends it."""
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def get(port: int, path: str) -> Any:
    """A JSON answer; None where it is none."""
    wire = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    wire.request("GET", path)
    answer = wire.getresponse()
    data = answer.read()
    return json.loads(data) if answer.status == 200 else None


def ask(port: int, body: dict[str, Any]) -> list[float]:
    """The instants at which a stream was asked for, and at which each of its pieces came; of a
    whole answer, at which it came, for each of its tokens."""
    wire = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    at = [time.perf_counter()]
    data = json.dumps({"stream": True, **body}).encode()
    wire.request("POST", "/v1/chat/completions", data, {"Content-Type": "application/json"})
    answer = wire.getresponse()
    if answer.status != 200:
        raise RuntimeError(f"{answer.status}: {answer.read()[:500]!r}")
    if not body.get("stream", True):
        tokens = json.loads(answer.read())["usage"]["completion_tokens"]
        wire.close()
        return at + [time.perf_counter()] * tokens
    for line in answer:
        if line.startswith(b"data: {") and _text(line):
            at.append(time.perf_counter())
    wire.close()
    return at


def _text(line: bytes) -> bool:
    choices = json.loads(line[6:]).get("choices")
    return bool(choices and choices[0].get("delta", {}).get("content"))


def measure(
    port: int, models: list[str], clients: int, tokens: int, seconds: float, more: dict[str, Any]
) -> dict[str, Any]:
    """n clients, each with a model of its own (in turn), for so many seconds."""
    runs: list[list[float]] = []

    def body(model: str, subject: str, most: int) -> dict[str, Any]:
        question = [{"role": "user", "content": QUESTION.format(subject)}]
        asked = {"model": model, "messages": question, "max_tokens": most, "temperature": 0}
        return {**asked, **more}

    for model in dict.fromkeys(models):  # read, packed, and its words in the cache
        ask(port, body(model, "a beginning", 2))
    lock, over = threading.Lock(), time.perf_counter() + seconds

    def client(number: int) -> None:
        turn = 0
        while time.perf_counter() < over:
            subject = SUBJECTS[(number + turn) % len(SUBJECTS)]
            at = ask(port, body(models[number % len(models)], subject, tokens))
            turn += 1
            with lock:
                runs.append(at)

    threads = [threading.Thread(target=client, args=(i,)) for i in range(clients)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - began
    pieces = sum(len(at) - 1 for at in runs)
    between = sorted(b - a for at in runs for a, b in zip(at[1:], at[2:]))
    first = sorted(at[1] - at[0] for at in runs if len(at) > 1)
    return {
        "clients": clients,
        "answers": len(runs),
        "tokens_per_second": pieces / took,
        "first_ms": {p: 1e3 * _share(first, p) for p in (50, 99)},
        "between_ms": {p: 1e3 * _share(between, p) for p in (50, 99)},
    }


def _share(values: list[float], percent: int) -> float:
    """The value that so many percent of them do not exceed."""
    if not values:
        return float("nan")
    return values[min(len(values) - 1, len(values) * percent // 100)]


def engine_rate(model: Path, precision: str, batch: int, adapters: Path, steps: int = 48) -> float:
    """Tokens/s of the engine's own decoding with that many distinct adapters, without a server."""
    import numpy as np

    from pylora import Adapter, AdapterPool, Llama, open_checkpoint
    from pylora.model.decoder import Batch

    with open_checkpoint(model) as checkpoint:
        llama = Llama.from_checkpoint(checkpoint, precision=precision)
        modules = checkpoint.config.modules()
    pool = AdapterPool(llama)
    names = sorted(p.name for p in adapters.iterdir())
    names = [names[i % len(names)] for i in range(batch)]
    for name in set(names):
        pool.add(name, Adapter.load(adapters / name, modules))
    kv = llama.kv_cache(batch, 128 + steps)
    packs = [pool.packed(name) for name in sorted(names)]
    start = Batch(llama, kv, [60] * batch, np.arange(batch), packs)
    start.forward(np.full(60 * batch, 5))
    one = Batch(llama, kv, [1] * batch, np.arange(batch), packs)
    seconds = []
    for _ in range(steps):
        began = time.perf_counter()
        one.forward([5] * batch)
        seconds.append(time.perf_counter() - began)
        one.advance()
    return batch / statistics.median(seconds)


def generate_rate(model: Path, precision: str, tokens: int, rounds: int = 5) -> float:
    """Tokens/s of `generate` for one prompt, its prompt included."""
    import pylora
    from pylora.generation.generate import generate

    with pylora.load(model, precision=precision) as loaded:
        ids = loaded.tokenizer.encode(QUESTION.format("a fox"))
        seconds = []
        for _ in range(rounds):
            began = time.perf_counter()
            generate(loaded.llama, [ids], tokens, eos_ids=())
            seconds.append(time.perf_counter() - began)
    return tokens / statistics.median(seconds)


def mixed(port: int, seconds: float, clients: int = 4) -> dict[str, float]:
    """Milliseconds between the tokens of clients while long prompts come, and until those' first
    token, in seconds."""
    told: list[float] = []

    def long(turn: int) -> None:
        prompt = [{"role": "user", "content": f"{turn} {LONG}"}]
        at = ask(port, {"messages": prompt, "max_tokens": 1, "temperature": 0, "ignore_eos": True})
        told.append(at[1] - at[0] if len(at) > 1 else float("nan"))

    over = time.perf_counter() + seconds

    def arrive() -> None:
        threads = []
        while time.perf_counter() < over:
            threads.append(threading.Thread(target=long, args=(len(threads),)))
            threads[-1].start()
            time.sleep(EVERY)
        for thread in threads:
            thread.join()

    prompts = threading.Thread(target=arrive)
    prompts.start()
    row = measure(port, ["base"], clients, 256, seconds, {"ignore_eos": True})
    prompts.join()
    p50, p99 = row["between_ms"][50], row["between_ms"][99]
    first = statistics.median(told)
    return {"p50_ms": p50, "p99_ms": p99, "p99_of_p50": p99 / p50, "long_first_s": first}


def overhead(port: int, n: int = 200) -> dict[str, float]:
    """Milliseconds of a request for one token over a connection that stays open, less those that
    the server's engine says it needed: its log and metrics have them."""
    wire = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = json.dumps({"prompt": "The sea", "max_tokens": 1, "temperature": 0}).encode()
    took = []
    before = _sums(port)
    for _ in range(n):
        began = time.perf_counter()
        wire.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        wire.getresponse().read()
        took.append(time.perf_counter() - began)
    engine = (_sums(port) - before) / n
    return {"request_ms": 1e3 * statistics.median(took), "engine_ms": 1e3 * engine,
            "overhead_ms": 1e3 * (statistics.median(took) - engine)}  # fmt: skip


def _sums(port: int) -> float:
    """Seconds to first tokens, of all answers so far."""
    wire = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    wire.request("GET", "/metrics")
    text = wire.getresponse().read().decode()
    found = re.findall(r"^pylora_first_token_seconds_sum\S* (\S+)$", text, re.M)
    return sum(map(float, found))


def say(line: str) -> None:
    """A line, at once."""
    print(line, flush=True)


def head() -> dict[str, Any]:
    """What the figures depend on beside the program."""
    import pylora

    info = pylora.build_info()
    versions = {}
    for peer in ("llama-cpp-python", "transformers", "torch"):
        with suppress(metadata.PackageNotFoundError):
            versions[peer] = metadata.version(peer)
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True
    )
    return {
        **info,
        "commit": commit.stdout.strip(),
        "peers": versions,
        "cpus": os.cpu_count(),
        "load": os.getloadavg(),
    }


def main() -> None:
    """All of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--hf", type=Path, help="the same model for `transformers serve`")
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--precision", default="int4")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--only", nargs="+", default=["pylora", "llama", "transformers"])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pylora-bench-") as where:
        found = run(args, Path(where))
    RESULTS.mkdir(exist_ok=True)
    out = args.out or RESULTS / f"serve-{time.strftime('%Y-%m-%d')}.json"
    out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    say(f"written: {out}")


def run(args: argparse.Namespace, where: Path) -> dict[str, Any]:
    """The rounds, and their medians."""
    from served import write_adapter

    adapters = where / "adapters"
    adapters.mkdir()
    names = [f"a{i:02}" for i in range(max(args.clients))]
    for i, name in enumerate(names):
        write_adapter(args.model, adapters / name, seed=i, size=0.003, r=8)
    rows: list[dict[str, Any]] = []
    http_cost: list[dict[str, float]] = []
    between: list[dict[str, float]] = []

    def say_row(row: dict[str, Any]) -> None:
        rows.append(row)
        say(
            f"  {row['server']:14} {row['what']:9} {row['clients']:3} clients "
            f"{row['tokens_per_second']:8.1f} tokens/s   first {row['first_ms'][50]:7.1f} ms   "
            f"between p50 {row['between_ms'][50]:6.1f}, p99 {row['between_ms'][99]:6.1f} ms"
        )

    for turn in range(args.rounds):
        say(f"round {turn + 1}, load {os.getloadavg()[0]:.1f}")
        if "pylora" in args.only:
            port = free_port()
            command = [sys.executable, "-m", "pylora", "serve", str(args.model), "--name", "base"]
            command += ["--precision", args.precision, "--adapters", str(adapters)]
            command += ["--port", str(port), "--log-level", "warning"]
            server = Server(command, port, where / "pylora.log")
            forever = {"ignore_eos": True}
            for n in args.clients:
                kinds = {"base": ["base"], "one": names[:1], "distinct": names[:n]}
                for what, models in kinds.items():
                    row = measure(server.port, models, n, args.tokens, args.seconds, forever)
                    say_row({"server": "pylora", "what": what, "round": turn, **row})
                for what, fields in KINDS.items():
                    asked = {**forever, **fields}
                    row = measure(server.port, names[:n], n, args.tokens, args.seconds, asked)
                    say_row({"server": "pylora", "what": what, "round": turn, **row})
            between.append(mixed(server.port, 2 * args.seconds))
            say("  beside long prompts: " + json.dumps(between[-1]))
            http_cost.append(overhead(server.port))
            say(f"  a request costs {http_cost[-1]['overhead_ms']:.2f} ms beside the engine")
            server.stop()
        if "llama" in args.only:
            port = free_port()
            command = [args.peer_python, "-m", "llama_cpp.server", "--model", str(args.model)]
            command += ["--port", str(port), "--n_ctx", "2048", "--verbose", "False"]
            command += ["--interrupt_requests", "False", "--n_threads", str(os.cpu_count())]
            server = Server(command, port, where / "llama.log")
            for n in args.clients:
                row = measure(server.port, ["base"], n, args.tokens, args.seconds, {})
                say_row({"server": "llama_cpp", "what": "base", "round": turn, **row})
            server.stop()
        if "transformers" in args.only and args.hf is not None:
            port = free_port()
            command = [str(Path(args.peer_python).parent / "transformers"), "serve", str(args.hf)]
            command += ["--port", str(port), "--device", "cpu", "--continuous-batching"]
            server = Server(command, port, where / "transformers.log", "/health")
            for n in args.clients:
                row = measure(server.port, [str(args.hf)], n, args.tokens, args.seconds, {})
                say_row({"server": "transformers", "what": "base", "round": turn, **row})
            server.stop()
    rates = {n: engine_rate(args.model, args.precision, n, adapters) for n in args.clients}
    alone = generate_rate(args.model, args.precision, args.tokens)
    say(f"  generate, one prompt: {alone:.1f} tokens/s")
    for n, rate in rates.items():
        say(f"  the engine alone, {n} distinct adapters: {rate:.1f} tokens/s")
    return {
        "head": head(),
        "model": args.model.name,
        "precision": args.precision,
        "rows": rows,
        "overhead": http_cost,
        "engine_tokens_per_second": rates,
        "generate_tokens_per_second": alone,
        "beside_long_prompts": between,
        "medians": medians(rows),
    }


def medians(rows: list[dict[str, Any]]) -> dict[str, float]:
    """server, what, clients -> the median of tokens/s over the rounds."""
    found: dict[str, list[float]] = {}
    for row in rows:
        key = f"{row['server']}, {row['what']}, {row['clients']}"
        found.setdefault(key, []).append(row["tokens_per_second"])
    return {key: statistics.median(values) for key, values in found.items()}


if __name__ == "__main__":
    main()
