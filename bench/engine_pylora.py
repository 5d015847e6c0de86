"""What pylora does for each job: the work of engine_peft.py, through the public interface."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from setting import ALL_LINEAR, ALPHA, LEARNING_RATE, RANK, TARGETS, geometry

import pylora
from pylora import backends
from pylora.generation import generate as texts
from pylora.model.weights import random_weights
from pylora.training.config import TrainConfig
from pylora.training.optimizer import Optimizer, gradients, trainable
from pylora.types import LoRA, Seqs


def versions() -> dict[str, str]:
    return {"pylora": pylora.__version__, "numpy": np.__version__}


class Job:
    """A callable with facts about itself."""

    def __init__(self, run: Callable[[], Any], **info: Any) -> None:
        self.run, self.info = run, info

    def __call__(self) -> Any:
        return self.run()


def config(model: str | None = None) -> Any:
    return pylora.LlamaConfig.from_hf(geometry(model))


def base(precision: str, model: str | None = None) -> Any:
    c = config(model)
    return pylora.Llama(c, random_weights(c, 0), backend="c", **in_precision(precision))


def in_precision(precision: str) -> dict[str, str]:
    return {} if precision == "fp32" else {"precision": precision}


def computes_in(model: Any) -> str:
    """The precision in use: fp32x3 is strict fp32 where there is no AMX."""
    return str(getattr(model, "computes", "fp32"))


def new_adapter(
    model: Any, rank: int = RANK, targets: tuple[str, ...] = TARGETS, seed: int = 0
) -> Any:
    """An adapter for a model, on q, k, v and o unless said, with B not zero."""
    lora = pylora.LoraConfig(
        r=rank, lora_alpha=ALPHA, target_modules=list(targets), init_lora_weights=False
    )
    return pylora.Adapter.init(pylora.resolve(lora, model.config.modules()), lora, seed=seed)


def step(
    precision: str,
    batch: int,
    length: int,
    rank: int = RANK,
    recompute: bool = False,
    model: str | None = None,
) -> Job:
    """A training step: loss, gradients, AdamW."""
    llama = base(precision, model)
    adapter = new_adapter(llama, rank)
    llama.attach(adapter)
    parameters = trainable(adapter)
    optimizer = Optimizer(llama.ops, parameters, TrainConfig(steps=1, learning_rate=LEARNING_RATE))
    tokens = np.random.default_rng(0).integers(0, llama.config.vocab_size, (batch, length))
    labels = np.full_like(tokens, pylora.IGNORE)
    labels[:, :-1] = tokens[:, 1:]
    ids, labels, seqs = tokens.reshape(-1), labels.reshape(-1), Seqs.of([length] * batch)
    at = {"step": 0}

    def run() -> None:
        at["step"] += 1
        _, grads = llama.loss(ids, labels, seqs, recompute=recompute)
        optimizer.update(gradients(grads, parameters), 0.0, at["step"], LEARNING_RATE)

    return Job(run, computes_in=computes_in(llama))


def generate(precision: str, prompt: int, new: int, model: str | None = None) -> Job:
    """Seconds to take in the prompt, and for `new` greedy tokens after the first."""
    llama = base(precision, model)
    llama.attach(new_adapter(llama))
    ids = prompts(llama, 1, prompt)
    return Job(lambda: decode(llama, ids, new), computes_in=computes_in(llama))


def prompts(model: Any, rows: int, length: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, model.config.vocab_size, length).tolist() for _ in range(rows)]


def decode(model: Any, ids: list[list[int]], new: int, **pool: Any) -> dict[str, float]:
    """The public `generate`, with all that it does; every row's first token ends the prefill."""
    times: list[float] = []
    began = time.perf_counter()
    texts.generate(
        model,
        ids,
        new + 1,
        eos_ids=(),
        batch_size=len(ids),
        on_token=lambda row, token: times.append(time.perf_counter()),
        **pool,
    )
    first = times[len(ids) - 1]
    return {"prefill": first - began, "decode": times[-1] - first}


def from_file(precision: str, path: str) -> Any:
    from pylora.formats import open_checkpoint

    with open_checkpoint(path) as checkpoint:
        return pylora.Llama.from_checkpoint(checkpoint, backend="c", **in_precision(precision))


def gguf(precision: str, path: str, prompt: int, new: int, model: str | None = None) -> Job:
    """The same from a GGUF file, whose model is that one; no adapter."""
    llama = from_file(precision, path)
    ids = prompts(llama, 1, prompt)
    return Job(lambda: decode(llama, ids, new), computes_in=computes_in(llama))


