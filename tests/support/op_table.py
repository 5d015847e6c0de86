"""Every operation as one row of a table: how to make inputs, run it, and bound its error.

Tests that hold for all operations (agreement, layouts, rows, threads, no tokens) walk the table, so
an operation that is added here is held to all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import bounds
import bounds_bf16
import numpy as np

from pylora.numbers.precision import BF16, from_bf16, to_bf16, widened
from pylora.ops.features import ACTIVATIONS
from pylora.reference import IGNORE, Reference
from pylora.types import Attn, Drop, LoRA, Projection, ProjectionGrad, Seqs

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
    tensor_cores: Callable[[Arrays], tuple[Any, ...]] | None = None  # what those round beside

    def limit(self, ops: Any, inputs: Arrays) -> tuple[Any, ...]:
        """The bound for this backend."""
        limit = self.bound(inputs)
        if ops.name != "cuda" or not self.tensor_cores:
            return limit
        return tuple(a + b for a, b in zip(limit, self.tensor_cores(inputs), strict=True))

    def __str__(self) -> str:
        return self.name


def normal(rng: np.random.Generator, *shape: int, size: float = 1.0) -> np.ndarray:
    return (size * rng.normal(size=shape)).astype(np.float32)


def size(rng: np.random.Generator) -> int:
    """A number of features on either side of the widths that kernels work in."""
    return int(rng.choice([1, 2, 7, 15, 16, 17, 31, 32, 33, 65, 100]))


def in_float64(inputs: Arrays) -> Arrays:
    def wide(a: Any) -> Any:
        if getattr(a, "dtype", None) in (np.float32, BF16):
            return widened(a).astype(np.float64)
        return a

    return {n: wide(a) for n, a in inputs.items()}


def take_row(op: Op, inputs: Arrays, i: int) -> Arrays:
    """The inputs of token i alone."""
    one = {n: a[i : i + 1] if n in op.rows and a is not None else a for n, a in inputs.items()}
    for name, drop in one.items():
        if isinstance(drop, Drop):
            one[name] = replace(drop, row0=drop.row0 + i)
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


def _pack(ops: Any, W: Any, precision: str = "fp32") -> Any:
    return ops.pack(W, precision) if hasattr(ops, "pack") else W


# ---- several projections of one x, and bfloat16 -----------------------------------------------


def _bf16(a: np.ndarray) -> np.ndarray:
    """The same numbers rounded to bfloat16, in float32."""
    return from_bf16(to_bf16(a))


def has_bf16(ops: Any) -> bool:
    """Whether the backend computes with arrays of bfloat16."""
    return hasattr(ops, "isa") or getattr(ops, "name", "") == "cuda"


def _own(ops: Any, a: Any) -> Any:
    """A BF16 array as the backend takes it: as it is, or in its own dtype."""
    narrow = has_bf16(ops) or getattr(a, "dtype", None) != BF16
    return a if narrow else widened(a)


def _out(ops: Any, dtype: Any) -> Any:
    """BF16 where the backend has it; elsewhere results stay in the computation's dtype."""
    return dtype if has_bf16(ops) else None


def _together(rng: np.random.Generator, m: int) -> Arrays:
    """Two projections of one x, flat: names end in their number."""
    one, two = _forward_inputs(rng, m), _forward_inputs(rng, m)
    k = one["x"].shape[1]
    two |= {"W": normal(rng, two["W"].shape[0], k), "A": normal(rng, two["A"].shape[0], k)}
    flat = {f"{n}{i}": p[n] for i, p in enumerate((one, two)) for n in p if n != "x"}
    for i in range(2):
        d, r = flat[f"B{i}"].shape
        flat |= {f"dy{i}": normal(rng, m, d), f"h{i}": normal(rng, m, r)}
    add = normal(rng, m, k) if rng.random() < 0.5 else None
    return flat | {"x": one["x"], "add": add, "precision": "fp32"}


