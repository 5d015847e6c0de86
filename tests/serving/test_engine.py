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
from hypothesis import event, given, settings
from hypothesis import strategies as st

from pylora.adapters.adapter import Adapter
from pylora.adapters.loraconfig import LoraConfig
from pylora.adapters.plan import resolve
from pylora.adapters.pool import AdapterPool
from pylora.errors import ConfigError, DataError, UnsupportedError
from pylora.generation.generate import generate
from pylora.generation.logprobs import Logprobs
from pylora.generation.sampling import Sampling
from pylora.model.config import LlamaConfig
from pylora.model.llama import Llama
from pylora.model.whole import Whole
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
    Pooled,
    QueueFull,
    Request,
    Token,
    UnknownAdapter,
)
from pylora.serving.stats import StepReport
from pylora.types import Seqs

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


def pooled_alone(model: Llama, request: Request) -> np.ndarray:
    """The prompt's rows behind the last norm, by the layers, as one."""
    model.attach(mixed(model, request.adapters) or {})
    ids = np.array(request.ids)
    seqs = Seqs(np.array([0, ids.size]), np.array([0]), np.array([ids.size]))
    x, _ = model.trunk.forward(ids, seqs, np.arange(ids.size), None, model.trunk.lowest, False)
    model.detach()
    rows = model.ops.norm_forward(x, model.norm)[0].astype(np.float64)
    total = np.zeros(rows.shape[1])
    for row in rows:
        total += row
    return rows[-1] if request.pooling == "last" else total / ids.size


