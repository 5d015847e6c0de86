"""One model used from several threads at once, and from a child process after a fork."""

from __future__ import annotations

import os
import sys
import threading
from typing import Any

import numpy as np
import pytest

from pylora import backends
from pylora.adapters.adapter import Adapter
from pylora.adapters.loraconfig import LoraConfig
from pylora.adapters.plan import resolve
from pylora.model.config import LlamaConfig
from pylora.model.llama import Llama
from pylora.model.rope import Rope
from pylora.types import LoRA


class Hooked:
    """A backend whose `asarray` first does something else, as another thread would."""

    def __init__(self) -> None:
        self.hook: Any = lambda: None

    def asarray(self, a: np.ndarray) -> np.ndarray:
        self.hook()
        return a


def test_rotary_tables_are_a_pair_while_a_longer_one_is_made() -> None:
    ops, seen = Hooked(), []
    rope = Rope(LlamaConfig.tiny(max_position_embeddings=4096), ops=ops)  # type: ignore[arg-type]
    ops.hook = lambda: seen.append(rope.tables(200))
    rope.tables(1000)
    assert len(seen) == 2
    for cos, sin in seen:
        assert cos.shape == sin.shape and len(cos) >= 200


def model_with_adapter(ops: Any) -> Llama:
    config = LlamaConfig.tiny(max_position_embeddings=2048)
    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model = Llama.random(config, backend=ops)
    model.attach(Adapter.init(resolve(lora, config.modules()), lora))
    return model


def result(model: Llama, n: int) -> list[bytes]:
    """The bits of the loss and of every gradient on n tokens."""
    ids = np.arange(n) % model.config.vocab_size
    nll, grads = model.loss(ids, (ids * 7) % model.config.vocab_size)
    assert grads is not None
    return [nll.tobytes(), *(g.A.tobytes() + g.B.tobytes() for g in grads.values())]


def test_threads_that_share_a_model_get_the_bits_that_each_gets_alone() -> None:
    lengths = (20, 270, 300, 530)  # across the lengths at which the rotary tables grow
    ops = backends.get()
    alone = {n: result(model_with_adapter(ops), n) for n in lengths}
    for _ in range(3):
        model, together = model_with_adapter(ops), {}

        def work(n: int, model: Llama = model, out: dict[int, Any] = together) -> None:
            out[n] = result(model, n)

        threads = [threading.Thread(target=work, args=(n,)) for n in lengths]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert together == alone


def test_threads_that_share_a_weight_each_get_their_own_adapter(rng: np.random.Generator) -> None:
    if "c" not in backends.available():
        pytest.skip("the C core is not built")
    ops: Any = backends.get("c")

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    W = ops.pack(normal(40, 24))
    calls = [
        (normal(m, 24), LoRA(normal(r, 24), normal(40, r), 0.5)) for m in (1, 3) for r in (2, 4)
    ]

    def run(x: np.ndarray, lora: LoRA) -> tuple[bytes, bytes]:
        y, h = ops.lora_forward(x, W, None, lora)
        return y.tobytes(), h.tobytes()

    alone, wrong = [run(*call) for call in calls], []

    def work(i: int) -> None:
        wrong.extend(j for j in range(300) if run(*calls[i]) != alone[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_forked_child_computes_the_same_bits() -> None:
    model = model_with_adapter(backends.get())
    before = result(model, 40)  # the thread pool is running now
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os._exit(0 if result(model, 40) == before else 1)
    assert os.waitpid(child, 0)[1] == 0
