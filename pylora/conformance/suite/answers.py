"""What a model must answer: log-probabilities in float64, and how roundings move them.

The model is pylora's own over the reference backend in float64; tests hold it to transformers in
float64. An answer is, for each prompt, the log-probability of every token of it but the first, and
that of every token of the vocabulary as the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pylora.backends.numpy import NumpyBackend
from pylora.conformance.suite import tokenizer
from pylora.conformance.suite.adapters import Meaning
from pylora.conformance.suite.bases import Base
from pylora.model.llama import Llama
from pylora.types import Attn, Seqs

Array = np.ndarray[Any, Any]

# Words whose tokens every engine can name. The last two begin alike, over two blocks of 16 tokens,
# the size in which caches of prefixes are shared.
TEXTS = (
    "the engine answers",
    "one base and many adapters",
    "a prefix that two requests share is computed once and no more",
    "a prefix that two requests share is computed once and again",
)
_PLAIN = {"heads", "kv_heads", "head_dim", "scale", "window"}
PROMPTS = tuple(tuple(tokenizer.encode(text)) for text in TEXTS)


@dataclass(frozen=True, eq=False)
class Answer:
    """prompt: for each prompt [n - 1]; next: for each prompt [vocabulary]. Natural logarithms."""

    prompt: tuple[Array, ...]
    next: tuple[Array, ...]

    def flat(self) -> Array:
        """All numbers behind each other."""
        return np.concatenate([*self.prompt, *self.next])


class Exact(NumpyBackend):
    """The reference without its promise about the bits of rows, which costs time."""

    def _rows(self, x: Array, M: Array) -> Array:
        product: Array = x @ M
        return product

    def attention_forward(
        self, q: Array, k: Array, v: Array, seqs: Seqs, attn: Attn, dtype: Any = None
    ) -> tuple[Array, Array]:
        """The reference's, for all queries of a sequence at once; what it has beyond a scale and a
        window is left to it."""
        if set(vars(attn)) - _PLAIN and any(vars(attn)[n] for n in set(vars(attn)) - _PLAIN):
            return super().attention_forward(q, k, v, seqs, attn, dtype)
        G, D = attn.kv_heads, attn.head_dim
        o, lse = np.empty_like(q), np.empty((q.shape[0], attn.heads))
        for i, (start, n) in enumerate(zip(seqs.k_start.tolist(), seqs.k_len.tolist())):
            a, b = int(seqs.q_start[i]), int(seqs.q_start[i + 1])
            Q = q[a:b].reshape(b - a, G, -1, D).transpose(1, 2, 0, 3)  # [G, H/G, queries, D]
            K, V = (x[start : start + n].reshape(n, G, D).transpose(1, 0, 2) for x in (k, v))
            S = attn.scale * (Q @ K[:, None].swapaxes(-1, -2))
            back = np.arange(n - (b - a), n)[:, None] - np.arange(n)  # how far behind a key is
            seen = (back >= 0) & ((back < attn.window) if attn.window else True)
            S = np.where(seen, S, -np.inf)
            top = S.max(axis=-1, keepdims=True)
            E = np.exp(S - top)
            total = E.sum(axis=-1, keepdims=True)
            o[a:b] = ((E / total) @ V[:, None]).transpose(2, 0, 1, 3).reshape(b - a, -1)
            lse[a:b] = (top + np.log(total))[..., 0].transpose(2, 0, 1).reshape(b - a, -1)
        return o, lse


class Moved(Exact):
    """The same with every result of an operation moved at random by up to `size`: of itself, or
    (`block`) of the largest of its block of 32."""

    def __init__(self, size: float, block: bool, seed: int) -> None:
        super().__init__()
        self.size, self.block = size, block
        self.random = np.random.default_rng(seed)

    def move(self, a: Array) -> Array:
        """The array with each element moved."""
        noise: Array = np.asarray(self.random.uniform(-self.size, self.size, a.shape))
        if not self.block or a.shape[-1] % 32 or not a.size:
            each: Array = a * (1 + noise)
            return each
        blocks = a.reshape(*a.shape[:-1], -1, 32)
        top = np.abs(blocks).max(axis=-1, keepdims=True)
        moved: Array = (blocks + top * noise.reshape(blocks.shape)).reshape(a.shape)
        return moved

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if not name.endswith("_forward") and name != "rope":
            return found

        def moved(*args: Any, **kwargs: Any) -> Any:
            result = found(*args, **kwargs)
            if isinstance(result, tuple):
                return tuple(self.move(r) if _is_real(r) else r for r in result)
            return self.move(result) if _is_real(result) else result

        return moved


def _is_real(a: Any) -> bool:
    return isinstance(a, np.ndarray) and a.dtype == np.float64


def model_of(base: Base, meaning: Meaning, ops: NumpyBackend | None = None) -> Llama:
    """The model with the adapter, in float64."""
    ops = Exact() if ops is None else ops
    move = ops.move if isinstance(ops, Moved) else lambda a: a
    config = base.config
    if config.tie_word_embeddings and "lm_head.weight" in meaning.weights:
        config = replace(config, tie_word_embeddings=False)

    def weights(name: str) -> Array:
        W = meaning.weights.get(name)
        return move(base.weights[name].astype(np.float64) if W is None else W)

    model = Llama(config, weights, backend=ops)
    moved = {}
    for path, lora in meaning.loras.items():
        arrays: dict[str, Any] = {n: getattr(lora, n) for n in ("A", "B", "bias", "base_bias")}
        there: dict[str, Any] = {n: move(a) for n, a in arrays.items() if a is not None}
        moved[path] = replace(lora, **there)
    model.attach(moved)
    return model


def answer(
    base: Base,
    meaning: Meaning,
    prompts: Sequence[Sequence[int]] = PROMPTS,
    ops: NumpyBackend | None = None,
) -> Answer:
    """What the base with this adapter answers to each prompt."""
    model = model_of(base, meaning, ops)
    lengths = [len(p) for p in prompts]
    logits, _ = model.forward(np.array([t for p in prompts for t in p]), Seqs.of(lengths))
    logs, at, said, then = log_softmax(logits), 0, [], []
    for p in prompts:
        rows = logs[at : at + len(p)]
        said.append(rows[np.arange(len(p) - 1), list(p[1:])])
        then.append(rows[-1])
        at += len(p)
    return Answer(tuple(said), tuple(then))


def log_softmax(logits: Array) -> Array:
    """Rows of logits to natural logarithms of probabilities."""
    top = logits.max(axis=-1, keepdims=True)
    out: Array = logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))
    return out
