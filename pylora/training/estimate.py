"""The memory that a training run will hold at its peak, before anything of it is read or made.

Counted is what layers keep for backward (docs/training.md, "Memory", has the table), from the
model's configuration, the adapter's plan and the lengths of the examples. It is an estimate for the
c backend; bench/memory.py measures how good it is. The total is of the whole process: what it holds
when it is asked, and what is to come.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from pylora.adapters.plan import Plan
from pylora.model.config import LlamaConfig
from pylora.model.tensors import norm_roles
from pylora.model.weights import weight_bytes
from pylora.numbers.blocks import BLOCKS, row_bytes
from pylora.numbers.precision import QUANTIZED, weights_of
from pylora.training.batching import epoch_of
from pylora.training.config import TrainConfig
from pylora.training.memory import held_bytes
from pylora.training.optimizer8 import SMALLEST

_HEAD_ROWS = 128  # rows of logits at a time
_WORKSPACE = 28 << 20  # of the operations, and what an allocator does not give back
_INTERPRETER = 60 << 20  # where the system does not say what the process holds
_LONGEST = 4096  # examples whose batches are looked at


@dataclass(frozen=True)
class Estimate:
    """Bytes, by what they are for."""

    process: int  # what is held already: the interpreter, the tokenizer, the data
    weights: int
    adapter: int
    optimizer: int
    gradients: int
    activations: int
    head: int  # logits, and other short-lived arrays
    loading: int  # more than the rest while the weights are read: the largest one as numbers

    @property
    def total(self) -> int:
        """The peak: of training, or of loading where that is higher."""
        at_rest = self.process + self.weights + self.adapter
        work = self.optimizer + self.gradients + self.activations + self.head
        return at_rest + max(work, self.loading)

    def parts(self) -> dict[str, int]:
        """The fields, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def words(self) -> str:
        """ "1.07 GB: weights 0.54, activations 0.36, ..." """
        named = {n: b for n, b in self.parts().items() if b >= 5e6 and n != "loading"}
        listed = sorted(named.items(), key=lambda item: -item[1])
        return f"{gigabytes(self.total)}: " + ", ".join(f"{n} {b / 1e9:.2f}" for n, b in listed)


def gigabytes(size: float) -> str:
    """ "1.07 GB", "0.12 GB" """
    return f"{size / 1e9:.2f} GB"


