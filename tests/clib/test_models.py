"""The C library's models: the same logits as Python's, bit for bit, from every kind of file."""

from __future__ import annotations

import functools
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from clibrary import CError, CModel, greedy, needs_library, python_model, read_tensor
from small_models import CONFIG, weights, write_gguf, write_hf

from pylora.errors import PyloraError
from pylora.model.config import LlamaConfig

pytestmark = needs_library
IDS = [3, 17, 4, 29, 29]
PRECISIONS = ("fp32", "bf16", "int8", "int4", "int4a8")


def check_same(path: Path, precision: str) -> None:
    tokens, logits = greedy(python_model(path, precision), IDS, 4)
    with CModel(path, precision) as model:
        got_tokens, got = model.generate(IDS, 4)
    assert got_tokens == tokens
    assert got.tobytes() == logits.tobytes()


def small(**over: Any) -> LlamaConfig:
    return replace(CONFIG, **over)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_gguf(tmp_path: Path, kind: str, precision: str) -> None:
    tensors = {n: w / np.float32(16) for n, w in weights(CONFIG).items()}
    write_gguf(tmp_path / "m.gguf", CONFIG, kind, tensors=tensors)
    check_same(tmp_path / "m.gguf", precision)


def random_blocks(data: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """Rows of a K-quant with small scales, whatever the data are: gguf makes none of these."""
    _, size = gguf.constants.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(data.shape[0] * 1000 + data.shape[1])
    blocks = rng.integers(0, 256, (data.size // 256, size), dtype=np.uint8)
    scales = rng.uniform(1e-4, 1e-3, (len(blocks), 2)).astype("<f2").view(np.uint8)
    if kind.name in ("Q4_K", "Q5_K"):
        blocks[:, :4] = scales
    elif kind.name == "Q2_K":
        blocks[:, -4:] = scales
    elif kind.name == "IQ4_XS":
        blocks[:, :2] = scales[:, :2]
    else:
        blocks[:, -2:] = scales[:, :2]
    return blocks.reshape(len(data), -1)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"])
def test_k_quants(
    tmp_path: Path, kind: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf.quants, "quantize", random_blocks)
    write_gguf(tmp_path / "m.gguf", CONFIG, kind)
    check_same(tmp_path / "m.gguf", precision)


def write_split(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    whole = functools.partial(gguf.GGUFWriter, split_max_tensors=7)
    monkeypatch.setattr(gguf, "GGUFWriter", whole)
    write_gguf(folder / "m.gguf", small(tie_word_embeddings=False))
    return sorted(folder.glob("*.gguf"))


def test_split_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = write_split(tmp_path, monkeypatch)
    assert len(parts) == 3
    for part in parts:
        check_same(part, "fp32")


def test_split_model_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = write_split(tmp_path, monkeypatch)
    renamed = parts[0].rename(tmp_path / "whole.gguf")
    assert "name" in refused(renamed)
    shutil.copy(parts[1], parts[0])
    assert "part 1 of 3" in refused(parts[2])
    parts[0].unlink()
    refused(parts[1])


@pytest.mark.parametrize("arch", ["qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_other_architectures(tmp_path: Path, arch: str, tied: bool) -> None:
    over: dict[str, Any] = {"model_type": arch, "tie_word_embeddings": tied}
    over |= {"attention_bias": True} if arch == "qwen2" else {"qk_norm": True}
    write_gguf(tmp_path / "m.gguf", small(**over), arch=arch)
    check_same(tmp_path / "m.gguf", "fp32")


def test_biases_of_llama_are_put_in_order(tmp_path: Path) -> None:
    config = small(attention_bias=True, attention_out_bias=True, mlp_bias=True)
    write_gguf(tmp_path / "m.gguf", config)
    check_same(tmp_path / "m.gguf", "fp32")


@pytest.mark.parametrize("base", [10000.0, 1e6, 123456.789])
def test_rotary_base_and_linear_scaling(tmp_path: Path, base: float) -> None:
    def more(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(2.5)

    write_gguf(tmp_path / "m.gguf", small(rope_theta=base), more=more)
    check_same(tmp_path / "m.gguf", "fp32")


def test_llama3_scaling_is_recovered(tmp_path: Path) -> None:
    n = CONFIG.head_dim // 2
    wavelength = 2 * np.pi * 10000.0 ** (np.arange(n) / n)
    smooth = np.clip((8192 / wavelength - 1) / 3, 0, 1)
    factors = (1 / ((1 - smooth) / 32 + smooth)).astype(np.float32)
    write_gguf(
        tmp_path / "m.gguf", more=lambda writer: writer.add_tensor("rope_freqs.weight", factors)
    )
    model = python_model(tmp_path / "m.gguf", "fp32")
    assert model.config.rope_scaling is not None
    check_same(tmp_path / "m.gguf", "fp32")


def test_sliding_window(tmp_path: Path) -> None:
    write_gguf(
        tmp_path / "m.gguf", more=lambda w: w.add_uint32("llama.attention.sliding_window", 3)
    )
    check_same(tmp_path / "m.gguf", "fp32")


HF: list[dict[str, Any]] = [
    {},
    {"attention_bias": True, "attention_out_bias": True, "mlp_bias": True},
    {"model_type": "mistral", "sliding_window": 3},
    {"model_type": "qwen2", "attention_bias": True},
    {"model_type": "qwen2", "attention_bias": True, "sliding_window": 3, "max_window_layers": 1},
    {"model_type": "qwen3", "qk_norm": True, "tie_word_embeddings": False},
    {"rope_scaling": {"rope_type": "linear", "factor": 3.0}, "eos_token_ids": (1, 2)},
]
HF[-1]["rms_norm_eps"] = 1e-5
HF.append(
    {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    }
)


@pytest.mark.parametrize("over", HF, ids=range(len(HF)))
def test_hugging_face_directory(tmp_path: Path, over: dict[str, Any]) -> None:
    write_hf(tmp_path / "m", small(**over))
    check_same(tmp_path / "m", "fp32")
    with CModel(tmp_path / "m") as model:
        eos = python_model(tmp_path / "m", "fp32").config.eos_token_ids
        assert tuple(model.about.eos[: model.about.eos_count]) == eos


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int4"])
def test_shards_and_dtypes(tmp_path: Path, dtype: str, precision: str) -> None:
    write_hf(tmp_path / "m", CONFIG, dtype, shards=3)
    check_same(tmp_path / "m", precision)


@pytest.mark.parametrize("kind", list(gguf.quants._type_traits))
def test_every_type_decodes_to_the_same_bits(
    tmp_path: Path, kind: gguf.GGMLQuantizationType
) -> None:
    """Random bytes are random blocks; only which NaN one is may differ."""
    _, size = gguf.constants.GGML_QUANT_SIZES[kind]
    rows = np.random.default_rng(int(kind)).integers(0, 256, (33, 5 * size), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    writer.add_tensor("t", rows, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with np.errstate(all="ignore"):
        want = np.ascontiguousarray(gguf.quants.dequantize(rows, kind), np.float32)
    got = read_tensor(tmp_path / "t.gguf", "t")
    assert got.shape == want.shape
    number = ~np.isnan(want)
    assert number.any() and np.array_equal(np.isnan(got), ~number)
    assert np.array_equal(got[number].view(np.uint32), want[number].view(np.uint32))


@pytest.mark.parametrize("theta", [10000.0, 123456.0, 500000.0, 8e6])
@pytest.mark.parametrize("head_dim", [64, 96])
def test_rope_tables(tmp_path: Path, theta: float, head_dim: int) -> None:
    config = small(max_position_embeddings=5000, rope_theta=theta, head_dim=head_dim)
    write_gguf(tmp_path / "m.gguf", config)
    tables = python_model(tmp_path / "m.gguf", "fp32").rope.tables(5000)
    with CModel(tmp_path / "m.gguf") as model:
        for got, want in zip(model.rope(5000), tables, strict=True):
            assert got.tobytes() == np.ascontiguousarray(want[:5000]).tobytes()


# ---- what is refused: by both, and with a sentence that names it ------------------------------


def refused(path: Path) -> str:
    with pytest.raises(PyloraError):
        python_model(path, "fp32")
    with pytest.raises(CError) as error:
        CModel(path)
    return str(error.value)


def set_u32(key: str, value: int) -> Any:
    return lambda writer: writer.add_uint32(key, value)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"arch": "mamba"}, "mamba"),
        ({"skip": ("block_count",)}, "llama.block_count"),
        ({"more": lambda w: w.add_float32("llama.attn_logit_softcapping", 30.0)}, "softcapping"),
        ({"more": set_u32("llama.expert_count", 8)}, "llama.expert_used_count"),
        ({"more": set_u32("llama.rope.dimension_count", 32)}, "rope.dimension_count"),
        ({"more": lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN)}, "yarn"),
        ({"more": lambda w: w.add_tensor("blk.0.extra.weight", np.ones(3, np.float32))}, "extra"),
        (
            {"more": lambda w: w.add_tensor("rope_freqs.weight", np.ones(3, np.float32))},
            "rope_freqs",
        ),
        ({"more": lambda w: w.add_array("llama.rope.scaling.factor", [1, 2])}, "scaling.factor"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_gguf_refused(tmp_path: Path, change: dict[str, Any], names: str) -> None:
    write_gguf(tmp_path / "m.gguf", **change)
    assert names in refused(tmp_path / "m.gguf")


@pytest.mark.parametrize("missing", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_missing_tensor(tmp_path: Path, missing: str) -> None:
    tensors = weights(CONFIG)
    del tensors[missing]
    write_hf(tmp_path / "m", tensors=tensors)
    assert missing in refused(tmp_path / "m")


def test_wrong_shape_and_left_over(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    tensors = weights(CONFIG)
    write_hf(tmp_path / "a", tensors=tensors | {name: tensors[name][:-1]})
    assert name in refused(tmp_path / "a")
    extra = "model.layers.2.mlp.up_proj.weight"
    write_hf(tmp_path / "b", tensors=tensors | {extra: tensors[name]})
    assert extra in refused(tmp_path / "b")


def test_tied_head_that_is_stored(tmp_path: Path) -> None:
    tensors = weights(CONFIG)
    embedding = tensors["model.embed_tokens.weight"]
    write_hf(tmp_path / "same", tensors=tensors | {"lm_head.weight": embedding})
    check_same(tmp_path / "same", "fp32")
    write_hf(tmp_path / "other", tensors=tensors | {"lm_head.weight": embedding + 1})
    assert "lm_head.weight" in refused(tmp_path / "other")


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"hidden_act": "gelu"}, "gelu"),
        ({"model_type": "gpt2"}, "gpt2"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "spiral", "factor": 2.0}}, "spiral"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "layer_types"),
        ({"num_hidden_layers": 3}, "model.layers.2"),
        ({"num_hidden_layers": 10**9}, "layers"),
        ({"num_attention_heads": 3}, "heads"),
        ({"hidden_size": -1}, "hidden_size"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"eos_token_id": 300}, "300"),
        ({"rms_norm_eps": 0}, "epsilon"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_config_refused(tmp_path: Path, settings: dict[str, Any], names: str) -> None:
    write_hf(tmp_path / "m", settings=settings)
    assert names in refused(tmp_path / "m")


def test_no_such_file(tmp_path: Path) -> None:
    assert "no such file" in refused(tmp_path / "nothing.gguf")
    (tmp_path / "empty").write_bytes(b"")
    assert "empty" in refused(tmp_path / "empty")
    (tmp_path / "folder").mkdir()
    assert "config.json" in refused(tmp_path / "folder")
