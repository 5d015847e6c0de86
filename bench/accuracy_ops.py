"""The error of every operation against float64, on shapes of SmolLM2.

Inputs are float32 numbers that every contender gets; what a precision rounds of them (activations,
weights) is part of its error. Float32 results are also shown as a share of their derived bound.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pylora import backends
from pylora.backends.numpy import NumpyBackend
from pylora.conformance.bounds import ops as bounds
from pylora.errors import PyloraError
from pylora.types import Attn, LoRA, Seqs

ROWS, RANK, HEADS, KV_HEADS, HEAD_DIM, EPS = 128, 8, 9, 3, 64, 1e-5
ATTN = Attn(HEADS, KV_HEADS, HEAD_DIM, HEAD_DIM**-0.5)
SEQS = Seqs.of([ROWS])
SCALE = 2.0
Inputs = dict[str, np.ndarray]


@dataclass(frozen=True)
class Op:
    """run(ops, inputs, W, feed, kept) -> results by name; bound -> of the same results, float32.

    feed rounds an array that only feeds a product to what the precision keeps, `kept` asks for
    such a result.
    """

    run: Callable[..., tuple[Any, ...]]
    results: tuple[str, ...]
    bound: Callable[[Inputs], tuple[Any, ...]]


def _lora(i: Inputs) -> LoRA:
    return LoRA(i["A"], i["B"], SCALE)


OPS: dict[str, Op] = {
    "LoRA linear, forward": Op(
        lambda ops, i, W, feed, kept: ops.lora_forward(feed(i["x"]), W, None, _lora(i), **kept)[:1],
        ("y",),
        lambda i: bounds.lora_forward(i["x"], i["W"], None, _lora(i))[:1],
    ),
    "LoRA linear, backward": Op(
        lambda ops, i, W, feed, kept: ops.lora_backward(
            feed(i["dy"]), feed(i["x"]), i["h"], W, _lora(i), **kept
        ),
        ("dx", "dA", "dB"),
        lambda i: bounds.lora_backward(i["dy"], i["x"], i["h"], i["W"], _lora(i)),
    ),
    "RMS norm, forward": Op(
        lambda ops, i, W, feed, kept: ops.rms_norm_forward(i["x"], i["w"], EPS, **kept)[:1],
        ("norm",),
        lambda i: bounds.rms_norm_forward(i["x"], i["w"], EPS)[:1],
    ),
    "RMS norm, backward": Op(
        lambda ops, i, W, feed, kept: ops.rms_norm_backward(
            feed(i["dy"]), i["x"], i["w"], i["rstd"]
        )[:1],
        ("norm dx",),
        lambda i: bounds.rms_norm_backward(i["dy"], i["x"], i["w"], i["rstd"])[:1],
    ),
    "RoPE": Op(
        lambda ops, i, W, feed, kept: (
            ops.rope(feed(i["q"]), i["cos"], i["sin"], np.arange(ROWS), HEAD_DIM, **kept),
        ),
        ("rope",),
        lambda i: (bounds.rope(i["q"], HEAD_DIM),),
    ),
    "attention, forward": Op(
        lambda ops, i, W, feed, kept: ops.attention_forward(
            feed(i["q"]), feed(i["k"]), feed(i["v"]), SEQS, ATTN, **kept
        )[:1],
        ("o",),
        lambda i: bounds.attention_forward(i["q"], i["k"], i["v"], SEQS, ATTN)[:1],
    ),
    "attention, backward": Op(
        lambda ops, i, W, feed, kept: ops.attention_backward(
            feed(i["do"]),
            feed(i["q"]),
            feed(i["k"]),
            feed(i["v"]),
            feed(i["o"]),
            i["lse"],
            SEQS,
            ATTN,
            **kept,
        ),
        ("dq", "dk", "dv"),
        lambda i: bounds.attention_backward(
            i["do"], i["q"], i["k"], i["v"], i["o"], i["lse"], SEQS, ATTN
        ),
    ),
    "SwiGLU, forward": Op(
        lambda ops, i, W, feed, kept: (ops.swiglu_forward(feed(i["gate"]), feed(i["up"]), **kept),),
        ("swiglu",),
        lambda i: (bounds.swiglu_forward(i["gate"], i["up"]),),
    ),
    "SwiGLU, backward": Op(
        lambda ops, i, W, feed, kept: ops.swiglu_backward(
            feed(i["dswiglu"]), feed(i["gate"]), feed(i["up"]), **kept
        ),
        ("dgate", "dup"),
        lambda i: bounds.swiglu_backward(i["dswiglu"], i["gate"], i["up"]),
    ),
    "cross-entropy, forward": Op(
        lambda ops, i, W, feed, kept: ops.cross_entropy_forward(i["logits"], i["labels"])[:1],
        ("nll",),
        lambda i: bounds.cross_entropy_forward(i["logits"], i["labels"])[:1],
    ),
    "cross-entropy, backward": Op(
        lambda ops, i, W, feed, kept: (
            ops.cross_entropy_backward(i["logits"], i["labels"], i["lse_ce"], i["weight"]),
        ),
        ("dlogits",),
        lambda i: (
            bounds.cross_entropy_backward(i["logits"], i["labels"], i["lse_ce"], i["weight"]),
        ),
    ),
}


def inputs(model: Path) -> Inputs:
    """float32 inputs: a weight of a real one's deviation (itself it comes from a quantized file,
    and would not show what quantizing loses), activations of about the sizes that the model has."""
    from pylora.formats import open_checkpoint

    rng = np.random.default_rng(0)

    def normal(*shape: int, size: float = 1.0) -> np.ndarray:
        return (size * rng.standard_normal(shape)).astype(np.float32)

    with open_checkpoint(model) as checkpoint:
        real = checkpoint.load("model.layers.10.self_attn.q_proj.weight")
        w = checkpoint.load("model.layers.10.input_layernorm.weight")
    d, k = real.shape
    W = normal(d, k, size=float(real.std()))
    i = {"W": W, "w": w, "x": normal(ROWS, k), "dy": normal(ROWS, d, size=1e-3)}
    i |= {"A": normal(RANK, k, size=k**-0.5), "B": normal(d, RANK, size=0.02)}
    i |= {"q": normal(ROWS, HEADS * HEAD_DIM), "do": normal(ROWS, HEADS * HEAD_DIM, size=1e-3)}
    i |= {"k": normal(ROWS, KV_HEADS * HEAD_DIM), "v": normal(ROWS, KV_HEADS * HEAD_DIM)}
    angle = np.arange(ROWS)[:, None] / 1e5 ** (np.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
    i |= {"cos": np.cos(angle).astype(np.float32), "sin": np.sin(angle).astype(np.float32)}
    i |= {"gate": normal(ROWS, 1536, size=2.0), "up": normal(ROWS, 1536)}
    i |= {"dswiglu": normal(ROWS, 1536, size=1e-3), "logits": normal(ROWS, 8192, size=4.0)}
    i |= {"labels": rng.integers(0, 8192, ROWS), "weight": np.full(ROWS, 1 / ROWS, np.float32)}
    # What forward passes on to backward, rounded once from float64.
    exact, f = NumpyBackend(), lambda a: a.astype(np.float64)
    _, h = exact.lora_forward(f(i["x"]), f(W), None, LoRA(f(i["A"]), f(i["B"]), SCALE))
    o, lse = exact.attention_forward(f(i["q"]), f(i["k"]), f(i["v"]), SEQS, ATTN)
    i |= {"h": h, "o": o, "lse": lse}
    i["rstd"] = exact.rms_norm_forward(f(i["x"]), f(w), EPS)[1]
    i["lse_ce"] = exact.cross_entropy_forward(f(i["logits"]), i["labels"])[1]
    return {n: a.astype(np.float32) if a.dtype.kind == "f" else a for n, a in i.items()}


def ours(i: Inputs, precision: str) -> dict[str, np.ndarray]:
    """Every result of the C backend in a precision, as float32."""
    ops: Any = backends.get("c")
    if precision == "fp32":
        W, kept, feed, widen = ops.pack(i["W"]), {}, np.asarray, np.asarray
    else:
        from pylora.numbers.precision import BF16, to_bf16, widened

        W, widen = ops.pack(i["W"], precision), widened
        narrow = ops.activation_dtype(precision) == BF16
        kept, feed = ({"dtype": BF16}, to_bf16) if narrow else ({}, np.asarray)
    out = {}
    for title, op in OPS.items():
        try:
            for name, array in zip(op.results, op.run(ops, i, W, feed, kept)):
                out[name] = np.array(widen(array))
        except PyloraError as error:
            print(f"  {title}, {precision}: {error}", flush=True)
    return out


def exact(i: Inputs) -> dict[str, np.ndarray]:
    """The same in float64."""
    ops = NumpyBackend()
    wide = {n: a.astype(np.float64) if a.dtype.kind == "f" else a for n, a in i.items()}
    out = {}
    for op in OPS.values():
        out |= dict(zip(op.results, op.run(ops, wide, wide["W"], np.asarray, {})))
    return out


def measure(precisions: list[str], model: Path, peer: Any) -> dict[str, Any]:
    """{operation: {contender: {"rms": ..., "max": ..., "of_bound": ...}}}: the root mean square of
    the error over that of the result, the largest error over the largest result, and (float32) the
    largest share of the bound; the worst of an operation's results."""
    i = inputs(model)
    want = exact(i)
    np.savez(peer.folder / "ops.npz", **i)
    got = {}
    for precision in precisions:
        try:
            got[f"pylora {precision}"] = ours(i, precision)
        except PyloraError as error:
            print(f"  {precision}: {error}", flush=True)
    for precision in ("fp32", "bf16"):
        found = peer.run("ops", precision)
        if found is not None:
            got[f"PEFT {precision}"] = found
    table: dict[str, Any] = {}
    for name, op in OPS.items():
        limits = dict(zip(op.results, op.bound(i)))
        row = table[name] = {}
        for contender, results in got.items():
            errors = {
                r: results[r].astype(np.float64) - want[r] for r in op.results if r in results
            }
            if not errors:
                continue
            row[contender] = {
                "rms": max(_rms(e) / _rms(want[r]) for r, e in errors.items()),
                "max": max(_top(e) / _top(want[r]) for r, e in errors.items()),
            }
            if contender.endswith("fp32"):
                with np.errstate(divide="ignore", invalid="ignore"):
                    shares = [np.nanmax(abs(e) / limits[r]) for r, e in errors.items()]
                row[contender]["of_bound"] = float(max(shares))
    return table


def _rms(a: np.ndarray) -> float:
    return float(np.sqrt((a * a).mean()))


def _top(a: np.ndarray) -> float:
    return float(abs(a).max())
