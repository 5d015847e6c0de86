"""GGUF: names, row order, every quantization that is promised, configuration, real weights."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from small_models import CONFIG, REAL, interleave, weights, write_gguf

from pylora.errors import FileFormatError, MissingExtraError, UnsupportedError
from pylora.formats import open_checkpoint
from pylora.formats.base import widen
from pylora.formats.ggml import BLOCK_TYPES
from pylora.formats.gguf import deinterleave, dequantize
from pylora.formats.gguf_header import read_header
from pylora.model.config import LlamaConfig
from pylora.numbers.ggml_decode import DECODERS

QUANTIZABLE = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"]  # what gguf-py can write


@pytest.mark.parametrize("kind", QUANTIZABLE)
def test_every_tensor_comes_back_under_its_hugging_face_name(tmp_path: Path, kind: str) -> None:
    expected = write_gguf(tmp_path / "m.gguf", kind=kind)
    with open_checkpoint(tmp_path / "m.gguf") as model:
        assert model.config == CONFIG
        assert list(model.names()) == list(CONFIG.tensors()) == list(expected)
        for name, w in expected.items():
            got = model.load(name)
            assert got.dtype == np.float32 and got.shape == model.shape(name) == w.shape
            assert got.flags.c_contiguous and np.array_equal(got, w), name
            assert model.dtype(name) == (kind.lower() if w.ndim == 2 else "f32")
            if model.dtype(name) in ("f32", "f16", "bf16"):
                assert np.array_equal(widen(*model.raw(name)), w)
            else:
                with pytest.raises(UnsupportedError, match="quantized"):
                    model.raw(name)


def q4_k(block: bytes) -> list[float]:
    """One Q4_K block by the text of the format: 8 groups of 32, 6-bit scales and minima."""
    d, dmin = np.frombuffer(block[:4], np.float16).astype(np.float32)
    s, q = block[4:16], block[16:]
    out = []
    for j in range(8):
        if j < 4:
            scale, low = s[j] & 63, s[j + 4] & 63
        else:
            scale = (s[j + 4] & 15) | (s[j - 4] >> 6) << 4
            low = (s[j + 4] >> 4) | (s[j] >> 6) << 4
        for i in range(32):
            nibble = q[32 * (j // 2) + i] >> 4 * (j % 2) & 15
            out.append(np.float32(d * scale) * np.float32(nibble) - np.float32(dmin * low))
    return [float(v) for v in out]


def q6_k(block: bytes) -> list[float]:
    """One Q6_K block: 4 low bits, 2 high bits, 16 signed scales for 16 numbers each."""
    low, high = block[:128], block[128:192]
    scales = np.frombuffer(block[192:208], np.int8)
    d = np.frombuffer(block[208:], np.float16).astype(np.float32)[0]
    out = []
    for i in range(256):
        half, r = divmod(i, 128)
        nibble = low[64 * half + r % 64] >> 4 * (r // 64) & 15
        pair = high[32 * half + r % 32] >> 2 * (r // 32) & 3
        out.append(float(np.float32(d * np.float32(scales[i // 16])) * (nibble + 16 * pair - 32)))
    return out


@pytest.mark.parametrize(("kind", "oracle"), [("Q4_K", q4_k), ("Q6_K", q6_k)])
def test_k_formats_against_their_definition(
    tmp_path: Path, rng: np.random.Generator, kind: str, oracle: Any
) -> None:
    """gguf-py cannot write these, so blocks of random bits stand for weights."""
    qtype = gguf.GGMLQuantizationType[kind]
    size = gguf.GGML_QUANT_SIZES[qtype][1]
    blocks = rng.integers(0, 256, (CONFIG.intermediate_size, size), np.uint8)
    at = 208 if kind == "Q6_K" else 0
    blocks[:, at : at + 2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    if kind == "Q4_K":
        blocks[:, 2:4] = np.frombuffer(np.float16(0.02).tobytes(), np.uint8)
    name = "model.layers.1.mlp.up_proj.weight"
    rest = {n: w for n, w in weights(CONFIG).items() if n != name}

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("blk.1.ffn_up.weight", blocks, raw_dtype=qtype)

    write_gguf(tmp_path / "m.gguf", tensors=rest, more=add)
    model = open_checkpoint(tmp_path / "m.gguf")
    assert model.dtype(name) == kind.lower()
    got = model.load(name)
    for row in range(0, len(blocks), 37):
        expected = oracle(blocks[row].tobytes())
        np.testing.assert_allclose(got[row], expected, rtol=1e-5, atol=1e-5)


def test_ggml_types_are_those_of_gguf_py() -> None:
    sizes = {int(t): (t.name, *size) for t, size in gguf.GGML_QUANT_SIZES.items()}
    assert {number: sizes.get(number, t) for number, t in BLOCK_TYPES.items()} == BLOCK_TYPES
    assert set(sizes) <= set(BLOCK_TYPES)


@pytest.mark.parametrize("kind", sorted(DECODERS))
def test_blocks_of_any_bits_are_decoded_as_gguf_py_does(
    kind: str, rng: np.random.Generator
) -> None:
    qtype = gguf.GGMLQuantizationType.__members__.get(kind)
    if qtype is None:
        pytest.skip(f"this version of gguf does not know {kind}")
    rows = rng.integers(0, 256, (40, 8 * gguf.GGML_QUANT_SIZES[qtype][1]), np.uint8)
    with np.errstate(all="ignore"):
        want = gguf.quants.dequantize(rows, qtype)
    got = dequantize(rows, kind.lower(), "here")
    assert got.dtype == np.float32 and got.shape == want.shape
    # Random scales may be infinite or NaN; which NaN is not told.
    same = (got.view(np.uint32) == want.view(np.uint32)) | (np.isnan(got) & np.isnan(want))
    assert same.all()


@pytest.mark.parametrize("kind", ["iq2_xxs", "iq3_s", "iq1_m"])
def test_types_with_large_tables_need_the_package_gguf(
    kind: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    qtype = gguf.GGMLQuantizationType[kind.upper()]
    rows = rng.integers(0, 256, (3, 2 * gguf.GGML_QUANT_SIZES[qtype][1]), np.uint8)
    with np.errstate(all="ignore"):
        want = gguf.quants.dequantize(rows, qtype)
    np.testing.assert_array_equal(dequantize(rows, kind, "here"), want)
    monkeypatch.setitem(sys.modules, "gguf.constants", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'pylora-engine\[iq\]'"):
        dequantize(rows, kind, "here")


def test_a_type_that_nothing_decodes_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="here: no way is known to dequantize q8_k"):
        dequantize(np.zeros((1, 292), np.uint8), "q8_k", "here")


def test_a_model_is_read_without_the_package_gguf(tmp_path: Path) -> None:
    expected = write_gguf(tmp_path / "m.gguf", kind="Q4_1")
    np.save(tmp_path / "want.npy", expected["model.layers.0.mlp.up_proj.weight"])
    program = """