def check(model: Llama, request: Request, heard: Heard) -> None:
    """The answer is the one alone, and its logprobs are those of the whole text."""
    want, done = alone(model, request), heard.done
    assert heard.ids == want
    assert isinstance(heard.events[0], Began)
    assert done.usage.prompt_tokens == len(request.ids)
    assert done.usage.completion_tokens == len(want)
    assert done.reason == ("length" if len(want) == request.max_new_tokens else "stop")
    if request.pooling is not None:
        (pooled,) = (event.row for event in heard.events if isinstance(event, Pooled))
        np.testing.assert_array_equal(pooled, pooled_alone(model, request))
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
        pooling = random.choice([None] * 8 + ["last", "mean"])
        return Request(
            prompt,
            0 if pooling else random.choice([1, 5, 14, 30, 80 - len(prompt)]),
            random.choice(SAMPLINGS),
            seed=random.randrange(3),
            row=random.randrange(3),
            stop_ids=random.choice([(), (), (4, 11, 12, 30)]),
            adapters=random.choice(some),
            logprobs=random.choice([None, None, None, 0, 3]),
            prompt_logprobs=random.random() < 0.1,
            pooling=pooling,
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


@settings(max_examples=8)
@given(st.randoms(use_true_random=True).map(a_scene))
def test_an_answer_is_the_one_alone_whoever_is_served(model: Llama, scene: Scene) -> None:
    """Random arrivals, in steps that take in any pieces of prompts, with hardly any memory:
    requests begin on others' prefixes, give their memory up, and are cancelled."""
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


# ---- what else a request can say ----------------------------------------------------------------


@pytest.fixture(scope="module")
def net() -> Llama:
    return a_model()


def an_engine(model: Llama, **settings: Any) -> Engine:
    return Engine(model, settings.pop("adapters", None) or a_registry(model), **settings)


class Only:
    """A mask of a few tokens; none once so many have come."""

    def __init__(self, tokens: set[int], most: int, bits: bool) -> None:
        self.tokens, self.most, self.bits = tokens, most, bits

    def allowed(self, answer: Any) -> np.ndarray:
        mask = np.zeros(VOCAB, np.bool_)
        mask[list(self.tokens if len(answer) < self.most else ())] = True
        if not self.bits:
            return mask
        packed = np.packbits(np.pad(mask, (0, 64 - VOCAB)), bitorder="little")
        return packed.view(np.int32)


@pytest.mark.parametrize("bits", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_mask_says_what_may_come(net: Llama, bits: bool, temperature: float) -> None:
    heard = Heard()
    with an_engine(net) as engine:
        mask = Only({3, 17, 60}, 9, bits)
        engine.submit(Request([1, 2], 30, Sampling(temperature, top_k=40), mask=mask), heard)
        assert heard.done.reason == "stop"
    assert len(heard.ids) == 9 and set(heard.ids) <= {3, 17, 60}


class Broken:
    def allowed(self, answer: Any) -> np.ndarray:
        raise RuntimeError("no such rule")


def test_what_fails_in_one_request_ends_that_one_alone(net: Llama) -> None:
    nan = an_adapter(net, 9)
    nan["model.layers.0.self_attn.q_proj"].B[:] = np.nan
    registry = a_registry(net)
    registry.add("nan", nan)
    request = Request([5, 6, 7], 20, Sampling(0.8), stop_ids=())
    heard, broken, sick, deaf = Heard(), Heard(), Heard(), Heard()

    def throws(event: Event) -> None:
        deaf(event)
        if isinstance(event, Token):
            raise ValueError("who cares")

    with an_engine(net, adapters=registry) as engine:
        engine.submit(Request([1], 5, mask=Broken()), broken)
        engine.submit(Request([1], 5, adapters=(("nan", 1.0),)), sick)
        engine.submit(Request([1], 50, stop_ids=()), throws)
        engine.submit(request, heard)
        check(net, request, heard)
        assert isinstance(broken.end, Failed) and "no such rule" in str(broken.end.error)
        assert isinstance(sick.end, Failed) and "not finite" in str(sick.end.error)
        assert deaf.done.reason == "cancelled" and len(deaf.ids) == 1
    assert engine.stats().ended == {"failed": 2, "cancelled": 1, "length": 1}


def test_a_step_that_fails_ends_those_in_it_and_no_others(net: Llama) -> None:
    engine = an_engine(net, max_batch=1, start=False)
    forward, first, second = engine._stepper._forward, Heard(), Heard()
    calls = iter([MemoryError("no room"), None])

    def fails(parts: Any) -> Any:
        error = next(calls, None)
        if error is not None:
            raise error
        return forward(parts)

    engine._stepper._forward = fails  # type: ignore[method-assign]
    request = Request([5, 6, 7], 8, stop_ids=())
    engine.submit(request, first)
    engine.submit(request, second)
    with engine:
        engine.start()
        assert isinstance(first.end, Failed) and "no room" in str(first.end.error)
        check(net, request, second)


def test_requests_are_checked(net: Llama) -> None:
    with an_engine(net, kv_bytes=48 * row_bytes(net)) as engine:
        assert engine.most_tokens == 48
        bad: list[tuple[type[Exception], str, Callable[[], Request]]] = [
            (DataError, "vocabulary", lambda: Request([VOCAB], 3)),
            (DataError, "empty", lambda: Request([], 3)),
            (ConfigError, "max_position_embeddings", lambda: Request([1] * 100, 29)),
            (ConfigError, "kv_bytes", lambda: Request([1] * 40, 9)),
            (ConfigError, "max_new_tokens", lambda: Request([1], -1)),
            (ConfigError, "logprobs", lambda: Request([1], 1, logprobs=21)),
            (ConfigError, "logit_bias", lambda: Request([1], 1, Sampling(logit_bias={61: 1.0}))),
            (ConfigError, "seed", lambda: Request([1], 1, seed=-1)),
            (ConfigError, "weight", lambda: Request([1], 1, adapters=(("tone", float("nan")),))),
            (ConfigError, "twice", lambda: Request([1], 1, adapters=(("a", 1.0), ("a", 1.0)))),
            (UnknownAdapter, "'no'; .*: legal", lambda: Request([1], 1, adapters=(("no", 1.0),))),
        ]  # fmt: skip
        for kind, says, make in bad:
            with pytest.raises(kind, match=says):
                engine.submit(make(), Heard())
        assert engine.stats().requests == 0
    with pytest.raises(ConfigError, match="holds no request"):
        Engine(net, kv_bytes=10)
    with pytest.raises(ConfigError, match="another model"):
        Engine(net, Registry(a_model()))


def test_no_new_tokens_are_an_echo_or_nothing(net: Llama) -> None:
    with an_engine(net) as engine:
        request, heard = Request([4, 5, 6], 0, prompt_logprobs=True, logprobs=2), Heard()
        engine.submit(request, heard)
        check(net, request, heard)
        assert len(heard.events) == 3 and heard.done.usage.completion_tokens == 0


# ---- coming and going ---------------------------------------------------------------------------


def test_the_queue_has_a_limit_and_says_when_to_come_again(net: Llama) -> None:
    engine = an_engine(net, max_batch=2, queue_limit=1, start=False)
    heard = [Heard() for _ in range(3)]
    for one in heard:
        engine.submit(Request([1], 4), one)
    with pytest.raises(QueueFull) as full:
        engine.submit(Request([1], 4), Heard())
    assert full.value.retry_after >= 1
    engine.start()
    assert all(isinstance(one.end, Done) for one in heard)
    engine.submit(Request([1], 1), last := Heard())
    assert last.done and engine.stats().refused == 1
    engine.close()


def test_a_deadline_ends_those_that_wait_and_those_in_work(net: Llama) -> None:
    engine = an_engine(net, max_batch=1, start=False)
    long, late = Heard(), Heard()
    engine.submit(Request([1], 100, stop_ids=(), deadline=time.monotonic() + 3600), long)
    engine.submit(Request([1], 4, deadline=time.monotonic() - 1), late)
    engine._turn()
    assert late.done.reason == "deadline" and not late.ids
    engine._turn()
    engine._scheduler.running[0].request.__dict__["deadline"] = 0.0
    engine._earliest = 0.0
    engine._turn()
    assert long.done.reason == "deadline" and len(long.ids) == 2
    engine.close()


def test_closing_finishes_or_hands_back(net: Llama) -> None:
    for finish in (True, False):
        engine = an_engine(net, max_batch=1, start=False)
        heard = [Heard() for _ in range(3)]
        for one in heard:
            engine.submit(Request([2], 9, stop_ids=()), one)
        engine.close(finish=finish)
        for one in heard:
            if finish:
                assert one.done.reason == "length"
            else:
                assert isinstance(one.end, Failed) and isinstance(one.end.error, Closed)
        with pytest.raises(Closed):
            engine.submit(Request([2], 9), Heard())
        engine.close()


def test_what_is_not_finished_in_time_is_handed_back(net: Llama) -> None:
    engine = an_engine(net)
    heard = Heard()
    hold = threading.Event()

    def slow(event: Event) -> None:
        heard(event)
        hold.wait(0.05)

    engine.submit(Request([2], 100, stop_ids=()), slow)
    engine.close(timeout=0.01)
    assert isinstance(heard.end, Failed) and isinstance(heard.end.error, Closed)


def test_nobody_waits_for_another_who_asks_much(net: Llama) -> None:
    """Ten of one key and then one of another: that one is the second to be served."""
    engine, ended = an_engine(net, max_batch=1, start=False), []

    def listener(name: str) -> Callable[[Event], None]:
        return lambda event: ended.append(name) if isinstance(event, Done) else None

    for i in range(10):
        engine.submit(Request([1, i], 2, key="many"), listener(f"many {i}"))
    engine.submit(Request([3], 2, key="one"), listener("one"))
    engine.close()
    assert ended[:3] == ["many 0", "one", "many 1"] and len(ended) == 11


def test_answers_to_one_prompt_compute_it_once(net: Llama) -> None:
    prompt = list(range(50))
    heard = [Heard() for _ in range(4)]
    engine = an_engine(net, start=False)
    for row, one in enumerate(heard):
        engine.submit(Request(prompt, 6, Sampling(1.0), row=row, stop_ids=()), one)
    engine.close()
    for row, one in enumerate(heard):
        check(net, Request(prompt, 6, Sampling(1.0), row=row, stop_ids=()), one)
        assert one.done.usage.cached_tokens == (49 if row else 0)
    stats = engine.stats()
    assert stats.cached_tokens == 3 * 49 and stats.adapters[""].tokens == 24


def test_a_conversation_goes_on_where_it_was(net: Llama) -> None:
    with an_engine(net) as engine:
        first = Heard()
        engine.submit(Request(list(range(20)), 10, stop_ids=(), adapters=(("tone", 1.0),)), first)
        assert first.done
        text = [*range(20), *first.ids, 7, 8]
        for name, known in (("tone", 29), ("legal", 0)):
            request, heard = Request(text, 5, stop_ids=(), adapters=((name, 1.0),)), Heard()
            engine.submit(request, heard)
            check(net, request, heard)
            assert heard.done.usage.cached_tokens == known, "of another adapter nothing is known"


def test_a_request_keeps_the_adapter_that_it_began_with(net: Llama) -> None:
    registry = a_registry(net)
    engine = an_engine(net, adapters=registry, start=False)
    request, heard, after = (
        Request([9, 8], 12, stop_ids=(), adapters=(("legal", 1.0),)),
        Heard(),
        Heard(),
    )
    engine.submit(request, heard)
    engine._turn()
    registry.add("legal", an_adapter(net, 77), replace=True)
    engine.submit(request, after)
    registry.unload("legal")
    engine.close()
    check(net, request, heard)
    assert (
        after.ids == generate(net, [[9, 8]], 12, eos_ids=(), pool=_pool(net, 77), adapters=["x"])[0]
    )
    assert after.ids != heard.ids and registry.nbytes > 0
    assert all(info.name != "legal" for info in registry.list())


def _pool(model: Llama, seed: int) -> AdapterPool:
    pool = AdapterPool(model)
    pool.add("x", an_adapter(model, seed))
    return pool


def test_steps_are_reported(net: Llama) -> None:
    reports: list[StepReport] = []
    engine = an_engine(net, prefill_chunk=4, on_step=reports.append, start=False)
    engine.submit(Request(list(range(10)), 3, stop_ids=()), Heard())
    engine.close()
    assert [r.prompt_tokens for r in reports] == [4, 4, 2, 0, 0]
    assert [r.decoding for r in reports] == [0, 0, 0, 1, 1]
    stats = engine.stats()
    assert stats.steps == 5 and stats.computed_tokens == 10 and stats.tokens == 3


# ---- adapters with weights of their own ---------------------------------------------------------


def test_adapters_with_weights_of_their_own_run_beside_the_others() -> None:
    """Each answer has the bits that it has alone, in steps that the three share."""
    model = a_model(tie_word_embeddings=False)
    registry = a_registry(model)
    rng = np.random.default_rng(0)
    made: dict[str, Adapter | None] = {"verse": an_adapter(model, 2, r=4)}
    for i, names in enumerate((("lm_head",), ("model.embed_tokens", "model.norm"))):
        plain = an_adapter(model, 5 + i)
        shapes = model.config.tensors()
        tensors = {
            f"{n}.weight": rng.standard_normal(shapes[f"{n}.weight"]).astype(np.float32)
            for n in names
        }
        made[f"own {i}"] = Adapter(plain.config, plain.plan, dict(plain), Whole(tensors))
        registry.add(f"own {i}", made[f"own {i}"])  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="cannot be summed"):
        registry.resolve((("own 0", 0.5), ("verse", 0.5)))
    asked = [
        (name, Request(tuple(rng.integers(0, VOCAB, n).tolist()), 7, adapters=((name, 1.0),)))
        for name, n in (("own 0", 9), ("verse", 5), ("own 1", 3), ("own 0", 4))
    ]
    asked.append(("", Request((3, 1, 4, 1, 5), 7)))
    made[""] = None
    with Engine(model, registry) as engine:
        heard = [(name, request, Heard()) for name, request in asked]
        for _, request, said in heard:
            engine.submit(request, said)
        for name, request, said in heard:
            assert said.done.usage.completion_tokens == len(said.ids)
            pool = AdapterPool(model)
            if (adapter := made[name]) is not None:
                pool.add("it", adapter)
            (want,) = generate(
                model, [list(request.ids)], 7, pool=pool,
                adapters=["it" if name else None],
            )  # fmt: skip
            assert said.ids == want, name
            if adapter is not None:
                model.attach(adapter)
                assert generate(model, [list(request.ids)], 7)[0] == want
                model.detach()
