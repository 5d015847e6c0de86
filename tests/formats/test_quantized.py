"""Quantized Hugging Face directories: every way is read exactly, and each way in which one is wrong
is an error that names the tensor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from quantized_models import KINDS, SMALL, Tensor, write_quantized, write_safetensors

import pylora
from pylora.adapters.adapter import Adapter
from pylora.adapters.loraconfig import LoraConfig
from pylora.adapters.plan import resolve
from pylora.errors import FileFormatError, PyloraError, UnsupportedError
from pylora.formats import open_checkpoint
from pylora.formats.quantized import bitsandbytes
from pylora.formats.quantized.parts import Parts
from pylora.formats.safetensors import SafeTensors
from pylora.merging.merge import merge_checkpoint, unmerge_checkpoint

UP = "model.layers.0.mlp.up_proj"
Change = Callable[[dict[str, Tensor]], None]


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_is_the_definitions(tmp_path: Path, kind: str) -> None:
    expected = write_quantized(tmp_path, kind)
    with open_checkpoint(tmp_path) as model:
        assert model.config == SMALL and list(model.names()) == list(expected)
        assert any("is quantized" in note for note in model.notes)
        for name, values in expected.items():
            assert model.shape(name) == values.shape
            assert np.array_equal(model.load(name).view(np.uint32), values.view(np.uint32)), name
            assert model.dtype(name) in ("f32", "f16", "bf16")
        assert model.form(f"{UP}.weight") not in ("f32", "f16", "bf16")
        assert model.form("model.norm.weight") == "bf16"
        assert "quantization_config" not in model.settings


# ---- what is made of it --------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
def test_a_model_keeps_it_in_the_precision_that_was_chosen(tmp_path: Path, precision: str) -> None:
    """The same as of a plain directory with the same numbers."""
    expected = write_quantized(tmp_path / "quantized", "nf4-double")
    (tmp_path / "plain").mkdir()
    settings = json.loads((tmp_path / "quantized" / "config.json").read_text())
    del settings["quantization_config"]
    (tmp_path / "plain" / "config.json").write_text(json.dumps(settings))
    write_safetensors(
        tmp_path / "plain" / "model.safetensors",
        {n: ("BF16", (x.view(np.uint32) >> 16).astype(np.uint16)) for n, x in expected.items()},
    )
    logits = []
    for name in ("quantized", "plain"):
        model = pylora.load(tmp_path / name, precision=precision)
        logits.append(np.asarray(model.llama.forward(np.arange(7))[0]))
    assert np.array_equal(*logits)


@pytest.mark.parametrize("kind", ["nf4-double", "llm.int8", "gptq-4"])
def test_a_merged_model_is_plain_and_unmerges_to_plain_ones(tmp_path: Path, kind: str) -> None:
    expected = write_quantized(tmp_path / "base", kind)
    lora = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    Adapter.init(resolve(lora, SMALL.modules()), lora).save(tmp_path / "adapter")
    report = merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    dtype = {"gptq-4": "f16"}.get(kind, "bf16")
    assert any("not quantized" in note and dtype in note for note in report.notes)
    settings = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in settings
    unmerge_checkpoint(tmp_path / "merged", tmp_path / "back")
    with open_checkpoint(tmp_path / "merged") as merged, open_checkpoint(tmp_path / "back") as back:
        assert merged.dtype(f"{UP}.weight") == back.dtype(f"{UP}.weight") == dtype
        for name, values in expected.items():
            near = np.abs(back.load(name) - values).max()
            assert near <= 2.0**-8 * np.abs(values).max()
            if kind != "llm.int8":
                assert np.array_equal(back.load(name), values)


# ---- refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "says"),
    [
        *[
            ({"quant_method": name}, name)
            for name in (
                "hqq", "aqlm", "quanto", "torchao", "mxfp4", "eetq", "spqr", "vptq", "higgs",
                "bitnet", "quark", "auto-round", "nvfp4", "mxfp8", "modelopt", "gguf", "x" * 500,
            )
        ],
        ({}, "quant_method"),
        ({"quant_method": None}, "quant_method"),
        ({"quant_method": ["gptq"]}, "quant_method"),
        ("nf4", "not an object"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "load_in_8bit"),
        ({"quant_method": "awq", "version": "gemv"}, "gemv"),
        ({"quant_method": "awq", "version": "marlin"}, "marlin"),
        ({"quant_method": "awq", "bits": 8}, "8"),
        ({"quant_method": "gptq"}, "bits"),
        ({"quant_method": "gptq", "bits": 5}, "5"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "group_size"),
        ({"quant_method": "gptq", "bits": 4, "group_size": "128"}, "group_size"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "marlin"),
        ({"quant_method": "gptq", "bits": 4, "pack_dtype": "int16"}, "pack_dtype"),
        ({"quant_method": "fp8", "weight_block_size": [0, 128]}, "weight_block_size"),
        ({"quant_method": "fp8", "weight_block_size": 128}, "weight_block_size"),
        ({"quant_method": "fp8", "modules_to_not_convert": 3}, "modules_to_not_convert"),
        ({"quant_method": "fp8", "expert_dtype": "fp4"}, "fp4"),
        ({"quant_method": "compressed-tensors"}, "config_groups"),
        *[
            (
                {
                    "quant_method": "compressed-tensors", "format": form,
                    "config_groups": {"g": {"weights": {"num_bits": 4, "strategy": "group"}}},
                },
                form,
            )
            for form in ("nvfp4-pack-quantized", "marlin-24", "sparse-24-bitmask", "dense")
        ],
    ],
    ids=lambda v: v[:30] if isinstance(v, str) else "",
)  # fmt: skip
def test_what_is_not_read_is_refused_by_name(tmp_path: Path, config: Any, says: str) -> None:
    write_quantized(tmp_path, "nf4")
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["quantization_config"] = config
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(PyloraError) as error:
        open_checkpoint(tmp_path)
    assert isinstance(error.value, UnsupportedError | FileFormatError)
    assert says[:20] in str(error.value) and "quantiz" in str(error.value) + "quantiz"
    assert len(str(error.value)) < 600


def tensors_of(path: Path) -> dict[str, Tensor]:
    file = SafeTensors(path / "model.safetensors")
    out = {}
    for name, info in file.tensors.items():
        raw = np.array(file.bytes_of(name))
        known = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I32": "<i4", "I64": "<i8", "I8": "i1"}
        out[name] = info.dtype, raw.view(known.get(info.dtype, "u1")).reshape(info.shape)
    return out


def drop(ending: str) -> Change:
    return lambda t: t.pop(f"{UP}.{ending}") and None


def cut(ending: str) -> Change:
    """The last row of a tensor is missing."""

    def change(t: dict[str, Tensor]) -> None:
        dtype, array = t[f"{UP}.{ending}"]
        t[f"{UP}.{ending}"] = dtype, np.ascontiguousarray(array[:-1])

    return change


def put(ending: str, value: Any, at: Any = 0) -> Change:
    def change(t: dict[str, Tensor]) -> None:
        dtype, array = t[f"{UP}.{ending}"]
        array = array.copy()
        array.reshape(-1)[at] = value
        t[f"{UP}.{ending}"] = dtype, array

    return change


def recast(ending: str, dtype: str, kind: str) -> Change:
    def change(t: dict[str, Tensor]) -> None:
        t[f"{UP}.{ending}"] = dtype, t[f"{UP}.{ending}"][1].astype(kind)

    return change


def state(**values: Any) -> Change:
    name = f"{UP}.weight.quant_state.bitsandbytes__nf4"

    def change(t: dict[str, Tensor]) -> None:
        said = json.loads(t[name][1].tobytes()) | values
        t[name] = "U8", np.frombuffer(json.dumps(said).encode(), np.uint8)

    return change


NAN = float("nan")
WRONG: list[tuple[str, Change, str]] = [
    ("nf4", drop("weight.absmax"), "weight.absmax"),
    ("nf4", drop("weight"), "weight"),
    ("nf4", drop("weight.quant_state.bitsandbytes__nf4"), "quant_state"),
    ("nf4", cut("weight.absmax"), "weight.absmax"),
    ("nf4", cut("weight"), "weight"),
    ("nf4", put("weight.absmax", NAN), "weight.absmax"),
    ("nf4", put("weight.absmax", float("inf"), -1), "weight.absmax"),
    ("nf4", put("weight.quant_map", 0.5), "weight.quant_map"),
    ("nf4", put("weight.quant_map", NAN), "weight.quant_map"),
    ("nf4", recast("weight.absmax", "I32", "<i4"), "weight.absmax"),
    ("nf4", state(shape=[160, 95]), "weight"),
    ("nf4", state(shape=[96, 160]), "shape"),
    ("nf4", state(shape=[2**40, 2**40]), "shape"),
    ("nf4", state(shape=[-160, -96]), "shape"),
    ("nf4", state(shape=15360), "shape"),
    ("nf4", state(blocksize=0), "blocksize"),
    ("nf4", state(blocksize=65), "blocksize"),
    ("nf4", state(dtype="int8"), "dtype"),
    ("nf4", state(quant_type="fp4"), "quant_type"),
    ("nf4-double", drop("weight.nested_quant_map"), "weight.nested_quant_map"),
    ("nf4-double", drop("weight.nested_absmax"), "weight.absmax"),
    ("nf4-double", cut("weight.nested_quant_map"), "weight.nested_quant_map"),
    ("nf4-double", put("weight.nested_absmax", NAN), "weight.nested_absmax"),
    ("nf4-double", put("weight.nested_quant_map", NAN), "weight.nested_quant_map"),
    ("nf4-double", state(nested_blocksize=0), "nested_blocksize"),
    ("nf4-double", state(nested_offset="x"), "nested_offset"),
    ("nf4-double", state(nested_offset=NAN), "nested_offset"),
    ("nf4-double", state(nested_dtype="float16"), "nested_dtype"),
    ("llm.int8", drop("SCB"), "SCB"),
    ("llm.int8", cut("SCB"), "SCB"),
    ("llm.int8", put("SCB", NAN), "SCB"),
    ("llm.int8", put("weight_format", 2), "weight_format"),
    ("llm.int8", recast("weight", "U8", "u1"), "weight"),
    ("fp8-blocks", drop("weight_scale_inv"), "weight"),
    ("fp8-blocks", cut("weight_scale_inv"), "weight_scale_inv"),
    ("fp8-blocks", put("weight_scale_inv", NAN), "weight_scale_inv"),
    ("fp8-blocks", recast("weight", "I8", "i1"), "weight"),
    ("awq-32", drop("qzeros"), "qzeros"),
    ("awq-32", drop("scales"), "scales"),
    ("awq-32", drop("qweight"), "qweight"),
    ("awq-32", cut("scales"), "scales"),
    ("awq-32", cut("qzeros"), "qzeros"),
    ("awq-32", cut("qweight"), "qweight"),
    ("awq-32", put("scales", NAN), "scales"),
    ("gptq-4", put("g_idx", 3), "g_idx"),
    ("gptq-4", put("g_idx", -1), "g_idx"),
    ("gptq-4", drop("g_idx"), "g_idx"),
    ("gptq-4", cut("g_idx"), "up_proj.weight"),
    ("gptq-4", cut("qweight"), "qweight"),
    ("gptq-4", cut("scales"), "qzeros"),
    ("gptq-4", drop("scales"), "scales"),
    ("gptq-4", put("scales", NAN), "scales"),
    ("gptq-8", cut("qzeros"), "qzeros"),
    ("int4-packed", drop("weight_shape"), "weight_shape"),
    ("int4-packed", put("weight_shape", -160), "weight_packed"),
    ("int4-packed", put("weight_shape", 2**60), "weight_packed"),
    ("int4-packed", drop("weight_scale"), "weight_scale"),
    ("int4-packed", put("weight_scale", 0x7FC0), "weight_scale"),
    ("int8-packed", drop("weight_packed"), "weight"),
    ("int8-packed", cut("weight_zero_point"), "weight_zero_point"),
    ("int8-rows", cut("weight_zero_point"), "weight_zero_point"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "change", "says"), WRONG, ids=[f"{k}-{s}" for k, _, s in WRONG])
def test_a_wrong_tensor_is_named(tmp_path: Path, kind: str, change: Change, says: str) -> None:
    write_quantized(tmp_path, kind)
    tensors = tensors_of(tmp_path)
    change(tensors)
    write_safetensors(tmp_path / "model.safetensors", tensors)
    with pytest.raises(PyloraError) as error:
        open_checkpoint(tmp_path).load(f"{UP}.weight")
    assert says in str(error.value) and "up_proj" in str(error.value)


def test_bits_that_do_not_fit_what_config_json_says(tmp_path: Path) -> None:
    write_quantized(tmp_path, "gptq-4")
    settings = json.loads((tmp_path / "config.json").read_text())
    for key, value in (("bits", 8), ("group_size", 16)):
        changed = {**settings["quantization_config"], key: value}
        text = json.dumps({**settings, "quantization_config": changed})
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(FileFormatError, match="proj"):
            open_checkpoint(tmp_path)
        (tmp_path / "config.json").write_text(  # but where single modules have rules of their own
            text.replace('"quant_method"', '"dynamic": {"-:x": {}}, "quant_method"')
        )
        open_checkpoint(tmp_path).load(f"{UP}.weight")


def test_what_is_said_not_to_be_quantized_is_not(tmp_path: Path) -> None:
    write_quantized(tmp_path, "nf4")
    settings = json.loads((tmp_path / "config.json").read_text())
    for listed in ("up_proj", "mlp.up_proj", UP, "model.layers.0"):
        settings["quantization_config"]["llm_int8_skip_modules"] = [listed]
        (tmp_path / "config.json").write_text(json.dumps(settings))
        with pytest.raises(FileFormatError, match=listed):
            open_checkpoint(tmp_path)
    settings["quantization_config"]["llm_int8_skip_modules"] = ["proj", "lm_head", "re:.*"]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    open_checkpoint(tmp_path)


def test_plain_weights_under_a_quantization_config_are_an_error(tmp_path: Path) -> None:
    expected = write_quantized(tmp_path, "nf4")
    write_safetensors(
        tmp_path / "model.safetensors", {n: ("F32", x) for n, x in expected.items()}
    )  # fmt: skip
    with pytest.raises(FileFormatError, match="no weight is stored so"):
        open_checkpoint(tmp_path)


def test_stacked_experts_in_fp8_are_read_one_at_a_time(tmp_path: Path) -> None:
    """Of a model whose experts are one tensor with a scale behind its own name."""
    import ml_dtypes

    from pylora.model.config import LlamaConfig

    config = LlamaConfig.from_hf(
        {
            "model_type": "qwen3_moe", "vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 1,
            "intermediate_size": 64, "moe_intermediate_size": 48, "num_experts": 2,
            "num_experts_per_tok": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
            "head_dim": 16,
        }
    )  # fmt: skip
    rng = np.random.default_rng(0)
    tensors: dict[str, Tensor] = {}
    expected = {}
    for name, shape in config.tensors().items():
        if ".experts." not in name:
            tensors[name] = "F32", rng.standard_normal(shape).astype(np.float32)
    for part, shape in (("gate_up_proj", (2, 32, 96)), ("down_proj", (2, 48, 32))):
        at = f"model.layers.0.mlp.experts.{part}"
        codes = rng.standard_normal(shape).astype(ml_dtypes.float8_e4m3fn)
        grid = (2, shape[1] // 16, shape[2] // 16)
        scales = rng.uniform(0.1, 1, grid).astype(np.float32)
        tensors[at] = "F8_E4M3", codes.view(np.uint8)
        tensors[f"{at}_scale_inv"] = "F32", scales
        wide = np.repeat(np.repeat(scales, 16, axis=1), 16, axis=2)
        expected[part] = codes.astype(np.float32) * wide
    write_safetensors(tmp_path / "model.safetensors", tensors)
    settings = config.to_hf() | {"torch_dtype": "float32"}
    settings["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with open_checkpoint(tmp_path) as model:
        for e in range(2):
            at = f"model.layers.0.mlp.experts.{e}"
            both = expected["gate_up_proj"][e].T
            assert np.array_equal(model.load(f"{at}.gate_proj.weight"), both[:48])
            assert np.array_equal(model.load(f"{at}.up_proj.weight"), both[48:])
            assert np.array_equal(
                model.load(f"{at}.down_proj.weight"), expected["down_proj"][e].T
            )  # fmt: skip


def test_no_more_than_the_result_and_a_few_rows_is_there_at_once(tmp_path: Path) -> None:
    import tracemalloc

    rng, d, k = np.random.default_rng(0), 4096, 512
    codes = rng.integers(-127, 128, (d, k)).astype(np.int8)
    scales = np.ones(d, np.float32)
    tensors: dict[str, Tensor] = {"m.weight": ("I8", codes), "m.SCB": ("F32", scales)}
    write_safetensors(tmp_path / "a.safetensors", tensors)
    with SafeTensors(tmp_path / "a.safetensors") as file:
        parts = Parts("m", "m.weight")
        for ending in ("weight", "SCB"):
            parts.add(ending, file, f"m.{ending}")
        spec = bitsandbytes.read(parts)
        tracemalloc.start()
        result = spec.numbers()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert result.nbytes == 4 * d * k and peak < result.nbytes + (4 << 20)


# ---- anything at all -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, bytes]]:
    """Of each kind config.json and the file of tensors."""
    out = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp("kind")
        write_quantized(folder, kind)
        config = (folder / "config.json").read_text()
        out[kind] = config, (folder / "model.safetensors").read_bytes()
    return out


@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=60)
def test_a_damaged_file_is_read_or_refused(
    written: dict[str, tuple[str, bytes]], tmp_path_factory: Any, data: st.DataObject
) -> None:
    config, raw = written[data.draw(st.sampled_from(sorted(KINDS)))]
    folder = tmp_path_factory.mktemp("damaged")
    settings = json.loads(config)
    quantization = settings["quantization_config"]
    if data.draw(st.booleans()):
        junk = st.none() | st.integers() | st.text(max_size=4) | st.lists(st.integers(), max_size=2)
        quantization[data.draw(st.sampled_from(sorted(quantization)))] = data.draw(junk)
    changed = bytearray(raw)
    for _ in range(data.draw(st.integers(0, 3))):
        changed[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "model.safetensors").write_bytes(bytes(changed))
    try:
        with open_checkpoint(folder) as model:
            for name in model.names():
                assert model.load(name).shape == model.shape(name)
    except PyloraError as error:
        assert len(str(error)) > 20
