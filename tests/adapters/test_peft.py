"""PEFT directories: bit-exact round trips, PEFT's own spellings, and hostile files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pylora.adapters import peft
from pylora.adapters.adapter import Adapter, parameters
from pylora.adapters.loraconfig import LoraConfig
from pylora.adapters.plan import resolve
from pylora.errors import ConfigError, FileFormatError, PlanError, PyloraError, UnsupportedError
from pylora.formats.safetensors import Bf16, SafeTensors, save
from pylora.model.config import LlamaConfig

CONFIG = LlamaConfig.tiny(model_type="qwen2", attention_bias=True)
MODULES = CONFIG.modules()
Q0 = "model.layers.0.self_attn.q_proj"
KEY = f"base_model.model.{Q0}"


def base(name: str) -> np.ndarray:
    """The base model's tensors: each filled with numbers made from its name."""
    if name == "lm_head.weight":
        raise KeyError(name)  # tied
    seed = list(name.encode())
    return np.random.default_rng(seed).standard_normal(CONFIG.tensors()[name]).astype(np.float32)


def make(**fields: Any) -> Adapter:
    config = LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **fields})
    adapter = Adapter.init(resolve(config, MODULES), config, 3, base=base)
    rng = np.random.default_rng(5)
    for array in parameters(adapter).values():
        array += rng.standard_normal(array.shape).astype(np.float32)
    return adapter


def rewrite(directory: Path, change: Callable[[dict[str, Any]], None], **fields: Any) -> Path:
    """Saves an adapter, then writes its tensors again as `change` leaves them."""
    adapter = make(**fields)
    adapter.save(directory)
    tensors: dict[str, Any] = dict(parameters(adapter))
    change(tensors)
    save(directory / peft.WEIGHTS, tensors)
    return directory


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_rslora": True, "rank_pattern": {Q0: 5}, "alpha_pattern": {"q_proj": 0.5}},
        {"target_modules": "all-linear", "lora_bias": True, "lora_dropout": 0.1},
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"bias": "lora_only", "target_modules": ["q_proj", "o_proj"]},
        {"bias": "all"},
    ],
)
def test_what_is_saved_is_loaded_bit_for_bit(tmp_path: Path, fields: dict[str, Any]) -> None:
    adapter = make(**fields)
    adapter.save(tmp_path / "a")
    again = Adapter.load(tmp_path / "a", MODULES)
    if adapter.config.target_modules == "all-linear":  # saved as the names that it stood for
        assert [e.path for e in again.plan] == [e.path for e in adapter.plan]
    else:
        assert again.config == adapter.config
        assert again.plan == adapter.plan
    assert list(again) == list(adapter)
    for key, array in parameters(adapter).items():
        other = parameters(again)[key]
        assert other.dtype == np.float32
        assert other.flags.writeable
        assert other.tobytes() == array.tobytes()
    assert again.digest() == adapter.digest()
    assert {lora.dropout for lora in again.values()} == {adapter.config.lora_dropout}


def test_saving_twice_gives_the_same_bytes_and_keeps_other_files(tmp_path: Path) -> None:
    adapter = make()
    adapter.save(tmp_path / "a")
    first = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    (tmp_path / "a" / "README.md").write_text("mine")
    adapter.save(tmp_path / "a")
    second = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    assert second == first | {"README.md": b"mine"}
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_saved_files_can_be_read_by_whom_the_system_says(tmp_path: Path) -> None:
    make().save(tmp_path / "a")
    (tmp_path / "plain").touch()
    modes = {p.stat().st_mode for p in (tmp_path / "a").iterdir()}
    assert modes == {(tmp_path / "plain").stat().st_mode}


def test_bias_keys_are_pefts(tmp_path: Path) -> None:
    make(bias="all").save(tmp_path / "a")
    with SafeTensors(tmp_path / "a" / peft.WEIGHTS) as file:
        keys = set(file.tensors)
    assert f"{KEY}.base_layer.bias" in keys
    assert KEY.replace("q_proj", "k_proj") + ".bias" in keys


def test_the_older_spelling_of_a_base_bias_is_read_and_a_second_one_refused(tmp_path: Path) -> None:
    def older(t: dict[str, Any]) -> None:
        t[f"{KEY}.bias"] = t.pop(f"{KEY}.base_layer.bias")

    def twice(t: dict[str, Any]) -> None:
        t[f"{KEY}.bias"] = t[f"{KEY}.base_layer.bias"]

    want = make(bias="lora_only").digest()
    found = Adapter.load(rewrite(tmp_path / "a", older, bias="lora_only"), MODULES)
    assert found.digest() == want
    with pytest.raises(PlanError, match=rf"{Q0}.*the same tensor, twice"):
        Adapter.load(rewrite(tmp_path / "b", twice, bias="lora_only"), MODULES)


