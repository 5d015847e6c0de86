"""The cases about GGUF files: pylora, llama.cpp and ik_llama.cpp on the same file, without an
adapter and with one, and what an adapter costs each of them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import work
from cases import Options, Record, measured
from contenders import Contender
from gguf_files import File, write_adapter

FILES = [
    ("smollm2-135m", "Q4_0"),
    ("gemma3-270m", "Q4_K_M"),
    ("smollm2-135m", "Q4_1"),
    ("smollm2-135m", "Q4_K_M"),
    ("smollm2-135m", "Q8_0"),
    ("qwen2.5-0.5b", "Q4_K_M"),
]
RANKS = (8, 16, 64)


def others(o: Options, kind: str, **arguments: Any) -> list[Contender]:
    """The peers that read such a file, in the settings that may be their best."""
    every = [
        Contender("llama", kind, "", arguments),
        Contender("llama", kind, "flash attention", arguments | {"flash": True}),
        Contender("ik", kind, "", arguments),
        Contender("ik", kind, "repacked", arguments | {"repack": True}),
        Contender("openvino", kind, "", arguments),
    ]
    return [c for c in every if c.engine in o.engines]


def ours(o: Options, kind: str, **arguments: Any) -> list[Contender]:
    """A file of 8-bit blocks is multiplied as such; of the others each precision of blocks."""
    return [
        Contender("pylora", p, arguments=arguments)
        for p in o.quantized()
        if kind != "Q8_0" or p.startswith("int8")
    ]


def with_adapters(c: Contender) -> Contender:
    """ik_llama.cpp has adapters without flash attention alone."""
    more = {"flash": False} if c.engine == "ik" else {}
    return replace(c, arguments=c.arguments | more)


def without_path(r: Record, file: File) -> Record:
    """The key says which file, not where it lies on this machine."""
    key = {k: v for k, v in r["key"].items() if k not in ("path", "adapters")}
    sizes = {"file_bytes": file.path.stat().st_size, "read_bytes": file.read_bytes()}
    return r | {"key": key | {"kind": file.kind} | sizes}


def gguf(o: Options) -> Iterator[Record]:
    """Files as they are, no adapter: a prompt of 512 tokens, then new ones."""
    files = FILES[:1] if o.tiny else FILES[:2] if o.quick else FILES
    sizes = [work.weights(model) for model, _ in files]
    problems = []
    for n, (model, kind) in enumerate(files):
        try:
            file = o.file(model, kind)
        except Exception as problem:  # one file must not take the others with it
            problems.append(str(problem))
            continue
        key = {"path": str(file.path), "prompt": 512, "new": 16 if o.quick else 48, "model": model}
        with o.team() as team:
            some = [*ours(o, kind), *others(o, kind)]
            how = {"reps": o.reps(7, 2), "jobs": sum(sizes[n:]) / sizes[n], "rivals": True}
            for r in measured(o, team, "gguf", "gguf", some, key, **how):
                yield without_path(r, file)
    if problems:
        raise RuntimeError("; ".join(problems))


def adapter_cost(o: Options) -> Iterator[Record]:
    """Decoding and prefill with one adapter on all linear modules beside none, from one file and,
    for what PEFT can do, in its dtypes."""
    ranks = list(RANKS[1:2] if o.quick else RANKS)
    key: dict[str, Any] = {"ranks": ranks, "prompt": 512, "new": 16 if o.quick else 32}
    key["model"] = "smollm2-135m"
    with o.team() as team:
        some = [*o.ours("fp32", "bf16"), Contender("peft", "fp32"), Contender("peft", "bf16")]
        how = {"reps": o.reps(5, 1), "jobs": 2}
        yield from measured(o, team, "adapter-cost", "adapter_cost", some, key, **how)
    with tempfile.TemporaryDirectory() as folder, o.team() as team:
        file = o.file("smollm2-135m", "Q4_0")
        paths = {
            str(rank): str(write_adapter(file, rank, Path(folder) / f"r{rank}.gguf"))
            for rank in ranks
        }
        some = [with_adapters(c) for c in others(o, file.kind, adapters=paths)]
        some = [c for c in some if c.engine != "openvino"]  # it takes none of llama.cpp's format
        both = [*ours(o, file.kind), *some]
        how = {"reps": o.reps(5, 1), "rivals": True}
        key |= {"path": str(file.path)}
        for r in measured(o, team, "adapter-cost", "adapter_cost", both, key, **how):
            yield without_path(r, file)
