"""Decoding with a mixture of experts of Qwen3-30B-A3B's geometry: tokens/s, and the memory's limit.

    python bench/moe_decode.py [--layers N] [--kind q4_0] [--new 32] [--threads 2] [--at DIR]

Random weights, int4. With --at they are a packed model in DIR/moe, as `pylora pack` writes one
(kept for the next run; 17 GB as Q4_0 for all 48 layers), which is mapped: what does not fit into
memory comes from the disk again and again. Without it they are packed in memory, and without
--layers as many of the 48 run as fit into four fifths of the memory that is available; the figure
is of those, said as such. Each token is routed by
the layer's router to 8 of 128 experts; the limit is what one token must read (attention, router, 8
experts, head) over the speed of reading memory, measured in the same run.
Prints one line of JSON at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

import ceilings

import pylora
from pylora.errors import FileFormatError
from pylora.formats import open_checkpoint
from pylora.formats.pack import pack_checkpoint
from pylora.numbers.precision import Stored

GEOMETRY: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
}
INT4 = {"q4_0": 18 / 32, "q4_1": 20 / 32}  # bytes of a number in a block
POOL = 64 << 20  # random bytes that blocks are cut from: what they are does not change the speed


def config(layers: int) -> Any:
    return pylora.LlamaConfig.from_hf(GEOMETRY | {"num_hidden_layers": layers})


def packed_bytes(c: Any, kind: str) -> tuple[float, float]:
    """(of all packed weights, of those that one token reads)."""
    total = read = 0.0
    share = GEOMETRY["num_experts_per_tok"] / GEOMETRY["num_experts"]
    for name, shape in c.tensors().items():
        router = name.endswith(".gate.weight")
        size = float(np.prod(shape)) * (INT4[kind] if len(shape) == 2 and not router else 4.0)
        total += size
        if ".experts." in name:
            read += size * share
        elif not name.startswith("model.embed_tokens"):  # of the embedding one row
            read += size
    return total, read


def layers_that_fit(kind: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            room = 0.8 * int(line.split()[1]) * 1024
    layers = int(GEOMETRY["num_hidden_layers"])
    ends, one = packed_bytes(config(1), kind)[0], packed_bytes(config(2), kind)[0]
    one -= ends
    return max(1, min(layers, int((room - (ends - one)) / one)))


class Weights:
    """Blocks with random codes, scaled so that a product keeps the size of its input. Codes are 1
    to 15: with a mean all tokens would go the same way, and to the same experts. To the packer they
    are a checkpoint."""

    path, settings, notes = Path("random"), {}, ()  # type: ignore[var-annotated]

    def __init__(self, c: Any, kind: str) -> None:
        self.config, self.kind, self.size = c, kind, int(INT4[kind] * 32)
        self.shapes, self.rng = c.tensors(), np.random.default_rng(0)
        low, high = self.rng.integers(1, 16, (2, POOL), np.uint8)
        self.pool = low | high << 4

    def __call__(self, name: str) -> Any:
        shape = self.shapes[name]
        if len(shape) == 1:
            return np.ones(shape, np.float32)
        d, k = shape
        if name.endswith(".gate.weight"):  # a router stays float32
            return (self.rng.standard_normal(shape) / np.sqrt(k)).astype(np.float32)
        size, at = d * k // 32 * self.size, int(self.rng.integers(0, POOL // 2))
        some = self.pool[at : at + size].copy() if size <= POOL // 2 else np.resize(self.pool, size)
        blocks = some.reshape(-1, self.size)
        scale = np.float16(1 / (4.32 * np.sqrt(k)))  # codes 1 to 15 have a deviation of 4.32
        numbers = [scale] if self.kind == "q4_0" else [scale, -8 * scale]
        blocks[:, : 2 * len(numbers)] = np.array(numbers, np.float16).view(np.uint8)
        return Stored(self.kind, blocks.reshape(d, -1), (d, k))

    def names(self) -> tuple[str, ...]:
        return tuple(self.shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.shapes[name])

    def dtype(self, name: str) -> str:
        plain = len(self.shapes[name]) == 1 or name.endswith(".gate.weight")
        return "f32" if plain else self.kind

    form = dtype

    load = __call__

    def stored(self, name: str) -> Any:
        found = self(name)
        return found if isinstance(found, Stored) else None

    def tokenizer(self) -> Any:
        raise FileFormatError("random weights have no tokenizer")


def mapped(c: Any, kind: str, at: Path) -> Any:
    """The packed model in at/moe, which is written unless it is there with these layers."""
    where = at / "moe"
    if (where / "config.json").exists():
        with open_checkpoint(where) as there:
            if there.config == c and there.dtype("model.embed_tokens.weight") == kind:
                return pylora.Llama.from_checkpoint(there, "c")
        shutil.rmtree(where)
    began = time.perf_counter()
    pack_checkpoint(Weights(c, kind), where, "int4")  # type: ignore[arg-type]
    print(f"written in {time.perf_counter() - began:.0f} s", flush=True)
    return None


def resident() -> int:
    """Bytes of this process in memory, mapped ones included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def seconds_a_token(model: Any, ids: Any) -> float:
    """Of all but the first. The tokens are given: what random weights find likeliest is one token
    again and again, which would read the same experts each time."""
    kv = model.kv_cache(1, len(ids))
    model.decode(ids[:1], kv, [1])
    began = time.perf_counter()
    for i in range(1, len(ids)):
        model.decode(ids[i : i + 1], kv, [1])
    return (time.perf_counter() - began) / (len(ids) - 1)