def rekeyed(change: Callable[[str], str]) -> Callable[[dict[str, Any]], None]:
    def rewrite_keys(t: dict[str, Any]) -> None:
        for key in list(t):
            t[change(key)] = t.pop(key)

    return rewrite_keys


@pytest.mark.parametrize(
    "change",
    [
        lambda key: re.sub(r"(lora_(?:embedding_)?[AB])", r"\1.default", key),
        lambda key: re.sub(r"(lora_(?:embedding_)?[AB])", r"\1.my-adapter", key),
        lambda key: key.removeprefix("base_model.model."),
        lambda key: key.replace(".model.model", ".model.model.language_model", 1),  # multimodal
        lambda key: key.replace(".model.model", ".model.language_model.model", 1),
    ],
)
@pytest.mark.parametrize("fields", [{}, {"target_modules": ["q_proj", "embed_tokens"]}])
def test_keys_with_an_adapters_name_or_without_the_wrapper_are_read(
    tmp_path: Path, change: Callable[[str], str], fields: dict[str, Any]
) -> None:
    found = Adapter.load(rewrite(tmp_path / "a", rekeyed(change), **fields), MODULES)
    assert found.digest() == make(**fields).digest()


def test_float64_is_rounded_once(tmp_path: Path) -> None:
    def widen(t: dict[str, Any]) -> None:
        for key, a in t.items():
            t[key] = a.astype(np.float64) * (1 + 1e-9)

    found = parameters(Adapter.load(rewrite(tmp_path / "a", widen), MODULES))
    for key, array in parameters(make()).items():
        want = (array.astype(np.float64) * (1 + 1e-9)).astype(np.float32)
        assert found[key].tobytes() == want.tobytes()


def test_biases_that_older_peft_did_not_save_are_explained(tmp_path: Path) -> None:
    def without(t: dict[str, Any]) -> None:
        for key in [k for k in t if k.endswith("base_layer.bias")]:
            del t[key]

    where = rewrite(tmp_path / "a", without, bias="lora_only")
    with pytest.raises(PlanError, match='has none of the .*set "bias" to "none"'):
        Adapter.load(where, MODULES)


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_half_precision_is_widened_exactly(tmp_path: Path, dtype: str) -> None:
    def narrow(t: dict[str, Any]) -> None:
        for key, a in t.items():
            t[key] = (
                a.astype(np.float16) if dtype == "f16" else Bf16((a.view("u4") >> 16).astype("u2"))
            )

    found = parameters(Adapter.load(rewrite(tmp_path / "a", narrow), MODULES))
    for key, array in parameters(make()).items():
        want = array.astype(np.float16).astype(np.float32)
        if dtype == "bf16":
            want = (array.view("u4") & np.uint32(0xFFFF0000)).view("f4")
        assert found[key].dtype == np.float32
        assert found[key].tobytes() == want.tobytes()


