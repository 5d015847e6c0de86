"""The registry: names, sums, limits, and what is packed when."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pylora.adapters.adapter import Adapter
from pylora.adapters.loraconfig import LoraConfig
from pylora.adapters.plan import resolve
from pylora.errors import ConfigError, FileFormatError, PlanError, PyloraError
from pylora.model.config import LlamaConfig
from pylora.model.llama import Llama
from pylora.serving.adapters import BASE, Registry
from pylora.serving.request import AdaptersFull, UnknownAdapter


@pytest.fixture(scope="module")
def net() -> Llama:
    return Llama.random(LlamaConfig.tiny(), seed=5, backend="c")


def an_adapter(model: Llama, seed: int, r: int = 2) -> Adapter:
    config = LoraConfig(r=r, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return Adapter.init(resolve(config, model.config.modules()), config, seed=seed)


def save(model: Llama, folder: Path, seed: int, r: int = 2) -> Path:
    an_adapter(model, seed, r).save(folder)
    return folder


def one(name: str) -> tuple[tuple[str, float], ...]:
    return ((name, 1.0),)


def test_a_name_stands_for_a_directory(net: Llama, tmp_path: Path) -> None:
    registry = Registry(net)
    info = registry.load("a", save(net, tmp_path / "a", 1, r=3))
    assert info == registry.get("a") == registry.list()[0] and "a" in registry
    assert (info.name, info.directory, info.rank) == ("a", tmp_path / "a", 3)
    assert info.resident and not info.pinned and info.nbytes == registry.nbytes > 0
    assert info.digest == an_adapter(net, 1, 3).digest()
    with pytest.raises(ConfigError, match="already"):
        registry.load("a", tmp_path / "a")
    registry.load("a", save(net, tmp_path / "b", 2), replace=True)
    assert registry.get("a").digest != info.digest
    registry.unload("a")
    assert not registry.list() and registry.nbytes == 0
    for call in (registry.get, registry.unload, registry.pin):
        with pytest.raises(UnknownAdapter, match="no adapter 'a'; there are: none"):
            call("a")


def test_what_cannot_be_loaded_is_said_and_changes_nothing(net: Llama, tmp_path: Path) -> None:
    registry = Registry(net)
    other = Llama.random(LlamaConfig.tiny(hidden_size=32, head_dim=8), backend="c")
    registry.load("a", save(net, tmp_path / "a", 1))
    before = registry.list()
    with pytest.raises(FileFormatError):
        registry.load("b", tmp_path / "nowhere")
    with pytest.raises(PyloraError):
        registry.load("a", save(other, tmp_path / "b", 1), replace=True)
    with pytest.raises(PlanError):
        registry.add("c", an_adapter(other, 1))
    for name in ("", " ", "a\nb", 3):
        with pytest.raises(ConfigError, match="visible"):
            registry.load(name, tmp_path / "a")  # type: ignore[arg-type]
    assert registry.list() == before


def test_content_is_what_is_packed_and_not_names(net: Llama) -> None:
    registry = Registry(net)
    for name, seed in (("a", 1), ("same", 1), ("b", 2)):
        registry.add(name, an_adapter(net, seed))
    leases = {name: registry.resolve(one(name)) for name in ("a", "same", "b")}
    assert leases["a"].packed is leases["same"].packed is not leases["b"].packed
    assert leases["a"].key == leases["same"].key != leases["b"].key
    base = registry.resolve(())
    assert base.packed is None and base.key == BASE == registry.resolve((("a", 0.0),)).key
    keys = {
        registry.resolve(pairs).key
        for pairs in (
            (("a", 0.5),),
            (("a", 0.5), ("b", 0.5)),
            (("a", 0.5), ("b", 0.25)),
            (("b", 0.5), ("a", 0.5)),
        )
    }
    assert len(keys | {leases["a"].key, leases["b"].key}) == 6
    again = registry.resolve((("a", 0.5), ("b", 0.25)))
    assert again.packed is registry.resolve((("same", 0.5), ("b", 0.25))).packed
    assert registry.get("a").requests == 7


def test_a_sum_is_of_the_adapters_as_they_are_now(net: Llama) -> None:
    registry = Registry(net)
    registry.add("a", an_adapter(net, 1))
    registry.add("b", an_adapter(net, 2))
    pairs = (("a", 0.5), ("b", 0.25))
    first = registry.resolve(pairs)
    first.release()
    registry.add("b", an_adapter(net, 3), replace=True)
    second = registry.resolve(pairs)
    assert second.key != first.key
    assert len(registry._packs) == 3, "the sum with what b was has gone"


def test_the_one_that_was_used_longest_ago_goes_and_comes_back(net: Llama, tmp_path: Path) -> None:
    registry = Registry(net, most=2)
    for i, name in enumerate("abc"):
        registry.load(name, save(net, tmp_path / name, i))
    assert [info.resident for info in registry.list()] == [False, True, True]
    registry.resolve(one("b")).release()
    assert not registry.is_ready(one("a"))
    lease = registry.resolve(one("a"))
    assert lease.key == registry.get("a").digest
    assert [info.resident for info in registry.list()] == [True, True, False]
    registry.pin("b")
    with pytest.raises(AdaptersFull, match="all 2 adapters that fit") as full:
        registry.resolve(one("c"))
    assert full.value.retry_after > 0
    lease.release()
    lease.release()
    registry.resolve(one("c")).release()
    assert [info.resident for info in registry.list()] == [False, True, True]
    with pytest.raises(AdaptersFull):
        for name in "ac":
            registry.pin(name)


def test_bytes_have_a_limit(net: Llama) -> None:
    size = Registry(net).add("x", an_adapter(net, 0)).nbytes
    registry = Registry(net, most_bytes=2 * size)
    for i in range(5):
        registry.add(str(i), an_adapter(net, i))
        assert registry.nbytes <= 2 * size
    assert sum(info.resident for info in registry.list()) == 2
    with pytest.raises(ConfigError, match="most_bytes"):
        Registry(net, most_bytes=size - 1).add("x", an_adapter(net, 0))
    for bad in ({"most": 0}, {"most_bytes": -1}, {"most": 1.5}):
        with pytest.raises(ConfigError):
            Registry(net, **bad)  # type: ignore[arg-type]


def test_a_directory_that_has_changed_is_read_as_it_is(net: Llama, tmp_path: Path) -> None:
    registry = Registry(net, most=1)
    old = registry.load("a", save(net, tmp_path / "a", 1))
    registry.load("b", save(net, tmp_path / "b", 2))
    shutil.rmtree(tmp_path / "a")
    save(net, tmp_path / "a", 3, r=5)
    lease = registry.resolve(one("a"))
    assert lease.key == registry.get("a").digest != old.digest
    assert registry.get("a").rank == 5
    lease.release()
    registry.resolve(one("b")).release()
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(FileFormatError):
        registry.resolve(one("a"))


def test_what_runs_keeps_its_adapter(net: Llama) -> None:
    registry = Registry(net)
    registry.add("a", an_adapter(net, 1))
    lease = registry.resolve(one("a"))
    packed: Any = lease.packed
    registry.unload("a")
    assert lease.packed is packed and registry.nbytes > 0
    lease.release()
    assert registry.nbytes == 0


def test_a_sum_says_what_cannot_be_summed(net: Llama) -> None:
    registry = Registry(net)
    registry.add("a", an_adapter(net, 1))
    config = LoraConfig(r=2, target_modules=["q_proj"], bias="lora_only", init_lora_weights=False)
    modules = net.config.modules()
    base = {f"{path}.bias": np.zeros(spec.d, np.float32) for path, spec in modules.items()}
    try:
        biased = Adapter.init(resolve(config, modules), config, base=base.__getitem__)
    except PyloraError:
        pytest.skip("this model has no biases to train")
    registry.add("b", biased)
    registry.resolve(one("b")).release()
    if any(lora.base_bias is not None for lora in biased.values()):
        with pytest.raises(PyloraError, match="summed"):
            registry.resolve((("a", 0.5), ("b", 0.5)))
