"""Small Hugging Face directories whose weights are quantized, in each way that is read.

Codes and scales are drawn at random; what each stands for is computed here from the definition, so
that nothing is shared with the reader but that.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pylora.formats.base import narrow, widen
from pylora.model.config import LlamaConfig

Tensor = tuple[str, np.ndarray]  # safetensors' dtype, and an array with those bytes
Made = tuple[dict[str, Tensor], np.ndarray]  # tensors by ending; the weight, float32
# Groups of 32, and sizes that are no whole blocks of 64 and 128.
SMALL = LlamaConfig.tiny(
    vocab_size=64, hidden_size=96, intermediate_size=160, num_attention_heads=3,
    num_key_value_heads=3, head_dim=32, num_hidden_layers=1,
)  # fmt: skip
BNB = {"quant_method": "bitsandbytes", "llm_int8_skip_modules": ["lm_head"]}


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file with any dtype that the format has."""
    header, data = {}, b""
    for name, (dtype, array) in tensors.items():
        raw = np.ascontiguousarray(array).tobytes()
        where = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": where}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    """float32 numbers rounded to a dtype."""
    return widen(narrow(x, dtype), dtype)


def nf4(rng: np.random.Generator, shape: tuple[int, int], *, nested: bool, kind: str) -> Made:
    """bitsandbytes in 4 bits; blocks of 64 over all rows."""
    steps = {"nf4": NF4, "fp4": FP4}[kind]
    n, block = shape[0] * shape[1], 64
    codes, count = rng.integers(0, 16, n), -(-n // block)
    tensors: dict[str, Tensor] = {"weight.quant_map": ("F32", np.array(steps, np.float32))}
    state: dict[str, Any] = {"quant_type": kind, "blocksize": block, "dtype": "bfloat16"}
    state["shape"] = list(shape)
    if nested:
        table = np.sort(rng.uniform(-1, 1, 256)).astype(np.float32)
        own, above = rng.integers(0, 256, count), rng.uniform(0, 0.01, -(-count // 256))
        above = above.astype(np.float32)
        offset = 0.0371
        absmax = np.array(
            [table[q] * above[i // 256] + np.float32(offset) for i, q in enumerate(own)]
        )
        tensors |= {
            "weight.absmax": ("U8", own.astype(np.uint8)),
            "weight.nested_quant_map": ("F32", table),
            "weight.nested_absmax": ("F32", above),
        }
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
    else:
        absmax = rng.uniform(0.01, 0.1, count).astype(np.float32)
        tensors["weight.absmax"] = "F32", absmax
    table4 = np.array(steps, np.float32)
    values = np.array([table4[q] * absmax[i // block] for i, q in enumerate(codes)], np.float32)
    padded = np.append(codes, np.zeros(n % 2, np.int64))
    tensors["weight"] = "U8", (padded[::2] << 4 | padded[1::2]).astype(np.uint8)[:, None]
    text = np.frombuffer(json.dumps(state).encode(), np.uint8)
    tensors[f"weight.quant_state.bitsandbytes__{kind}"] = "U8", text
    return tensors, rounded(values.reshape(shape), "bf16")


def int8(rng: np.random.Generator, shape: tuple[int, int]) -> Made:
    """bitsandbytes' LLM.int8()."""
    codes = rng.integers(-127, 128, shape).astype(np.int8)
    largest = rng.uniform(0.05, 0.2, shape[0]).astype(np.float32)
    values = codes.astype(np.float32) * largest[:, None] * np.float32(7.874015748698502e-3)
    format_ = np.zeros((), np.uint8)
    tensors = {"weight": ("I8", codes), "SCB": ("F32", largest), "weight_format": ("U8", format_)}
    return tensors, values