def put(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(t: dict[str, Any]) -> None:
        if value is None:
            del t[key]
        else:
            t[key] = value

    return change


NAN = np.full((24, 2), np.nan, np.float32)
BAD_TENSORS: list[tuple[Any, type[PyloraError], str]] = [
    (put(f"{KEY}.lora_A.weight", None), PlanError, f"missing '{KEY}.lora_A.weight'"),
    (put(f"{KEY}.lora_C.weight", NAN), PlanError, f"not expected '{KEY}.lora_C.weight'"),
    (put(f"{KEY}.lora_A.default.weight", NAN), PlanError, "default.*are the same tensor, twice"),
    (put(f"{KEY}.base_layer.bias", NAN[:, 0].copy()), PlanError, "not expected.*base_layer.bias"),
    (
        put(f"{KEY}.lora_A.weight", np.zeros((24, 2), "f4")),
        PlanError,
        r"lora_A.weight' has shape \(24, 2\), expected \(2, 24\)",
    ),
    (put(f"{KEY}.lora_B.weight", np.full((24, 2), 1e300)), FileFormatError, "NaN or infinity"),
    (put(f"{KEY}.lora_B.weight", np.zeros((24, 2), "i4")), PlanError, "is I32, expected F32"),
    (put(f"{KEY}.lora_B.weight", NAN), FileFormatError, f"'{KEY}.lora_B.weight' contains NaN"),
    (put(f"{KEY}.lora_B.weight", -NAN / 0), FileFormatError, "contains NaN or infinity"),
    (put("base_model.model.x\n" * 200, NAN), PlanError, "not expected"),
]


@pytest.mark.filterwarnings("ignore:divide")
@pytest.mark.parametrize(("change", "kind", "message"), BAD_TENSORS)
def test_tensors_that_do_not_fit_are_named(
    tmp_path: Path, change: Any, kind: type[PyloraError], message: str
) -> None:
    where = rewrite(tmp_path / "a", change)
    with pytest.raises(kind, match=message) as caught:
        Adapter.load(where, MODULES)
    assert str(where / peft.WEIGHTS) in str(caught.value)


def test_modules_to_save_names_the_tensor(tmp_path: Path) -> None:
    where = rewrite(tmp_path / "a", put("base_model.model.lm_head.weight", NAN))
    config = json.loads((where / peft.CONFIG).read_text()) | {"modules_to_save": ["lm_head"]}
    (where / peft.CONFIG).write_text(json.dumps(config))
    with pytest.raises(
        UnsupportedError, match="'base_model.model.lm_head.weight'.*modules_to_save"
    ):
        Adapter.load(where, MODULES)


def test_copies_of_base_weights_are_compared(tmp_path: Path) -> None:
    fields = {"target_modules": ["embed_tokens", "lm_head"]}
    embed = base("model.embed_tokens.weight")
    keys = [f"base_model.model.{p}.base_layer.weight" for p in ("model.embed_tokens", "lm_head")]

    def copies(t: dict[str, Any]) -> None:
        t.update(dict.fromkeys(keys, embed))

    def altered(t: dict[str, Any]) -> None:
        t[keys[0]] = embed + np.float32(0.5)

    def misshapen(t: dict[str, Any]) -> None:
        t[keys[0]] = embed[:5].copy()

    good = rewrite(tmp_path / "a", copies, **fields)
    assert Adapter.load(good, MODULES, base=base).digest() == make(**fields).digest()
    with pytest.raises(PlanError, match="give the base model's tensors"):
        Adapter.load(good, MODULES)
    with pytest.raises(PlanError, match="differs from the base model's weight"):
        Adapter.load(rewrite(tmp_path / "b", altered, **fields), MODULES, base=base)
    with pytest.raises(PlanError, match=r"shape \(5, 24\)"):
        Adapter.load(rewrite(tmp_path / "c", misshapen, **fields), MODULES, base=base)


def test_an_adapter_for_another_model_is_refused(tmp_path: Path) -> None:
    make().save(tmp_path / "a")
    wider = LlamaConfig.tiny(hidden_size=48).modules()
    with pytest.raises(PlanError, match="another base model: its hidden size is 24, the model's"):
        Adapter.load(tmp_path / "a", wider)
    deeper = LlamaConfig.tiny(num_hidden_layers=3).modules()
    with pytest.raises(PlanError, match="another base model: it has 2 layers, the model 3"):
        Adapter.load(tmp_path / "a", deeper)
    shallow = LlamaConfig.tiny(num_hidden_layers=1).modules()
    with pytest.raises(PlanError, match="another base model: it has 2 layers, the model 1"):
        Adapter.load(tmp_path / "a", shallow)


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="no such file or directory"):
        Adapter.load(tmp_path / "none", MODULES)
    where = tmp_path / "a"
    make().save(where)
    (where / peft.WEIGHTS).rename(where / "adapter_model.bin")
    with pytest.raises(FileFormatError, match="adapter_model.bin is a pickle"):
        Adapter.load(where, MODULES)
    (where / "adapter_model.bin").unlink()
    with pytest.raises(FileFormatError, match=r"no adapter_model.safetensors"):
        Adapter.load(where, MODULES)
    (where / peft.CONFIG).unlink()
    with pytest.raises(FileFormatError, match="adapter_config.json"):
        Adapter.load(where, MODULES)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (b"not json", ConfigError),
        (b"\xff\x00", FileFormatError),
        (b"[" * 200_000, ConfigError),
        (b'{"r": 2, "r": 4}', ConfigError),
        (b'{"target_modules": ["q_proj"], "r": 1e400}', ConfigError),
        (b'{"target_modules": ["nothing"]}', PlanError),
        (b'{"target_modules": ["q_proj", "down_proj"], "use_dora": true}', PlanError),
    ],
)
def test_bad_configs_name_the_file(tmp_path: Path, text: bytes, kind: type[PyloraError]) -> None:
    make().save(tmp_path / "a")
    (tmp_path / "a" / peft.CONFIG).write_bytes(text)
    with pytest.raises(kind, match="adapter_config.json"):
        Adapter.load(tmp_path / "a", MODULES)


@given(st.data())
def test_a_damaged_file_is_an_error_or_another_adapter_never_a_crash(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    where = tmp_path_factory.mktemp("damaged")
    make().save(where)
    name = data.draw(st.sampled_from([peft.CONFIG, peft.WEIGHTS]))
    content = bytearray((where / name).read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (where / name).write_bytes(content)
    try:
        found = Adapter.load(where, MODULES)
    except PyloraError:
        return
    for array in parameters(found).values():
        assert np.isfinite(array).all()
