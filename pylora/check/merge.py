"""The parts of `pylora check` about weights: scales, sizes, merging and unmerging of each module.

A merged weight is rounded once to the dtype that the model is stored in, so it is within one unit
roundoff of W + scale B A; that is checked element by element in float64. Nothing is written.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from pylora.adapters.adapter import Adapter, parameters
from pylora.adapters.plan import PlanEntry
from pylora.check.gradient import SIGMAS
from pylora.check.report import FAIL, PASS, WARN, Finding
from pylora.check.rounding import Exact, Rounded
from pylora.check.sample import Batch, Part
from pylora.conformance.bounds.ops import gamma, unit
from pylora.formats import Checkpoint, widen
from pylora.merging.weight import digest, merge_weight, unmerge_weight
from pylora.model.expert_lora import ExpertParameter
from pylora.model.linear import LoRALinear
from pylora.model.llama import Llama
from pylora.types import LoRA

_ROWS = 1024  # rows of a weight that are looked at together, to bound memory
_HALF_SUBNORMAL = {"f32": 2.0**-150, "f16": 2.0**-25, "bf16": 2.0**-134}
Modules = dict[str, dict[str, Any]]


def expected_scale(adapter: Adapter, e: PlanEntry) -> float:
    """alpha / r, or alpha / sqrt(r) with rsLoRA, from the settings alone."""
    return e.alpha / (math.sqrt(e.r) if adapter.config.use_rslora else e.r)


def scales(adapter: Adapter, modules: Modules) -> Iterator[Finding]:
    """Every value is finite; every module has the rank and scale that the settings imply."""
    arrays = parameters(adapter)
    bad = {key: n for key, a in arrays.items() if (n := int((~np.isfinite(a)).sum()))}
    text = f"NaN or infinite of {adapter.num_parameters:,} values{_first(list(bad))}"
    yield Finding.of("finite adapter", sum(bad.values()), 0, text)
    wrong, used = [], set()
    for e in adapter.plan:
        lora, want = adapter[e.path], expected_scale(adapter, e)
        modules[e.path] |= {"scale": lora.scale, "expected_scale": want, "rule": e.rule_scale}
        used.add(f"{e.rule_scale} = {want:g}")
        if lora.rank != e.r or not math.isclose(lora.scale, want, rel_tol=1e-12):
            wrong.append(f"{e.path}: {lora.scale:g} at rank {lora.rank}, expected {want:g}")
    rules = "; ".join(sorted(used)[:3]) + (" ..." if len(used) > 3 else "")
    text = f"modules with another scale than {rules}{_first(wrong)}"
    yield Finding.of("scale", len(wrong), 0, text)


def _first(names: list[str]) -> str:
    return f"; first: {names[0]}" if names else ""


def weights(
    checkpoint: Checkpoint,
    adapter: Adapter,
    llama: Llama,
    part: Part | None,
    batch: Batch,
    seed: int,
    modules: Modules,
) -> Iterator[Finding]:
    """Merges and unmerges every adapted weight, then compares logits.

    `llama`, on the backend in use, is `part` (or the whole model without one); its weights are
    the merged ones afterwards.
    """
    own = part.adapter if part is not None else adapter
    llama.attach(own)
    attached = llama.ops.to_numpy(llama.forward(batch.ids, batch.seqs)[0]).astype(np.float64)
    llama.detach()
    worst, where, restored, units = 0.0, "-", [], [unit("f32")]
    embedding = False
    for e in adapter.plan:
        W, dtype = _stored(checkpoint, e.path)
        lora, before = adapter[e.path], digest(W)
        merged, residue = merge_weight(llama.ops, W, lora, dtype, kind=e.kind)
        back = unmerge_weight(llama.ops, merged, lora, residue, dtype, kind=e.kind)
        if digest(back) != before:
            restored.append(e.path)
        scale = float(np.float32(expected_scale(adapter, e)))
        error, delta, size = _error(widen(W, dtype), widen(merged, dtype), lora, scale, e, dtype)
        modules[e.path] |= {
            "dtype": dtype,
            "sha256": before,
            "residue": int(residue.position.size),
            "merge_error_over_bound": error,
            "delta_norm": delta,
            "weight_norm": size,
        }
        if error > worst:
            worst, where = error, e.path
        path = part.own(e.path) if part is not None else e.path
        if path is not None:
            units.append(unit(dtype))
            embedding |= e.kind == "embedding"
            module = llama.modules[path]
            assert not isinstance(module, ExpertParameter)
            module.W = llama.ops.pack(widen(merged, dtype), llama.precision)
    yield _size(adapter, modules)
    text = f"|W' - (W + scale B A)| over one rounding, {len(modules)} modules, worst {where}"
    yield Finding.of("merge", worst, 1, text)
    text = f"of {len(modules)} weights have another SHA-256 after merge and unmerge"
    yield Finding.of("unmerge", len(restored), 0, text + _first(restored))
    if part is None:
        text = "logits, adapter against merged: float64 does not fit into memory"
        yield Finding("merged logits", "not tested", None, None, text)
        return
    for path, lora in own.items():
        _merge_bias(llama, path, lora)
    merged_logits = llama.ops.to_numpy(llama.forward(batch.ids, batch.seqs)[0]).astype(np.float64)
    yield _logits(part, batch, seed, attached, merged_logits, max(units), embedding)


def _stored(checkpoint: Checkpoint, path: str) -> tuple[np.ndarray, str]:
    """A weight as `pylora merge` takes it: as stored; float32 from a GGUF file."""
    names = checkpoint.config.names
    tied = path == names.head and checkpoint.config.tie_word_embeddings
    name = f"{names.embedding if tied else path}.weight"
    if checkpoint.path.is_dir() and checkpoint.dtype(name) in _HALF_SUBNORMAL:
        return checkpoint.raw(name)
    return checkpoint.load(name), "f32"


def _error(
    W: np.ndarray, merged: np.ndarray, lora: LoRA, scale: float, e: PlanEntry, dtype: str
) -> tuple[float, float, float]:
    """(largest error of the merged weight over its bound, norm of the delta, norm of the weight).

    One rounding is at most u |W + scale B A|, or half the smallest subnormal number; the delta, in
    float64, is off by at most gamma_{r+2}, on either side.
    """
    A, B = (lora.A, lora.B) if e.kind == "linear" else (lora.B.T, lora.A.T)
    A, B = A.astype(np.float64), B.astype(np.float64)
    worst = delta = size = 0.0
    if lora.magnitude is not None:
        return _rescaled_error(W, merged, lora, scale, e, dtype)
    for i in range(0, W.shape[0], _ROWS):
        base, b = W[i : i + _ROWS].astype(np.float64), B[i : i + _ROWS]
        t = scale * (b @ A)
        bound = unit(dtype) * abs(base + t) * 1.000001 + _HALF_SUBNORMAL[dtype]
        bound += 2 * gamma(e.r + 2, "f64") * (abs(base) + abs(scale) * (abs(b) @ abs(A)))
        ratio = abs(merged[i : i + _ROWS] - (base + t)) / bound
        worst = max(worst, math.inf if np.isnan(ratio).any() else float(ratio.max(initial=0.0)))
        delta += float((t * t).sum())
        size += float((base * base).sum())
    return worst, math.sqrt(delta), math.sqrt(size)


def _rescaled_error(
    W: np.ndarray, merged: np.ndarray, lora: LoRA, scale: float, e: PlanEntry, dtype: str
) -> tuple[float, float, float]:
    """The same with a magnitude: the lengths and their quotient are rounded to float32, too."""
    if e.kind == "embedding":
        W, merged = W.T, merged.T
    worst = delta = size = 0.0
    A = lora.A.astype(np.float64)
    for i in range(0, W.shape[0], _ROWS):
        base, b = W[i : i + _ROWS].astype(np.float64), lora.B[i : i + _ROWS].astype(np.float64)
        V = base + scale * (b @ A)
        n = np.sqrt((V * V).sum(axis=1, keepdims=True))
        m = np.asarray(lora.magnitude[i : i + _ROWS], np.float64)[:, None]  # type: ignore[index]
        want = np.where((n == 0) & (m == 0), 1, m / np.where(n == 0, 1, n)) * V
        bound = (unit(dtype) + 3 * unit("f32")) * abs(want) * 1.000001 + _HALF_SUBNORMAL[dtype]
        bound += 2 * gamma(e.r + 2, "f64") * m * (abs(base) + abs(scale) * (abs(b) @ abs(A)))
        ratio = abs(merged[i : i + _ROWS] - want) / bound
        worst = max(worst, math.inf if np.isnan(ratio).any() else float(ratio.max(initial=0.0)))
        delta += float(((want - base) ** 2).sum())
        size += float((base * base).sum())
    return worst, math.sqrt(delta), math.sqrt(size)


def _size(adapter: Adapter, modules: Modules) -> Finding:
    """How large the deltas are; one larger than its weight, or none at all, is a warning."""
    ratios = {
        path: m["delta_norm"] / m["weight_norm"] if m["weight_norm"] else math.inf
        for path, m in modules.items()
    }
    path = max(ratios, key=lambda p: ratios[p])
    top = ratios[path]
    verdict = PASS if 0 < top <= 1 else FAIL if math.isnan(top) else WARN
    text = f"largest |delta| / |weight|: {path}; median {np.median(list(ratios.values())):.3g}"
    if top == 0 and not any(
        m.base_bias is not None or m.bias is not None for m in adapter.values()
    ):
        text = "every delta is zero: this adapter changes nothing"
    elif top > 1:
        text += "; a delta larger than its weight is rare: look at scale and alpha"
    return Finding("size of the delta", verdict, top, 1.0, text)


def _merge_bias(llama: Llama, path: str, lora: LoRA) -> None:
    """The bias that a merged module has: base_bias where the adapter brings one, plus B's."""
    module, ops = llama.modules[path], llama.ops
    if not isinstance(module, LoRALinear):
        return
    own_bias = None if module.bias is None else ops.to_numpy(module.bias)
    bias = own_bias if lora.base_bias is None else lora.base_bias
    if lora.bias is not None:
        own = float(np.float32(lora.scale)) * lora.bias.astype(np.float64)
        bias = (own if bias is None else bias + own).astype(np.float32)
    module.bias = None if bias is None else ops.place(bias)


def _logits(
    part: Part,
    batch: Batch,
    seed: int,
    attached: np.ndarray,
    merged: np.ndarray,
    unit: float,
    embedding: bool,
) -> Finding:
    """The worst token: the distance of its logits, and SIGMAS times what rounding moves both."""
    norm = _row_norm
    exact: np.ndarray = part.model(Exact()).forward(batch.ids, batch.seqs)[0]
    ops = Rounded(seed, stored=unit, embedding=embedding)
    moved = norm(part.model(ops).forward(batch.ids, batch.seqs)[0] - exact)
    # Both sides round in float32, one of them its weights besides.
    allowed = 2 * SIGMAS * moved
    error = norm(attached - merged)
    size = norm(exact)
    ratio = np.where(np.isnan(error), np.inf, error / np.maximum(allowed, 1e-300))
    i = int(np.argmax(ratio))
    text = f"relative distance of the logits, adapter and merged weights, token {i}"
    return Finding.of("merged logits", error[i] / size[i], allowed[i] / size[i], text)


def _row_norm(a: np.ndarray) -> np.ndarray:
    norm: np.ndarray = np.sqrt((a * a).sum(axis=1))
    return norm
