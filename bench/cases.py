"""What is measured: each case is a function that has contenders do a job in turn.

A case yields records (see contenders.py). `full` and `quick` differ in repetitions and in how many
shapes are tried, not in what a shape is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from contenders import Contender, Team

Record = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """What a run was asked for, and what the machine has."""

    quick: bool = False
    compile: bool = True
    tiny: bool = False
    amx: bool = False
    precisions: tuple[str, ...] = ("fp32", "bf16", "int8", "int4")
    gguf: Path | None = None
    team: Callable[[], Team] = field(default=lambda: Team({}, 1))

    def reps(self, full: int, quick: int) -> int:
        return quick if self.quick else full

    def ours(self, *precisions: str, **arguments: Any) -> list[Contender]:
        return [
            Contender("pylora", p, arguments=arguments) for p in precisions if p in self.precisions
        ]


def _peers(o: Options, precision: str) -> list[Contender]:
    """The three that a training step is compared with, always."""
    peers = [Contender("peft", precision), Contender("peft", precision, "tuned")]
    if o.compile:
        peers.append(Contender("peft", precision, "compiled", {"compiled": True}))
    return peers


def step(o: Options) -> Iterator[Record]:
    """A training step of 4 x 256 tokens."""
    key = {"batch": 4, "length": 256}
    groups = {"bf16": ["bf16", "int8", "int4"], "fp32": ["fp32", *(["fp32x3"] if o.amx else [])]}
    for precision, ours in groups.items():
        if o.quick and precision != "bf16":
            continue
        some = [*o.ours(*ours), *_peers(o, precision)]
        with o.team() as team:
            yield from team.measure(
                "step", "step", some, key, reps=o.reps(5, 3), warm=1, timeout=420
            )


def step_memory(o: Options) -> Iterator[Record]:
    """The same with activations computed again in backward, for its memory. Without: case step."""
    key = {"batch": 4, "length": 256, "recompute": True}
    for precision in ("bf16",) if o.quick else ("bf16", "fp32"):
        some = [*o.ours(precision), Contender("peft", precision)]
        with o.team() as team:
            yield from team.measure("step", "step", some, key, reps=o.reps(2, 1))


def generate(o: Options) -> Iterator[Record]:
    """One sequence with an adapter: a prompt of 512 tokens, then new ones."""
    key = {"prompt": 512, "new": 16 if o.quick else 32}
    peers = [Contender("peft", "bf16"), Contender("peft", "bf16", "tuned")]
    if not o.quick:
        peers.append(Contender("peft", "fp32"))
    with o.team() as team:
        some = [*o.ours("fp32", "bf16", "int8", "int4"), *peers]
        yield from team.measure("generate", "generate", some, key, reps=o.reps(5, 3))


def gguf(o: Options) -> Iterator[Record]:
    """The Q4_1 file itself, beside llama.cpp."""
    if o.gguf is None:
        raise RuntimeError("the GGUF file is not there (pylora.demo.fetch could not get it)")
    key = {"path": str(o.gguf), "prompt": 512, "new": 16 if o.quick else 64}
    some = [*o.ours("int4"), Contender("llama", "Q4_1")]
    with o.team() as team:
        records = team.measure("gguf", "gguf", some, key, reps=o.reps(7, 3))
    size = o.gguf.stat().st_size
    for r in records:
        yield r | {"key": {"prompt": key["prompt"], "new": key["new"], "file_bytes": size}}


def resident(o: Options) -> Iterator[Record]:
    """100 adapters resident: 8 and 32 rows, of distinct adapters and of one; switching."""
    key = {"adapters": 100, "prompt": 64, "new": 8}
    some = [*o.ours("bf16", "fp32", "int4"), Contender("peft", "bf16")]
    if o.quick:
        some = o.ours("bf16")
    with o.team() as team:
        yield from team.measure("resident", "resident", some, key, reps=o.reps(4, 2), timeout=420)


def linear(o: Options) -> Iterator[Record]:
    """One LoRA linear, from one token to 2048."""
    peers = [
        Contender("peft", "fp32"),
        Contender("peft", "bf16"),
        Contender("peft", "bf16", "fp32 adapters", {"fp32_adapters": True}),
    ]
    shapes = [(d, m, False) for d in (576, 1024) for m in (1, 16, 512, 2048)]
    shapes += [(d, 512, True) for d in (1024, 4096)]
    if o.quick:
        shapes = shapes[:3]
    if o.tiny:
        shapes = [(128, 16, False), (128, 16, True)]
    with o.team() as team:
        for d, tokens, backward in shapes:
            key = {"d": d, "tokens": tokens, "backward": backward}
            some = [*o.ours("fp32", "bf16", "int8", "int4"), *peers]
            if backward:
                some = [*o.ours("fp32", "bf16"), *peers]
            yield from team.measure("linear", "linear", some, key, reps=o.reps(11, 5), at_least=0.1)


def merge(o: Options) -> Iterator[Record]:
    """Merging into a weight of 4096 x 4096, and taking out again."""
    key = {"d": 128 if o.tiny else 4096}
    some = [*o.ours("fp32", "bf16"), Contender("peft", "fp32"), Contender("peft", "bf16")]
    with o.team() as team:
        yield from team.measure("merge", "merge", some, key, reps=o.reps(11, 3), warm=2)


# ---- how cost grows ----------------------------------------------------------------------------


def by_length(o: Options) -> Iterator[Record]:
    """A training step of one sequence, from 128 to 8192 tokens."""
    lengths = (128, 512) if o.quick else (128, 256, 512, 1024, 2048, 4096, 8192)
    with o.team() as team:
        for length in lengths:
            some = o.ours("bf16", "fp32") if length <= 1024 else o.ours("bf16")
            if length <= 1024 and not o.quick:
                some.append(Contender("peft", "bf16", "tuned"))
            yield from team.measure(
                "by-length",
                "step",
                some,
                {"batch": 1, "length": length},
                reps=1 if length >= 2048 else 2,
            )


def by_rank(o: Options) -> Iterator[Record]:
    """A training step of 1 x 512 tokens, ranks 4 to 256."""
    with o.team() as team:
        for rank in (4, 64) if o.quick else (4, 8, 16, 32, 64, 128, 256):
            some = o.ours("bf16")
            if not o.quick:
                some.append(Contender("peft", "bf16", "tuned"))
            yield from team.measure(
                "by-rank",
                "step",
                some,
                {"batch": 1, "length": 512, "rank": rank},
                reps=2,
            )


def by_adapters(o: Options) -> Iterator[Record]:
    """Decoding with 1 to 1000 adapters resident; what one more costs."""
    with o.team() as team:
        for n in (1, 100) if o.quick else (1, 8, 32, 100, 316, 1000):
            key = {"adapters": n, "prompt": 16, "new": 8}
            yield from team.measure(
                "by-adapters", "resident", o.ours("bf16"), key, reps=o.reps(3, 2)
            )


CASES: dict[str, Callable[[Options], Iterator[Record]]] = {
    "step": step,
    "step-memory": step_memory,
    "generate": generate,
    "gguf": gguf,
    "resident": resident,
    "linear": linear,
    "merge": merge,
    "by-length": by_length,
    "by-rank": by_rank,
    "by-adapters": by_adapters,
}
QUICK = ("step", "generate", "linear", "merge")
