"""Every operation as one row of a table: how to make inputs, run it, and bound its error.

Tests that hold for all operations (agreement, layouts, rows, threads, no tokens) walk the table, so
an operation that is added here is held to all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import bounds
import numpy as np

from pylora.reference import IGNORE, Reference
from pylora.types import Attn, Drop, LoRA, Seqs

Arrays = dict[str, Any]  # float arrays, and whatever else the operation takes


@dataclass(frozen=True)
class Op:
    """`make(rng, m)` gives inputs for m tokens; `run(ops, inputs)` and `bound(inputs)` give one
    array per output. Inputs in `rows` have a row per token, and so do outputs in `row_outputs`."""

    name: str
    make: Callable[[np.random.Generator, int], Arrays]
    run: Callable[[Any, Arrays], tuple[Any, ...]]
    bound: Callable[[Arrays], tuple[Any, ...]]
    rows: tuple[str, ...] = ()
    row_outputs: tuple[int, ...] = (0,)
    given_away: tuple[str, ...] = ()  # inputs that a backend may write to

    def __str__(self) -> str:
        return self.name


def normal(rng: np.random.Generator, *shape: int, size: float = 1.0) -> np.ndarray:
    return (size * rng.normal(size=shape)).astype(np.float32)


def size(rng: np.random.Generator) -> int:
    """A number of features on either side of the widths that kernels work in."""
    return int(rng.choice([1, 2, 7, 15, 16, 17, 31, 32, 33, 65, 100]))


def in_float64(inputs: Arrays) -> Arrays:
    return {
        n: a.astype(np.float64) if getattr(a, "dtype", None) == np.float32 else a
        for n, a in inputs.items()
    }


def take_row(op: Op, inputs: Arrays, i: int) -> Arrays:
    """The inputs of token i alone."""
    one = {n: a[i : i + 1] if n in op.rows and a is not None else a for n, a in inputs.items()}
    if isinstance(one.get("drop"), Drop):
        one["drop"] = replace(one["drop"], row0=one["drop"].row0 + i)
    return one


# ---- LoRA linear ------------------------------------------------------------------------------


def _linear(rng: np.random.Generator, m: int) -> Arrays:
    k, d, r = size(rng), size(rng), int(rng.choice([1, 2, 8, 40]))
    drop = Drop(0.25, seed=9, stream=2**40 + 3, row0=int(rng.integers(50)))
    return {
        "x": normal(rng, m, k), "W": normal(rng, d, k), "A": normal(rng, r, k),
        "B": normal(rng, d, r), "scale": float(np.float32(rng.uniform(0.1, 3))),
        "drop": drop if rng.random() < 0.5 else None,
    }  # fmt: skip


def _forward_inputs(rng: np.random.Generator, m: int) -> Arrays:
    i = _linear(rng, m)
    d = i["W"].shape[0]
    maybe = lambda a: a if rng.random() < 0.5 else None
    return i | {"bias": maybe(normal(rng, d)), "residual": maybe(normal(rng, m, d))}


def _lora(i: Arrays) -> LoRA:
    return LoRA(i["A"], i["B"], i["scale"])


def _p(i: Arrays) -> float:
    return i["drop"].p if i["drop"] else 0.0


def _backward_inputs(rng: np.random.Generator, m: int) -> Arrays:
    i = _linear(rng, m)
    d, r = i["B"].shape
    add = normal(rng, m, i["x"].shape[1]) if rng.random() < 0.5 else None
    return i | {"dy": normal(rng, m, d), "h": normal(rng, m, r), "add": add}


def _lora_backward(ops: Any, i: Arrays) -> tuple[Any, ...]:
    add = None if i["add"] is None else i["add"].copy()
    lora, drop, W = _lora(i), i["drop"], _pack(ops, i["W"])
    return tuple(ops.lora_backward(i["dy"], i["x"], i["h"], W, lora, drop, add=add))


def _pack(ops: Any, W: Any) -> Any:
    return ops.pack(W) if hasattr(ops, "pack") else W


# ---- transformer ------------------------------------------------------------------------------


def _norm(rng: np.random.Generator, m: int) -> Arrays:
    k = size(rng)
    x, w = normal(rng, m, k, size=10.0 ** rng.integers(-2, 3)), normal(rng, k)
    rstd = Reference().rms_norm_forward(x, w, 1e-5)[1]
    add = normal(rng, m, k) if rng.random() < 0.5 else None
    return {"x": x, "w": w, "dy": normal(rng, m, k), "rstd": rstd, "add": add}


def _norm_backward(ops: Any, i: Arrays) -> tuple[Any, ...]:
    add = None if i["add"] is None else i["add"].copy()
    return tuple(ops.rms_norm_backward(i["dy"], i["x"], i["w"], i["rstd"], add, True))


def _rope(rng: np.random.Generator, m: int) -> Arrays:
    D, n = int(rng.choice([2, 6, 32, 34, 64])), 13
    angle = rng.uniform(-9, 9, size=(n, D // 2))
    return {
        "x": normal(rng, m, D * int(rng.integers(1, 4))), "position": rng.integers(0, n, size=m),
        "cos": np.cos(angle).astype(np.float32), "sin": np.sin(angle).astype(np.float32), "D": D,
        "layout": str(rng.choice(["half", "interleaved"])), "inverse": bool(rng.random() < 0.5),
    }  # fmt: skip


def lengths(rng: np.random.Generator, m: int) -> list[int]:
    """m tokens cut into up to four sequences, some of which may be empty."""
    cuts = np.sort(rng.integers(0, m + 1, size=int(rng.integers(0, 4))))
    return np.diff(np.concatenate([[0], cuts, [m]])).tolist()


def _attention(rng: np.random.Generator, m: int) -> Arrays:
    D, G, group = (int(rng.choice(c)) for c in ([2, 8, 32, 33], [1, 2], [1, 3]))
    attn = Attn(G * group, G, D, float(np.float32(D**-0.5)), int(rng.choice([0, 0, 1, 5])))
    seqs = Seqs.of(lengths(rng, m))
    q, do = normal(rng, m, G * group * D), normal(rng, m, G * group * D)
    k, v = normal(rng, m, G * D), normal(rng, m, G * D)
    o, lse = Reference().attention_forward(q, k, v, seqs, attn)
    return {"q": q, "k": k, "v": v, "do": do, "o": o, "lse": lse, "seqs": seqs, "attn": attn}


def _swiglu(rng: np.random.Generator, m: int) -> Arrays:
    n = size(rng)
    gate = normal(rng, m, n, size=float(rng.choice([1, 10, 60])))
    return {"gate": gate, "up": normal(rng, m, n), "dy": normal(rng, m, n)}


def _embedding(rng: np.random.Generator, m: int) -> Arrays:
    vocab, k = size(rng), size(rng)
    W, dy = normal(rng, vocab, k), normal(rng, m, k)
    return {"ids": rng.integers(0, vocab, size=m), "W": W, "dy": dy}


# ---- loss -------------------------------------------------------------------------------------


def _loss(rng: np.random.Generator, m: int) -> Arrays:
    n = size(rng)
    logits = normal(rng, m, n, size=float(rng.choice([0.1, 3, 40])))
    labels = np.where(rng.random(m) < 0.3, IGNORE, rng.integers(0, n, size=m))
    lse = Reference().cross_entropy_forward(logits, labels)[1]
    weight = rng.random(m).astype(np.float32)
    return {"logits": logits, "labels": labels, "lse": lse, "weight": weight}


def _dropout(rng: np.random.Generator, m: int) -> Arrays:
    drop = Drop(float(rng.choice([0, 0.1, 0.9])), int(rng.integers(2**60)), 2**63 + 1, 5)
    return {"x": normal(rng, m, size(rng)), "drop": drop}


TABLE = (
    Op(
        "lora_forward",
        _forward_inputs,
        lambda ops, i: ops.lora_forward(
            i["x"], _pack(ops, i["W"]), i["bias"], _lora(i), i["drop"], i["residual"]
        ),
        lambda i: bounds.lora_forward(i["x"], i["W"], i["bias"], _lora(i), i["residual"], p=_p(i)),
        rows=("x", "residual"),
        row_outputs=(0, 1),
    ),
    Op(
        "lora_backward",
        _backward_inputs,
        _lora_backward,
        lambda i: bounds.lora_backward(
            i["dy"], i["x"], i["h"], i["W"], _lora(i), i["add"], p=_p(i)
        ),
        rows=("dy", "x", "h", "add"),
        given_away=("add",),
    ),
    Op(
        "rms_norm_forward",
        _norm,
        lambda ops, i: ops.rms_norm_forward(i["x"], i["w"], 1e-5),
        lambda i: bounds.rms_norm_forward(i["x"], i["w"], 1e-5),
        rows=("x", "dy", "rstd", "add"),
        row_outputs=(0, 1),
    ),
    Op(
        "rms_norm_backward",
        _norm,
        _norm_backward,
        lambda i: bounds.rms_norm_backward(i["dy"], i["x"], i["w"], i["rstd"], i["add"]),
        rows=("x", "dy", "rstd", "add"),
        given_away=("add",),
    ),
    Op(
        "rope",
        _rope,
        lambda ops, i: (
            ops.rope(i["x"], i["cos"], i["sin"], i["position"], i["D"], i["layout"], i["inverse"]),
        ),
        lambda i: (bounds.rope(i["x"], i["D"]),),
        rows=("x", "position"),
    ),
    Op(
        "attention_forward",
        _attention,
        lambda ops, i: ops.attention_forward(i["q"], i["k"], i["v"], i["seqs"], i["attn"]),
        lambda i: bounds.attention_forward(i["q"], i["k"], i["v"], i["seqs"], i["attn"]),
    ),
    Op(
        "attention_backward",
        _attention,
        lambda ops, i: ops.attention_backward(
            *(i[n] for n in ("do", "q", "k", "v", "o", "lse", "seqs", "attn"))
        ),
        lambda i: bounds.attention_backward(
            *(i[n] for n in ("do", "q", "k", "v", "o", "lse", "seqs", "attn"))
        ),
    ),
    Op(
        "swiglu_forward",
        _swiglu,
        lambda ops, i: (ops.swiglu_forward(i["gate"], i["up"]),),
        lambda i: (bounds.swiglu_forward(i["gate"], i["up"]),),
        rows=("gate", "up", "dy"),
    ),
    Op(
        "swiglu_backward",
        _swiglu,
        lambda ops, i: ops.swiglu_backward(i["dy"], i["gate"], i["up"]),
        lambda i: bounds.swiglu_backward(i["dy"], i["gate"], i["up"]),
        rows=("gate", "up", "dy"),
        row_outputs=(0, 1),
    ),
    Op(
        "embedding_forward",
        _embedding,
        lambda ops, i: (ops.embedding_forward(i["ids"], _pack(ops, i["W"])),),
        lambda i: (0.0,),
        rows=("ids", "dy"),
    ),
    Op(
        "embedding_backward",
        _embedding,
        lambda ops, i: (ops.embedding_backward(i["ids"], i["dy"], i["W"].shape[0]),),
        lambda i: (bounds.embedding_backward(i["ids"], i["dy"], i["W"].shape[0]),),
        rows=("ids", "dy"),
        row_outputs=(),
    ),
    Op(
        "cross_entropy_forward",
        _loss,
        lambda ops, i: ops.cross_entropy_forward(i["logits"], i["labels"]),
        lambda i: bounds.cross_entropy_forward(i["logits"], i["labels"]),
        rows=("logits", "labels", "lse", "weight"),
        row_outputs=(0, 1),
    ),
    Op(
        "cross_entropy_backward",
        _loss,
        lambda ops, i: (
            ops.cross_entropy_backward(i["logits"], i["labels"], i["lse"], i["weight"]),
        ),
        lambda i: (bounds.cross_entropy_backward(i["logits"], i["labels"], i["lse"], i["weight"]),),
        rows=("logits", "labels", "lse", "weight"),
    ),
    Op(
        "dropout",
        _dropout,
        lambda ops, i: (ops.dropout(i["x"], i["drop"]),),
        lambda i: (bounds.gamma(bounds.DROP) * np.abs(i["x"], dtype=np.float64) * 11,),
        rows=("x",),
    ),
)
