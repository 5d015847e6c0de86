"""Whole models of any structure, as the operation `llama` takes them: random features and weights,
adapters of some modules, and a few steps of a mixed batch."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from pylora.numbers.precision import BF16
from pylora.ops.features import ACTIVATIONS, QKV, Features
from pylora.ops.heads import HEADS
from pylora.ops.llama import EXPERT, Experts, LayerWeights, LlamaWeights, Step
from pylora.types import Attn, LoRA, Norm, Rotation, Seqs

ROWS, POSITIONS, VOCAB = 24, 16, 40


def normal(rng: np.random.Generator, *shape: int, size: float = 1.0) -> np.ndarray:
    return (size * rng.standard_normal(shape)).astype(np.float32)


@st.composite
def structures(draw: st.DrawFn) -> dict[str, Any]:
    """A structure of everything that the operation knows, and what runs through it."""
    gated, experts = draw(st.booleans()), draw(st.sampled_from((0, 0, 0, 1, 5)))
    fused = gated and not experts and draw(st.booleans())
    maybe = st.sampled_from((1.0, 1.0, 0.75))
    features = Features(
        activation=draw(st.sampled_from(ACTIVATIONS)),
        gated=gated or experts > 0,
        parallel=not experts and draw(st.booleans()),
        fused_qkv=draw(st.sampled_from(QKV)),
        fused_gate_up=fused,
        embedding_multiplier=draw(maybe),
        residual_multiplier=draw(maybe),
        logit_multiplier=draw(maybe),
        logit_softcap=draw(st.sampled_from((0.0, 3.0))),
    )
    kv = draw(st.sampled_from((1, 2)))
    D = draw(st.sampled_from((32, 64)))  # quantized weights have groups of 32 inputs
    return {
        "features": features,
        "attn": Attn(kv * draw(st.sampled_from((1, 2))), kv, D, 0.3, 0,
                     draw(st.sampled_from((0.0, 2.0)))),
        "experts": experts,
        "top_k": draw(st.integers(1, max(experts, 1))),
        "normalize": draw(st.booleans()),
        "norm": draw(st.sampled_from(("rms", "layer", "layer+b"))),
        "before": draw(st.booleans()),
        "after": draw(st.booleans()),
        "heads": draw(st.sampled_from(("", *HEADS))),
        "scales": [draw(st.sampled_from((0.0, 0.0, 0.45))) for _ in range(2)],
        "ropes": [draw(st.sampled_from((-1, 0, 1))) for _ in range(2)],
        "windows": [draw(st.sampled_from((0, 3))) for _ in range(2)],
        "layout": draw(st.sampled_from(("half", "interleaved"))),
        "rotated": draw(st.sampled_from((D, D // 2))),
        "bias": draw(st.booleans()),
        "positions": draw(st.booleans()),
        "hidden": draw(st.sampled_from((32, 64))),
        "inner": draw(st.sampled_from((32, 96))),
        "seed": draw(st.integers(0, 2**16)),
    }  # fmt: skip


def weights_of(s: dict[str, Any], precision: str, ops: Any) -> LlamaWeights:
    rng, f, a = np.random.default_rng(s["seed"]), s["features"], s["attn"]
    hidden, inner = s["hidden"], s["inner"]

    def packed(d: int, k: int, kind: str = precision) -> Any:
        return ops.pack(normal(rng, d, k, size=k**-0.5), kind)

    def norm(k: int) -> Norm:
        kind, _, b = s["norm"].partition("+")
        w = ops.place(1 + normal(rng, k, size=0.1))
        return Norm(w, 1e-5, kind, ops.place(normal(rng, k)) if b else None)

    q, kv = a.heads * a.head_dim, a.kv_heads * a.head_dim
    shapes = {
        "q": (q, hidden), "k": (kv, hidden), "v": (kv, hidden), "qkv": (q + 2 * kv, hidden),
        "o": (hidden, q), "gate": (inner, hidden), "up": (inner, hidden),
        "gate_up": (2 * inner, hidden), "down": (hidden, inner),
    }  # fmt: skip
    layers = []
    for i in range(2):
        roles, mix = f.modules, None
        if s["experts"]:
            roles = (*f.attention_modules, *EXPERT * s["experts"])
            router = packed(s["experts"], hidden, "fp32")
            mix = Experts(router, s["experts"], s["top_k"], s["normalize"])
        W = tuple(packed(*shapes[role]) for role in roles)
        bias = tuple(ops.place(normal(rng, w.shape[0])) if s["bias"] else None for w in W)
        D = a.head_dim
        heads = {"": (0, 0), "shared": (D, D)}.get(s["heads"], (q, kv))
        q_norm, k_norm = (norm(n) if n else None for n in heads)
        before = s["before"] or f.parallel
        layers.append(
            LayerWeights(
                norm(hidden) if before else None,
                norm(hidden) if before and not (f.parallel and s["after"]) else None,
                W, bias, q_norm, k_norm, s["windows"][i],
                norm(hidden) if s["after"] and not f.parallel else None,
                norm(hidden) if s["after"] and not f.parallel else None,
                s["ropes"][i], s["heads"] or "shared", mix, s["scales"][i],
            )
        )  # fmt: skip
    embedding = packed(VOCAB, hidden)
    return LlamaWeights(
        embedding, embedding, norm(hidden), tuple(layers), a, ops.activation_dtype(precision), f,
        packed(POSITIONS, hidden) if s["positions"] else None,
    )  # fmt: skip


def adapters_of(w: LlamaWeights, rng: np.random.Generator, op: Any) -> list[Any]:
    """One on some modules, with a bias here and there; one on all, with the embedding."""
    out = []
    for share in (0.5, 1.0):
        modules = {}
        for n in range(w.head_number + 1):
            if rng.random() > share:
                continue
            W, _ = w.module(n)
            d, k = W.shape
            own = normal(rng, d) if share < 1 and rng.random() < 0.2 else None
            low = normal(rng, 3, k), normal(rng, d, 3, size=0.2)
            modules[n] = LoRA(*low, 0.5, 0.0, None, own)
        d, k = w.embedding.shape
        embedding = LoRA(normal(rng, 2, d), normal(rng, k, 2), 0.5) if share == 1 else None
        out.append(op.adapter(modules, embedding))
    return out


def rotations(s: dict[str, Any], rng: np.random.Generator, position: np.ndarray, ops: Any) -> Any:
    half = s["rotated"] // 2
    tables = [ops.asarray(normal(rng, POSITIONS, half)) for _ in range(4)]
    other = rng.permutation(POSITIONS)[position]  # rows need not be positions
    return tuple(
        Rotation(cos, sin, rows, s["attn"].head_dim, s["layout"])
        for cos, sin, rows in ((*tables[:2], position), (*tables[2:], other))
    )


def run(op: Any, w: LlamaWeights, s: dict[str, Any], ops: Any) -> list[np.ndarray]:
    """A prompt of five tokens, one of three and a single token, then one more of each; all logits
    and what the cache has become."""
    rng = np.random.default_rng(s["seed"] + 1)
    adapters = adapters_of(w, rng, op)
    dtype = np.float32 if w.dtype is None else w.dtype
    width = w.attn.kv_heads * w.attn.head_dim
    k, v = ([ops.zeros((ROWS, width), dtype) for _ in w.layers] for _ in range(2))
    cache, out = op.cache(k, v), []
    lengths = np.zeros(3, np.int64)
    for new in ((5, 3, 1), (1, 1, 1)):
        ids = rng.integers(0, VOCAB, sum(new))
        position = np.concatenate([np.arange(a, a + n) for a, n in zip(lengths, new)])
        rows = position + np.repeat(8 * np.arange(3), new)
        lengths = lengths + new
        start = np.concatenate([[0], np.cumsum(new)])
        seqs = Seqs(start, 8 * np.arange(3), lengths.copy())
        step = Step(
            ids, position, rows, seqs, np.arange(sum(new)), start,
            (adapters[0], None, adapters[1]), rotations(s, np.random.default_rng(3), position, ops),
        )  # fmt: skip
        out.append(np.array(ops.to_numpy(op.forward(cache, step))))
    stored = [ops.to_numpy(a) for a in (*k, *v)]
    return out + [a.view(np.uint16) if a.dtype == BF16 else a for a in stored]
