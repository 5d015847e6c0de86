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
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests" / "support")]
os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
RESULTS = HERE / "results"

from serve_clients import KINDS, QUESTION, get, measure, mixed, overhead  # noqa: E402


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
