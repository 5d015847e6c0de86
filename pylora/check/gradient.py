"""The gradients of a whole model: against finite differences of its loss, and in float32 against
float64.

Along a direction D the slope sum(gradient * D) must be that of t -> loss(theta + t D). Central
differences at two steps, h and h/2, give it twice; Richardson extrapolation combines them, and
their difference over three, the term it removes, bounds what is left. Rounding of the loss is the
other part of the bound.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from pylora.check.report import Finding
from pylora.check.rounding import Exact, Rounded
from pylora.check.sample import FIELDS, Batch, Part, counted
from pylora.conformance.bounds.ops import unit
from pylora.model.linear import Grads, LoRAGrad
from pylora.model.llama import Llama
from pylora.numbers import random
from pylora.types import LoRA

SIGMAS = 6.0  # beyond this many standard deviations an error is no rounding
SAMPLES = 2  # random models of rounding
Adapters = Mapping[str, LoRA]


def in_float64(
    llama: Llama, part: Part, batch: Batch, seed: int, modules: dict[str, dict[str, Any]]
) -> Iterator[Finding]:
    """Finite differences of the part in float64, then the backend's gradients against float64's.

    `llama` is the same part on the backend in use; its adapter is set here.
    """
    exact, adapter = part.model(Exact()), part.wide_adapter
    nll, grads = exact.loss(batch.ids, batch.labels, batch.seqs)
    rounded: list[Grads] = []
    off = 0.0
    for k in range(SAMPLES):
        other, more = part.model(Rounded(seed + k)).loss(batch.ids, batch.labels, batch.seqs)
        rounded.append(more or {})
        off += float(abs(other - nll).sum()) / counted(batch) / SAMPLES
    held = _held(exact)
    # The model of rounding is of float32; float64's is smaller by the ratio of the units.
    noise = SIGMAS * off * unit("f64") / unit("f32")
    for name in ("A", "B"):
        direction = _direction(adapter, seed, (name,) if name == "A" else FIELDS[1:])
        loss = _loss_along(exact, held, direction, batch)
        yield _directional(f"gradient of {name}", loss, grads or {}, direction, 2.0**-8, noise)

    llama.attach(part.adapter)
    _, backend = llama.loss(batch.ids, batch.labels, batch.seqs)
    yield _compare(llama, backend or {}, grads or {}, rounded, part, modules)


# ---- finite differences --------------------------------------------------------------------------


def _direction(adapter: Adapters, seed: int, fields: tuple[str, ...]) -> dict[str, LoRAGrad]:
    """Standard normal numbers (Philox), times the root mean square of the array they are for."""
    out = {}
    for path, lora in adapter.items():
        parts: dict[str, Any] = {}
        for f in FIELDS:
            array = getattr(lora, f)
            if array is None:
                continue
            z = np.zeros(array.shape)
            if f in fields and array.size:
                stream = random.stream("check", "direction", path, f)
                size = math.sqrt(float((array.astype(np.float64) ** 2).mean())) or 0.01
                z = random.normal(array.shape, size, seed=seed, stream=stream)
            parts[f] = z.astype(array.dtype)
        out[path] = LoRAGrad(**parts)
    return out


def _held(model: Llama) -> Adapters:
    """The attached adapter, DoRA's lengths held as they are: they are no part of the gradient."""
    return {path: model.modules[path].measured(lora) for path, lora in model.placed.items()}


def _loss_along(
    model: Llama, adapter: Adapters, direction: Mapping[str, LoRAGrad], batch: Batch
) -> Callable[[float], float]:
    """t -> the mean loss with the adapter moved by t times the direction."""

    def loss(t: float) -> float:
        moved = {}
        for path, lora in adapter.items():
            pairs = {f: (getattr(lora, f), getattr(direction[path], f)) for f in FIELDS}
            new: dict[str, Any] = {
                f: None if a is None else a + a.dtype.type(t) * z for f, (a, z) in pairs.items()
            }
            moved[path] = dataclasses.replace(lora, **new)
        model.attach(moved)
        nll, _ = model.loss(batch.ids, batch.labels, batch.seqs, grads=False)
        return float(np.asarray(model.ops.to_numpy(nll), np.float64).sum()) / counted(batch)

    return loss


