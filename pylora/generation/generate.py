"""Text from a model, token by token: greedy or sampled, many prompts at once with a KV cache.

What a prompt yields does not depend on the other prompts: rows have the same bits in any batch,
and each row draws from its own random stream, by position. A finished row leaves the batch and a
waiting prompt takes its place.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from pylora.adapters.pool import AdapterPool
from pylora.errors import ConfigError, DataError, PyloraError
from pylora.model.decoder import Batch, pack_attached
from pylora.model.inputs import token_ids
from pylora.model.llama import Llama
from pylora.numbers import random

_NOT_FINITE = (
    "the model's logits are not finite, so no token can be chosen; check the weights and the "
    "adapter for NaN or infinite values"
)
OnToken = Callable[[int, int], None]  # (index of the prompt, token)

_PREFILL_TOKENS = 2048  # prompts are taken in until a step has this many tokens
_UNLIKELY = 1e-5  # a token of a lower probability is ranked only where the others do not decide


def generate(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_ids: Collection[int] | None = None,
    batch_size: int = 32,
    first_row: int = 0,
    on_token: OnToken | None = None,
    pool: AdapterPool | None = None,
    adapters: Sequence[str | None] | None = None,
) -> list[list[int]]:
    """Up to `max_new_tokens` tokens after each prompt; the end-of-text token is not included.

    temperature 0 takes the likeliest token (the lowest id of equals); else `sample` draws one from
    softmax(logits / temperature), cut by top_k and top_p. Row i draws from the stream of
    (seed, first_row + i, position), so a list may be cut into calls that state their `first_row`.
    `eos_ids` defaults to the model's; `on_token` hears each token as it comes, the end excepted.

    Without a pool all prompts use the adapter that is attached to the model, if any. With a `pool`,
    prompt i uses the adapter of the name adapters[i], None being the base model; without `adapters`
    all use `pool.active`. What counts is the adapters as they are when the call begins.

    Raises DataError for an empty prompt or a token outside the vocabulary, ConfigError for settings
    out of range, for a prompt that with its new tokens exceeds the model's
    max_position_embeddings, and for adapters that the pool does not have or that do not fit the
    call.
    """
    _check(model, prompts, max_new_tokens, temperature, top_k, top_p, batch_size)
    packed, which = _adapters(model, len(prompts), pool, adapters)
    ends = frozenset(model.config.eos_token_ids if eos_ids is None else eos_ids)
    out: list[list[int]] = [[] for _ in prompts]
    if not prompts or max_new_tokens == 0:
        return out
    if temperature:
        streams = [random.stream("sample", str(first_row + i)) for i in range(len(prompts))]
    slots = min(batch_size, len(prompts))
    kv = model.kv_cache(slots, max(map(len, prompts)) + max_new_tokens)
    waiting, free = deque(range(len(prompts))), list(range(slots))
    active: list[tuple[int, int]] = []  # (prompt, slot), those of one adapter side by side
    batch: Batch | None = None  # of `active`, one token each
    latest: list[int] = []  # the tokens that `active` has not seen, where it is the batch
    while waiting or active:
        fresh: dict[int, Sequence[int]] = {}
        taken = 0
        while (
            waiting and free and (not fresh or taken + len(prompts[waiting[0]]) <= _PREFILL_TOKENS)
        ):
            row, slot = waiting.popleft(), free.pop()
            kv.clear(slot)
            active.append((row, slot))
            fresh[row] = prompts[row]
            taken += len(prompts[row])
        if fresh:
            active.sort(key=lambda a: which[a[0]])  # stable
        if fresh or batch is None:
            new = [fresh.get(row, out[row][-1:]) for row, _ in active]
            lengths, at = [len(n) for n in new], np.array([slot for _, slot in active], np.int64)
            batch = Batch(model, kv, lengths, at, [packed[which[row]] for row, _ in active])
            latest = [token for n in new for token in n]
        else:
            batch.advance()
        logits = batch.forward(latest)
        if temperature == 0:
            latest = _greedy(logits)
        else:
            scores = model.ops.to_numpy(logits)
            latest = []
            for (row, _), row_scores in zip(active, scores, strict=True):
                at_token = len(prompts[row]) + len(out[row])
                u = random.unit(seed, streams[row], at_token, 1)[0]
                latest.append(sample(row_scores, float(u), temperature, top_k, top_p))
        still: list[tuple[int, int]] = []
        for (row, slot), token in zip(active, latest, strict=True):
            if token not in ends:
                out[row].append(token)
                if on_token is not None:
                    on_token(row, token)
                if len(out[row]) < max_new_tokens:
                    still.append((row, slot))
                    continue
            free.append(slot)
        if fresh or len(still) < len(active):
            batch = None
        active = still
    return out


def _adapters(
    model: Llama, n: int, pool: AdapterPool | None, names: Sequence[str | None] | None
) -> tuple[list[Any], list[int]]:
    """The adapters of this call, ready for the backend, and the number of each prompt's."""
    if pool is None:
        if names is not None:
            raise ConfigError(
                "`adapters` names adapters of a pool: give pool=AdapterPool(model) too"
            )
        return [pack_attached(model)], [0] * n
    if pool.model is not model:
        raise ConfigError(
            "this pool of adapters was made for another model; make one for this model"
        )
    if any(module.lora is not None for module in model.modules.values()):
        raise ConfigError(
            "the model has an adapter attached, and a pool is given; call model.detach(), and add "
            "the adapter to the pool if it is meant"
        )
    if names is None:
        names = [pool.active] * n
    if isinstance(names, str) or len(names) != n:
        raise ConfigError(
            f"{n} prompts need a list of {n} adapters (None for the base model), got {names!r:.100}"
        )
    numbers: dict[str | None, int] = {}
    which = [numbers.setdefault(name, len(numbers)) for name in names]
    return [pool.packed(name) for name in numbers], which


