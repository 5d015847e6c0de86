"""What is measured: each case is a function that has contenders do a job in turn.

A case yields records (see contenders.py). `full` and `quick` differ in repetitions and in how many
shapes are tried, not in what a shape is. What is compared on files is in cases_files.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import records
import work
from contenders import Contender, Team
from gguf_files import File

Record = dict[str, Any]
LARGE = 100_000  # tokens of a vocabulary
SLOW = 0.1  # PyTorch's rate in a dtype beside its float32's: less is no way to use it
PATIENCE = 40.0  # seconds that one sample of a peer may take before it is left out


def no_file(model: str, kind: str) -> File:
    raise RuntimeError("this run has no files")


@dataclass(frozen=True)
class Options:
    """What a run was asked for, and what the machine has."""

    quick: bool = False
    compile: bool = True
    tiny: bool = False
    amx: bool = False
    bf16: bool = True  # whether PyTorch multiplies bfloat16 here at a useful rate
    precisions: tuple[str, ...] = ("fp32", "bf16", "int8", "int4")
    engines: tuple[str, ...] = ("pylora", "peft")
    file: Callable[[str, str], File] = no_file
    team: Callable[[], Team] = field(default=lambda: Team({}, 1))
    rates: dict[str, Any] = field(default_factory=dict)  # "bf16": what `probe` found

    def reps(self, full: int, quick: int) -> int:
        return quick if self.quick else full

    def ours(self, *precisions: str, **arguments: Any) -> list[Contender]:
        return [
            Contender("pylora", p, arguments=arguments) for p in precisions if p in self.precisions
        ]

    def quantized(self) -> list[str]:
        """pylora's precisions for a file of quantized numbers; those with activations in 8 bits
        where it has them."""
        return [p for p in self.precisions if p.startswith("int")]


# ---- what is left out, and why -----------------------------------------------------------------


def probe(o: Options) -> Iterator[Record]:
    """How fast PyTorch multiplies in each dtype: bfloat16 without instructions for it takes minutes
    a step. Fills o.rates."""
    key = {"d": 576, "k": 1536, "rows": 16 if o.tiny else 128}
    with o.team() as team:
        some = [Contender("peft", p) for p in ("fp32", "bf16")]
        found = team.measure("probe", "probe", some, key, reps=5)
    for r in found:
        if "seconds" in r:
            rows = key["rows"] * 2 if r["part"] == "rows" else 1
            rate = 2.0 * rows * key["d"] * key["k"] / min(r["seconds"])
            o.rates.setdefault(r["precision"], {})[r["part"]] = rate
    yield from found


def affordable(
    o: Options, case: str, some: list[Contender], key: dict[str, Any]
) -> tuple[list[Contender], list[Record]]:
    """Of contenders those that end, and a record for each of the others that says why not: PyTorch
    has no kernel for their dtype here, and would take longer than PATIENCE."""
    stay, out = [], []
    for c in some:
        rate = o.rates.get(c.precision) if c.engine == "peft" else None
        strict = o.rates.get("fp32")
        if rate is None or strict is None or rate["rows"] > SLOW * strict["rows"]:
            stay.append(c)
            continue
        seconds = _expected(case, key, rate)
        if seconds <= PATIENCE:
            stay.append(c)
            continue
        why = (
            f"PyTorch multiplies {c.precision} here at {rate['rows'] / 1e9:.1f} GFLOP/s "
            f"(fp32: {strict['rows'] / 1e9:.0f}): about {seconds:.0f} s for what is timed"
        )
        out.append(c.record(case, key) | {"skipped": why})
    return stay, out


def _expected(case: str, key: dict[str, Any], rate: dict[str, float]) -> float:
    """Seconds of a sample at the rates that were found for products of rows and of a row."""
    one = {"case": case, "key": key, "precision": "fp32", "engine": "peft"}
    if case in records.STEPS:
        again = 1.5 if key.get("recompute") else 1.0
        return again * records.flops(one | {"part": ""}) / rate["rows"]
    if "new" in key and "adapters" not in key:
        prefill = records.flops(one | {"part": "prefill"}) / rate["rows"]
        token = 2.0 * work.weights(key.get("model"))
        times = 1 + len(key.get("ranks", ()))
        return times * (prefill + key["new"] * token / rate["row"])
    if case == "resident":  # 80 rows decode; a batch of rows is no faster than its slower rate
        return 80 * key["new"] * 2.0 * work.weights() / min(rate.values())
    return 0.0


def measured(
    o: Options, team: Team, case: str, job: str, some: list[Contender], key: Any, **how: Any
) -> Iterator[Record]:
    """Team.measure without those that would take too long, which are named."""
    stay, out = affordable(o, case, some, key)
    for r in out:
        team.say(f"  {case} {key}: {r['contender']} left out: {r['skipped']}")
    yield from out
    yield from team.measure(case, job, stay, key, **how)


# ---- whole models ------------------------------------------------------------------------------


def peers(o: Options, precision: str) -> list[Contender]:
    """PEFT's settings that a training step is compared with; the slower ones leave early."""
    some = [Contender("peft", precision), Contender("peft", precision, "tuned")]
    if o.compile:
        some.append(Contender("peft", precision, "compiled", {"compiled": True}))
    return some


