"""Golden vectors of a training step: AdamW, clipping, rates and decay, micro-batches."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pylora.conformance.bounds import ops as bounds
from pylora.conformance.vectors.cases import Case
from pylora.conformance.vectors.ops import draw, wide
from pylora.conformance.vectors.parts import loss_parts
from pylora.reference import IGNORE, Reference
from pylora.types import AdamW

_ref = Reference()


def cases() -> list[Case]:
    """All cases of this file."""
    usual: dict[str, Any] = {"lr": 0.01, "step": 3, "weight_decay": 0.1, "grad_scale": 0.5}
    return [
        _adamw("adamw", AdamW(**usual)),
        _adamw("adamw-first", AdamW(lr=0.01, step=1), fresh=True),
        _adamw("adamw-late", AdamW(**usual | {"step": 100_000})),
        _adamw("adamw-eps", AdamW(lr=0.01, step=2, eps=0.05)),
        _adamw("adamw-decay", AdamW(lr=0.1, step=2, weight_decay=2.5)),
        _adamw("adamw-betas", AdamW(lr=0.01, step=5, beta1=0.0, beta2=0.5)),
        _adamw("adamw-tiny", AdamW(lr=0.01, step=2), size=1e-7),
        _update(),
        _clip("clip", 0.05),
        _clip("clip-small", 0.02, size=0.01),
        _clip("clip-not", 1e3),
        _clip("clip-zero", 1.0, size=0.0),
        _micro_batches(),
    ]


def _adamw(name: str, o: AdamW, *, fresh: bool = False, size: float = 1.0) -> Case:
    params = {n: getattr(o, n) for n in ("lr", "step", "beta1", "beta2", "eps", "weight_decay")}
    case = Case(name, "adamw", ("O-3",), params | {"grad_scale": o.grad_scale})
    param, grad, m = (draw(f"{name}/{n}", (12,)) for n in ("param", "grad", "m"))
    # As large as after two steps: what the third adds shows whether beta2 was rounded to float32.
    v = 0.002 * draw(f"{name}/v", (12,)) ** 2
    f = np.float32
    grad, m, v = f(size) * grad, f(0.1 * size) * m, f(size * size) * v
    if fresh:
        m, v, grad[3] = 0 * v, 0 * v, 0
    case.inputs |= {"param": param, "grad": grad, "m": m, "v": v}
    p, g, m, v = (wide(a) for a in case.inputs.values())
    limits = bounds.adamw_step(p, g, m, v, o)
    _ref.adamw_step(p, g, m, v, o)
    for output, value, limit in zip(("param", "m", "v"), (p, m, v), limits):
        case.expect(f"new_{output}", value, limit, "bounds.adamw_step")
    return case


def _update() -> Case:
    """The first step of A, B and the bias of B, moments from zero: B at its own rate, no decay of
    the bias."""
    params: dict[str, Any] = {"lr": 0.01, "lora_plus_ratio": 16.0, "weight_decay": 0.3, "step": 1}
    params |= {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
    case = Case("update", "update", ("O-3", "O-5", "O-6"), params)
    for name, shape in (("A", (2, 5)), ("B", (4, 2)), ("bias", (4,))):
        param, grad = draw(f"update/{name}", shape), draw(f"update/d{name}", shape)
        case.inputs |= {name: param, f"d{name}": grad}
        rate = params["lr"] * (params["lora_plus_ratio"] if name == "B" else 1)
        decay = 0.0 if name == "bias" else params["weight_decay"]
        o, p, g = AdamW(lr=rate, step=1, weight_decay=decay), wide(param), wide(grad)
        m, v = np.zeros_like(p), np.zeros_like(p)
        limit = bounds.adamw_step(p, g, m, v, o)[0]
        _ref.adamw_step(p, g, m, v, o)
        spec = {"A": ("O-3", "O-5"), "B": ("O-6",), "bias": ("O-5",)}[name]
        case.expect(f"new_{name}", p, limit, "bounds.adamw_step", spec=spec)
    return case


def _clip(name: str, limit: float, size: float = 1.0) -> Case:
    """Gradients of three arrays, clipped by the norm of all of them together."""
    case = Case(name, "clip", ("O-4",), {"limit": limit})
    for i, shape in enumerate(((2, 5), (4, 2), (3,))):
        case.inputs[f"g.{i}"] = np.float32(size) * draw(f"{name}/{i}", shape)
    grads = {key: wide(a) for key, a in case.inputs.items()}
    count = sum(g.size for g in grads.values())
    norm = math.sqrt(sum(float((g * g).sum()) for g in grads.values()))
    factor = min(1.0, limit / norm) if norm else 1.0
    relative = bounds.gamma(count / 2 + 4)
    rule = "gamma_{n/2+4}: a sum of n squares, a root, a quotient, a product"
    case.expect("norm", np.array([norm]), relative * norm + bounds.tiny(), rule)
    for key, g in grads.items():
        bound = relative * factor * np.abs(g) if factor < 1 else 0.0
        case.expect(f"new_{key}", factor * g, bound, rule)
    return case


def _micro_batches() -> Case:
    """One step in parts of different lengths, one of them without a label: the mean is over all
    counted labels of the step."""
    parts, labels = [1, 4, 2, 3], np.array([5, 2, IGNORE, 0, 1, IGNORE, IGNORE, 3, 6, IGNORE])
    case = Case(
        "micro-batches", "micro_batches", ("O-1", "O-2"), {"parts": parts, "ignore": IGNORE}
    )
    case.inputs |= {"logits": draw("micro/logits", (10, 7), 2.0), "labels": labels.astype(np.int64)}
    logits, weight = wide(case.inputs["logits"]), np.full(10, 1 / (labels != IGNORE).sum())
    (nll, nll_bound), _, (d, d_bound) = loss_parts(logits, labels, weight)
    d_bound = d_bound + bounds.gamma(2) * np.abs(d)
    loss = np.array([float(nll @ weight)])
    bound = float(nll_bound @ weight) + bounds.gamma(len(labels) + 2) * loss
    case.expect("loss", loss, bound, "bounds.cross_entropy_forward, and gamma_{m+2} of the mean")
    case.expect("dlogits", d, d_bound, "bounds.cross_entropy_backward, and lse's error")
    return case
