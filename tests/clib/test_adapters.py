"""The C library's adapters: the plan and the bits of Python's, and the same files refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from clibrary import CError, CModel, greedy, needs_library
from small_models import CONFIG, REAL, gguf_name, interleave, weights, write_gguf, write_hf

from pylora.adapters.adapter import Adapter, parameters
from pylora.adapters.loraconfig import _REFUSED, LoraConfig
from pylora.adapters.plan import resolve
from pylora.errors import PyloraError
from pylora.formats import open_checkpoint
from pylora.formats.safetensors import save
from pylora.model.llama import Llama

pytestmark = needs_library
IDS = [3, 17, 4, 29, 29]
WIDE = replace(CONFIG, attention_bias=True, attention_out_bias=True, tie_word_embeddings=False)


@pytest.fixture(scope="module", params=["llama-gguf", "llama-tied", "qwen2-hf"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    small = {n: w / np.float32(8) for n, w in weights(WIDE).items()}
    if request.param == "llama-gguf":
        write_gguf(folder / "m.gguf", WIDE, tensors=small)
        return folder / "m.gguf"
    if request.param == "llama-tied":
        write_gguf(folder / "m.gguf", CONFIG, "Q4_0")
        return folder / "m.gguf"
    config = replace(CONFIG, model_type="qwen2", attention_bias=True)
    write_hf(folder / "m", config)
    return folder / "m"


def random_adapter(path: Path, where: Path, **fields: Any) -> Adapter:
    """Saves an adapter of random numbers, also B and the biases."""
    with open_checkpoint(path) as checkpoint:
        modules = checkpoint.config.modules()
        config = LoraConfig(**{"r": 3, "lora_alpha": 5.0, "init_lora_weights": False, **fields})
        adapter = Adapter.init(resolve(config, modules), config, 7, base=checkpoint.load)
    rng = np.random.default_rng(1)
    for array in parameters(adapter).values():
        array += (rng.standard_normal(array.shape) * 0.1).astype(np.float32)
    adapter.save(where)
    return adapter


def python(path: Path, adapter: Path | None, precision: str) -> tuple[list[int], np.ndarray]:
    with open_checkpoint(path) as checkpoint:
        model = Llama.from_checkpoint(checkpoint, "c", precision)
        if adapter is not None:
            model.attach(Adapter.load(adapter, checkpoint.config.modules(), base=checkpoint.load))
    return greedy(model, IDS, 3)


def check_same(path: Path, adapter: Path, precision: str = "fp32") -> None:
    tokens, logits = python(path, adapter, precision)
    with CModel(path, precision) as model:
        plain = model.generate(IDS, 3)[1]
        model.attach(adapter)
        got_tokens, got = model.generate(IDS, 3)
    assert got_tokens == tokens
    assert got.tobytes() == logits.tobytes()
    assert got.tobytes() != plain.tobytes(), "the adapter changed nothing"


FIELDS: dict[str, dict[str, Any]] = {
    "all-linear": {"target_modules": "all-linear"},
    "names": {"target_modules": ["q_proj", "model.layers.1.mlp.down_proj"]},
    "rslora": {"target_modules": ["v_proj", "o_proj"], "use_rslora": True},
    "embedding": {"target_modules": ["embed_tokens", "lm_head", "k_proj"]},
    "patterns": {
        "target_modules": ["q_proj", "k_proj", "v_proj"],
        "rank_pattern": {r"layers\.1\..*": 2, "q_proj": 7, r"^model\.layers\.0\..*v_proj$": 1},
        "alpha_pattern": {r"self_attn\.(q|k)_proj": 0.75},
    },
    "regex": {"target_modules": r"model\.layers\.\d+\.(self_attn|mlp)\.(q|gate|up)_proj"},
    "exclude": {"target_modules": "all-linear", "exclude_modules": ["0.mlp.up_proj", "q_proj"]},
    "exclude-regex": {"target_modules": "all-linear", "exclude_modules": r".*layers\.1.*"},
    "layers": {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
    "list-of-layers": {"target_modules": ["up_proj"], "layers_to_transform": [0]},
    "lora-bias": {"target_modules": ["q_proj", "gate_proj"], "lora_bias": True},
    "bias-all": {"target_modules": ["v_proj"], "bias": "all"},
    "bias-lora": {"target_modules": ["q_proj", "v_proj"], "bias": "lora_only", "lora_bias": True},
}  # fmt: skip


@pytest.mark.parametrize("name", FIELDS)
def test_peft(path: Path, tmp_path: Path, name: str) -> None:
    adapter = random_adapter(path, tmp_path / "a", **FIELDS[name])
    check_same(path, tmp_path / "a")
    with CModel(path) as model:
        model.attach(tmp_path / "a")
        found = {module: rest for module, *rest in model.plan()}
    assert [e.path for e in adapter.plan] == [p for p, (r, _, _) in found.items() if r]
    for e in adapter.plan:
        assert found[e.path] == [e.r, e.alpha, e.scale]


@pytest.mark.parametrize("precision", ["bf16", "int8", "int4"])
def test_peft_in_other_precisions(path: Path, tmp_path: Path, precision: str) -> None:
    random_adapter(path, tmp_path / "a", target_modules=["q_proj", "down_proj", "embed_tokens"])
    check_same(path, tmp_path / "a", precision)


def test_fresh_adapter_is_the_base(path: Path, tmp_path: Path) -> None:
    with open_checkpoint(path) as checkpoint:
        config = LoraConfig(target_modules=["q_proj", "embed_tokens"])
        Adapter.init(resolve(config, checkpoint.config.modules()), config).save(tmp_path / "a")
    with CModel(path) as model:
        plain = model.generate(IDS, 2)[1]
        model.attach(tmp_path / "a")
        assert model.generate(IDS, 2)[1].tobytes() == plain.tobytes()


def test_copies_of_base_weights(path: Path, tmp_path: Path) -> None:
    """PEFT writes them for adapted embeddings; they must be the base model's."""
    adapter = random_adapter(path, tmp_path / "a", target_modules=["embed_tokens", "q_proj"])
    with open_checkpoint(path) as checkpoint:
        paths = ("model.embed_tokens", "model.layers.0.self_attn.q_proj")
        copies = {
            f"base_model.model.{p}.base_layer.weight": np.array(checkpoint.load(f"{p}.weight"))
            for p in paths
        }
    file = tmp_path / "a" / "adapter_model.safetensors"
    save(file, parameters(adapter) | copies)
    check_same(path, tmp_path / "a")
    for key in copies:
        changed = {k: c.copy() for k, c in copies.items()}
        changed[key][-1, -1] += 1
        save(file, parameters(adapter) | changed)
        assert key in refused(path, tmp_path / "a")


