"""Training steps as CUDA graphs (pylora/backends/cuda/steps.py): the same bits with and without
them, replays that really happen, and what callers hold staying as it is.

Runs where PYLORA_TEST_BACKENDS names cuda (tests/support/gpu.py). Over the stand-in for CuPy a step
that computes with the array library while it is captured, or copies from the host, is an error.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training import interrupt_after

import pylora
from pylora import backends
from pylora.adapters.loraconfig import LoraConfig
from pylora.model.linear import DropKey
from pylora.model.llama import IGNORE
from pylora.training.examples import Example
from pylora.training.train import TrainConfig, train
from pylora.types import LoRA, Seqs

pytestmark = [
    pytest.mark.skipif(
        "cuda" not in os.environ.get("PYLORA_TEST_BACKENDS", "").split(","),
        reason="PYLORA_TEST_BACKENDS does not name cuda",
    ),
    pytest.mark.filterwarnings("error::RuntimeWarning"),  # that a step cannot be captured
]

CONFIG = pylora.LlamaConfig.tiny()


@pytest.fixture(params=["cuda"])  # in the test's name, by which `make gputest` finds it
def gpu(request: pytest.FixtureRequest) -> Any:
    return backends.exactly(request.param)


def a_model(gpu: Any, precision: str = "fp32", **over: Any) -> Any:
    return pylora.Llama.random(
        pylora.LlamaConfig.tiny(**over), seed=1, backend=gpu, precision=precision
    )


def an_adapter(model: Any, seed: int = 3, **over: Any) -> pylora.Adapter:
    names = ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj")
    lora = LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": names, "init_lora_weights": False} | over
    )
    plan = pylora.resolve(lora, model.config.modules())
    return pylora.Adapter.init(plan, lora, seed=seed)


def a_batch(seed: int, lengths: list[int], ignored: int = 3) -> tuple[Any, Any, Seqs]:
    rng = np.random.default_rng(seed)
    ids, labels = rng.integers(0, CONFIG.vocab_size, (2, sum(lengths)))
    labels[rng.permutation(labels.size)[:ignored]] = IGNORE
    return ids, labels, Seqs.of(lengths)


def bits(gpu: Any, nll: Any, grads: Any) -> dict[str, bytes]:
    found = {"nll": gpu.to_numpy(nll).tobytes()}
    for path, grad in grads.items():
        for name in ("A", "B", "bias"):
            a = getattr(grad, name)
            if a is not None:
                found[f"{path}.{name}"] = gpu.to_numpy(a).tobytes()
    return found


def ordinary(monkeypatch: pytest.MonkeyPatch, gpu: Any, model: Any, *args: Any, **kw: Any) -> Any:
    """The bits of a step without graphs."""
    with monkeypatch.context() as context:
        context.setenv("PYLORA_CUDA_GRAPHS", "0")
        return bits(gpu, *model.loss(*args, **kw))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("ignored", [0, 3])
def test_replays_have_the_bits_of_an_ordinary_step(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, precision: str, recompute: bool, ignored: int
) -> None:
    monkeypatch.setattr(type(gpu), "head_rows", 5)  # several chunks
    model = a_model(gpu, precision)
    model.attach(an_adapter(model))
    lengths = [5, 1, 6], [6, 5, 1], [12], [1, 6, 5], [5, 6, 1], [12], [6, 1, 5]
    for seed, some in enumerate(lengths):  # the third and sixth are of another shape
        args = a_batch(seed, some, ignored)
        want = ordinary(monkeypatch, gpu, model, *args, recompute=recompute)
        assert bits(gpu, *model.loss(*args, recompute=recompute)) == want
    assert (model._steps.captures, model._steps.replays) == (2, 5)


def test_weights_dropout_keys_and_other_settings_are_seen(
    gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = a_model(gpu)
    model.attach(an_adapter(model))
    args = a_batch(0, [5, 7])
    weights = [None, 0.5, np.arange(12, dtype=np.float32), None, 2.0]
    for step, weight in enumerate(weights):
        kw = {"weight": weight, "drop": DropKey(1, step)}  # an adapter without dropout
        want = ordinary(monkeypatch, gpu, model, *args, **kw)
        assert bits(gpu, *model.loss(*args, **kw)) == want
    assert model._steps.replays == 4
    gpu.allow_tf32(True)
    try:  # a graph was recorded with products of the other kind
        model.loss(*args)
        assert model._steps.replays == 4
    finally:
        gpu.allow_tf32(False)
    model.loss(*args, grads=False)
    assert model._steps.replays == 4


def test_what_a_caller_holds_does_not_change(gpu: Any) -> None:
    model = a_model(gpu)
    model.attach(an_adapter(model))
    held = []
    for seed in range(5):
        nll, grads = model.loss(*a_batch(seed, [4, 4]))
        held.append((nll, grads, bits(gpu, nll, grads)))
    assert model._steps.replays == 4
    assert all(bits(gpu, nll, grads) == before for nll, grads, before in held)
    # In-place changes of a caller's are not seen by the next replay either.
    _, grads, before = held[-1]
    for grad in grads.values():
        grad.A += 1.0
        grad.B += 1.0
    assert bits(gpu, *model.loss(*a_batch(4, [4, 4]))) == before


def test_the_adapter_is_read_as_it_is(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Updated in place, replaced, changed module by module, taken away."""
    model = a_model(gpu)
    args = a_batch(0, [4, 4])

    def steps(n: int) -> None:
        for _ in range(n):
            want = ordinary(monkeypatch, gpu, model, *args)
            assert bits(gpu, *model.loss(*args)) == want

    model.attach(an_adapter(model))
    steps(3)
    assert model._steps.replays == 2
    for lora in model.placed.values():
        A = lora.A
        A += 0.25
    steps(2)
    assert model._steps.replays == 4 and model._steps.captures == 1
    model.attach(an_adapter(model, seed=8))
    assert model._steps.nbytes == 0  # the old one's graphs are gone
    steps(3)
    assert model._steps.replays == 6
    module = model.modules["model.layers.0.self_attn.q_proj"]
    old = module.lora
    module.lora = LoRA(old.A.copy(), old.B + 0.5, old.scale)
    steps(3)
    assert model._steps.replays == 8 and model._steps.captures == 3
    model.detach()
    assert model._steps.nbytes == 0
    _, grads = model.loss(*args)
    assert grads == {} and model._steps.replays == 8


