"""A watched folder: what appears, changes and goes."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest

from pylora.adapters.adapter import Adapter
from pylora.adapters.loraconfig import LoraConfig
from pylora.adapters.plan import resolve
from pylora.errors import ConfigError, FileFormatError
from pylora.model.config import LlamaConfig
from pylora.model.llama import Llama
from pylora.serving.adapters import Registry
from pylora.serving.watch import Watch


@pytest.fixture(scope="module")
def net() -> Llama:
    return Llama.random(LlamaConfig.tiny(), seed=5, backend="c")


def save(model: Llama, folder: Path, seed: int) -> Adapter:
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapter = Adapter.init(resolve(config, model.config.modules()), config, seed=seed)
    shutil.rmtree(folder, ignore_errors=True)
    adapter.save(folder)
    return adapter


def names(registry: Registry) -> list[str]:
    return sorted(info.name for info in registry.list())


def test_the_registry_is_as_the_folder_is(net: Llama, tmp_path: Path) -> None:
    registry = Registry(net)
    save(net, tmp_path / "a", 1)
    (tmp_path / "nothing").mkdir()
    (tmp_path / "file.txt").write_text("no adapter")
    watch = Watch(registry, tmp_path, interval=3600)
    assert names(registry) == ["a"] and registry.get("a").watched and not watch.errors
    registry.pin("a")
    changed = save(net, tmp_path / "a", 2)
    save(net, tmp_path / "b", 3)
    watch.look()
    assert names(registry) == ["a", "b"]
    assert registry.get("a").digest == changed.digest() and registry.get("a").pinned
    shutil.rmtree(tmp_path / "a")
    watch.look()
    assert names(registry) == ["b"]
    registry.unload("b")  # by hand: it does not come back before its files change
    watch.look()
    assert names(registry) == []
    watch.close()
    watch.close()


def test_what_is_damaged_is_said_and_the_old_one_stays(net: Llama, tmp_path: Path) -> None:
    registry = Registry(net)
    old = save(net, tmp_path / "a", 1)
    registry.add("mine", old)
    save(net, tmp_path / "mine", 2)
    watch = Watch(registry, tmp_path, interval=3600)
    assert list(watch.errors) == ["mine"] and "did not come from" in watch.errors["mine"]
    weights = tmp_path / "a" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    watch.look()
    assert sorted(watch.errors) == ["a", "mine"] and len(watch.errors["a"]) > 20
    assert registry.get("a").digest == old.digest()
    weights.write_bytes(whole + b"")
    watch.look()
    assert list(watch.errors) == ["mine"]
    shutil.rmtree(tmp_path / "mine")
    watch.look()
    assert not watch.errors and "mine" in registry, "what is not the folder's stays"
    watch.close()


def test_a_thread_looks(net: Llama, tmp_path: Path) -> None:
    registry = Registry(net)
    loaded = threading.Event()
    load = registry.load

    def said(*args: object, **settings: object) -> object:
        info = load(*args, **settings)  # type: ignore[arg-type]
        loaded.set()
        return info

    registry.load = said  # type: ignore[method-assign, assignment]
    watch = Watch(registry, tmp_path, interval=0.01)
    save(net, tmp_path / ".new", 1)
    (tmp_path / ".new").rename(tmp_path / "new")
    assert loaded.wait(60)
    watch.close()
    assert names(registry) == ["new"]


def test_there_has_to_be_a_folder(net: Llama, tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="no folder"):
        Watch(Registry(net), tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="interval"):
        Watch(Registry(net), tmp_path, interval=0)