def _together_bf16(rng: np.random.Generator, m: int) -> Arrays:
    """The same with weights that bfloat16 has, and x and dy in bfloat16 now and then."""
    i = _together(rng, m)
    i |= {n: _bf16(i[n]) for n in ("W0", "W1")}
    i |= {n: to_bf16(i[n]) for n in ("x", "dy0", "dy1") if rng.random() < 0.5}
    dtype = BF16 if rng.random() < 0.5 else None
    return i | {"precision": "bf16", "residual0": None, "dtype": dtype, "add": None}


def _of(i: Arrays, n: int) -> Arrays:
    return {name: i[f"{name}{n}"] for name in ("W", "A", "B", "scale", "drop", "bias", "residual")}


def _linear_forward(ops: Any, i: Arrays) -> tuple[Any, ...]:
    projections = []
    for n in range(2):
        p, dtype = _of(i, n), _out(ops, i.get("dtype")) if n == 0 else None
        W = _pack(ops, p["W"], i["precision"])
        projections.append(Projection(W, p["bias"], _lora(p), p["drop"], p["residual"], dtype))
    results = ops.linear_forward(_own(ops, i["x"]), projections)
    return tuple(a for pair in results for a in pair)


def _linear_backward(ops: Any, i: Arrays) -> tuple[Any, ...]:
    add = None if i["add"] is None else i["add"].copy()
    projections = []
    for n in range(2):
        p, W = _of(i, n), _pack(ops, i[f"W{n}"], i["precision"])
        dy = _own(ops, i[f"dy{n}"])
        projections.append(ProjectionGrad(dy, W, i[f"h{n}"], _lora(p), p["drop"]))
    dx, grads = ops.linear_backward(
        _own(ops, i["x"]), projections, add=add, dtype=_out(ops, i.get("dtype"))
    )
    return dx, *(a for pair in grads for a in pair)


def _linear_forward_bound(i: Arrays) -> tuple[Any, ...]:
    i, out = in_float64(i), []
    value = _linear_forward(Reference(), i)
    for n in range(2):
        p = _of(i, n)
        args = i["x"], p["W"], p["bias"], _lora(p), p["residual"]
        if i["precision"] == "fp32":
            y, h = bounds.lora_forward(*args, p=_p(p))
        else:
            y, h = bounds_bf16.lora_forward(*args, p=_p(p))
            if n == 0 and i["dtype"] is not None:
                y = bounds_bf16.stored(y, value[0])
        out += [y, h]
    return tuple(out)


def _linear_backward_bound(i: Arrays) -> tuple[Any, ...]:
    """Of dx: the sum of the projections' magnitudes, as one sum of all their outputs."""
    i, grads, total = in_float64(i), [], 0.0
    outputs = sum(i[f"W{n}"].shape[0] + i[f"A{n}"].shape[0] for n in range(2))
    for n in range(2):
        p, dy, h = _of(i, n), i[f"dy{n}"], i[f"h{n}"]
        if i["precision"] == "fp32":
            dx, dA, dB = bounds.lora_backward(dy, i["x"], h, p["W"], _lora(p), None, p=_p(p))
        else:
            dx, dA, dB = bounds_bf16.lora_backward(dy, i["x"], h, p["W"], _lora(p), p=_p(p))
        low = np.abs(dy) @ np.abs(p["B"]) @ np.abs(p["A"]) * p["scale"] / (1 - _p(p))
        size = np.abs(dy) @ np.abs(p["W"]) + low
        total = total + dx + bounds.gamma(outputs + 8) * size * 1.02
        grads += [dA, dB]
    if i["add"] is not None:
        total = total + bounds.gamma(outputs + 8) * np.abs(i["add"])
    if i.get("dtype") is not None:
        total = bounds_bf16.stored(total, _linear_backward(Reference(), i)[0])
    return total, *grads


# ---- transformer ------------------------------------------------------------------------------