def step(o: Options) -> Iterator[Record]:
    """A training step of 4 x 256 tokens; of 2 x 256 where the vocabulary is a large one, or the
    logits of three PyTorch processes take 20 GB."""
    large = work.geometry()["vocab_size"] > LARGE
    key = {"batch": 2 if large else 4, "length": 256}
    groups = {
        "fp32": ["fp32", *(["fp32x3"] if o.amx else []), "int8", "int4"],
        "bf16": ["bf16"],
    }
    # The second group is quickly done where PyTorch has no kernel for bfloat16.
    for left, (precision, ours) in zip((2.0 if o.bf16 else 1.15, 1.0), groups.items()):
        some = [*o.ours(*ours), *peers(o, precision)]
        how = {"reps": o.reps(5, 2), "jobs": left}
        with o.team() as team:
            yield from measured(
                o, team, "step", "step", some, key, rivals=True, one_by_one=True, **how
            )


def step_memory(o: Options) -> Iterator[Record]:
    """The same with activations computed again in backward, for its memory. Without: case step."""
    key = {"batch": 4, "length": 256, "recompute": True}
    some = [(2, "fp32"), (1, "bf16")]
    for left, precision in some[1:] if o.quick else some:
        both = [*o.ours(precision), Contender("peft", precision)]
        with o.team() as team:
            yield from measured(
                o, team, "step", "step", both, key, reps=o.reps(2, 1), jobs=left, one_by_one=True
            )


def generate(o: Options) -> Iterator[Record]:
    """One sequence with an adapter: a prompt of 512 tokens, then new ones."""
    key = {"prompt": 512, "new": 16 if o.quick else 32}
    some = [Contender("peft", p, v) for p in ("fp32", "bf16") for v in ("", "tuned")]
    with o.team() as team:
        both = [*o.ours("fp32", "bf16", *o.quantized()), *some]
        yield from measured(
            o, team, "generate", "generate", both, key, reps=o.reps(5, 2), rivals=True
        )


def geometries(o: Options) -> Iterator[Record]:
    """A training step and decoding in other models' shapes: large vocabularies, a wide MLP.

    Gemma 3's 262,144 tokens make PyTorch's logits of 512 positions 0.5 GB in float32, of which it
    keeps several: hence fewer tokens than SmolLM2's step has.
    """
    models = ("gemma3-270m", "qwen2.5-0.5b")
    for n, model in enumerate(models):
        left = 2 * (len(models) - n)
        some = {p: [*o.ours(p), *peers(o, p)[:2]] for p in ("fp32", "bf16")}
        key: dict[str, Any] = {"batch": 2, "length": 256, "model": model}
        both = [*some["fp32"], *([] if o.quick else some["bf16"]), *o.ours("int4")]
        with o.team() as team:
            how = {"reps": o.reps(3, 1), "jobs": left, "rivals": True, "one_by_one": True}
            yield from measured(o, team, "step", "step", both, key, **how)
        key = {"prompt": 512, "new": 16 if o.quick else 32, "model": model}
        both = [*o.ours("fp32", "bf16", "int4"), Contender("peft", "fp32")]
        both += [] if o.quick else [Contender("peft", "bf16")]
        with o.team() as team:
            how = {"reps": o.reps(3, 1), "jobs": left - 1}
            yield from measured(o, team, "generate", "generate", both, key, **how)


