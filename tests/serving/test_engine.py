"""The engine: each answer has the bits of `generate` alone, whoever comes and goes beside it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pylora.adapters.adapter import Adapter
from pylora.adapters.loraconfig import LoraConfig
from pylora.adapters.plan import resolve
from pylora.adapters.pool import AdapterPool
from pylora.errors import ConfigError, DataError, PyloraError
from pylora.generation.generate import generate
from pylora.generation.logprobs import Logprobs
from pylora.generation.sampling import Sampling
from pylora.model.config import LlamaConfig
from pylora.model.llama import Llama
from pylora.serving.adapters import Registry
from pylora.serving.arena import row_bytes
from pylora.serving.engine import Engine
from pylora.serving.request import (
    Began,
    Closed,
    Done,
    Echo,
    Event,
    Failed,
    QueueFull,
    Request,
    Token,
    UnknownAdapter,
)
from pylora.serving.stats import StepReport

VOCAB = 61
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
SHARED = [7, 3, 9, 9, 1, 44, 13, 2, 5, 60, 21, 8, 30, 31, 32, 33, 34, 35, 36, 37]  # of prompts


def a_model(precision: str = "fp32", backend: str = "c", **over: Any) -> Llama:
    return Llama.random(
        LlamaConfig.tiny(**(SHAPE | over)), seed=5, backend=backend, precision=precision
    )


def an_adapter(model: Llama, seed: int, r: int = 4) -> Adapter:
    config = LoraConfig(
        r=r, lora_alpha=3 * r, target_modules=["q_proj", "v_proj", "down_proj"],
        init_lora_weights=False,
    )  # fmt: skip
    return Adapter.init(resolve(config, model.config.modules()), config, seed=seed)


def a_registry(model: Llama, **limits: Any) -> Registry:
    registry = Registry(model, **limits)
    for i, name in enumerate(("legal", "verse", "tone")):
        registry.add(name, an_adapter(model, i + 1, r=2 + 2 * i))
    return registry


@dataclass
class Heard:
    """What was said of a request."""

    events: list[Event] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)

    def __call__(self, event: Event) -> None:
        assert not self.ended.is_set(), "something was said behind the end"
        self.events.append(event)
        if isinstance(event, Done | Failed):
            self.ended.set()

    @property
    def tokens(self) -> list[Token]:
        return [event for event in self.events if isinstance(event, Token)]

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]

    @property
    def end(self) -> Done | Failed:
        assert self.ended.wait(60), "the request did not end"
        last = self.events[-1]
        assert isinstance(last, Done | Failed)
        return last

    @property
    def done(self) -> Done:
        end = self.end
        assert isinstance(end, Done), end
        return end


def mixed(model: Llama, adapters: tuple[tuple[str, float], ...]) -> Adapter | None:
    """What a request's adapters come to, made from the beginning."""
    made = {
        n: an_adapter(model, i + 1, r=2 + 2 * i) for i, n in enumerate(("legal", "verse", "tone"))
    }
    wanted = [(made[name], weight) for name, weight in adapters if weight != 0]
    if [weight for _, weight in wanted] == [1.0]:
        return wanted[0][0]
    return Adapter.stack(wanted) if wanted else None


def alone(model: Llama, request: Request) -> list[int]:
    """The answer of `generate` to this request and no other."""
    how, adapter = request.sampling, mixed(model, request.adapters)
    pool = AdapterPool(model)
    if adapter is not None:
        pool.add("it", adapter)
    ends: Any = () if request.ignore_eos else request.stop_ids
    return generate(
        model, [list(request.ids)], request.max_new_tokens,
        temperature=how.temperature, top_k=how.top_k, top_p=how.top_p, min_p=how.min_p,
        repetition_penalty=how.repetition_penalty, presence_penalty=how.presence_penalty,
        frequency_penalty=how.frequency_penalty, logit_bias=dict(how.logit_bias),
        seed=request.seed, first_row=request.row, eos_ids=ends, pool=pool,
        adapters=[None if adapter is None else "it"],
    )[0]  # fmt: skip


def logits_of(model: Llama, request: Request, answer: list[int]) -> np.ndarray:
    """Of the whole text at once [tokens, vocab], by the layers and not by the decoder."""
    model.attach(mixed(model, request.adapters) or {})
    rows = model.ops.to_numpy(model.forward(np.array([*request.ids, *answer]))[0])
    model.detach()
    return np.asarray(rows)


def check(model: Llama, request: Request, heard: Heard) -> None:
    """The answer is the one alone, and its logprobs are those of the whole text."""
    want, done = alone(model, request), heard.done
    assert heard.ids == want
    assert isinstance(heard.events[0], Began)
    assert done.usage.prompt_tokens == len(request.ids)
    assert done.usage.completion_tokens == len(want)
    assert done.reason == ("length" if len(want) == request.max_new_tokens else "stop")
    if request.logprobs is None and not request.prompt_logprobs:
        return
    rows, first = logits_of(model, request, want), len(request.ids) - 1
    if request.logprobs is not None:
        for i, token in enumerate(heard.tokens):
            found = Logprobs(rows[first + i])
            assert token.logprob == found.of(token.id)
            assert token.top == found.top(request.logprobs)
    if request.prompt_logprobs:
        echo = next(event for event in heard.events if isinstance(event, Echo))
        assert [token.id for token in echo.tokens] == list(request.ids)
        assert echo.tokens[0].logprob is None
        for i, token in enumerate(echo.tokens[1:]):
            assert token.logprob == Logprobs(rows[i]).of(token.id)


