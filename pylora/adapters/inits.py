"""Beginnings that are made of the base's weights: PiSSA, OLoRA, LoftQ, EVA.

PiSSA (Meng et al., arXiv:2404.02948) and OLoRA (Büyükakyüz, arXiv:2406.01775) take a part of W
into the adapter and train on what is left, W - s B0 A0. The base here is never changed: an adapter
of twice the rank, A = [A1; A0] and B = [B1, -B0], is the same function of the base as it is, which
is PEFT's conversion rule (path_initial_model_for_weight_conversion). Read from a file, A0 and B0
are computed of W, as PEFT does; made here, the second half stays as it is while the first is
trained. LoftQ (Li et al., arXiv:2310.08659) fits B A to what quantizing takes from W, EVA (Paischer
et al., arXiv:2410.07170) takes A from the directions of a module's inputs; both leave the base.

Decompositions are done in float64, so A and B may differ from PEFT's in their signs, and B A in
float32's rounding.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from pylora.adapters.loraconfig import FROM_BASE, LoraConfig
from pylora.adapters.plan import Plan, PlanEntry, resolve
from pylora.errors import PlanError, UnsupportedError
from pylora.formats.base import Array
from pylora.model.config import LlamaConfig
from pylora.types import LoRA


def takes_from_base(config: LoraConfig) -> str | None:
    """ "pissa" or "olora", where that is how the adapter began; None where it is another way."""
    how = config.init_lora_weights
    if not isinstance(how, str) or not FROM_BASE.fullmatch(how):
        return None
    return "pissa" if how.startswith("pissa") else "olora"


# ---- A and B of one module -----------------------------------------------------------------------


def principal(W: Array, r: int) -> tuple[Array, Array, Array]:
    """The r largest singular values of W [d, k] and their vectors: (U [d, r], S [r], Vt [r, k]),
    float64, by the eigenvectors of the smaller of W Wᵀ and Wᵀ W."""
    W = np.asarray(W, np.float64)
    wide = W.shape[0] <= W.shape[1]
    _, vectors = np.linalg.eigh(W @ W.T if wide else W.T @ W)
    own = vectors[:, ::-1][:, :r]
    other = W.T @ own if wide else W @ own  # its columns are as long as the singular values
    S = np.linalg.norm(other, axis=0)
    other = np.divide(other, S, out=np.zeros_like(other), where=S > 0)
    return (own, S, other.T) if wide else (other, S, own.T)


def pissa(W: Array, r: int, scale: float) -> tuple[Array, Array]:
    """(A [r, k], B [d, r]), float32, with scale B A the principal part of W of rank r."""
    U, S, Vt = principal(W, r)
    root = np.sqrt(S / scale)
    return _float32(root[:, None] * Vt), _float32(U * root)


def olora(W: Array, r: int) -> tuple[Array, Array]:
    """(A [r, k], B [d, r]), float32: the first r rows of R and columns of Q of W = Q R."""
    Q, R = np.linalg.qr(np.asarray(W, np.float64))
    return _float32(R[:r]), _float32(Q[:, :r])


def loftq(W: Array, quantized: Array, r: int, scale: float) -> tuple[Array, Array]:
    """(A [r, k], B [d, r]), float32, with scale B A the best of rank r for W - quantized: what
    PEFT's replace_lora_weights_loftq gives, whose scale is 1."""
    rest = np.asarray(W, np.float64) - quantized
    return pissa(rest, r, scale)


def upright(V: Array) -> Array:
    """Directions [r, k], float32, each with the sign that makes its largest number positive."""
    largest = V[np.arange(V.shape[0]), np.abs(V).argmax(axis=1)]
    return _float32(V * np.where(largest < 0, -1.0, 1.0)[:, None])


def _float32(a: Array) -> Array:
    return np.ascontiguousarray(a, np.float32)


def taken(how: str, W: Array, e: PlanEntry) -> tuple[Array, Array]:
    """A0 and B0 of a module whose adapter began as "pissa" or "olora"."""
    if e.kind != "linear":
        raise UnsupportedError(f"{e.path}: {how} is for linear modules, and this is an {e.kind}")
    if e.r > min(W.shape):
        raise PlanError(
            f"{e.path}: {how} of rank {e.r} takes a weight of at least that rank, and this one is "
            f"[{W.shape[0]}, {W.shape[1]}]"
        )
    A, B = pissa(W, e.r, e.scale) if how == "pissa" else olora(W, e.r)
    return A, B


# ---- the same on the base as it is ---------------------------------------------------------------


def doubled(config: LoraConfig) -> LoraConfig:
    """The settings of the adapter of twice the rank that is the same on the unchanged base: scales
    stay, so alpha is twice as large, or sqrt(2) times with use_rslora."""
    factor = math.sqrt(2) if config.use_rslora else 2
    return dataclasses.replace(
        config,
        init_lora_weights=True,
        r=2 * config.r,
        lora_alpha=config.lora_alpha * factor,
        rank_pattern={key: 2 * r for key, r in config.rank_pattern.items()},
        alpha_pattern={key: alpha * factor for key, alpha in config.alpha_pattern.items()},
    )


def check_head(config: LlamaConfig | None, plan: Plan, how: str) -> None:
    """UnsupportedError for a head that is the embedding: what is taken from one is from both."""
    for e in plan.entries:
        if config is not None and config.tie_word_embeddings and e.path == config.names.head:
            raise UnsupportedError(
                f"{e.path}: {how} takes a part of the weight, and this head is tied to the "
                "embedding, which would lose it, too; leave it out of target_modules"
            )


def on_unchanged_base(
    config: LoraConfig,
    plan: Plan,
    modules: Mapping[str, LoRA],
    weight: Any,
    model: LlamaConfig | None,
    specs: Mapping[str, Any],
) -> tuple[LoraConfig, Plan, dict[str, LoRA]]:
    """The adapter that began as `config` says, on the base as it is: [A; A0], [B, -B0].

    weight(path): the base's, float32 [d, k]; model, specs: its configuration, where it is known,
    and modules. Errors: those of `taken` and `check_head`.
    """
    how = takes_from_base(config)
    assert how is not None
    check_head(model, plan, how)
    return without_first(config, plan, modules, lambda e: taken(how, weight(e.path), e), specs)


def without_first(
    config: LoraConfig,
    plan: Plan,
    modules: Mapping[str, LoRA],
    first: Callable[[PlanEntry], tuple[Array, Array]],
    specs: Mapping[str, Any],
) -> tuple[LoraConfig, Plan, dict[str, LoRA]]:
    """[A; A0] and [B, -B0] of every module: PEFT's conversion of an adapter whose first values,
    A0 [r, k] and B0 [d, r], were taken from the base."""
    new = doubled(config)
    there = resolve(new, specs)
    out = dict(modules)
    scales = {e.path: e.scale for e in there.entries}
    for e in plan.entries:
        A0, B0 = first(e)
        low = modules[e.path]
        A, B = np.concatenate([low.A, A0]), np.concatenate([low.B, -B0], axis=1)
        out[e.path] = dataclasses.replace(low, A=A, B=B, scale=scales[e.path])
    return new, there, out
