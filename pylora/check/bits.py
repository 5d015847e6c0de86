"""The parts of `pylora check` that allow no difference at all: zero-init and row invariance."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pylora.adapters.adapter import Adapter
from pylora.check.report import SKIP, Finding
from pylora.check.sample import Batch
from pylora.model.llama import Llama


def _logits(model: Llama, batch: Batch) -> np.ndarray:
    out: np.ndarray = model.ops.to_numpy(model.forward(batch.ids, batch.seqs)[0])
    return out


def _decoded(model: Llama, parts: list[np.ndarray]) -> np.ndarray:
    """Logits of the last token of each sequence, by a prefill of the rest and a decode step."""
    longest = max(ids.size for ids in parts)
    kv = model.kv_cache(len(parts), longest)
    slots = [i for i, ids in enumerate(parts) if ids.size > 1]
    if slots:
        rest = [parts[i][:-1] for i in slots]
        model.decode(np.concatenate(rest), kv, [ids.size for ids in rest], slots)
    last = np.array([ids[-1] for ids in parts])
    out: np.ndarray = model.ops.to_numpy(model.decode(last, kv, [1] * len(parts)))
    return out


def _different(a: np.ndarray, b: np.ndarray) -> int:
    """How many elements have other bits."""
    bits = np.dtype(f"u{a.itemsize}")
    a, b = np.ascontiguousarray(a).view(bits), np.ascontiguousarray(b).view(bits)
    return int((a != b).sum())


def identity(model: Llama, fresh: Adapter, batch: Batch) -> Iterator[Finding]:
    """A fresh adapter on the same targets changes no bit of any logit; leaves none attached."""
    model.detach()
    logits, decoded = _logits(model, batch), _decoded(model, batch.parts())
    model.attach(fresh)
    n = _different(logits, _logits(model, batch))
    what = f"of {logits.size} logits, {len(fresh)} modules freshly initialised"
    yield Finding.of("zero-init", n, 0, f"different bits {what}")
    n = _different(decoded, _decoded(model, batch.parts()))
    yield Finding.of("zero-init, decode", n, 0, f"different bits of {decoded.size} logits")
    model.detach()
    n = _different(logits, _logits(model, batch))
    yield Finding.of("detach", n, 0, f"different bits of {logits.size} logits after detaching")


def rows(model: Llama, batch: Batch) -> Iterator[Finding]:
    """A sequence gives the same bits alone, in a batch, and token by token."""
    logits, parts = _logits(model, batch), batch.parts()
    finite = int((~np.isfinite(logits)).sum())
    yield Finding.of("finite logits", finite, 0, f"NaN or infinite of {logits.size} logits")
    if not model.ops.bitwise:
        text = f"the {model.ops.name} backend's rows may depend on the size of the batch"
        yield Finding("rows", SKIP, None, None, text)
        return
    bounds = np.cumsum(batch.lengths)
    alone = [model.ops.to_numpy(model.forward(ids)[0]) for ids in parts]
    n = _different(logits, np.concatenate(alone))
    sizes = ", ".join(map(str, batch.lengths))
    yield Finding.of("rows", n, 0, f"different bits, sequences of {sizes} alone and in one batch")
    n = _different(logits[bounds - 1], _decoded(model, parts))
    yield Finding.of("rows, decode", n, 0, "different bits, decode step and whole sequence")