def main() -> int:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--layers", type=int, help="of 48 (default: as many as fit)")
    p.add_argument("--kind", choices=INT4, default="q4_0")
    p.add_argument("--at", type=Path, metavar="DIR", help="where the packed model is, or goes")
    p.add_argument("--new", type=int, default=32, help="tokens in one sample")
    p.add_argument("--samples", type=int, default=5)
    p.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    a = p.parse_args()
    os.environ["PYLORA_NUM_THREADS"] = str(a.threads)
    c = config(a.layers or (48 if a.at else layers_that_fit(a.kind)))
    total, read = packed_bytes(c, a.kind)
    print(f"{c.num_hidden_layers} of 48 layers, {total / 1e9:.1f} GB packed", flush=True)
    began = time.perf_counter()
    if a.at is None:
        model = pylora.Llama(c, Weights(c, a.kind), backend="c", precision="int4")
    elif (model := mapped(c, a.kind, a.at)) is None:
        began = time.perf_counter()
        model = mapped(c, a.kind, a.at)
    opened = time.perf_counter() - began
    print(f"{'packed' if a.at is None else 'opened'} in {opened:.1f} s", flush=True)
    rng = np.random.default_rng(1)
    took: list[float] = []
    speeds: list[float] = []
    for _ in range(a.samples):  # the machine may change its speed: both in turn
        speeds.append(ceilings.measure(a.threads, 3, 256)["memory read"]["best"])
        took.append(seconds_a_token(model, rng.integers(0, c.vocab_size, a.new + 1)))
    seconds, memory = statistics.median(took), statistics.median(speeds) * 1e9
    limit = memory / read
    found = {
        "layers": c.num_hidden_layers,
        "parameters": c.num_parameters,
        "kind": a.kind,
        "mapped": a.at is not None,
        "seconds_to_open": round(opened, 1),
        "resident_bytes": resident(),
        "packed_bytes": int(total),
        "bytes_a_token": int(read),
        "tokens_per_second": round(1 / seconds, 2),
        "memory_read_bytes_per_second": int(memory),
        "limit_tokens_per_second": round(limit, 2),
        "share_of_limit": round(1 / seconds / limit, 3),
        "samples_seconds_a_token": took,
        "load": os.getloadavg()[0],
        "isa": pylora.build_info().get("isa"),
        "threads": a.threads,
    }
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