# ---- the same bits as alone ---------------------------------------------------------------------

SAMPLINGS = st.sampled_from(
    [
        Sampling(),
        Sampling(1.1),
        Sampling(0.9, top_k=12, top_p=0.9),
        Sampling(1.3, min_p=0.02, repetition_penalty=1.2),
        Sampling(0.0, presence_penalty=1.5, frequency_penalty=0.5),
        Sampling(0.7, logit_bias={5: 4.0, 9: -100.0}),
    ]
)
ADAPTERS = st.sampled_from(
    [
        (),
        (("legal", 1.0),),
        (("verse", 1.0),),
        (("tone", 0.4),),
        (("legal", 0.5), ("tone", -0.25)),
        (("verse", 0.0),),
    ]
)
PROMPTS = st.builds(
    lambda shared, own: (SHARED[:shared] + own) or [1],
    st.sampled_from([0, 0, 17, 20]),
    st.lists(st.integers(0, VOCAB - 1), max_size=25),
)
REQUESTS = st.builds(
    Request,
    ids=PROMPTS,
    max_new_tokens=st.integers(1, 14),
    sampling=SAMPLINGS,
    seed=st.integers(0, 3),
    row=st.integers(0, 2),
    stop_ids=st.sampled_from([(), (4, 11, 12, 30)]),
    adapters=ADAPTERS,
    logprobs=st.sampled_from([None, None, 0, 3]),
    prompt_logprobs=st.sampled_from([False, False, False, True]),
    key=st.sampled_from(["", "a", "b"]),
)


@dataclass
class Arrival:
    request: Request
    turn: int  # it comes before this step
    leaves: int | None  # it is cancelled so many turns later


ARRIVALS = st.lists(
    st.builds(
        Arrival, REQUESTS, st.integers(0, 12), st.sampled_from([None, None, None, None, 1, 4])
    ),
    min_size=1, max_size=9,
)  # fmt: skip
PRECISIONS = ("fp32", "fp32x3", "bf16", "int8", "int4")
MODELS: dict[str, Callable[[], Llama]] = {
    **{p: (lambda p=p: a_model(p)) for p in PRECISIONS},
    "numpy": lambda: a_model(backend="numpy"),
    "window": lambda: a_model("bf16", model_type="mistral", sliding_window=7),
    # Frequencies of a long text differ from those of a short one, for the whole prompt.
    "dynamic": lambda: a_model(
        max_position_embeddings=24, rope_scaling={"rope_type": "dynamic", "factor": 4.0}
    ),
}


@pytest.fixture(scope="module", params=list(MODELS))
def model(request: pytest.FixtureRequest) -> Llama:
    return MODELS[request.param]()


@given(
    arrivals=ARRIVALS,
    rows=st.sampled_from([80, 112, 400]),  # 80 hold the largest request, and hardly another one
    batch=st.integers(1, 5),
    pieces=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    keep=st.sampled_from([True, True, False]),
)
def test_an_answer_is_the_one_alone_whoever_is_served(
    model: Llama, arrivals: list[Arrival], rows: int, batch: int, pieces: list[int], keep: bool
) -> None:
    """Random arrivals, in steps that take in any pieces of prompts, with hardly any memory: requests
    begin on others' prefixes, give their memory up, and are cancelled."""
    longest = model.config.max_position_embeddings
    arrivals = [a for a in arrivals if len(a.request.ids) + a.request.max_new_tokens <= longest]
    engine = Engine(
        model, a_registry(model), kv_bytes=rows * row_bytes(model), max_batch=batch,
        prefix_cache=keep, start=False,
    )  # fmt: skip
    turns = iter(range(10_000))
    pace: Any = engine._stepper.pace
    pace.piece = lambda decoding: pieces[next(turns) % len(pieces)] + (not decoding)
    heard = [Heard() for _ in arrivals]
    tickets: dict[int, Any] = {}
    for turn in range(2000):
        for i, a in enumerate(arrivals):
            if a.turn == turn:
                tickets[i] = engine.submit(a.request, heard[i])
            if a.leaves is not None and a.turn + a.leaves == turn:
                tickets[i].cancel()
        if engine._waiting or engine._scheduler.running:
            engine._turn()
        elif turn > 20:
            break
    for a, h in zip(arrivals, heard, strict=True):
        if a.leaves is not None and h.done.reason == "cancelled":
            assert h.ids == alone(model, a.request)[: len(h.ids)]
        else:
            check(model, a.request, h)
    stats = engine.stats()
    assert sum(stats.ended.values()) == len(arrivals) and not stats.running and not stats.queued
    arena, kept = engine._arena, engine._scheduler.prefixes
    assert arena.used == kept.rows, "rows belong to nobody"
    assert engine.adapters.list() and all(not p.leases for p in engine.adapters._packs.values())
    engine.close()
    assert arena.used == 0