import sys
sys.modules["gguf"] = None
import numpy, pylora
with pylora.open_checkpoint(sys.argv[1] + "/m.gguf") as model:
    got = model.load("model.layers.0.mlp.up_proj.weight")
assert (got == numpy.load(sys.argv[1] + "/want.npy")).all()
"""
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)


def test_rows_are_put_back_by_the_definition() -> None:
    rows = np.arange(2 * 6 * 3).reshape(12, 3)
    assert np.array_equal(deinterleave(interleave(rows, 2), 2), rows)
    head = np.array([[0], [3], [1], [4], [2], [5]])
    assert deinterleave(head, 1).ravel().tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(("arch", "extra"), [("qwen2", "attention_bias"), ("qwen3", "qk_norm")])
def test_qwen_is_not_permuted_and_has_its_own_tensors(
    tmp_path: Path, arch: str, extra: str
) -> None:
    config = dataclasses.replace(CONFIG, model_type=arch, **{extra: True})
    expected = write_gguf(tmp_path / "m.gguf", config, arch=arch)
    model = open_checkpoint(tmp_path / "m.gguf")
    assert model.config == config
    for name, w in expected.items():
        assert np.array_equal(model.load(name), w), name


def test_biases_of_llama_are_permuted_too(tmp_path: Path) -> None:
    config = dataclasses.replace(
        CONFIG, attention_bias=True, attention_out_bias=True, tie_word_embeddings=False
    )
    expected = write_gguf(tmp_path / "m.gguf", config)
    model = open_checkpoint(tmp_path)  # a directory with one GGUF file
    assert model.config == config
    for name, w in expected.items():
        assert np.array_equal(model.load(name), w), name


def test_mistral_is_told_by_its_window(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", more=lambda w: w.add_sliding_window(32))
    config = open_checkpoint(tmp_path / "m.gguf").config
    assert (config.model_type, config.sliding_window) == ("mistral", 32)


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def llama3_factors(theta: float, head_dim: int) -> np.ndarray:
    """As convert_hf_to_gguf computes them: one frequency at a time, by wavelength."""
    out = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * np.pi * theta ** (i / head_dim)
        if wavelength < 8192 / 4:
            out.append(1.0)
        elif wavelength > 8192:
            out.append(8.0)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            out.append(1 / ((1 - smooth) / 8 + smooth))
    return np.array(out, np.float32)


def test_llama3_rope_scaling_is_recovered(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, rope_theta=500000.0, rope_scaling=LLAMA3)
    factors = llama3_factors(500000.0, CONFIG.head_dim)
    assert 2 < len(set(factors)) < len(factors)
    write_gguf(
        tmp_path / "m.gguf", config, more=lambda w: w.add_tensor("rope_freqs.weight", factors)
    )
    model = open_checkpoint(tmp_path / "m.gguf")
    assert model.config == config and "rope_freqs.weight" not in model.names()
    factors[5] *= 1.01
    write_gguf(
        tmp_path / "m.gguf", config, more=lambda w: w.add_tensor("rope_freqs.weight", factors)
    )
    with pytest.raises(UnsupportedError, match="rope_freqs"):
        open_checkpoint(tmp_path / "m.gguf")


def test_linear_rope_scaling(tmp_path: Path) -> None:
    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(2.5)

    write_gguf(tmp_path / "m.gguf", more=add)
    scaling = open_checkpoint(tmp_path / "m.gguf").config.rope_scaling
    assert scaling == {"rope_type": "linear", "factor": 2.5}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("llama.expert_shared_count", 1, "expert_shared_count"),
        ("llama.rope.dimension_count", 32, "dimension_count is 32"),
        ("llama.rope.scaling.type", "spiral", "spiral"),
        ("llama.logit_scale", 0.5, "logit_scale"),
        ("llama.attention.head_count_kv", [2, 2], "head_count_kv"),
        ("llama.rope.scaling.type", [1, 2], "rope.scaling.type"),
        ("llama.rope.scaling.factor", [1.0, 2.0], "rope.scaling.factor"),
    ],
)
def test_settings_that_change_the_result_are_refused(
    tmp_path: Path, key: str, value: Any, message: str
) -> None:
    write_gguf(
        tmp_path / "m.gguf",
        more=lambda w: (
            w.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
            if not isinstance(value, list)
            else w.add_array(key, value)
        ),
        skip=(key.removeprefix("llama."),),
    )
    with pytest.raises(UnsupportedError, match=message):
        open_checkpoint(tmp_path / "m.gguf")


def test_other_architectures_and_tensors_are_refused_by_name(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", arch="gemma3n")
    with pytest.raises(UnsupportedError, match=r"'gemma3n'.*nearest.*'gemma3'.*architecture\.md"):
        open_checkpoint(tmp_path / "m.gguf")
    x = np.zeros(4, np.float32)
    write_gguf(tmp_path / "m.gguf", more=lambda w: w.add_tensor("blk.0.ffn_gate_exps.weight", x))
    with pytest.raises(UnsupportedError, match="ffn_gate_exps"):
        open_checkpoint(tmp_path / "m.gguf")


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_missing_tensor_is_named(tmp_path: Path, name: str) -> None:
    tensors = {n: w for n, w in weights(CONFIG).items() if n != name}
    write_gguf(tmp_path / "m.gguf", tensors=tensors)
    with pytest.raises(FileFormatError, match=f"missing.*{name}"):
        open_checkpoint(tmp_path / "m.gguf")


def test_a_quantization_that_cannot_be_read_is_named() -> None:
    with pytest.raises(UnsupportedError, match=r"here: .*q8_1"):
        dequantize(np.zeros((2, 40), np.uint8), "q8_1", "here")


def test_the_walk_agrees_with_the_librarys_reader(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", kind="Q4_1", tokenizer=True)
    ours, theirs = read_header(tmp_path / "m.gguf"), gguf.GGUFReader(tmp_path / "m.gguf")
    fields = {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert list(ours.metadata) == list(fields)
    for key, value in fields.items():
        got = ours.metadata[key]
        assert (got.tolist() if isinstance(got, np.ndarray) else got) == value, key
    for tensor in theirs.tensors:
        mine = ours.tensors[tensor.name]
        assert (mine.start, mine.end - mine.start) == (tensor.data_offset, tensor.n_bytes)
        assert mine.shape == tuple(tensor.shape[::-1].tolist())
        assert mine.kind == tensor.tensor_type.name


@pytest.mark.parity
def test_real_weights_against_transformers() -> None:
    """Also pins that q and k are un-permuted right: transformers has its own loader."""
    transformers = pytest.importorskip("transformers")
    if not REAL.is_file():
        pytest.skip(f"no {REAL}; set PYLORA_TEST_GGUF")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        REAL.parent, gguf_file=REAL.name, dtype="float32"
    )
    state = theirs.state_dict()
    with open_checkpoint(REAL) as model:
        assert model.config.tie_word_embeddings == theirs.config.tie_word_embeddings
        assert set(model.names()) == set(state) - {"lm_head.weight"}
        for name in model.names():
            assert np.array_equal(model.load(name), state[name].numpy()), name
        ours, hf = model.config, theirs.config
    for field in dataclasses.fields(LlamaConfig):
        if hasattr(hf, field.name) and field.name not in ("rope_scaling", "rms_norm_eps"):
            assert getattr(ours, field.name) == getattr(hf, field.name), field.name
    assert np.float32(ours.rms_norm_eps) == np.float32(hf.rms_norm_eps)
    assert ours.rope_theta == hf.rope_parameters["rope_theta"]