def _norm(rng: np.random.Generator, m: int) -> Arrays:
    k = size(rng)
    x, w = normal(rng, m, k, size=10.0 ** rng.integers(-2, 3)), normal(rng, k)
    rstd = Reference().rms_norm_forward(x, w, 1e-5)[1]
    add = normal(rng, m, k) if rng.random() < 0.5 else None
    return {"x": x, "w": w, "dy": normal(rng, m, k), "rstd": rstd, "add": add}


def _norm_backward(ops: Any, i: Arrays) -> tuple[Any, ...]:
    add = None if i["add"] is None else i["add"].copy()
    dy, x = _own(ops, i["dy"]), _own(ops, i["x"])
    return tuple(ops.rms_norm_backward(dy, x, i["w"], i["rstd"], add, True))


def _rope_run(ops: Any, i: Arrays) -> tuple[Any, ...]:
    return (
        ops.rope(
            _own(ops, i["x"]), i["cos"], i["sin"], i["position"], i["D"], i["layout"], i["inverse"],
            _out(ops, i.get("dtype")),
        ),
    )  # fmt: skip


def _attention_run(ops: Any, i: Arrays, names: str) -> tuple[Any, ...]:
    op = ops.attention_backward if "do" in names else ops.attention_forward
    arrays = (_own(ops, i[n]) for n in names.split())
    return tuple(op(*arrays, i["seqs"], i["attn"], _out(ops, i.get("dtype"))))


