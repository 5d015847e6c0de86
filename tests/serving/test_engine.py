"""The engine: each answer has the bits of `generate` alone, whoever comes and goes beside it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import event, given
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
    """Of each token of the text [tokens, vocab]: the prompt by the layers, then token by token."""
    model.attach(mixed(model, request.adapters) or {})
    kv = model.kv_cache(1, len(request.ids) + len(answer))
    rows = [model.forward(np.array(request.ids))[0]]
    model.decode(request.ids, kv, [len(request.ids)])
    rows += [model.decode([token], kv, [1]) for token in answer]
    model.detach()
    return np.concatenate([model.ops.to_numpy(row) for row in rows])


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

SAMPLINGS = (
    Sampling(),
    Sampling(1.1),
    Sampling(0.9, top_k=12, top_p=0.9),
    Sampling(1.3, min_p=0.02, repetition_penalty=1.2),
    Sampling(0.0, presence_penalty=1.5, frequency_penalty=0.5),
    Sampling(0.7, logit_bias={5: 4.0, 9: -100.0}),
)
ADAPTERS: tuple[tuple[tuple[str, float], ...], ...] = (
    (),
    (("legal", 1.0),),
    (("verse", 1.0),),
    (("tone", 0.4),),
    (("legal", 0.5), ("tone", -0.25)),
    (("verse", 0.0),),
)


@dataclass
class Arrival:
    request: Request
    turn: int  # it comes before this step
    leaves: int | None  # it is cancelled so many turns later


@dataclass
class Scene:
    """Who comes when, and how the engine is set."""

    arrivals: list[Arrival]
    rows: int
    batch: int
    pieces: list[int]
    keep: bool
    ahead: int
    far: int


def a_scene(random: Random) -> Scene:
    """Prompts that begin alike, a few adapters, hardly any memory."""
    texts = [[random.randrange(VOCAB) for _ in range(45)] for _ in range(random.randint(1, 2))]
    some = random.sample(ADAPTERS, random.randint(1, 3))

    def request() -> Request:
        prompt = random.choice(texts)[: random.choice([1, 3, 18, 30, 45])]
        prompt += [random.randrange(VOCAB) for _ in range(random.choice([0, 0, 1, 5]))]
        return Request(
            prompt,
            random.choice([1, 5, 14, 30, 80 - len(prompt)]),
            random.choice(SAMPLINGS),
            seed=random.randrange(3),
            row=random.randrange(3),
            stop_ids=random.choice([(), (), (4, 11, 12, 30)]),
            adapters=random.choice(some),
            logprobs=random.choice([None, None, None, 0, 3]),
            prompt_logprobs=random.random() < 0.1,
            key=random.choice(["", "a", "b"]),
        )

    spread = random.choice([1, 10, 30])
    arrivals = [
        Arrival(request(), random.randrange(spread), random.choice([None] * 6 + [1, 4]))
        for _ in range(random.randint(3, 12))
    ]
    return Scene(
        arrivals,
        random.choice([80, 80, 112, 400]),  # 80 hold the largest request, and little else
        random.randint(2, 5),
        [random.randint(0, 9) for _ in range(5)],
        random.random() < 0.8,
        random.choice([1, 1, 8, 64]),
        random.choice([1, 8, 1024]),
    )


PRECISIONS = ("fp32", "fp32x3", "bf16", "int8", "int4")
MODELS: dict[str, Callable[[], Llama]] = {
    **{p: (lambda p=p: a_model(p)) for p in PRECISIONS},
    "numpy": lambda: a_model(backend="numpy"),
    "window": lambda: a_model("bf16", model_type="mistral", sliding_window=7),
    # Frequencies of a long text differ from those of a short one, for the whole prompt.
    "longrope": lambda: a_model(
        rope_scaling={
            "rope_type": "longrope",
            "short_factor": [1.0] * 8,
            "long_factor": [1.0 + i for i in range(8)],
            "original_max_position_embeddings": 32,
            "factor": 4.0,
        }
    ),
}


@pytest.fixture(scope="module", params=list(MODELS))
def model(request: pytest.FixtureRequest) -> Llama:
    return MODELS[request.param]()


@given(st.randoms(use_true_random=True).map(a_scene))
def test_an_answer_is_the_one_alone_whoever_is_served(model: Llama, scene: Scene) -> None:
    """Random arrivals, in steps that take in any pieces of prompts, with hardly any memory: requests
    begin on others' prefixes, give their memory up, and are cancelled."""
    engine = Engine(
        model, a_registry(model), kv_bytes=scene.rows * row_bytes(model), max_batch=scene.batch,
        prefix_cache=scene.keep, start=False,
    )  # fmt: skip
    turns = iter(range(10_000))
    pace: Any = engine._stepper.pace
    pace.piece = lambda decoding: scene.pieces[next(turns) % 5] + (not decoding)
    engine._scheduler.ahead, engine._scheduler.far = scene.ahead, scene.far
    heard = [Heard() for _ in scene.arrivals]
    tickets: dict[int, Any] = {}
    for turn in range(2000):
        for i, a in enumerate(scene.arrivals):
            if a.turn == turn:
                tickets[i] = engine.submit(a.request, heard[i])
            if a.leaves is not None and a.turn + a.leaves == turn:
                tickets[i].cancel()
        engine._turn()
        if turn > 40 and not engine._waiting and not engine._scheduler.running:
            break
    for a, h in zip(scene.arrivals, heard, strict=True):
        if a.leaves is not None and h.done.reason == "cancelled":
            assert h.ids == alone(model, a.request)[: len(h.ids)]
        else:
            check(model, a.request, h)
    stats = engine.stats()
    event(f"some gave their memory up: {engine._scheduler.preemptions > 0}")
    event(f"some began on a prefix: {stats.cached_tokens > 0}")
    event(f"rows moved: {engine._arena.moved_rows > 0}")
    assert sum(stats.ended.values()) == len(scene.arrivals)
    assert not stats.running and not stats.queued
    arena, kept = engine._arena, engine._scheduler.prefixes
    assert arena.used == kept.rows, "rows belong to nobody"
    assert all(not pack.leases for pack in engine.adapters._packs.values())
    engine.close()
    assert arena.used == 0
