"""Text from a model, token by token: greedy or sampled, many prompts at once with a KV cache.

What a prompt yields does not depend on the other prompts: rows have the same bits in any batch,
and each row draws from its own random stream, by position. A finished row leaves the batch and a
waiting prompt takes its place.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence

import numpy as np

from pylora import random
from pylora.errors import ConfigError, DataError, PyloraError
from pylora.model import Llama

OnToken = Callable[[int, int], None]  # (index of the prompt, token)

_PREFILL_TOKENS = 2048  # prompts are taken in until a step has this many tokens


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
) -> list[list[int]]:
    """Up to `max_new_tokens` tokens after each prompt; the end-of-text token is not included.

    temperature 0 takes the likeliest token (the lowest id of equals); else `sample` draws one from
    softmax(logits / temperature), cut by top_k and top_p. Row i draws from the stream of
    (seed, first_row + i, position), so a list may be cut into calls that state their `first_row`.
    `eos_ids` defaults to the model's; `on_token` hears each token as it comes, the end excepted.

    Raises DataError for an empty prompt, ConfigError for settings out of range or for a prompt
    that with its new tokens exceeds the model's max_position_embeddings.
    """
    _check(model, prompts, max_new_tokens, temperature, top_k, top_p, batch_size)
    ends = frozenset(model.config.eos_token_ids if eos_ids is None else eos_ids)
    out: list[list[int]] = [[] for _ in prompts]
    if not prompts or max_new_tokens == 0:
        return out
    slots = min(batch_size, len(prompts))
    kv = model.kv_cache(slots, max(map(len, prompts)) + max_new_tokens)
    waiting, free = deque(range(len(prompts))), list(range(slots))
    active: list[tuple[int, int, list[int]]] = []  # (prompt, slot, tokens not yet seen)
    while waiting or active:
        fresh = 0
        while (
            waiting and free and (not fresh or fresh + len(prompts[waiting[0]]) <= _PREFILL_TOKENS)
        ):
            row, slot = waiting.popleft(), free.pop()
            kv.clear(slot)
            active.append((row, slot, list(prompts[row])))
            fresh += len(prompts[row])
        ids = [token for _, _, new in active for token in new]
        logits = model.decode(ids, kv, [len(new) for *_, new in active], [a[1] for a in active])
        scores = model.ops.to_numpy(logits)
        still: list[tuple[int, int, list[int]]] = []
        for (row, slot, _), row_scores in zip(active, scores, strict=True):
            if temperature == 0:
                token = _greedy(row_scores)
            else:
                stream = random.stream("sample", str(first_row + row))
                at = random.unit(seed, stream, len(prompts[row]) + len(out[row]), 1)[0]
                token = sample(row_scores, float(at), temperature, top_k, top_p)
            if token not in ends:
                out[row].append(token)
                if on_token is not None:
                    on_token(row, token)
                if len(out[row]) < max_new_tokens:
                    still.append((row, slot, [token]))
                    continue
            free.append(slot)
        active = still
    return out


def sample(
    logits: np.ndarray, u: float, temperature: float, top_k: int = 0, top_p: float = 1.0
) -> int:
    """One token from logits [vocab] and a number 0 < u < 1, in float64.

    p = softmax(logits / temperature). Tokens are ranked by p, equals by the lower id. top_k > 0
    keeps the first top_k. top_p < 1 then keeps the shortest run of the first whose share of what
    top_k left is at least top_p; at least one stays. The token is the first, in ranked order,
    at which the running sum of p exceeds u times the sum of all that stayed.
    """
    scores = np.asarray(logits, np.float64)
    _check_finite(scores)
    ranked = np.argsort(-scores, kind="stable")
    if top_k:
        ranked = ranked[:top_k]
    total = np.cumsum(np.exp((scores[ranked] - scores[ranked[0]]) / temperature))
    if top_p < 1:
        total = total[: int(np.searchsorted(total, top_p * total[-1])) + 1]
    at = int(np.searchsorted(total, u * total[-1], side="right"))
    return int(ranked[min(at, total.size - 1)])


def _greedy(logits: np.ndarray) -> int:
    _check_finite(logits)
    return int(np.argmax(logits))


def _check_finite(logits: np.ndarray) -> None:
    if not np.isfinite(logits).all():
        raise PyloraError(
            "the model's logits are not finite, so no token can be chosen; check the weights and "
            "the adapter for NaN or infinite values"
        )


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
        if len(prompt) + max_new_tokens > most:
            raise ConfigError(
                f"prompt {i} has {len(prompt)} tokens; with {max_new_tokens} new ones it exceeds "
                f"the model's max_position_embeddings ({most})"
            )