def sample(
    logits: np.ndarray, u: float, temperature: float, top_k: int = 0, top_p: float = 1.0
) -> int:
    """One token from logits [vocab] and a number 0 < u < 1, in float64.

    p = softmax(logits / temperature). Tokens are ranked by p, equals by the lower id. top_k > 0
    keeps the first top_k. top_p < 1 then keeps the shortest run of the first whose share of what
    top_k left is at least top_p; at least one stays. The token is the first, in ranked order,
    at which the running sum of p exceeds u times the sum of all that stayed.
    """
    _check_finite(logits)
    scores = np.asarray(logits, np.float64)
    if 0 < top_k < scores.size:
        least = np.partition(scores, -top_k)[-top_k]
        ranked = _ranked(scores, np.flatnonzero(scores >= least))[:top_k]
        whole = None
    else:  # the likely ones alone are ranked first: they nearly always decide
        p = np.exp((scores - scores.max()) / temperature)
        whole = float(p.sum())
        ranked = _ranked(scores, np.flatnonzero(p > whole * _UNLIKELY))
    while True:
        total = np.cumsum(np.exp((scores[ranked] - scores[ranked[0]]) / temperature))
        mass = float(total[-1]) if whole is None or ranked.size == scores.size else whole
        if top_p < 1:
            enough = total[-1] >= top_p * mass
            total = total[: int(np.searchsorted(total, top_p * mass)) + 1]
            mass = float(total[-1])
        else:
            enough = total[-1] > u * mass
        if enough or whole is None or ranked.size == scores.size:
            break
        ranked = _ranked(scores, np.arange(scores.size))
    at = int(np.searchsorted(total, u * mass, side="right"))
    return int(ranked[min(at, total.size - 1)])


def _ranked(scores: np.ndarray, some: np.ndarray) -> np.ndarray:
    """The tokens `some`, ascending, in the order of their scores; equals by the lower id."""
    ranked: np.ndarray = some[np.argsort(-scores[some], kind="stable")]
    return ranked


def _greedy(scores: Any) -> list[int]:
    """The likeliest token of each row [n, vocab]; on a GPU, where they are."""
    if isinstance(scores, np.ndarray):
        _check_finite(scores)
    elif not math.isfinite(float(abs(scores).max())):  # the maximum of a NaN is NaN
        raise PyloraError(_NOT_FINITE)
    tokens: list[int] = scores.argmax(axis=1).tolist()
    return tokens


def _check_finite(logits: np.ndarray) -> None:
    # A sum is finite unless a term is not, or the terms are so large that it overflows: one pass,
    # and nothing the size of the logits is written.
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(logits.sum()) or np.isfinite(logits).all():
            return
    raise PyloraError(_NOT_FINITE)


def _check(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    batch_size: int,
) -> None:
    if not 0 <= temperature < np.inf:
        raise ConfigError(f"temperature must be 0 (greedy) or positive, got {temperature}")
    if not 0 < top_p <= 1:
        raise ConfigError(f"top_p must be above 0 and at most 1, got {top_p}")
    for name, value, low in (
        ("max_new_tokens", max_new_tokens, 0),
        ("top_k", top_k, 0),
        ("batch_size", batch_size, 1),
    ):
        if not isinstance(value, (int, np.integer)) or value < low:
            raise ConfigError(f"{name} must be a whole number from {low} on, got {value!r}")
    most = model.config.max_position_embeddings
    for i, prompt in enumerate(prompts):
        if not hasattr(prompt, "__len__"):
            raise DataError(f"prompt {i} is {prompt!r}; give a list of prompts, each a list of ids")
        if len(prompt) == 0:
            raise DataError(f"prompt {i} is empty; give at least one token, such as the BOS token")
        token_ids(prompt, model.config.vocab_size)
        if len(prompt) + max_new_tokens > most:
            raise ConfigError(
                f"prompt {i} has {len(prompt)} tokens; with {max_new_tokens} new ones it exceeds "
                f"the model's max_position_embeddings ({most})"
            )
