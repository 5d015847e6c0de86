"""What bench/serve.py's clients ask of a server, and what they measure of its answers."""

from __future__ import annotations

import http.client
import json
import re
import statistics
import threading
import time
from typing import Any

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
    failed: list[Exception] = []

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
            try:
                at = ask(port, body(models[number % len(models)], subject, tokens))
            except Exception as error:
                failed.append(error)
                return
            turn += 1
            with lock:
                runs.append(at)

    threads = [threading.Thread(target=client, args=(i,)) for i in range(clients)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise SystemExit(f"{len(failed)} clients failed, the first by {failed[0]}")
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