def weights_of_checkpoint(checkpoint: Any, precision: str) -> int:
    """Bytes of an open checkpoint's weights in a precision: in int8 and int4 a GGUF file's blocks
    stay as they are."""
    config, kept = checkpoint.config, weights_of(precision)
    if kept not in QUANTIZED or getattr(checkpoint, "packed_as", None):
        return weight_bytes(config, precision)
    total = 0
    for name, shape in config.tensors().items():
        if len(shape) != 2:
            total += 4 * int(np.prod(shape))
            continue
        kind = str(checkpoint.dtype(name))
        if kind in ("f32", "f16", "bf16"):
            kind = "q4_1" if kept == "int4" else "q8_0"
        kind = kind if kind in BLOCKS else "q8_0"
        numbers, size = BLOCKS[kind]
        whole = shape[1] % numbers == 0
        total += shape[0] * (row_bytes(kind, shape[1]) if whole else shape[1] * size // numbers)
    return total


def estimate(
    checkpoint: Any,
    plan: Plan,
    precision: str,
    config: TrainConfig,
    lengths: Sequence[int],
    held: int | None = None,
    whole: int = 0,
) -> Estimate:
    """Of training the adapter of `plan` on examples of these lengths (in rows) on `checkpoint`,
    which is open and of which nothing was read. `held`: see `Estimate.process`; None: as it is.
    `whole`: numbers of weights that are trained whole."""
    model = checkpoint.config
    rows, evaluated = most_rows(config, lengths)
    numbers = plan.num_parameters + whole
    largest = max(4 * int(np.prod(shape)) for shape in model.tensors().values())
    grown = 2 if config.accumulation > 1 or config.packing else 1  # the sum, and a part's
    if not config.packing and config.max_tokens is not None:
        grown = 2
    if held is None:
        held = held_bytes() or _INTERPRETER
    return Estimate(
        process=held,
        weights=weights_of_checkpoint(checkpoint, precision) + _width(precision) * whole,
        adapter=4 * numbers,
        optimizer=_moments(plan, config, whole),
        gradients=4 * numbers * grown,
        activations=max(
            _activations(model, plan, precision, rows, config.recompute),
            _passing(model, precision) * evaluated,
        ),
        head=4 * model.vocab_size * min(_HEAD_ROWS, max(rows, 1)) + _WORKSPACE,
        loading=largest,
    )


def most_rows(config: TrainConfig, lengths: Sequence[int]) -> tuple[int, int]:
    """(rows of the largest micro-batch, of the largest batch that is evaluated)."""
    some = sorted(lengths)[-_LONGEST:]
    steps = epoch_of(config, some)
    rows = max((sum(some[i] for i in micro) for step in steps for micro in step), default=0)
    return rows, sum(some[-config.batch_size :])


def _moments(plan: Plan, config: TrainConfig, whole: int) -> int:
    if config.optimizer != "adamw_8bit":
        return 8 * (plan.num_parameters + whole)
    sizes = [n for e in plan.entries for n in (e.r * e.k * e.experts, e.r * e.d * e.experts)]
    large = sum(n for n in sizes if n >= SMALLEST)
    working = 5 * 4 * max(sizes, default=0)  # one array at a time, in float32
    return 8 * (plan.num_parameters - large) + int(2 * (large + whole) * (1 + 4 / 256)) + working


def _width(precision: str) -> int:
    return 2 if weights_of(precision) in ("bf16", "fp16") else 4


def _kept(c: LlamaConfig, plan: Plan, precision: str, layer: int) -> int:
    """Bytes that one row leaves in one layer for backward."""
    e, D, hidden = _width(precision), c.head_dim, c.hidden_size
    queries, keys = c.num_attention_heads * D, c.num_key_value_heads * D
    before = 4 if c.qk_norm or c.fused_qkv else e  # of q and k as they are kept
    found = 2 * e * hidden  # the inputs of the two norms
    found += before * (queries + keys) + e * (keys + queries) + 4 * c.num_attention_heads
    if c.has_experts(layer):
        found += 2 * e * c.expert_size * c.experts_per_token + 4 * c.experts + e * hidden
    else:
        found += e * c.intermediate_size * (2 if c.gated else 1)
    found += 4 * hidden * sum(role.startswith("after") for role in norm_roles(c, layer))
    prefix = f"{c.names.layer}.{layer}."
    for entry in plan.entries:
        if entry.path.startswith(prefix):
            each = c.experts_per_token if entry.kind == "experts" else 1
            found += each * 4 * entry.r + (4 * entry.d if entry.dora else 0)
    return found + 4 * 2


def _passing(c: LlamaConfig, precision: str) -> int:
    """Bytes of a row that live while one layer is computed, forward or backward."""
    e, hidden = _width(precision), c.hidden_size
    inner = c.expert_size * c.experts_per_token if c.experts else c.intermediate_size
    return 4 * 3 * hidden + e * 3 * max(inner, c.intermediate_size if not c.experts else 0)


def _activations(c: LlamaConfig, plan: Plan, precision: str, rows: int, recompute: bool) -> int:
    layers = c.num_hidden_layers
    first = [int(n) for e in plan.entries if (n := _layer_of(c, e.path)) is not None]
    lowest = min(first, default=layers)
    if any(e.path == c.names.embedding for e in plan.entries):
        lowest = 0
    kept = [_kept(c, plan, precision, i) for i in range(lowest, layers)]
    total = 4 * c.hidden_size * len(kept) + max(kept, default=0) if recompute else sum(kept)
    return rows * (total + _passing(c, precision))


def _layer_of(c: LlamaConfig, path: str) -> int | None:
    rest = path.removeprefix(f"{c.names.layer}.")
    number = rest.split(".", 1)[0]
    return int(number) if rest != path and number.isdigit() else None


@dataclass(frozen=True)
class Fit:
    """Settings that fit, and what was changed for it, in words."""

    config: TrainConfig
    precision: str
    estimate: Estimate
    changed: tuple[str, ...] = ()

    def words(self) -> str:
        """The estimate's."""
        return self.estimate.words()


def ways(
    checkpoint: Any,
    plan: Plan,
    precision: str,
    config: TrainConfig,
    lengths: Sequence[int],
    held: int,
    narrower: Sequence[str] = ("bf16", "int8", "int4"),
    *,
    whole: int = 0,
) -> list[Fit]:
    """Ever smaller ways of the same run: as it is; with recompute; in more and more micro-batches
    (both give the same numbers but for rounding); then in narrower precisions."""

    def made(config: TrainConfig, precision: str, changed: tuple[str, ...]) -> Fit:
        found = estimate(checkpoint, plan, precision, config, lengths, held, whole)
        return Fit(config, precision, found, changed)

    out = [made(config, precision, ())]
    words: tuple[str, ...] = ()
    if not config.recompute:
        config, words = replace(config, recompute=True), ("--recompute",)
        out.append(made(config, precision, words))
    parts = config.accumulation
    while not config.packing and parts < config.batch_size:
        parts = min(2 * parts, config.batch_size)
        config = replace(config, accumulation=parts)
        out.append(made(config, precision, (*words, f"--accumulation {parts}")))
    words = out[-1].changed
    size = weights_of_checkpoint(checkpoint, precision)
    for name in narrower if getattr(checkpoint, "packed_as", None) is None else ():
        if (less := weights_of_checkpoint(checkpoint, name)) < size:
            size = less
            out.append(made(config, name, (*words, f"--precision {name}")))
    return out


def fitting(tried: Sequence[Fit], room: float) -> Fit | None:
    """The first of them whose total is no more than `room`."""
    return next((one for one in tried if one.estimate.total <= room), None)