@pytest.mark.parametrize("form", ["default", "other", "bare", "float64"])
def test_other_spellings_of_a_file(path: Path, tmp_path: Path, form: str) -> None:
    """Keys with an adapter's name, without the wrappers' prefix; numbers in float64."""
    targets = ["q_proj", "embed_tokens"]
    adapter = random_adapter(path, tmp_path / "a", target_modules=targets, lora_bias=False)

    def spelt(key: str) -> str:
        if form == "bare":
            return key.removeprefix("base_model.model.")
        if form == "float64":
            return key
        return re.sub(r"\.(lora_(?:embedding_)?[AB])", rf".\1.{form}", key)

    kind = np.float64 if form == "float64" else np.float32
    tensors = {spelt(k): v.astype(kind) for k, v in parameters(adapter).items()}
    if form == "float64":
        tensors = {k: v * (1 + 1e-12) for k, v in tensors.items()}
    assert form == "float64" or not set(tensors) & set(parameters(adapter))
    save(tmp_path / "a" / "adapter_model.safetensors", tensors)
    check_same(path, tmp_path / "a")


def test_a_tensor_in_two_spellings(plain: Path, tmp_path: Path) -> None:
    adapter = random_adapter(plain, tmp_path / "a", target_modules=["q_proj"])
    tensors: dict[str, Any] = dict(parameters(adapter))
    tensors[f"{Q0}.lora_A.default.weight"] = tensors[f"{Q0}.lora_A.weight"]
    save(tmp_path / "a" / "adapter_model.safetensors", tensors)
    assert "twice" in refused(plain, tmp_path / "a")