def fp8(
    rng: np.random.Generator, shape: tuple[int, int], *, high: int, wide: int, name: str
) -> Made:
    """FP8 with a scale for each block of `high` x `wide`; 0: for the tensor."""
    import ml_dtypes

    codes = rng.standard_normal(shape).astype(ml_dtypes.float8_e4m3fn)
    d, k = shape
    if not high:
        scales = rng.uniform(0.01, 0.1, 1).astype(np.float32)
        high, wide = d, k
    else:
        scales = rng.uniform(0.01, 0.1, (-(-d // high), -(-k // wide))).astype(np.float32)
    table = scales.reshape(-(-d // high), -(-k // wide))
    each = np.array([[table[i // high, j // wide] for j in range(k)] for i in range(d)])
    values = codes.astype(np.float32) * each
    tensors = {"weight": ("F8_E4M3", codes.view(np.uint8)), name: ("F32", scales)}
    tensors["input_scale"] = "F32", np.ones((), np.float32)
    return tensors, rounded(values, "bf16")


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint [rows, n] as int32 [rows, words], by Python's own long numbers."""
    rows = []
    for row in codes:
        number = sum(int(q) << (bits * i) for i, q in enumerate(row))
        words = -(-len(row) * bits // 32)
        rows.append([(number >> (32 * w)) & 0xFFFFFFFF for w in range(words)])
    return np.array(rows, np.uint32).view(np.int32)


def gptq(
    rng: np.random.Generator,
    shape: tuple[int, int],
    *,
    bits: int,
    group: int,
    v2: bool = False,
    ordered: bool = True,
) -> Made:
    """GPTQ; zeros of 1 and above, so that none of v1's wraps."""
    d, k = shape
    group = k if group == -1 else group
    groups = -(-k // group)
    q = rng.integers(0, 1 << bits, (k, d))
    zeros = rng.integers(1, 1 << bits, (groups, d))
    scales = rng.uniform(0.001, 0.01, (groups, d)).astype(np.float16)
    index = np.arange(k) // group
    index = index if ordered else rng.permutation(index)
    values = scales[index].astype(np.float32) * (q - zeros[index]).astype(np.float32)
    tensors = {
        "qweight": ("I32", np.ascontiguousarray(pack(q.T, bits).T)),
        "qzeros": ("I32", pack(zeros if v2 else zeros - 1, bits)),
        "scales": ("F16", scales),
        "g_idx": ("I32", index.astype(np.int32)),
    }
    return tensors, rounded(values.T, "f16")


def awq(rng: np.random.Generator, shape: tuple[int, int], *, group: int) -> Made:
    """AWQ's gemm layout."""
    d, k = shape
    group = k if group == -1 else group
    q, zeros = rng.integers(0, 16, (k, d)), rng.integers(0, 16, (k // group, d))
    scales = rng.uniform(0.001, 0.01, (k // group, d)).astype(np.float16)
    index = np.arange(k) // group
    values = scales[index].astype(np.float32) * (q - zeros[index]).astype(np.float32)
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def packed(codes: np.ndarray) -> np.ndarray:
        return pack(codes.reshape(len(codes), -1, 8)[:, :, order].reshape(len(codes), -1), 4)

    tensors = {
        "qweight": ("I32", packed(q)),
        "qzeros": ("I32", packed(zeros)),
        "scales": ("F16", scales),
    }
    return tensors, rounded(values.T, "f16")


def packed_quantized(
    rng: np.random.Generator, shape: tuple[int, int], *, bits: int, group: int, zero: bool
) -> Made:
    """compressed-tensors' pack-quantized, bfloat16 scales."""
    d, k = shape
    q, groups = rng.integers(0, 1 << bits, shape), k // group
    scales = narrow(rng.uniform(0.001, 0.01, (d, groups)).astype(np.float32), "bf16")
    zeros = rng.integers(0, 1 << bits, (d, groups)) if zero else np.full((d, groups), 1 << bits - 1)
    wide = widen(scales, "bf16")
    index = np.arange(k) // group
    values = wide[:, index] * (q - zeros[:, index]).astype(np.float32)
    tensors = {
        "weight_packed": ("I32", pack(q, bits)),
        "weight_shape": ("I64", np.array(shape)),
        "weight_scale": ("BF16", scales),
    }
    if zero:
        tensors["weight_zero_point"] = "I32", np.ascontiguousarray(pack(zeros.T, bits).T)
    return tensors, rounded(values, "bf16")


def int_quantized(rng: np.random.Generator, shape: tuple[int, int]) -> Made:
    """compressed-tensors' int-quantized, a scale and a zero for each row."""
    q = rng.integers(-128, 128, shape).astype(np.int8)
    zeros = rng.integers(-100, 100, (shape[0], 1)).astype(np.int8)
    scales = narrow(rng.uniform(0.001, 0.01, (shape[0], 1)).astype(np.float32), "bf16")
    values = (q.astype(np.float32) - zeros) * widen(scales, "bf16")
    tensors = {
        "weight": ("I8", q), "weight_scale": ("BF16", scales), "weight_zero_point": ("I8", zeros),
    }  # fmt: skip
    return tensors, rounded(values, "bf16")


def compressed(form: str, **weights: Any) -> dict[str, Any]:
    """A quantization_config of compressed-tensors."""
    group = {"targets": ["Linear"], "weights": {"symmetric": True, **weights}}
    return {
        "quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group},
        "ignore": ["lm_head"], "quantization_status": "compressed",
    }  # fmt: skip


Maker = Callable[[np.random.Generator, tuple[int, int]], Made]


def _with(maker: Callable[..., Made], **settings: Any) -> Maker:
    return lambda rng, shape: maker(rng, shape, **settings)


def _gptq(**settings: Any) -> tuple[dict[str, Any], Maker]:
    config = {
        "quant_method": "gptq", "bits": settings["bits"], "group_size": settings["group"],
        "desc_act": not settings.get("ordered", True), "sym": False,
        "checkpoint_format": "gptq_v2" if settings.get("v2") else "gptq",
    }  # fmt: skip
    return config, _with(gptq, **settings)


# Each way: its quantization_config, and what makes the tensors of one weight.
KINDS: dict[str, tuple[dict[str, Any], Maker]] = {
    "nf4": ({**BNB, "load_in_4bit": True}, _with(nf4, nested=False, kind="nf4")),
    "nf4-double": ({**BNB, "load_in_4bit": True}, _with(nf4, nested=True, kind="nf4")),
    "fp4": ({**BNB, "load_in_4bit": True}, _with(nf4, nested=False, kind="fp4")),
    "llm.int8": ({**BNB, "load_in_8bit": True}, int8),
    "fp8-blocks": (
        {"quant_method": "fp8", "weight_block_size": [64, 64]},
        _with(fp8, high=64, wide=64, name="weight_scale_inv"),
    ),
    "fp8-tensor": (
        {"quant_method": "fp8", "weight_block_size": None, "ignored_layers": ["lm_head"]},
        _with(fp8, high=0, wide=0, name="weight_scale_inv"),
    ),
    "fp8-rows": ({"quant_method": "fbgemm_fp8"}, _with(fp8, high=1, wide=160, name="weight_scale")),
    "awq-32": (
        {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"},
        _with(awq, group=32),
    ),
    "awq-all": (
        {"quant_method": "awq", "bits": 4, "group_size": -1, "version": "GEMM"},
        _with(awq, group=-1),
    ),
    "gptq-2": _gptq(bits=2, group=32),
    "gptq-3": _gptq(bits=3, group=32, v2=True),
    "gptq-3-v1": _gptq(bits=3, group=-1),
    "gptq-4": _gptq(bits=4, group=32, ordered=False),
    "gptq-4-v2": _gptq(bits=4, group=-1, v2=True),
    "gptq-8": _gptq(bits=8, group=32),
    "int4-packed": (
        compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32),
        _with(packed_quantized, bits=4, group=32, zero=False),
    ),
    "int8-packed": (
        compressed("pack-quantized", num_bits=8, type="int", strategy="group", group_size=32),
        _with(packed_quantized, bits=8, group=32, zero=True),
    ),
    "int8-rows": (
        compressed("int-quantized", num_bits=8, type="int", strategy="channel"),
        int_quantized,
    ),
}  # fmt: skip


def write_quantized(
    path: Path, kind: str, config: LlamaConfig = SMALL, *, seed: int = 0
) -> dict[str, np.ndarray]:
    """Writes a model with all projections of its layers quantized; returns what every tensor must
    read as, float32."""
    quantization, maker = KINDS[kind]
    rng = np.random.default_rng(seed)
    path.mkdir(parents=True, exist_ok=True)
    settings = {**config.to_hf(), "torch_dtype": "bfloat16", "quantization_config": quantization}
    (path / "config.json").write_text(json.dumps(settings))
    tensors: dict[str, Tensor] = {}
    expected = {}
    for name, shape in config.tensors().items():
        module = name.removesuffix(".weight")
        if len(shape) == 2 and name.startswith("model.layers."):
            parts, expected[name] = maker(rng, (shape[0], shape[1]))
            tensors |= {f"{module}.{ending}": tensor for ending, tensor in parts.items()}
            continue
        plain = rng.standard_normal(shape).astype(np.float32)
        expected[name] = rounded(plain, "bf16")
        tensors[name] = "BF16", narrow(plain, "bf16")
    write_safetensors(path / "model.safetensors", tensors)
    return expected


NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip
FP4 = [0, 0.0625, 8, 12, 4, 6, 2, 3, 0.0, -0.0625, -8, -12, -4, -6, -2, -3]
FP4 = [x / 12 for x in FP4]
