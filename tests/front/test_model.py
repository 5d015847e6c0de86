"""pylora.load and pylora.Model: the five common jobs, and that each is what the parts do."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tokenizers")

from tiny_model import write_tiny_model

import pylora
from pylora.adapters.adapter import Adapter, parameters
from pylora.adapters.plan import resolve
from pylora.errors import (
    ConfigError,
    DataError,
    FileFormatError,
    PlanError,
    PyloraError,
    WrongTypeError,
)
from pylora.formats import open_checkpoint
from pylora.generation.generate import generate

TEXTS = ["truth exists. In symbols:", "time", "life equals energy. In symbols:"]
CHAT = [
    {"role": "user", "content": "what is truth?"},
    {"role": "assistant", "content": "a word"},
    {"role": "user", "content": "and time?"},
]
RECORDS = [
    {"prompt": f"{word} exists. In symbols:", "completion": f" ∃{symbol}"}
    for word, symbol in (("truth", "Φ"), ("life", "Λ"), ("time", "τ"), ("energy", "ε"))
]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


def random_adapter(path: Path, seed: int, **lora: Any) -> Adapter:
    with open_checkpoint(path) as checkpoint:
        config = pylora.LoraConfig.fresh(4, init_lora_weights=False, **lora)
        return Adapter.init(resolve(config, checkpoint.config.modules()), config, seed)


@pytest.fixture(scope="module")
def folders(path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    where = tmp_path_factory.mktemp("adapters")
    for name, seed in (("legal", 1), ("verse", 2)):
        random_adapter(path, seed, target_modules="all-linear").save(where / name)
    return {name: where / name for name in ("legal", "verse")}


@pytest.fixture
def model(path: Path, folders: dict[str, Path]) -> Any:
    with pylora.load(path, folders) as loaded:
        yield loaded


def by_hand(path: Path, text: str, adapter: Path | None = None, n: int = 8, **how: Any) -> str:
    """What the parts give."""
    with open_checkpoint(path) as checkpoint:
        k, llama = checkpoint.tokenizer(), pylora.Llama.from_checkpoint(checkpoint)
        if adapter is not None:
            llama.attach(Adapter.load(adapter, checkpoint.config.modules()))
        ids = k.encode(text, bos=k.add_bos)
        out = generate(llama, [ids], n, eos_ids=k.eos_ids, **how)[0]
        return k.decode(ids + out)[len(k.decode(ids)) :]


# ---- loading -----------------------------------------------------------------------------------


def test_three_lines(path: Path, folders: dict[str, Path]) -> None:
    model = pylora.load(path, adapter=folders["legal"], precision="bf16")
    assert isinstance(model.chat("Who are you?", max_new_tokens=4), str)
    assert model.adapters.active == ("default",)
    model.close()


def test_an_adapter_may_be_a_run_an_object_or_several(
    path: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    want = by_hand(path, "time", folders["legal"])
    adapter = random_adapter(path, 1, target_modules="all-linear")
    adapter.save(tmp_path / "run" / "adapter")
    for given in (folders["legal"], str(folders["legal"]), tmp_path / "run", adapter):
        with pylora.load(path, given) as model:
            assert model.generate("time", max_new_tokens=8) == want
    with pylora.load(path, {"a": adapter, "b": folders["verse"]}) as model:
        assert tuple(model.adapters) == ("a", "b") and model.adapters.active == ()
        assert model.generate("time", max_new_tokens=8) == by_hand(path, "time")


def test_what_does_not_load(path: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="precision"):
        pylora.load(path, precision="int3")
    with pytest.raises(PyloraError, match="no backend 'abacus'"):
        pylora.load(path, backend="abacus")
    with pytest.raises(FileFormatError, match="give the base model here"):
        pylora.load(folders["legal"])
    with pytest.raises(FileFormatError, match="base model, not an adapter"):
        pylora.load(path, path)
    other = write_tiny_model(tmp_path / "wide", hidden_size=48)
    with pytest.raises(PlanError):
        pylora.load(other, folders["legal"])
    for wrong in (3, None, b"x", [path], pylora.Llama):
        with pytest.raises(WrongTypeError, match="path of its file or folder"):
            pylora.load(wrong)  # type: ignore[arg-type]
    for wrong in (3, [folders["legal"]], object()):
        with pytest.raises(WrongTypeError, match="adapter"):
            pylora.load(path, wrong)  # type: ignore[arg-type]


def test_a_closed_model_says_so(path: Path) -> None:
    with pylora.load(path) as model:
        pass
    model.close()
    assert "closed" in repr(model)
    for call in (
        lambda: model.generate("a"),
        lambda: model.chat("a"),
        lambda: model.score("a b"),
        lambda: model.train(RECORDS),
        lambda: model.adapters.add("a", "b"),
        lambda: model.__enter__(),
    ):
        with pytest.raises(PyloraError, match=r"closed|no such file"):
            call()


# ---- text --------------------------------------------------------------------------------------


def test_generate_is_what_the_parts_do(
    model: pylora.Model, path: Path, folders: dict[str, Path]
) -> None:
    assert model.generate("time", max_new_tokens=8) == by_hand(path, "time")
    model.adapters.use("verse")
    assert model.generate("time", max_new_tokens=8) == by_hand(path, "time", folders["verse"])
    how: dict[str, Any] = {"temperature": 1.2, "top_p": 0.9, "top_k": 30, "min_p": 0.01, "seed": 4}
    how["repetition_penalty"] = 1.2
    assert model.generate("time", max_new_tokens=8, **how) == by_hand(
        path, "time", folders["verse"], **how
    )


@pytest.mark.parametrize("how", [{}, {"temperature": 1.5, "seed": 3}, {"stop": ["e", "<|"]}])
def test_streamed_pieces_are_the_text(model: pylora.Model, how: dict[str, Any]) -> None:
    for text in TEXTS:
        whole = model.generate(text, max_new_tokens=20, **how)
        pieces = list(model.generate(text, max_new_tokens=20, stream=True, **how))
        assert "".join(pieces) == whole and all(pieces)
        assert not any(s in whole for s in how.get("stop", ()))
    many: dict[int, str] = dict.fromkeys(range(len(TEXTS)), "")
    for i, piece in model.generate(TEXTS, max_new_tokens=20, stream=True, **how):
        many[i] += piece
    assert list(many.values()) == model.generate(TEXTS, max_new_tokens=20, **how)


def test_many_prompts_each_with_its_own_adapter(
    model: pylora.Model, path: Path, folders: dict[str, Path]
) -> None:
    got = model.generate(TEXTS, max_new_tokens=8, adapter=["legal", None, "verse"])
    wanted = (folders["legal"], None, folders["verse"])
    assert got == [by_hand(path, t, a) for t, a in zip(TEXTS, wanted)]
    assert model.generate([], max_new_tokens=8) == []
    assert model.generate(("time",), max_new_tokens=8) == [by_hand(path, "time")]
    assert model.generate("time", max_new_tokens=8, adapter="legal") == by_hand(
        path, "time", folders["legal"]
    )
    with pytest.raises(ConfigError, match="3 prompts need a list of 3 adapters"):
        model.generate(TEXTS, adapter=["legal"])


def test_the_length_of_an_answer(model: pylora.Model) -> None:
    assert model.generate("time", max_new_tokens=0) == ""
    room = model.config.max_position_embeddings
    ids = len(model.tokenizer.encode("time"))
    long = "time " * ((room - 3) // ids)  # leaves room for a few tokens: as many are made
    left = room - len(model.tokenizer.encode(long))
    assert 0 < left < 60 and 0 < len(list(model.generate(long, stream=True))) <= left
    with pytest.raises(ConfigError, match="max_position_embeddings"):
        model.generate("time", max_new_tokens=room)
    with pytest.raises(ConfigError, match="max_position_embeddings"):
        model.generate("time " * 200)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"template_args": 5}, "template_args takes a dict"),
        ({"tools": {"type": "function"}}, "tools takes a list, got a dict"),
        ({"documents": "text"}, "documents takes a list, got the text 'text'"),
        ({"seed": "x"}, "seed = 'x': a seed is a whole number"),
    ],
)
def test_a_setting_of_a_wrong_type_says_what_to_pass(
    model: pylora.Model, given: dict[str, Any], says: str
) -> None:
    with pytest.raises(pylora.PyloraError, match=says):
        model.chat("time", max_new_tokens=1, **given)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({"temprature": 1}, "temperature"),
        ({"max_tokens": 5}, "max_new_tokens"),
        ({"do_sample": True}, "temperature"),
        ({"stop_strings": ["a"]}, "stop"),
        ({"xyzzy": 1}, "there are max_new_tokens, "),
    ],
)
def test_a_setting_of_another_name_leads_to_ours(
    model: pylora.Model, given: dict[str, Any], meant: str
) -> None:
    for verb in (model.generate, model.chat):
        with pytest.raises(ConfigError, match="has no setting") as error:
            verb("time", **given)
        assert meant in str(error.value)
    with pytest.raises(ConfigError, match="did you mean system"):
        model.chat("time", system_prompt="a")
    with pytest.raises(ConfigError, match="there are max_new_tokens"):
        model.generate("time", system_prompt="a")


def test_load_has_no_other_settings(path: Path) -> None:
    for name, meant in (("dtype", "precision"), ("device", "backend"), ("adapter_path", "adapter")):
        with pytest.raises(ConfigError, match=f"no setting '{name}'; did you mean {meant}"):
            pylora.load(path, **{name: "x"})
    with pytest.raises(ConfigError, match="there are adapter, precision, backend"):
        pylora.load(path, xyzzy=1)


def test_chat_takes_what_people_write(model: pylora.Model) -> None:
    k, n = model.tokenizer, {"max_new_tokens": 6}
    user = {"role": "user", "content": "and time?"}
    text = k.apply_chat([user], add_generation_prompt=True)
    want = model.generate(text, **n)
    assert model.chat("and time?", **n) == model.chat(user, **n) == model.chat([user], **n) == want
    assert model.chat(["and time?", "a"], **n) == [want, model.chat("a", **n)]
    assert model.chat([CHAT, [user]], **n) == [model.chat(CHAT, **n), want]
    system = [{"role": "system", "content": "be brief"}]
    assert model.chat(CHAT, system="be brief", **n) == model.chat([*system, *CHAT], **n)
    assert "".join(model.chat(CHAT, stream=True, **n)) == model.chat(CHAT, **n)
    for empty in ([], [[]]):
        with pytest.raises(PyloraError, match="message"):
            model.chat(empty)


def test_an_adapter_is_used_with_the_tokenizer_it_was_trained_with(
    path: Path, tmp_path: Path
) -> None:
    other = "{% for m in messages %}Q: {{ m['content'] }}\\nA:{% endfor %}"
    random_adapter(path, 3, target_modules="all-linear").save(tmp_path / "own")
    (tmp_path / "own" / "chat_template.jinja").write_text(other.replace("\\\\n", "\n"))
    random_adapter(path, 3, target_modules="all-linear").save(tmp_path / "plain")
    n = {"max_new_tokens": 6}
    with pylora.load(path, {"own": tmp_path / "own", "plain": tmp_path / "plain"}) as model:
        assert set(model.adapters.tokenizers) == {"own"}
        notes = model.adapters.tokenizers["own"].notes
        assert "the adapter's own chat template is used" in notes[-1]
        text = model.adapters.tokenizers["own"].apply_chat([{"role": "user", "content": "a"}])
        assert text.startswith("Q: a") and text.endswith("A:")
        want = model.generate(text, adapter="plain", **n)
        assert model.chat("a", adapter="own", **n) == want
        plain = model.chat("a", adapter="plain", **n)
        assert plain != want
        assert model.chat(["a"] * 2, adapter=["own", "plain"], **n) == [want, plain]
        model.adapters.remove("own")
        assert not model.adapters.tokenizers


def test_what_a_template_takes(path: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(path, tmp_path / "model")
    template = (
        "{{ tools | length if tools else 0 }}{% if loud %}!{% endif %}"
        "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    n = {"max_new_tokens": 4}
    with pylora.load(tmp_path / "model") as model:
        assert model.chat("a", **n) == model.generate("0a", **n)
        assert model.chat("a", template_args={"loud": True}, **n) == model.generate("0!a", **n)
        tool = {"type": "function", "function": {"name": "f"}}
        assert model.chat("a", tools=[tool], **n) == model.generate("1a", **n)
        said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        losses = [
            model.train([{"messages": said}], adapter=str(args), steps=1, template_args=args).losses
            for args in (None, {"loud": True})
        ]
        assert losses[0] != losses[1] and model.tokenizer.arguments == {}
        with pytest.raises(WrongTypeError, match="template_args"):
            model.train([{"messages": said}], template_args="loud")
        model.adapters.use(None)
        with pytest.raises(DataError, match="no argument 'soft'"):
            model.chat("a", template_args={"soft": True}, **n)
        with pytest.raises(ConfigError, match="did you mean template_args"):
            model.chat("a", chat_template_kwargs={"loud": True})


def test_a_conversation_is_not_computed_twice(
    model: pylora.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pylora.model.decoder import Batch

    talk: list[dict[str, str]] = []
    forward, rows = Batch.forward, []
    monkeypatch.setattr(
        Batch, "forward", lambda self, ids: (rows.append(len(ids)), forward(self, ids))[1]
    )
    for text in ("what is truth?", "why?", "no"):
        talk.append({"role": "user", "content": text})
        rows.clear()
        answer = model.chat(talk, max_new_tokens=5)
        first = rows[0]
        with pylora.load(model.checkpoint.path) as fresh:
            assert fresh.chat(talk, max_new_tokens=5) == answer
        talk.append({"role": "assistant", "content": answer})
    whole = model.tokenizer.encode(model.tokenizer.apply_chat(talk[:-1], True))
    if model.llama.ops.bitwise:
        assert first < len(whole) / 2


def test_streams_may_be_taken_in_turns(model: pylora.Model) -> None:
    how: dict[str, Any] = {"max_new_tokens": 30, "temperature": 1.5}
    want = [model.generate(t, seed=i, **how) for i, t in enumerate(TEXTS)]
    streams = [model.generate(t, seed=i, stream=True, **how) for i, t in enumerate(TEXTS)]
    got = [""] * len(streams)
    for _ in range(40):
        for i, pieces in enumerate(streams):
            got[i] += next(pieces, "")
        model.chat("a", max_new_tokens=1)
    assert got == want


def test_threads_may_share_a_model(model: pylora.Model) -> None:
    from concurrent.futures import ThreadPoolExecutor

    jobs = [(t, a) for t in TEXTS for a in ("legal", "verse", None, {"legal": 0.5})] * 3

    def answer(job: Any) -> str:
        return model.generate(job[0], adapter=job[1], max_new_tokens=10, temperature=1.0)

    want = [answer(job) for job in jobs]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(answer, jobs)) == want


def test_a_stream_that_is_dropped_or_outlives_the_model(path: Path) -> None:
    with pylora.load(path) as model:
        want = model.generate("time", max_new_tokens=9)
        for taken in (0, 1, 3):
            pieces = model.generate("time", max_new_tokens=9, stream=True)
            for _ in range(taken):
                next(pieces)
            del pieces
            assert model.generate("time", max_new_tokens=9) == want
        late = model.generate("time", max_new_tokens=9, stream=True)
        first = next(late)
    assert first + "".join(late) == want


def test_score_is_the_log_of_the_softmax(model: pylora.Model, folders: dict[str, Path]) -> None:
    text = "truth exists, and so does time"
    for adapter in (None, "legal", {"legal": 0.5, "verse": 2}):
        score = model.score(text, adapter=adapter)
        ids = model.tokenizer.encode(text, bos=model.tokenizer.add_bos)
        adapted = model.adapters.adapter(adapter)
        if adapted is not None:
            model.llama.attach(adapted)
        logits = np.asarray(model.llama.forward(ids)[0], np.float64)
        model.llama.detach()
        logp = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        want = [logp[i, t] for i, t in enumerate(ids[1:])]
        assert score.ids == tuple(ids) and math.isnan(score.logprobs[0])
        assert score.logprobs[1:] == pytest.approx(want, abs=1e-4)
        assert score.total == pytest.approx(sum(want), abs=1e-3)
        assert score.perplexity == pytest.approx(math.exp(-sum(want) / len(want)), rel=1e-4)
        assert "".join(score.tokens) == text and len(score) == len(ids)
    both = model.score([text, "time"])
    assert [s.total for s in both] == [model.score(t).total for t in (text, "time")]
    assert model.generate("time", max_new_tokens=3), "scoring leaves nothing attached"


# ---- adapters ----------------------------------------------------------------------------------


def test_adapters_by_name(model: pylora.Model, folders: dict[str, Path]) -> None:
    a = model.adapters
    assert tuple(a) == ("legal", "verse") and len(a) == 2 and "legal" in a and "x" not in a
    assert a.weights == {} and repr(a) == "Adapters(legal, verse)"
    a.use("legal")
    assert a.weights == {"legal": 1.0} and repr(a) == "Adapters(legal (in use), verse)"
    a.use("legal", "verse")
    assert a.active == ("legal", "verse")
    a.weights = {"verse": 0.25}
    assert a.weights == {"verse": 0.25} and "weight 0.25" in repr(a)
    assert "0.25 verse" in repr(model)
    a.remove("verse")
    assert tuple(a) == ("legal",) and a.active == ()
    a.add("more", folders["verse"])
    assert a["more"].digest() != a["legal"].digest()
    for call, says in (
        (lambda: a.use("x"), "no adapter 'x'; known: legal, more"),
        (lambda: a.use(), r"use\(None\)"),
        (lambda: a.use("legal", "legal"), "each adapter once"),
        (lambda: a.use({"legal": float("nan")}), "finite number"),
        (lambda: a.use({"legal": "half"}), "finite number"),
        (lambda: a.remove("x"), "no adapter 'x'"),
        (lambda: a["x"], "no adapter 'x'"),
        (lambda: a.add("legal", folders["legal"]), "already"),
        (lambda: a.use(str(folders["legal"])), "a path is added first"),
        (lambda: a.use(folders["legal"]), "by its name"),  # type: ignore[arg-type]
        (lambda: a.use(3), "by its name"),  # type: ignore[arg-type]
        (lambda: a.add(folders["legal"], "legal"), "the name comes first"),  # type: ignore[arg-type]
        (lambda: setattr(a, "weights", "legal"), "takes a mapping"),
        (lambda: a.add_weighted("mix", {}), "at least one"),
    ):
        with pytest.raises(PyloraError, match=says):
            call()
    assert a.weights == {}, "what failed has changed nothing"


def test_weights_are_the_weighted_sum(model: pylora.Model, path: Path, tmp_path: Path) -> None:
    weights = {"legal": 0.7, "verse": -0.3}
    pairs = [(model.adapters[n], w) for n, w in weights.items()]
    Adapter.stack(pairs).save(tmp_path / "sum")
    how: dict[str, Any] = {
        "temperature": 1.5,
        "seed": 2,
    }
    want = by_hand(path, "time", tmp_path / "sum", **how)
    base = model.generate("time", max_new_tokens=8, **how)
    assert base != want
    assert model.generate("time", max_new_tokens=8, **how, adapter=weights) == want
    model.adapters.weights = weights
    assert model.generate("time", max_new_tokens=8, **how) == want
    model.adapters.add_weighted("mix", weights)
    assert model.generate("time", max_new_tokens=8, **how, adapter="mix") == want
    both = model.generate(["time", "time"], max_new_tokens=8, adapter=[{"legal": 0.0}, weights])
    assert both[0] == model.generate("time", max_new_tokens=8, adapter=None)
    assert both[1] == model.generate("time", max_new_tokens=8)
    model.save(tmp_path / "saved")
    assert by_hand(path, "time", tmp_path / "saved", **how) == want


def test_a_replaced_adapter_reaches_the_sums_that_it_is_in(
    model: pylora.Model, folders: dict[str, Path]
) -> None:
    weights = {"legal": 0.5, "verse": 0.5}
    model.adapters.use(weights)
    before = model.generate("time", max_new_tokens=8)
    model.adapters.add("verse", folders["legal"], replace=True)
    legal = model.generate("time", max_new_tokens=8, adapter="legal")
    assert model.generate("time", max_new_tokens=8) == legal != before


def test_many_sums_do_not_pile_up(model: pylora.Model) -> None:
    for i in range(30):
        model.generate("time", max_new_tokens=1, adapter={"legal": i / 30 + 0.01})
    assert len(model.adapters.pool) < 15


# ---- training, plan, merging -------------------------------------------------------------------


def test_train_then_use(path: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in RECORDS), encoding="utf-8")
    made = []
    for given in (data, str(data), RECORDS, tuple(RECORDS)):
        with pylora.load(path) as model:
            base = model.generate("time", max_new_tokens=6)
            result = model.train(given, r=2, steps=3, learning_rate=0.05, seed=1)
            assert result.losses[-1] < result.losses[0]
            assert model.adapters.active == ("default",)
            assert model.adapters["default"] is result.adapter
            assert model.generate("time", max_new_tokens=6) != base
            assert model.generate("time", max_new_tokens=6, adapter=None) == base
            made.append(result.adapter.digest())
    assert len(set(made)) == 1, "a file and its records are the same data"
    config = result.adapter.config
    assert (config.r, config.lora_alpha, config.task_type) == (2, 4, "CAUSAL_LM")


def test_train_writes_a_run_that_load_takes(path: Path, tmp_path: Path) -> None:
    with pylora.load(path) as model:
        model.train(RECORDS, tmp_path / "run", adapter="tone", steps=2, learning_rate=0.05)
        want = model.generate("time", max_new_tokens=6)
        with pytest.raises(ConfigError, match="already holds a training run"):
            model.train(RECORDS, tmp_path / "run", adapter="other", steps=2)
        assert "other" not in model.adapters
    with pylora.load(path, tmp_path / "run") as again:
        assert again.generate("time", max_new_tokens=6) == want
    with pylora.load(path) as model:  # resumed: finished already
        model.train(
            RECORDS, tmp_path / "run", adapter="tone", steps=2, learning_rate=0.05, resume=True
        )
        assert model.generate("time", max_new_tokens=6) == want


def test_training_goes_on_with_an_adapter_that_is_there(path: Path) -> None:
    with pylora.load(path) as model:
        model.train(RECORDS, steps=2, learning_rate=0.05)
        first = {k: a.copy() for k, a in parameters(model.adapters["default"]).items()}
        said = model.generate(TEXTS, max_new_tokens=12)
        model.train(RECORDS, steps=4, learning_rate=0.1)
        assert any((first[k] != a).any() for k, a in parameters(model.adapters["default"]).items())
        assert model.generate(TEXTS, max_new_tokens=12) != said, "the pool has the new numbers"
        with pytest.raises(ConfigError, match="trained further as it is: leave out r"):
            model.train(RECORDS, r=4)


def test_an_interrupted_run_leaves_the_adapter_as_far_as_it_came(path: Path) -> None:
    def interrupt(info: Any) -> None:
        raise KeyboardInterrupt

    with pylora.load(path) as model:
        model.train(RECORDS, steps=1, learning_rate=0.05)
        said = model.score(TEXTS[0]).total
        with pytest.raises(KeyboardInterrupt):
            model.train(RECORDS, steps=9, learning_rate=0.5, on_step=interrupt)
        assert model.score(TEXTS[0]).total != said
        assert model.generate("time", max_new_tokens=3, adapter=None)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"steps": 1, "epochs": 1}, "give one of them"),
        ({"steps": 1, "truncate": True}, "truncate needs max_length"),
        ({"steps": 1, "eval_every": 2}, "eval_every needs eval_data"),
    ],
)
def test_a_setting_that_would_change_nothing_is_refused(
    model: pylora.Model, settings: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        model.train([{"prompt": "a", "completion": "b"}], **settings)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"lr": 1e-3}, "'lr'; did you mean learning_rate"),
        ({"num_train_epochs": 1}, "did you mean epochs"),
        ({"max_steps": 1}, "did you mean steps"),
        ({"rank": 4}, "did you mean r"),
        ({"alpha": 4}, "did you mean lora_alpha"),
        ({"target_module": "q_proj"}, "did you mean target_modules"),
        ({"per_device_train_batch_size": 4}, "did you mean batch_size"),
        ({"xyzzy": 4}, "no setting 'xyzzy'; there are "),
        ({"r": 0}, "rank must be"),
        ({"steps": 0}, "steps"),
        ({"learning_rate": "fast"}, "learning_rate"),
        ({"target_modules": "q_prj"}, "matches no module"),
        ({"lora": {"r": 4}}, "LoraConfig.from_dict"),
        ({"lora": pylora.LoraConfig(target_modules="all-linear"), "r": 4}, "leave out r"),
    ],
)
def test_a_wrong_setting_is_told_before_training(
    path: Path, settings: dict[str, Any], says: str
) -> None:
    with pylora.load(path) as model:
        with pytest.raises(PyloraError, match=says):
            model.train(RECORDS, **settings)
        assert not model.adapters


def test_wrong_data(path: Path, tmp_path: Path) -> None:
    with pylora.load(path) as model:
        with pytest.raises(DataError, match=r"data\[1\]"):
            model.train([RECORDS[0], {"question": "a"}])
        for wrong in ([], 3, None, ["a text"], {"prompt": "a", "completion": "b"}, b"x", [[1, 2]]):
            with pytest.raises(PyloraError):
                model.train(wrong)
        with pytest.raises(PyloraError, match="cannot be read"):
            model.train(tmp_path / "none.jsonl")


def test_plan(model: pylora.Model) -> None:
    plan = model.plan(r=4, target_modules=["q_proj"])
    assert {e.path.rsplit(".", 1)[-1] for e in plan} == {"q_proj"}
    assert {(e.r, e.alpha, e.scale) for e in plan} == {(4, 8, 2.0)}
    assert model.plan() == resolve(pylora.LoraConfig.fresh(), model.config.modules())
    assert model.plan("legal") is model.adapters["legal"].plan
    with pytest.raises(ConfigError, match="did you mean r"):
        model.plan(rank=4)
    with pytest.raises(ConfigError, match="leave out r"):
        model.plan("legal", r=4)


def test_merge_is_the_adapter_without_the_adapter(
    model: pylora.Model, path: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="no adapter is in use; .*legal, verse"):
        model.merge(tmp_path / "m")
    model.adapters.use("legal")
    report = model.merge(tmp_path / "m", dtype="f32")
    assert "modules" in repr(report) and len(repr(report)) < 300
    with pylora.load(tmp_path / "m") as merged:
        a, b = (m.score(TEXTS[0]).total for m in (model, merged))
        assert a == pytest.approx(b, abs=1e-3)


# ---- one call ----------------------------------------------------------------------------------


def test_verbs_of_one_call(path: Path, folders: dict[str, Path]) -> None:
    want = by_hand(path, "time", folders["legal"])
    got = pylora.generate(path, "time", adapter=folders["legal"], max_new_tokens=8)
    assert got == want
    result = pylora.train(path, RECORDS, steps=1, precision="bf16")
    assert result.steps == 1
    with pylora.load(path, folders["legal"]) as model:
        assert pylora.generate(model, "time", max_new_tokens=8) == want
        assert pylora.train(model, RECORDS, steps=1, adapter="new").steps == 1
        for verb in (pylora.generate, pylora.train):
            with pytest.raises(WrongTypeError, match=r"a Llama knows token ids alone"):
                verb(model.llama, "time")
    with pytest.raises(PyloraError, match="stays open"):
        pylora.generate(path, "time", stream=True)
    for verb in (pylora.generate, pylora.train):
        with pytest.raises(WrongTypeError, match=r"takes a pylora.Model.*pylora.load"):
            verb(3, "time")