# ---- GGUF adapters ----------------------------------------------------------------------------


def write_adapter(
    file: Path,
    adapter: Adapter,
    alpha: float | None,
    *,
    kind: str = "F32",
    arch: str = "llama",
    meta: dict[str, str] | None = None,
    change: Callable[[dict[str, np.ndarray]], None] = lambda tensors: None,
) -> None:
    """As llama.cpp's convert_lora_to_gguf.py writes it."""
    heads = {"q_proj": CONFIG.num_attention_heads, "k_proj": CONFIG.num_key_value_heads}
    writer = gguf.GGUFWriter(file, arch)
    for key, value in ({"general.type": "adapter", "adapter.type": "lora"} | (meta or {})).items():
        writer.add_string(key, value)
    if alpha is not None:
        writer.add_float32("adapter.lora.alpha", alpha)
    tensors: dict[str, np.ndarray] = {}
    for module, lora in adapter.items():
        name, part = gguf_name(f"{module}.weight"), module.rsplit(".", 1)[-1]
        turned = arch == "llama" and part in heads
        tensors[f"{name}.lora_a"] = lora.A.T.copy() if part == "embed_tokens" else lora.A
        tensors[f"{name}.lora_b"] = interleave(lora.B, heads[part]) if turned else lora.B
    change(tensors)
    for name, array in tensors.items():
        if kind == "F32" or array.shape[-1] % 32:
            writer.add_tensor(name, array)
        else:
            qtype = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quants.quantize(array, qtype), raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def architecture(path: Path) -> str:
    return "llama" if path.suffix == ".gguf" else "qwen2"


TARGETS = ["q_proj", "k_proj", "down_proj", "embed_tokens", "lm_head"]


@pytest.mark.parametrize("alpha", [5.0, None, 0.0])
def test_gguf_adapter(path: Path, tmp_path: Path, alpha: float | None) -> None:
    """The logits of the same adapter in PEFT's files; without an alpha the scale is 1."""
    lora_alpha = alpha or 3
    adapter = random_adapter(path, tmp_path / "a", target_modules=TARGETS, lora_alpha=lora_alpha)
    write_adapter(tmp_path / "a.gguf", adapter, alpha, arch=architecture(path))
    with CModel(path) as model:
        model.attach(tmp_path / "a")
        want, plan = model.generate(IDS, 3), model.plan()
        model.attach(tmp_path / "a.gguf")
        got = model.generate(IDS, 3)
        assert model.plan() == plan
    assert got[0] == want[0] and got[1].tobytes() == want[1].tobytes()


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0"])
def test_gguf_adapter_of_other_types(path: Path, tmp_path: Path, kind: str) -> None:
    adapter = random_adapter(path, tmp_path / "a", target_modules=["q_proj", "up_proj"], r=32)
    write_adapter(tmp_path / "a.gguf", adapter, 5.0, arch=architecture(path), kind=kind)
    qtype = gguf.GGMLQuantizationType[kind]
    rounded = {
        k: gguf.quants.dequantize(gguf.quants.quantize(v, qtype), qtype)
        for k, v in parameters(adapter).items()
    }
    save(tmp_path / "a" / "adapter_model.safetensors", rounded)
    with CModel(path) as model:
        model.attach(tmp_path / "a")
        want = model.generate(IDS, 2)[1]
        model.attach(tmp_path / "a.gguf")
        assert model.generate(IDS, 2)[1].tobytes() == want.tobytes()


def drop(end: str) -> Callable[[dict[str, np.ndarray]], None]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        del tensors[next(n for n in tensors if n.endswith(end))]

    return change