def adapter_cost(
    precision: str,
    ranks: list[int],
    prompt: int,
    new: int,
    model: str | None = None,
    path: str | None = None,
) -> Job:
    """The same without an adapter (rank 0) and with one of each rank on all linear modules, in
    turn; of the file at `path`, or of random weights."""
    llama = base(precision, model) if path is None else from_file(precision, path)
    adapters = {rank: new_adapter(llama, rank, ALL_LINEAR) for rank in ranks}
    ids = prompts(llama, 1, prompt)

    def run() -> dict[str, float]:
        parts = {}
        for rank in (0, *ranks):
            llama.attach(adapters.get(rank, {}))
            for part, seconds in decode(llama, ids, new).items():
                parts[f"{rank} {part}"] = seconds
        return parts

    return Job(run, computes_in=computes_in(llama))


def resident(precision: str, adapters: int, prompt: int, new: int) -> Job:
    """`adapters` resident: rows of distinct adapters and of one, and switching."""
    from pylora.adapters.pool import AdapterPool

    model = base(precision)
    one = new_adapter(model)
    pool, names = AdapterPool(model), [f"a{i}" for i in range(adapters)]
    began = time.perf_counter()
    for name in names:
        pool.add(name, one)  # a copy
        for lora in one.values():
            np.multiply(lora.B, np.float32(0.999), out=lora.B)
    seconds = time.perf_counter() - began
    ids = prompts(model, 32, prompt)

    def run() -> dict[str, float]:
        parts = {}
        for rows in (8, 32):
            for what in ("distinct", "one"):
                chosen = [names[i % adapters if what == "distinct" else 0] for i in range(rows)]
                took = decode(model, ids[:rows], new, pool=pool, adapters=chosen)
                parts[f"{rows} {what}"] = took["decode"]
        began = time.perf_counter()
        for i in range(1000):  # choose it, and look it up as the next batch does
            pool.use(names[i * 7 % adapters])
            pool.packed(pool.active)
        parts["switch"] = (time.perf_counter() - began) / 1000
        return parts

    return Job(run, adding_s=seconds, adapters_bytes=pool.nbytes, computes_in=computes_in(model))


def linear(precision: str, d: int, tokens: int, backward: bool, rank: int = RANK) -> Job:
    """One LoRA linear d x d, forward or forward and backward."""
    ops, rng = backends.get("c"), np.random.default_rng(0)

    def normal(rows: int, columns: int) -> np.ndarray:
        return rng.standard_normal((rows, columns), np.float32)

    W = ops.pack(normal(d, d) * np.float32(0.02), **in_precision(precision))
    lora = LoRA(normal(rank, d), normal(d, rank) * np.float32(0.01), ALPHA / rank)
    x, dy = normal(tokens, d), normal(tokens, d)
    kept = {}
    if precision == "bf16":  # what a bf16 model gives and takes, and PEFT too
        from pylora.numbers.precision import BF16, to_bf16

        x, dy, kept = to_bf16(x), to_bf16(dy), {"dtype": BF16}
    if not backward:
        return Job(lambda: ops.lora_forward(x, W, None, lora, **kept))

    def both() -> None:
        _, h = ops.lora_forward(x, W, None, lora, **kept)
        ops.lora_backward(dy, x, h, W, lora, **kept)

    return Job(both)


def merge(precision: str, d: int, rank: int = RANK) -> Job:
    """Merging in place, as PEFT does, and again so that it can be undone exactly: that also finds
    what must be kept aside. B is of the size that training gives it: a delta well below W."""
    ops, rng = backends.get("c"), np.random.default_rng(0)
    W = rng.standard_normal((d, d), np.float32) * np.float32(0.02)
    dtype = "f32"
    if precision == "bf16":
        W, dtype = (W.view(np.uint32) >> 16).astype(np.uint16), "bf16"
    A = rng.standard_normal((rank, d), np.float32)
    lora = LoRA(A, rng.standard_normal((d, rank), np.float32) * np.float32(1e-4), ALPHA / rank)
    changed = W.copy()

    def run() -> dict[str, float]:
        began = time.perf_counter()
        ops.merge_in_place(changed, lora, dtype)
        plain = time.perf_counter()
        merged, residue = ops.merge(W, lora, dtype)
        exact = time.perf_counter()
        ops.unmerge(merged, lora, residue, dtype)
        ended = time.perf_counter()
        return {"merge": plain - began, "exact merge": exact - plain, "unmerge": ended - exact}

    return Job(run)


JOBS: dict[str, Callable[..., Job]] = {
    "step": step,
    "generate": generate,
    "gguf": gguf,
    "adapter_cost": adapter_cost,
    "resident": resident,
    "linear": linear,
    "merge": merge,
}