def _rope(rng: np.random.Generator, m: int) -> Arrays:
    D, n = int(rng.choice([2, 6, 32, 34, 64])), 13
    pairs = int(rng.choice([D // 2, D // 2, (D + 2) // 4]))  # or a part of a head
    angle = rng.uniform(-9, 9, size=(n, pairs))
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
    window, cap = int(rng.choice([0, 0, 1, 5])), float(rng.choice([0, 0, 0, 1.5]))
    attn = Attn(G * group, G, D, float(np.float32(D**-0.5)), window, cap)
    seqs = Seqs.of(lengths(rng, m))
    q, do = normal(rng, m, G * group * D), normal(rng, m, G * group * D)
    k, v = normal(rng, m, G * D), normal(rng, m, G * D)
    o, lse = Reference().attention_forward(q, k, v, seqs, attn)
    return {"q": q, "k": k, "v": v, "do": do, "o": o, "lse": lse, "seqs": seqs, "attn": attn}


def _swiglu(rng: np.random.Generator, m: int) -> Arrays:
    n = size(rng)
    gate = normal(rng, m, n, size=float(rng.choice([1, 10, 60])))
    return {"gate": gate, "up": normal(rng, m, n), "dy": normal(rng, m, n)}


def _layer_norm(rng: np.random.Generator, m: int) -> Arrays:
    k = size(rng)
    x = normal(rng, m, k, size=10.0 ** rng.integers(-2, 3)) + np.float32(rng.choice([0, 3]))
    w, b = normal(rng, k), normal(rng, k) if rng.random() < 0.5 else None
    rstd = Reference().layer_norm_forward(x, w, b, 1e-3)[1]
    add = normal(rng, m, k) if rng.random() < 0.5 else None
    return {"x": x, "w": w, "b": b, "dy": normal(rng, m, k), "rstd": rstd, "add": add}


def _layer_norm_backward(ops: Any, i: Arrays) -> tuple[Any, ...]:
    add = None if i["add"] is None else i["add"].copy()
    dy, x = _own(ops, i["dy"]), _own(ops, i["x"])
    return (ops.layer_norm_backward(dy, x, i["w"], i["rstd"], add),)


def _activation(rng: np.random.Generator, m: int) -> Arrays:
    n = size(rng)
    x = normal(rng, m, n, size=float(rng.choice([0.01, 1, 5])))
    up = normal(rng, m, n) if rng.random() < 0.5 else None
    return {"x": x, "up": up, "dy": normal(rng, m, n), "kind": str(rng.choice(ACTIVATIONS))}


def _activation_run(ops: Any, i: Arrays, names: str) -> tuple[Any, ...]:
    x, up = _own(ops, i["x"]), None if i["up"] is None else _own(ops, i["up"])
    if "dy" not in names:
        return (ops.activation_forward(x, up, i["kind"], _out(ops, i.get("dtype"))),)
    dy = _own(ops, i["dy"])
    dx, dup = ops.activation_backward(dy, x, up, i["kind"], _out(ops, i.get("dtype")))
    return dx, dx if dup is None else dup


def _activation_bound(i: Arrays) -> tuple[Any, ...]:
    dx, dup = bounds.activation_backward(i["dy"], i["x"], i["up"], i["kind"])
    return dx, dx if i["up"] is None else dup


def _cap(rng: np.random.Generator, m: int) -> Arrays:
    x, cap = normal(rng, m, size(rng), size=3.0), float(rng.choice([0.0, 1.5, 30.0]))
    times = float(np.float32(rng.choice([0.25, 1.7])))
    y = Reference().soft_cap_forward(x, times, cap)
    return {"x": x, "y": y, "dy": normal(rng, *x.shape), "times": times, "cap": cap}


def _choose(rng: np.random.Generator, m: int) -> Arrays:
    """Logits that are apart, so that the choice does not hang on a rounding."""
    n = int(rng.choice([1, 2, 5, 17, 33]))
    ranks = np.argsort(rng.random((m, n)), axis=1)
    logits = (0.5 * ranks + 0.2 * rng.random((m, n))).astype(np.float32)
    return {"logits": logits, "k": int(rng.integers(1, n + 1)), "normalize": bool(rng.integers(2))}


def _choose_run(ops: Any, i: Arrays) -> tuple[Any, ...]:
    choice = ops.choose(i["logits"], i["k"], i["normalize"])
    chosen = choice.chosen
    for e, (rows, places) in enumerate(zip(choice.rows, choice.places, strict=True)):
        assert (chosen[rows, places] == e).all() and rows.size == (chosen == e).sum()
    found = ops.to_numpy(choice.probabilities), ops.to_numpy(choice.weights)
    return *found, chosen.astype(i["logits"].dtype)


def _choose_bound(i: Arrays) -> tuple[Any, ...]:
    weights = Reference().choose(i["logits"], i["k"], i["normalize"]).weights
    return *bounds.choose(i["logits"], weights, i["normalize"]), 0.0


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


def _loss_bound(i: Arrays) -> tuple[Any, ...]:
    """Of nll, lse, dlogits: the softmax is taken from the computed lse, off by its own bound."""
    nll, lse = bounds.cross_entropy_forward(i["logits"], i["labels"])
    exact = Reference().cross_entropy_forward(i["logits"].astype(np.float64), i["labels"])[1]
    d = bounds.cross_entropy_backward(i["logits"], i["labels"], exact, i["weight"])
    p = np.exp(i["logits"] - exact[:, None]) * np.expm1(lse)[:, None]
    counted = np.where(i["labels"] == IGNORE, 0, i["weight"])
    return nll, lse, d + 1.01 * p * counted[:, None]


def _dropout(rng: np.random.Generator, m: int) -> Arrays:
    drop = Drop(float(rng.choice([0, 0.1, 0.9])), int(rng.integers(2**60)), 2**63 + 1, 5)
    return {"x": normal(rng, m, size(rng)), "drop": drop}


def _cast(rng: np.random.Generator, m: int) -> Arrays:
    return {"x": normal(rng, m, size(rng), size=10.0 ** rng.integers(-30, 30))}


TABLE: tuple[Op, ...] = (
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
        "linear_forward",
        _together,
        _linear_forward,
        _linear_forward_bound,
        rows=("x", "residual0", "residual1"),
        row_outputs=(0, 1, 2, 3),
    ),
    Op(
        "linear_backward",
        _together,
        _linear_backward,
        _linear_backward_bound,
        rows=("x", "dy0", "dy1", "h0", "h1", "add"),
        given_away=("add",),
    ),
    Op(
        "linear_forward bf16",
        _together_bf16,
        _linear_forward,
        _linear_forward_bound,
        rows=("x", "residual1"),
        row_outputs=(0, 1, 2, 3),
    ),
    Op(
        "linear_backward bf16",
        _together_bf16,
        _linear_backward,
        _linear_backward_bound,
        rows=("x", "dy0", "dy1", "h0", "h1"),
    ),
    Op(
        "rms_norm_forward",
        _norm,
        lambda ops, i: ops.rms_norm_forward(
            _own(ops, i["x"]), i["w"], 1e-5, _out(ops, i.get("dtype"))
        ),
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
        _rope_run,
        lambda i: (bounds.rope(i["x"], i["D"]),),
        rows=("x", "position"),
    ),
    Op(
        "attention_forward",
        _attention,
        lambda ops, i: _attention_run(ops, i, "q k v"),
        lambda i: bounds.attention_forward(i["q"], i["k"], i["v"], i["seqs"], i["attn"]),
    ),
    Op(
        "attention_backward",
        _attention,
        lambda ops, i: _attention_run(ops, i, "do q k v o lse"),
        lambda i: bounds.attention_backward(
            *(i[n] for n in ("do", "q", "k", "v", "o", "lse", "seqs", "attn"))
        ),
    ),
    Op(
        "swiglu_forward",
        _swiglu,
        lambda ops, i: (
            ops.swiglu_forward(_own(ops, i["gate"]), _own(ops, i["up"]), _out(ops, i.get("dtype"))),
        ),
        lambda i: (bounds.swiglu_forward(i["gate"], i["up"]),),
        rows=("gate", "up", "dy"),
    ),
    Op(
        "swiglu_backward",
        _swiglu,
        lambda ops, i: ops.swiglu_backward(
            *(_own(ops, i[n]) for n in ("dy", "gate", "up")), _out(ops, i.get("dtype"))
        ),
        lambda i: bounds.swiglu_backward(i["dy"], i["gate"], i["up"]),
        rows=("gate", "up", "dy"),
        row_outputs=(0, 1),
    ),
    Op(
        "layer_norm_forward",
        _layer_norm,
        lambda ops, i: ops.layer_norm_forward(
            _own(ops, i["x"]), i["w"], i["b"], 1e-3, _out(ops, i.get("dtype"))
        ),
        lambda i: bounds.layer_norm_forward(i["x"], i["w"], i["b"], 1e-3),
        rows=("x", "dy", "rstd", "add"),
        row_outputs=(0, 1),
    ),
    Op(
        "layer_norm_backward",
        _layer_norm,
        _layer_norm_backward,
        lambda i: (bounds.layer_norm_backward(i["dy"], i["x"], i["w"], i["rstd"], i["add"]),),
        rows=("x", "dy", "rstd", "add"),
        given_away=("add",),
    ),
    Op(
        "activation_forward",
        _activation,
        lambda ops, i: _activation_run(ops, i, "x up"),
        lambda i: (bounds.activation_forward(i["x"], i["up"], i["kind"]),),
        rows=("x", "up", "dy"),
    ),
    Op(
        "activation_backward",
        _activation,
        lambda ops, i: _activation_run(ops, i, "dy x up"),
        _activation_bound,
        rows=("x", "up", "dy"),
        row_outputs=(0, 1),
    ),
    Op(
        "soft_cap_forward",
        _cap,
        lambda ops, i: (ops.soft_cap_forward(i["x"], i["times"], i["cap"]),),
        lambda i: (bounds.soft_cap_forward(i["x"], i["times"], i["cap"]),),
        rows=("x", "y", "dy"),
    ),
    Op(
        "soft_cap_backward",
        _cap,
        lambda ops, i: (ops.soft_cap_backward(i["dy"], i["y"], i["times"], i["cap"]),),
        lambda i: (bounds.soft_cap_backward(i["dy"], i["y"], i["times"], i["cap"]),),
        rows=("x", "y", "dy"),
    ),
    Op(
        "choose",
        _choose,
        _choose_run,
        _choose_bound,
        rows=("logits",),
        row_outputs=(0, 1, 2),
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
        "cross_entropy",
        _loss,
        lambda ops, i: ops.cross_entropy(i["logits"], i["labels"], i["weight"]),
        _loss_bound,
        rows=("logits", "labels", "lse", "weight"),
        row_outputs=(0, 1, 2),
    ),
    Op(
        "dropout",
        _dropout,
        lambda ops, i: (ops.dropout(i["x"], i["drop"]),),
        lambda i: (bounds.gamma(bounds.DROP) * np.abs(i["x"], dtype=np.float64) * 11,),
        rows=("x",),
    ),
)


# ---- what only feeds products, in bfloat16 ----------------------------------------------------


def narrow(name: str, inputs: tuple[str, ...], outputs: tuple[int, ...]) -> Op:
    """The operation of that name with these inputs in bfloat16 now and then, and these outputs."""
    op = next(op for op in TABLE if op.name == name)

    def make(rng: np.random.Generator, m: int) -> Arrays:
        i = op.make(rng, m)
        chosen = {n: to_bf16(i[n]) for n in inputs if rng.random() < 0.7}
        return i | chosen | ({"add": None} if "add" in i else {}) | {"dtype": BF16}

    def bound(i: Arrays) -> tuple[Any, ...]:
        i = in_float64(i)
        limits = list(op.bound(i))
        for n, value in enumerate(op.run(Reference(), i)):
            if n in outputs:
                limits[n] = bounds_bf16.stored(limits[n], value)
        return tuple(limits)

    return replace(op, name=f"{name} bf16", make=make, bound=bound, given_away=())


TABLE += (
    Op(
        "cast",
        _cast,
        lambda ops, i: (ops.cast(_own(ops, i["x"]), _out(ops, i.get("dtype"))),),
        lambda i: (0.0,),
        rows=("x",),
    ),
)


def _on_tensor_cores(rounded: Callable[..., tuple[Any, ...]], names: str) -> Any:
    """What attention rounds where q, k and v are bfloat16 and the heads fit (pylora_cuda.h)."""

    def more(i: Arrays) -> tuple[Any, ...]:
        used = all(i[n].dtype == BF16 for n in "qkv") and i["attn"].head_dim % 8 == 0
        i = in_float64(i)
        extra = rounded(*(i[n] for n in names.split()), i["seqs"], i["attn"])
        return tuple((1 + bounds_bf16.U) * used * a for a in extra)

    return more


TABLE += (
    narrow("cast", ("x",), (0,)),
    narrow("rms_norm_forward", ("x",), (0,)),
    narrow("rms_norm_backward", ("x", "dy"), ()),
    narrow("rope", ("x",), (0,)),
    narrow("layer_norm_forward", ("x",), (0,)),
    narrow("layer_norm_backward", ("x", "dy"), ()),
    narrow("activation_forward", ("x",), (0,)),
    narrow("activation_backward", ("dy", "x"), (0, 1)),
    narrow("swiglu_forward", ("gate", "up"), (0,)),
    narrow("swiglu_backward", ("dy", "gate", "up"), (0, 1)),
    replace(
        narrow("attention_forward", ("q", "k", "v"), (0,)),
        tensor_cores=_on_tensor_cores(bounds_bf16.attention_forward, "q k v"),
    ),
    replace(
        narrow("attention_backward", ("do", "q", "k", "v", "o"), (0, 1, 2)),
        tensor_cores=_on_tensor_cores(bounds_bf16.attention_backward, "do q k v o lse"),
    ),
)