def _directional(
    check: str,
    loss: Callable[[float], float],
    grads: Grads,
    direction: Mapping[str, LoRAGrad],
    h: float,
    noise: float,
) -> Finding:
    slope = math.fsum(
        float((g.astype(np.float64) * z).sum())
        for path, d in direction.items()
        for f in FIELDS
        if (z := getattr(d, f)) is not None
        and (g := getattr(grads.get(path), f, np.zeros(1))) is not None
    )
    coarse = (loss(h) - loss(-h)) / (2 * h)
    fine = (loss(h / 2) - loss(-h / 2)) / h
    found = fine + (fine - coarse) / 3
    rounding = (8 * noise / h + noise / h) / 3  # of 4/3 fine - 1/3 coarse, each loss off by `noise`
    allowed = abs(fine - coarse) / 3 + rounding
    text = f"slope {slope:.10g}, finite differences {found:.10g}: difference"
    return Finding.of(check, abs(slope - found), allowed, text)


def on_backend(llama: Llama, adapter: Adapters, batch: Batch, seed: int) -> Finding:
    """Where float64 does not fit: finite differences in float32, the loss's noise measured.

    The direction has random sizes and the gradient's signs (plus where it is zero), so that the
    slope stands out. The noise is from fourth differences of the loss at seven close points (Moré
    & Wild, "Estimating computational noise", SIAM J. Sci. Comput. 33(3), 2011).
    """
    llama.attach(adapter)
    _, found_grads = llama.loss(batch.ids, batch.labels, batch.seqs)
    grads = _on_host(llama, found_grads or {})
    direction = _direction(adapter, seed, FIELDS)
    for path, d in direction.items():
        for f in FIELDS:
            z = getattr(d, f)
            if z is not None:
                sign = np.where(getattr(grads[path], f) < 0, -1, 1)
                setattr(d, f, (abs(z) * sign).astype(z.dtype))
    if any(lora.magnitude is not None for lora in adapter.values()):
        adapter = {
            path: dataclasses.replace(lora, norm=_held(llama)[path].norm)
            for path, lora in adapter.items()
        }
    loss = _loss_along(llama, adapter, direction, batch)
    points = np.array([loss(k * 2.0**-16) for k in range(-3, 4)])
    fourth = np.diff(points, 4)
    noise = SIGMAS * math.sqrt(math.factorial(4) ** 2 / math.factorial(8) * (fourth**2).mean())
    found = _directional("gradient", loss, grads, direction, 2.0**-6, noise)
    llama.attach(adapter)
    return dataclasses.replace(found, text=f"on the backend, in float32: {found.text}")


def _on_host(llama: Llama, grads: Grads) -> Grads:
    """The same gradients in host memory."""

    def host(a: Any) -> Any:
        return None if a is None else llama.ops.to_numpy(a)

    return {path: LoRAGrad(*(host(getattr(g, f)) for f in FIELDS)) for path, g in grads.items()}


# ---- float32 against float64 ---------------------------------------------------------------------


def _compare(
    llama: Llama,
    backend: Grads,
    exact: Grads,
    rounded: list[Grads],
    part: Part,
    modules: dict[str, dict[str, Any]],
) -> Finding:
    """The worst of all arrays: |backend - exact| against SIGMAS times what rounding moves it."""
    worst, relative, allowed, where = -1.0, 0.0, 0.0, "-"
    for path, gradient in exact.items():
        for f in FIELDS:
            want = getattr(gradient, f)
            if want is None or not want.size:
                continue
            missing = np.full(want.shape, np.nan)
            got = getattr(backend.get(path), f, None)
            error = _norm((missing if got is None else llama.ops.to_numpy(got)) - want)
            moved = [_norm(getattr(r[path], f) - want) for r in rounded]
            tiny = float(np.finfo(np.float32).tiny) * math.sqrt(want.size)  # underflow
            bound = SIGMAS * math.sqrt(sum(s * s for s in moved) / len(moved)) + tiny
            ratio = math.inf if math.isnan(error) else error / bound
            size = max(_norm(want), tiny)
            entry = modules.get(part.whole(path))
            if entry is not None:
                entry[f"gradient_{f}"] = {"error": error / size, "allowed": bound / size}
            if ratio > worst:
                worst, where = ratio, f"{part.whole(path)}.{f}"
                relative, allowed = error / size, bound / size
    text = f"relative error of {llama.ops.name} in float32 where nearest to its bound, {where}"
    return Finding.of("gradients in float32", relative, allowed, text)


def _norm(a: np.ndarray) -> float:
    return math.sqrt(float((np.asarray(a, np.float64) ** 2).sum()))