def resident(o: Options) -> Iterator[Record]:
    """100 adapters resident: 8 and 32 rows, of distinct adapters and of one; switching."""
    key = {"adapters": 100, "prompt": 16, "new": 8}  # the prompt is not timed
    some = [*o.ours("bf16", "fp32", "int4"), Contender("peft", "fp32"), Contender("peft", "bf16")]
    if o.quick:
        some = o.ours("bf16", "fp32")
    with o.team() as team:
        yield from measured(o, team, "resident", "resident", some, key, reps=o.reps(4, 1))


def linear(o: Options) -> Iterator[Record]:
    """One LoRA linear, from one token to 2048."""
    some = [
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
        for n, (d, tokens, backward) in enumerate(shapes):
            key = {"d": d, "tokens": tokens, "backward": backward}
            both = [*o.ours("fp32", "bf16", "int8", "int4"), *some]
            if backward:
                both = [*o.ours("fp32", "bf16"), *some]
            how = {"reps": o.reps(11, 3), "at_least": 0.1, "jobs": len(shapes) - n}
            yield from team.measure("linear", "linear", both, key, **how)


def merge(o: Options) -> Iterator[Record]:
    """Merging into a weight of 4096 x 4096, and taking out again."""
    key = {"d": 128 if o.tiny else 4096}
    some = [*o.ours("fp32", "bf16"), Contender("peft", "fp32"), Contender("peft", "bf16")]
    with o.team() as team:
        yield from team.measure("merge", "merge", some, key, reps=o.reps(11, 3), warm=2)


# ---- how cost grows ----------------------------------------------------------------------------


def by_length(o: Options) -> Iterator[Record]:
    """A training step of one sequence, from 128 to 8192 tokens, as far as there is time."""
    lengths = (128, 512) if o.quick else (128, 256, 512, 1024, 2048, 4096, 8192)
    quickest = 0.0  # operations a second of ours, in the slowest precision
    with o.team() as team:
        for n, length in enumerate(lengths):
            some = o.ours("bf16", "fp32") if length <= 1024 else o.ours("bf16")
            if length <= 1024 and not o.quick:
                some.append(Contender("peft", "bf16" if o.bf16 else "fp32", "tuned"))
            key = {"batch": 1, "length": length}
            reps = 1 if length >= 2048 else 2
            work_ = length * work.step_flops(length)
            if quickest and 2 * work_ / quickest > team.left():  # once to prepare, once timed
                why = "no time was left for it in this run (--minutes)"
                team.say(f"  by-length {key}: {why}")
                yield from (c.record("by-length", key) | {"skipped": why} for c in some)
                continue
            for r in measured(o, team, "by-length", "step", some, key, reps=reps):
                yield r
                if r["engine"] == "pylora" and "seconds" in r:
                    rate = work_ / records.median(r)
                    quickest = min(quickest, rate) if n and quickest else rate


def by_rank(o: Options) -> Iterator[Record]:
    """A training step of 1 x 512 tokens, ranks 4 to 256."""
    ranks = (4, 64) if o.quick else (4, 8, 16, 32, 64, 128, 256)
    with o.team() as team:
        for n, rank in enumerate(ranks):
            some = o.ours("bf16" if o.bf16 else "fp32")
            if not o.quick:
                some.append(Contender("peft", "bf16" if o.bf16 else "fp32", "tuned"))
            key = {"batch": 1, "length": 512, "rank": rank}
            how = {"reps": 2, "jobs": len(ranks) - n}
            yield from measured(o, team, "by-rank", "step", some, key, **how)


def by_adapters(o: Options) -> Iterator[Record]:
    """Decoding with 1 to 1000 adapters resident; what one more costs."""
    counts = (1, 100) if o.quick else (1, 8, 32, 100, 316, 1000)
    with o.team() as team:
        for n, count in enumerate(counts):
            key = {"adapters": count, "prompt": 16, "new": 8}
            how = {"reps": o.reps(3, 1), "jobs": len(counts) - n}
            yield from team.measure("by-adapters", "resident", o.ours("bf16"), key, **how)
