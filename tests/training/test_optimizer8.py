"""8-bit moments: bitsandbytes' table and rounding, its update, and what a run makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pylora import Adapter, Llama, LlamaConfig, LoraConfig, backends, resolve
from pylora.training.config import TrainConfig
from pylora.training.examples import Example
from pylora.training.optimizer8 import BLOCK, SMALLEST, Code, Moment, Optimizer8, table
from pylora.training.train import train

MODEL = Llama.random(LlamaConfig.tiny(vocab_size=600), seed=1)
TARGETS = ["q_proj", "lm_head"]  # lm_head's B has 600 * 8 elements: enough for 8 bits


def adapter() -> Adapter:
    config = LoraConfig(r=8, target_modules=TARGETS)
    return Adapter.init(resolve(config, MODEL.config.modules()), config, seed=0)


def examples() -> list[Example]:
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 600, 12) for _ in range(16)]
    return [Example(ids[:-1], ids[1:]) for ids in rows]


@pytest.mark.parametrize("signed", [True, False])
def test_rounds_to_the_nearest(signed: bool) -> None:
    values, code = table(signed), Code(signed)
    assert values.size == 256 and (np.diff(values) > 0).all() and values[-1] == 1
    rng = np.random.default_rng(1)
    x = (rng.uniform(-1 if signed else 0, 1, 20_000) ** 5).astype(np.float32)
    x = np.concatenate([x, values, np.float32([0, 1e-30])])
    found = np.abs(values[code.nearest(x)].astype(np.float64) - x)
    least = np.abs(values.astype(np.float64)[None] - x[:, None]).min(axis=1)
    assert (found <= least * (1 + 1e-6) + 1e-12).all()  # of two that are as near, either


def test_a_moment_is_its_blocks_largest_times_a_number() -> None:
    rng = np.random.default_rng(2)
    x = rng.normal(size=3 * BLOCK + 7).astype(np.float32)
    x[BLOCK : 2 * BLOCK] = 0
    kept = Moment(np.zeros(x.size, np.uint8), np.zeros(4, np.float32))
    kept.write(x, Code(True))
    back = kept.read(Code(True))
    assert kept.largest.tolist() == [
        np.abs(x[i : i + BLOCK]).max() for i in range(0, x.size, BLOCK)
    ]
    assert (back[BLOCK : 2 * BLOCK] == 0).all()
    assert np.abs(back - x).max() < 0.0075 * np.abs(x).max()
    again = Moment(np.zeros(x.size, np.uint8), np.zeros(4, np.float32))
    again.write(back, Code(True))
    assert (again.codes == kept.codes).all()  # what is exact stays as it is


def test_a_second_moment_never_becomes_zero() -> None:
    x = np.full(BLOCK, 1e-12, np.float32)
    x[0], x[1] = 1, 0
    kept = Moment(np.zeros(BLOCK, np.uint8), np.zeros(1, np.float32))
    kept.write(x, Code(False))
    back = kept.read(Code(False))
    assert back[0] == 1 and back[1] == 0 and (back[2:] > 0).all()


@pytest.mark.parity
def test_is_bitsandbytes() -> None:
    torch = pytest.importorskip("torch")
    bnb: Any = pytest.importorskip("bitsandbytes.functional")
    for signed in (True, False):
        theirs = bnb.create_dynamic_map(signed=signed).numpy()
        assert np.allclose(table(signed), theirs, rtol=3e-7, atol=0)
    n, rng = 2 * SMALLEST + 100, np.random.default_rng(3)
    start = rng.normal(size=n).astype(np.float32)
    config = TrainConfig(optimizer="adamw_8bit", weight_decay=0.01, max_grad_norm=None)
    mine = {"a.A": start.reshape(2, -1).copy()}
    optimizer = Optimizer8(backends.get("numpy"), mine, config)
    p = torch.from_numpy(start.copy())
    states = [torch.full((n,), Code(s).zero, dtype=torch.uint8) for s in (True, False)]
    largest = [torch.zeros(-(-n // BLOCK)) for _ in range(2)]
    maps = [torch.from_numpy(table(s)) for s in (True, False)]
    for step in range(1, 6):
        grad = (rng.normal(size=n) * rng.uniform(0.5, 1, n)).astype(np.float32)
        optimizer.update({"a.A": grad.reshape(2, -1)}, 1.0, step, 1e-2)
        bnb.optimizer_update_8bit_blockwise(
            "adam", torch.from_numpy(grad), p, states[0], states[1], 0.9, 0.999, 0.0, 0.0, 1e-8,
            step, 1e-2, maps[0], maps[1], largest[0], largest[1], 0.01, 1.0, False,
        )  # fmt: skip
    for kind, state, top in zip(("m", "v"), states, largest, strict=True):
        kept = optimizer.moments[kind]["a.A"]
        other = (kept.codes != state.numpy()) & (kept.codes != 1)  # 1: zero with bitsandbytes
        assert other.mean() < 0.02, kind  # those that lie between two numbers
        assert np.allclose(kept.largest, top.numpy(), rtol=0.02)  # one of the two numbers
    off = np.abs(mine["a.A"].reshape(-1) - p.numpy())
    assert np.median(off) < 1e-6 and off.max() < 0.02  # a step is 0.01 at most


def test_learns_as_float32_does_with_a_quarter_of_the_memory() -> None:
    losses = {}
    for kind in ("adamw", "adamw_8bit"):
        config = TrainConfig(steps=30, learning_rate=1e-2, optimizer=kind)
        losses[kind] = train(MODEL, adapter(), examples(), config).losses[-1]
    assert losses["adamw_8bit"] == pytest.approx(losses["adamw"], rel=0.05)
    arrays = {"x.B": np.zeros((4096, 64), np.float32)}
    optimizer = Optimizer8(backends.get("numpy"), arrays, TrainConfig(optimizer="adamw_8bit"))
    size = sum(a.nbytes for a in optimizer.state().values())
    assert size < 0.26 * 2 * arrays["x.B"].nbytes


def test_a_resumed_run_has_the_same_bits(tmp_path: Path) -> None:
    config = TrainConfig(steps=6, learning_rate=1e-2, optimizer="adamw_8bit", batch_size=4)
    whole = adapter()
    train(MODEL, whole, examples(), config, tmp_path / "whole")

    def stop(info: Any) -> None:
        if info.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(MODEL, adapter(), examples(), config, tmp_path / "cut", on_step=stop)
    resumed = adapter()
    train(MODEL, resumed, examples(), config, tmp_path / "cut", resume=True)
    for path, lora in whole.items():
        assert lora.A.tobytes() == resumed[path].A.tobytes()
        assert lora.B.tobytes() == resumed[path].B.tobytes()