def rename(tensors: dict[str, np.ndarray]) -> None:
    first = next(iter(tensors))
    tensors["blk.0.ffn_norm.weight"] = tensors[first][0]


def beyond(tensors: dict[str, np.ndarray]) -> None:
    tensors["blk.9.attn_q.weight.lora_a"] = next(iter(tensors.values()))


def narrow(tensors: dict[str, np.ndarray]) -> None:
    name = next(n for n in tensors if n.endswith("lora_b"))
    tensors[name] = tensors[name][:-1]


def not_finite(tensors: dict[str, np.ndarray]) -> None:
    next(iter(tensors.values()))[0, 0] = np.inf


@pytest.mark.parametrize(
    ("over", "names"),
    [
        ({"change": drop(".lora_b")}, "other half"),
        ({"change": drop(".lora_a")}, "other half"),
        ({"change": rename}, "blk.0.ffn_norm.weight"),
        ({"change": beyond}, "blk.9.attn_q"),
        ({"change": narrow}, "lora_b"),
        ({"change": not_finite}, "NaN or infinity"),
        ({"change": dict.clear}, "no tensors"),
        ({"arch": "gemma"}, "gemma"),
        ({"alpha": -1.0}, "alpha"),
        ({"alpha": float("nan")}, "alpha"),
        ({"meta": {"general.type": "model"}}, "no LoRA adapter"),
        ({"meta": {"adapter.type": "control_vector"}}, "control_vector"),
        ({"meta": {"adapter.alora.invocation_tokens": "x"}}, "aLoRA"),
    ],
    ids=range(13),
)
def test_gguf_adapter_refused(tmp_path: Path, over: dict[str, Any], names: str) -> None:
    write_gguf(tmp_path / "m.gguf", CONFIG)
    adapter = random_adapter(tmp_path / "m.gguf", tmp_path / "a", target_modules=["q_proj"])
    write_adapter(tmp_path / "a.gguf", adapter, **{"alpha": 5.0, **over})
    with CModel(tmp_path / "m.gguf") as model, pytest.raises(CError) as error:
        model.attach(tmp_path / "a.gguf")
    assert names in str(error.value)


# ---- what is refused: by both, and with a sentence that names it ------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    file = tmp_path_factory.mktemp("plain") / "m.gguf"
    write_gguf(file, CONFIG)
    yield file


def refused(path: Path, adapter: Path) -> str:
    with open_checkpoint(path) as checkpoint, pytest.raises(PyloraError):
        Adapter.load(adapter, checkpoint.config.modules(), base=checkpoint.load)
    with CModel(path) as model, pytest.raises(CError) as error:
        model.attach(adapter)
    return str(error.value)


CONFIGS: list[tuple[dict[str, Any], str]] = [
    *(({name: [1]}, name) for name in _REFUSED),
    ({"brand_new_field": "x"}, "brand_new_field"),
    ({"peft_type": "IA3"}, "IA3"),
    ({"r": 0}, "r:"),
    ({"r": 2.5}, "r:"),
    ({"r": None}, "r:"),
    ({"r": 4}, "[3, 256]"),
    ({"lora_alpha": -1}, "lora_alpha"),
    ({"lora_alpha": "8"}, "lora_alpha"),
    ({"lora_dropout": 1.0}, "lora_dropout"),
    ({"bias": "some"}, "bias"),
    ({"use_rslora": 1}, "use_rslora"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"init_lora_weights": "corda"}, "corda"),
    ({"init_lora_weights": "mystery"}, "mystery"),
    ({"target_modules": ["q_prj"]}, "q_prj"),
    ({"target_modules": []}, "target_modules"),
    ({"target_modules": None}, "target_modules"),
    ({"target_modules": ".*nothing"}, "nothing"),
    ({"target_modules": [""]}, "target_modules"),
    ({"target_modules": "("}, "'('"),
    ({"exclude_modules": ["mlp.q_proj"]}, "mlp.q_proj"),
    ({"exclude_modules": ["q_proj"]}, "no module is left"),
    ({"rank_pattern": {"v_proj": 2}}, "v_proj"),
    ({"rank_pattern": {"q_proj": -2}}, "rank"),
    ({"rank_pattern": [2]}, "rank_pattern"),
    ({"alpha_pattern": {"up_proj": 2}}, "up_proj"),
    ({"alpha_pattern": {"q_proj": 0}}, "alpha"),
    ({"layers_to_transform": [2]}, "no layer 2"),
    ({"layers_to_transform": "1"}, "layers_to_transform"),
    ({"layers_pattern": "layers"}, "layers_to_transform"),
    ({"layers_to_transform": [1], "layers_pattern": "blocks"}, "layers_pattern"),
    ({"target_modules": "all-linear", "layers_to_transform": [1]}, "layers_to_transform"),
    ({"lora_bias": True}, "lora_B.bias"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "names"), CONFIGS, ids=range(len(CONFIGS)))
