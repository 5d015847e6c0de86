"""Text from a model, token by token: greedy or sampled, many prompts at once with a KV cache.

What a prompt yields does not depend on the other prompts: rows have the same bits in any batch,
and each row draws from its own random stream, by position. A finished row leaves the batch and a
waiting prompt takes its place. Here are token ids alone: text is in pylora/generation/text.py.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from pylora.adapters.pool import AdapterPool
from pylora.errors import ConfigError, DataError, expect
from pylora.generation.choosing import Chooser, choose
from pylora.generation.prompt_cache import PromptCache
from pylora.generation.sampling import Sampling, sample, whole_number
from pylora.model.decoder import Batch, pack_attached
from pylora.model.inputs import token_ids
from pylora.model.kvcache import KVCache
from pylora.model.llama import Llama
from pylora.numbers import random

__all__ = ["OnToken", "Sampling", "Stop", "generate", "sample", "stream"]

OnToken = Callable[[int, int], None]  # (index of the prompt, token)
Stop = Callable[[int, int], bool]  # (index of the prompt, its newest token) -> is that the last?

_PREFILL_TOKENS = 2048  # prompts are taken in until a step has this many tokens


def generate(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    logit_bias: Mapping[int, float] | None = None,
    seed: int = 0,
    eos_ids: Collection[int] | None = None,
    batch_size: int = 32,
    first_row: int = 0,
    on_token: OnToken | None = None,
    stop: Stop | None = None,
    pool: AdapterPool | None = None,
    adapters: Sequence[str | None] | None = None,
    cache: PromptCache | None = None,
) -> list[list[int]]:
    """Up to `max_new_tokens` tokens after each prompt; the end-of-text token is not included.

    temperature 0 takes the likeliest token (the lowest id of equals); else `sample` draws one from
    softmax(logits / temperature), cut by top_k, top_p and min_p; repetition_penalty is
    transformers', the other penalties and logit_bias are OpenAI's (`Sampling`). Row i draws from
    the stream of (seed, first_row + i, position), so a list may be cut into calls that state their
    `first_row`. `eos_ids` defaults to the model's;
    `on_token` hears each token as it comes, the end excepted; `stop(i, token)` is asked after each
    and ends row i, the token included, by returning True.

    Without a pool all prompts use the adapter that is attached to the model, if any. With a `pool`,
    prompt i uses the adapter of the name adapters[i], None being the base model; without `adapters`
    all use `pool.active`. What counts is the adapters as they are when the call begins.

    A `cache`, for a single prompt, keeps what was computed for the next call, whose prompt goes on
    where this one ends: see `PromptCache`.

    Raises DataError for an empty prompt or a token outside the vocabulary, ConfigError for settings
    out of range, for a prompt that with its new tokens exceeds the model's
    max_position_embeddings, and for adapters that the pool does not have or that do not fit the
    call; WrongTypeError for a path in place of the model, or text in place of ids.
    """
    tokens = stream(
        model,
        prompts,
        max_new_tokens,
        sampling=Sampling(
            temperature,
            top_k,
            top_p,
            min_p,
            repetition_penalty,
            presence_penalty,
            frequency_penalty,
            logit_bias or {},
        ),
        seed=seed,
        eos_ids=eos_ids,
        batch_size=batch_size,
        first_row=first_row,
        stop=stop,
        pool=pool,
        adapters=adapters,
        cache=cache,
    )
    out: list[list[int]] = [[] for _ in prompts]
    for row, token in tokens:
        if token is not None:
            out[row].append(token)
            if on_token is not None:
                on_token(row, token)
    return out


def stream(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    sampling: Sampling | None = None,
    seed: int = 0,
    eos_ids: Collection[int] | None = None,
    batch_size: int = 32,
    first_row: int = 0,
    stop: Stop | None = None,
    pool: AdapterPool | None = None,
    adapters: Sequence[str | None] | None = None,
    cache: PromptCache | None = None,
) -> Iterator[tuple[int, int | None]]:
    """What `generate` says, as it comes: (index of the prompt, token), and (index, None) when a
    prompt's answer has ended. What is wrong with the arguments is raised at once, before the first
    step. An iterator that is dropped stops computing."""
    expect("model", model, "generate")
    _check(model, prompts, max_new_tokens, batch_size)
    random.check_seed(seed)
    packed, which = _adapters(model, len(prompts), pool, adapters)
    if cache is not None:
        cache.check(model, len(prompts))
    ends = frozenset(model.config.eos_token_ids if eos_ids is None else eos_ids)
    how = Sampling() if sampling is None else sampling
    how.check_vocabulary(model.config.vocab_size)
    rows = _Rows(model, prompts, max_new_tokens, how, seed, first_row)
    if not prompts or max_new_tokens == 0:
        return iter([(row, None) for row in range(len(prompts))])
    return _steps(rows, packed, which, ends, min(batch_size, len(prompts)), stop, cache)


class _Rows:
    """The prompts, what has been said after each, and how the next token is chosen."""

    def __init__(
        self,
        model: Llama,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling,
        seed: int,
        first_row: int,
    ) -> None:
        self.model, self.prompts, self.most = model, prompts, max_new_tokens
        self.out: list[list[int]] = [[] for _ in prompts]
        self.choosers = [Chooser(p, sampling, seed, first_row + i) for i, p in enumerate(prompts)]

    def choose(self, logits: Any, rows: Sequence[int]) -> list[int]:
        """The next token of each of these rows, by its logits [len(rows), vocab]."""
        return choose(self.model.ops, logits, [self.choosers[row] for row in rows])

    def take(self, row: int, token: int) -> bool:
        """Adds a token to a row's answer; whether there is room for more."""
        self.out[row].append(token)
        self.choosers[row].take(token)
        return len(self.out[row]) < self.most


def _steps(
    rows: _Rows,
    packed: list[Any],
    which: list[int],
    ends: frozenset[int],
    slots: int,
    stop: Stop | None,
    cache: PromptCache | None,
) -> Iterator[tuple[int, int | None]]:
    """The loop of `stream`; packed[which[row]] is the adapter of a row."""
    model, prompts, out = rows.model, rows.prompts, rows.out
    longest = max(map(len, prompts)) + rows.most
    kv: KVCache
    known = 0  # tokens of the only prompt that the cache has
    if cache is None:
        kv = model.kv_cache(slots, longest)
    else:
        kv, known = cache.begin(prompts[0], longest, packed[0])
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
            if cache is None:
                kv.clear(slot)
            active.append((row, slot))
            fresh[row] = prompts[row][known:]
            taken += len(fresh[row])
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
        if cache is not None:
            cache.ids.extend(map(int, latest))
        latest = rows.choose(logits, [row for row, _ in active])
        still: list[tuple[int, int]] = []
        for (row, slot), token in zip(active, latest, strict=True):
            more = token not in ends
            if more:
                more = rows.take(row, token)
                if stop is not None and stop(row, token):
                    more = False
                yield row, token
            if more:
                still.append((row, slot))
            else:
                free.append(slot)
                yield row, None
        if fresh or len(still) < len(active):
            batch = None
        active = still


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
    expect("pool", pool, "generate(pool=...)")
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


def _check(
    model: Llama, prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_size: int
) -> None:
    whole_number("max_new_tokens", max_new_tokens, 0)
    whole_number("batch_size", batch_size, 1)
    expect("prompts", prompts, "generate")
    most = model.config.max_position_embeddings
    for i, prompt in enumerate(prompts):
        expect("ids", prompt, f"prompt {i} of generate")
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