@pytest.mark.parametrize(
    "over",
    [
        {"lora_dropout": 0.3},
        {"lora_bias": True},
        {"target_modules": ("embed_tokens", "q_proj")},
        {"target_modules": ("lm_head", "q_proj")},
    ],
    ids=["dropout", "bias", "embedding", "head in chunks"],
)
def test_what_is_not_captured_is_run(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, over: dict[str, Any]
) -> None:
    monkeypatch.setattr(type(gpu), "head_rows", 3)
    model = a_model(gpu)
    model.attach(an_adapter(model, **over))
    args = a_batch(1, [4, 4])
    for step in range(3):
        kw = {"drop": DropKey(1, step)}
        want = ordinary(monkeypatch, gpu, model, *args, **kw)
        assert bits(gpu, *model.loss(*args, **kw)) == want
    assert model._steps.captures == model._steps.replays == 0


def test_an_adapter_of_the_head_and_of_high_layers(
    gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = a_model(gpu)
    args = a_batch(1, [4, 4])
    for names in (("lm_head",), ("lm_head", "layers.1.mlp.up_proj"), ("layers.1.mlp.down_proj",)):
        model.attach(an_adapter(model, target_modules=names))
        before = model._steps.replays
        for _ in range(3):
            want = ordinary(monkeypatch, gpu, model, *args)
            assert bits(gpu, *model.loss(*args)) == want
        assert model._steps.replays == before + 2


def test_no_label_counts(gpu: Any) -> None:
    model = a_model(gpu)
    model.attach(an_adapter(model))
    ids, labels, seqs = a_batch(1, [3, 3], ignored=6)
    for _ in range(3):
        nll, grads = model.loss(ids, labels, seqs)
        assert not gpu.to_numpy(nll).any()
        assert not any(gpu.to_numpy(grad.B).any() for grad in grads.values())
    assert model._steps.replays == 0


def test_graphs_are_few(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from pylora.backends.cuda import steps

    monkeypatch.setattr(steps, "GRAPHS", 2)
    model = a_model(gpu)
    model.attach(an_adapter(model))
    for n in (3, 4, 5):
        for seed in range(3):
            model.loss(*a_batch(seed, [n], 1))
    steps = model._steps
    assert (steps.captures, steps.replays, len(steps._graphs)) == (3, 6, 2)
    model.loss(*a_batch(0, [4], 1))
    assert (steps.captures, steps.replays) == (3, 7)
    model.loss(*a_batch(0, [3], 1))  # was dropped, and begins anew
    assert (steps.captures, steps.replays) == (3, 7)
    # Beyond half of the device's memory the graphs of other shapes are given up.
    monkeypatch.setattr(gpu.xp.cuda.runtime, "memGetInfo", lambda: (1, steps.nbytes))
    model.loss(*a_batch(0, [3], 1))
    assert len(steps._graphs) == 1 and steps.replays == 8


def test_out_of_memory(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a capture: the step is run. In an ordinary step: graphs are given up and it is run."""
    model = a_model(gpu)
    model.attach(an_adapter(model))
    steps, own = model._steps, type(gpu).own_workspace

    def full(*args: Any) -> Any:
        raise MemoryError

    want = bits(gpu, *model.loss(*a_batch(0, [4])))
    monkeypatch.setattr(type(gpu), "own_workspace", full)
    for _ in range(3):
        assert bits(gpu, *model.loss(*a_batch(0, [4]))) == want
    assert steps.replays == 0 and steps.nbytes == 0
    monkeypatch.setattr(type(gpu), "own_workspace", own)
    for _ in range(2):
        model.loss(*a_batch(0, [5]))
    assert steps.replays == 1 and steps.nbytes > 0
    forward, left = type(model.trunk).forward, [1]

    def once(*args: Any) -> Any:
        if left:
            left.pop()
            raise MemoryError
        return forward(*args)

    monkeypatch.setattr(type(model.trunk), "forward", once)
    model.loss(*a_batch(0, [6]))
    assert steps.nbytes == 0 and not left
    left.append(1)
    with pytest.raises(MemoryError):  # nothing is left to give up
        model.loss(*a_batch(0, [7]))


def test_training_and_resuming(gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The adapter's bits after a run: with graphs, without, and resumed; in micro-batches."""
    rng = np.random.default_rng(5)
    examples = [Example(i, np.roll(i, -1)) for i in rng.integers(0, CONFIG.vocab_size, (8, 6))]
    settings = TrainConfig(
        steps=6, batch_size=4, accumulation=2, learning_rate=1e-2, warmup_steps=0, save_every=3
    )
    model = a_model(gpu)
    whole = an_adapter(model)
    losses = train(model, whole, examples, settings, out_dir=tmp_path / "whole").losses
    assert model._steps.replays == 2 * 6 - 1
    plain = an_adapter(model)
    with monkeypatch.context() as context:
        context.setenv("PYLORA_CUDA_GRAPHS", "0")
        assert train(model, plain, examples, settings).losses == losses
    assert plain.digest() == whole.digest()

    part = an_adapter(model)
    with pytest.raises(KeyboardInterrupt):
        train(
            model, part, examples, settings, out_dir=tmp_path / "part", on_step=interrupt_after(3)
        )
    again, before = an_adapter(model), model._steps.replays
    train(model, again, examples, settings, out_dir=tmp_path / "part", resume=True)
    assert again.digest() == whole.digest()
    assert model._steps.replays == before + 2 * 3 - 1


def test_qwen_and_windows(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Biases of the model itself, norms of heads, a sliding window, tied embeddings."""
    model = a_model(
        gpu, attention_bias=True, qk_norm=True, sliding_window=3, tie_word_embeddings=True
    )
    model.attach(an_adapter(model))
    for seed in range(3):
        args = a_batch(seed, [7, 5])
        want = ordinary(monkeypatch, gpu, model, *args)
        assert bits(gpu, *model.loss(*args)) == want
    assert model._steps.replays == 2


def test_another_stream(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = a_model(gpu)
    model.attach(an_adapter(model))
    streams = [gpu.xp.cuda.Stream(non_blocking=True) for _ in range(2)]
    for seed in range(4):
        args = a_batch(seed, [7, 5])
        with streams[seed % 2]:
            want = ordinary(monkeypatch, gpu, model, *args)
            assert bits(gpu, *model.loss(*args)) == want
    assert model._steps.replays == 3
