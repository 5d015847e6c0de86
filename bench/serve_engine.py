"""The serving engine in its own process: what it adds to a step of the model.

    python bench/serve_engine.py MODEL.gguf [--precision int4] [--tokens 64] [--rounds 3]

Alternating rounds, medians: one client against `generate`; 8 and 32 clients with distinct adapters
against `model.decoder.Batch` at that batch, greedy, drawn and with logprobs; and the time between
tokens of 4 clients while a prompt of 2,000 tokens arrives every 2 seconds. Prints JSON lines, each
with the machine's load. bench/serve.py measures the same through HTTP, beside other servers.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

import pylora
from pylora.generation.generate import generate
from pylora.generation.sampling import Sampling
from pylora.model.decoder import Batch
from pylora.serving.adapters import Registry
from pylora.serving.engine import Engine
from pylora.serving.request import Done, Event, Failed, Request, Token

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
PROMPT = 16
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "drawn": {"sampling": Sampling(0.8, top_p=0.95)},
    "logprobs": {"logprobs": 5},
}


class Client:
    """Hears one request, and when each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.ended = threading.Event()

    def __call__(self, event: Event) -> None:
        if isinstance(event, Token):
            self.times.append(time.perf_counter())
        elif isinstance(event, Done | Failed):
            self.ended.set()


def adapters(model: Any, n: int) -> Registry:
    lora = pylora.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, init_lora_weights=False)
    registry, plan = Registry(model), pylora.resolve(lora, model.config.modules())
    for i in range(n):
        registry.add(f"a{i}", pylora.Adapter.init(plan, lora, seed=i))
    return registry


def prompts(model: Any, n: int, length: int = PROMPT) -> list[list[int]]:
    some = np.random.default_rng(n).integers(5, model.config.vocab_size, (n, length))
    return [list(map(int, row)) for row in some]


def own(model: Any, registry: Registry, n: int, tokens: int) -> float:
    """Tokens/s of the model's steps alone, n sequences with an adapter each."""
    packed = [registry.resolve(((f"a{i}", 1.0),)).packed for i in range(n)]
    kv, slots = model.kv_cache(n, PROMPT + tokens), np.arange(n)
    Batch(model, kv, [PROMPT] * n, slots, packed).forward(sum(prompts(model, n), []))
    batch, lasted = Batch(model, kv, [1] * n, slots, packed), []
    for i in range(tokens - 1):
        if i:
            batch.advance()
        begun = time.perf_counter()
        batch.forward([1] * n)
        lasted.append(time.perf_counter() - begun)
    return n / statistics.median(lasted)


def served(engine: Engine, n: int, tokens: int, **settings: Any) -> float:
    """Tokens/s of n clients with an adapter each, while all of them decode."""
    clients = [Client() for _ in range(n)]
    for i, (client, ids) in enumerate(zip(clients, prompts(engine.model, n), strict=True)):
        request = Request(ids, tokens, ignore_eos=True, adapters=((f"a{i}", 1.0),), **settings)
        engine.submit(request, client)
    for client in clients:
        client.ended.wait()
    return n / float(np.median(np.diff(clients[0].times)))


def alone(model: Any, tokens: int) -> float:
    """Tokens/s of `generate` with an adapter, one prompt."""
    registry, pool, times = adapters(model, 1), pylora.AdapterPool(model), []
    lora = registry._names["a0"].source
    assert lora is not None
    pool.add("a0", lora)
    generate(
        model, prompts(model, 1), tokens, eos_ids=(), pool=pool, adapters=["a0"],
        on_token=lambda *_: times.append(time.perf_counter()),
    )  # fmt: skip
    return 1 / float(np.median(np.diff(times)))


def mixed(engine: Engine, seconds: float) -> dict[str, float]:
    """Milliseconds between tokens of 4 clients while long prompts arrive."""
    clients, stop = [Client() for _ in range(4)], time.perf_counter() + seconds
    tickets = []
    for i, (client, ids) in enumerate(zip(clients, prompts(engine.model, 4), strict=True)):
        request = Request(ids, 4000, ignore_eos=True, adapters=((f"a{i}", 1.0),))
        tickets.append(engine.submit(request, client))
    time.sleep(1)  # that it is known what a step lasts
    first, firsts = [len(client.times) for client in clients], []
    while time.perf_counter() < stop:
        long, begun = Client(), time.perf_counter()
        ids = np.random.default_rng(len(firsts)).integers(5, engine.model.config.vocab_size, 2000)
        tickets.append(engine.submit(Request([int(i) for i in ids], 1), long))
        firsts.append((long, begun))
        time.sleep(2)
    for ticket in tickets:
        ticket.cancel()
    for client in [*clients, *(long for long, _ in firsts)]:
        client.ended.wait()
    gaps = np.concatenate([np.diff(c.times[n:]) for c, n in zip(clients, first, strict=True)])
    taken = [client.times[0] - begun for client, begun in firsts if client.times]
    p50, p99 = np.percentile(gaps, [50, 99])
    return {
        "p50_ms": 1e3 * p50, "p99_ms": 1e3 * p99, "p99_of_p50": p99 / p50,
        "prompts_done": len(taken), "first_token_s": statistics.median(taken) if taken else 0.0,
    }  # fmt: skip


def rss() -> float:
    """MiB of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--precision", default="int4")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=12)
    args = parser.parse_args()
    model = pylora.load(args.model, precision=args.precision).llama
    registry = adapters(model, 32)
    with Engine(model, registry, prefix_cache=False) as engine:
        served(engine, 32, args.tokens)  # so that all memory has been touched
        for _ in range(args.rounds):
            row: dict[str, Any] = {"load": os.getloadavg()[0], "rss_mib": rss()}
            row["one client"] = served(engine, 1, args.tokens) / alone(model, args.tokens)
            for n in (8, 32):
                base = own(model, registry, n, args.tokens)
                row[f"own at {n}, tokens/s"] = base
                for name, settings in SETTINGS.items():
                    row[f"{name} at {n}"] = served(engine, n, args.tokens, **settings) / base
            if args.seconds:
                row["mixed"] = mixed(engine, args.seconds)
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