def test_config_refused(plain: Path, tmp_path: Path, change: dict[str, Any], names: str) -> None:
    random_adapter(plain, tmp_path / "a", target_modules=["q_proj"])
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert names in refused(plain, tmp_path / "a")


def test_what_takes_from_the_base_is_refused(plain: Path, tmp_path: Path) -> None:
    """Python reads it: it has the decompositions."""
    random_adapter(plain, tmp_path / "a", target_modules=["q_proj"])
    file = tmp_path / "a" / "adapter_config.json"
    config = json.loads(file.read_text()) | {"init_lora_weights": "pissa_niter_4"}
    file.write_text(json.dumps(config))
    with CModel(plain) as model, pytest.raises(CError, match="pissa_niter_4"):
        model.attach(tmp_path / "a")


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


def without(tensors: dict[str, Any]) -> None:
    del tensors[f"{Q0}.lora_B.weight"]


def one_more(tensors: dict[str, Any]) -> None:
    tensors["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"] = np.ones(
        (3, 256), np.float32
    )


def nan(tensors: dict[str, Any]) -> None:
    tensors[f"{Q0}.lora_A.weight"] = np.full((3, 256), np.nan, np.float32)


def whole_numbers(tensors: dict[str, Any]) -> None:
    tensors[f"{Q0}.lora_A.weight"] = np.ones((3, 256), np.int32)


def transposed(tensors: dict[str, Any]) -> None:
    tensors[f"{Q0}.lora_A.weight"] = np.ones((256, 3), np.float32)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (without, f"{Q0}.lora_B.weight"),
        (one_more, "mlp.up_proj.lora_A.weight"),
        (nan, "NaN or infinity"),
        (whole_numbers, "I32"),
        (transposed, "[256, 3]"),
    ],
)
def test_tensors_refused(plain: Path, tmp_path: Path, change: Any, names: str) -> None:
    adapter = random_adapter(plain, tmp_path / "a", target_modules=["q_proj"])
    tensors: dict[str, Any] = dict(parameters(adapter))
    change(tensors)
    save(tmp_path / "a" / "adapter_model.safetensors", tensors)
    assert names in refused(plain, tmp_path / "a")


def test_pickle_and_nothing(plain: Path, tmp_path: Path) -> None:
    random_adapter(plain, tmp_path / "a", target_modules=["q_proj"])
    file = tmp_path / "a" / "adapter_model.safetensors"
    file.rename(tmp_path / "a" / "adapter_model.bin")
    assert "pickle" in refused(plain, tmp_path / "a")
    (tmp_path / "a" / "adapter_model.bin").unlink()
    assert "no such file" in refused(plain, tmp_path / "a")
    assert "no such file" in refused(plain, tmp_path / "nothing")


@pytest.mark.skipif(not REAL.exists(), reason="needs the weights of SmolLM2")
@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_the_real_model(tmp_path: Path, precision: str) -> None:
    random_adapter(REAL, tmp_path / "a", target_modules="all-linear", r=8)
    check_same(REAL, tmp_path / "a", precision)
