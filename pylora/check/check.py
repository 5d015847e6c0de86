"""`pylora check`: proves on a user's own model and adapter what pylora promises, with numbers.

A fresh adapter is the base bit for bit; the gradients are those of the loss (in float64) and the
backend computes them as well as float32 can; merged weights compute what the adapter computes;
unmerging restores every bit; the adapter's scales and sizes are what its settings say; a sequence
has the same bits alone and in a batch. docs/check.md explains each line. Files are only read.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator

from pylora.adapters.adapter import Adapter
from pylora.adapters.plan import resolve
from pylora.check import bits, gradient, merge
from pylora.check.report import SKIP, Finding, Report
from pylora.check.sample import Batch, Part, available_memory, default_adapter, part_of, sample
from pylora.errors import ConfigError, expect
from pylora.formats import Checkpoint, open_checkpoint
from pylora.formats.overlaid import Overlaid
from pylora.model.config import LlamaConfig
from pylora.model.llama import Llama
from pylora.ops.protocol import Backend

__all__ = ["Finding", "Report", "check", "check_model"]


def check_model(
    model: str | os.PathLike[str],
    adapter: str | os.PathLike[str] | None = None,
    *,
    data: str | os.PathLike[str] | None = None,
    tokens: int = 24,
    seed: int = 0,
    backend: str | Backend | None = None,
    memory: float | None = None,
) -> Report:
    """Checks the model at `model` with the adapter in the PEFT directory `adapter`.

    Without an adapter it is a random one on q, k, v and o. `data` is a JSONL file to take tokens
    from; without it they are random. `memory`, in bytes, limits the float64 part (default: what is
    free). Raises PyloraError for files that are missing, damaged or do not fit each other.
    """
    with open_checkpoint(model) as checkpoint:
        config = checkpoint.config
        if adapter is None:
            name, loaded = "random, on q, k, v and o", default_adapter(config, seed % 2**64)
        else:
            name = os.fspath(adapter)
            loaded = Adapter.load(adapter, config, base=checkpoint.load)
        tokenizer = checkpoint.tokenizer() if data is not None else None
        batch = sample(config, tokens, seed, data, tokenizer)
        return check(checkpoint, loaded, batch, name, seed=seed, backend=backend, memory=memory)


def check(
    checkpoint: Checkpoint,
    adapter: Adapter,
    batch: Batch,
    name: str = "adapter",
    *,
    seed: int = 0,
    backend: str | Backend | None = None,
    memory: float | None = None,
) -> Report:
    """`check_model` for a checkpoint, adapter and batch that are there already."""
    expect("checkpoint", checkpoint, "check(checkpoint, adapter, batch)")
    expect("whole adapter", adapter, "check(checkpoint, adapter, batch)")
    if not len(adapter.plan):
        raise ConfigError(f"{name}: the adapter has no module with A and B, so nothing to check")
    if adapter.whole is not None:  # a part of the base that is checked
        name += f", with {', '.join(adapter.whole.tensors)} of its own"
        checkpoint, adapter = Overlaid(checkpoint, adapter.whole), adapter.without_whole()
    llama = Llama.from_checkpoint(checkpoint, backend)
    part = part_of(checkpoint, adapter, available_memory() if memory is None else memory)
    scope = _scope(part, checkpoint.config)
    where = str(checkpoint.path)
    report = Report(where, name, llama.ops.name, batch.ids.size, seed, scope)
    modules = {e.path: {"path": e.path, "r": e.r, "alpha": e.alpha} for e in adapter.plan}
    report.findings += merge.scales(adapter, modules)
    report.findings += bits.identity(llama, _fresh(checkpoint, adapter, seed), batch)
    llama.attach(adapter)
    report.findings += bits.rows(llama, batch)
    if part is not None and part.first:  # the same part on the backend, to compare with
        ops = llama.ops
        del llama
        llama = Llama(part.config, part.load, backend=ops)
    report.findings += _gradients(llama, adapter, part, batch, seed, modules)
    report.findings += merge.weights(checkpoint, adapter, llama, part, batch, seed, modules)
    report.modules = list(modules.values())
    return report


def _gradients(
    llama: Llama,
    adapter: Adapter,
    part: Part | None,
    batch: Batch,
    seed: int,
    modules: merge.Modules,
) -> Iterator[Finding]:
    if part is not None:
        yield from gradient.in_float64(llama, part, batch, seed, modules)
        return
    yield gradient.on_backend(llama, adapter, batch, seed)
    text = "the backend's gradients against float64: that does not fit into memory"
    yield Finding("gradients in float32", SKIP, None, None, text)


def _fresh(checkpoint: Checkpoint, adapter: Adapter, seed: int) -> Adapter:
    """A new adapter on the same modules, initialised so that it changes nothing."""
    config = dataclasses.replace(adapter.config, init_lora_weights=True)
    plan = resolve(config, checkpoint.config.modules())
    return Adapter.init(plan, config, seed, base=checkpoint.load)


def _scope(part: Part | None, config: LlamaConfig) -> str:
    layers = config.num_hidden_layers
    if part is None:
        return "not in float64: not even one adapted layer fits into memory"
    if part.first == 0:
        return f"float64 on the whole model, {layers} layers"
    n = layers - part.first
    return (
        f"float64 on the top {n} of {layers} layers with their real weights, fed by the embedding: "
        "the whole model does not fit into memory in float64"
    )
