"""Folders with an adapter, whole and damaged, as cases in JSON: what a reader takes from them, or
that it must refuse them. The statements K.

The bytes of the files are put together here, without a library, so that they can be wrong.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pylora.conformance.vectors.ops import draw
from pylora.conformance.vectors.questions import Question
from pylora.reference import Reference

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PATH = "model.layers.0.self_attn.q_proj"
_HEAD = f"base_model.model.{PATH}"
_A, _B = f"{_HEAD}.lora_A.weight", f"{_HEAD}.lora_B.weight"
_SETTINGS = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
_CODES = {"F32": "f32", "F16": "f16", "BF16": "bf16"}

Tensors = Sequence[tuple[str, str, Any]]  # name, dtype, float64 array


def models() -> dict[str, list[dict[str, Any]]]:
    """One linear layer, and an embedding."""
    q = {"path": PATH, "kind": "linear", "d": 3, "k": 4}
    return {"small": [{"path": "model.embed_tokens", "kind": "embedding", "d": 4, "k": 5}, q]}


def _numbers(name: str, shape: tuple[int, ...], dtype: str) -> Any:
    """Numbers that the dtype holds exactly, float64."""
    wide = draw(f"files/{name}", shape).astype(np.float64)
    ref = Reference()
    return ref._wide(ref._narrow(wide, _CODES[dtype]), _CODES[dtype])


def _encode(dtype: str, values: Any) -> bytes:
    array = Reference()._narrow(np.asarray(values, np.float64), _CODES[dtype])
    data: bytes = array.astype(array.dtype.newbyteorder("<")).tobytes()
    return data


def _file(header: Any, data: bytes) -> bytes:
    """The header's length in 8 bytes, the header, the data; `header` is an object or its text."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def _weights(tensors: Tensors) -> tuple[dict[str, Any], bytes]:
    """Header and data of tensors one behind the other."""
    header: dict[str, Any] = {}
    data = b""
    for name, dtype, values in tensors:
        part = _encode(dtype, values)
        offsets = [len(data), len(data) + len(part)]
        header[name] = {"dtype": dtype, "shape": list(np.shape(values)), "data_offsets": offsets}
        data += part
    return header, data


def _pair(dtype: str = "F32", r: int = 2) -> list[tuple[str, str, Any]]:
    A, B = _numbers(f"A{r}", (r, 4), dtype), _numbers(f"B{r}", (3, r), dtype)
    return [(_A, dtype, A), (_B, dtype, B)]


def questions() -> list[Question]:
    """All cases. Where nothing else is said: rank 2, alpha 4, float32."""
    return [*_accepted(), *_damaged(), *_misfits(), *_settings()]


def _question(
    name: str, spec: str, expect: Mapping[str, Any], files: Mapping[str, Any]
) -> Question:
    given = {"model": "small", "folder": f"files/{name}"}
    return Question(name, tuple(spec.split()), given, expect, files)


def _config(**settings: Any) -> bytes:
    return json.dumps(_SETTINGS | settings, indent=1).encode()


def _accepted() -> list[Question]:
    out = []

    def accepted(
        name: str,
        spec: str,
        tensors: Tensors,
        scale: float = 2.0,
        *,
        config: bytes | None = None,
        weights: bytes | None = None,
        path: str = PATH,
    ) -> None:
        fields = {"A": "A", "B": "B", "A.weight": "A", "B.weight": "B", "B.bias": "bias_B"}
        expect: dict[str, Any] = {"scale": scale}
        for key, _, values in tensors:
            field = fields[key.split("lora_")[1].removeprefix("embedding_")]
            expect[field] = np.asarray(values).tolist()
        files = {CONFIG: config or _config(), WEIGHTS: weights or _file(*_weights(tensors))}
        out.append(_question(name, spec, {"modules": {path: expect}}, files))

    pair = _pair()
    header, data = _weights(pair)
    accepted("float32", "K-1 K-2 K-5", pair)
    for dtype, edges in (
        ("F16", [2.0**-24, -(2.0**-24) * 3, 65504.0, -0.0]),
        ("BF16", [2.0**-133, -(2.0**-126), 255 * 2.0**120, -0.0]),
        ("F32", [2.0**-149, -(2.0**-126), (2 - 2.0**-23) * 2.0**127, -0.0]),
    ):
        tensors = _pair(dtype)
        tensors[0][2][0] = edges  # subnormal, the largest, negative zero
        accepted(f"values-of-{_CODES[dtype]}", "K-8 K-5", tensors)
    accepted("mixed-dtypes", "K-8", [_pair("F16")[0], _pair("BF16")[1]])
    accepted("other-order", "K-2", pair[::-1])
    accepted(
        "header-padded", "K-2", pair, weights=_file(json.dumps(header).encode() + b"   ", data)
    )
    meta = {"__metadata__": {"format": "pt", "note": "größer"}} | header
    accepted("metadata", "K-2", pair, weights=_file(meta, data))
    escaped = json.dumps(header).replace("lora_A", "lora\\u005fA").encode()
    accepted("header-with-escapes", "K-2", pair, weights=_file(escaped, data))
    text = _config().replace(b"q_proj", b"\\u0071_proj")
    accepted("settings-with-escapes", "K-1", pair, config=text)
    accepted("settings-in-one-line", "K-1", pair, config=json.dumps(_SETTINGS).encode())
    accepted("settings-empty-fields", "K-6", pair,
             config=_config(modules_to_save=None, use_dora=False, rank_pattern={}))  # fmt: skip
    accepted("rslora", "S-1", _pair(r=4), 2.0, config=_config(r=4, use_rslora=True))
    accepted("rank-pattern", "S-2", _pair(r=4), 1.0, config=_config(rank_pattern={"q_proj": 4}))
    accepted("alpha-pattern", "S-2", pair, 0.5, config=_config(alpha_pattern={"q_proj": 1}))
    plain = json.dumps({"peft_type": "LORA", "target_modules": ["q_proj"]}).encode()
    accepted("settings-left-out", "K-1", _pair(r=8), 1.0, config=plain)  # PEFT's: r = alpha = 8
    bias = [*pair, (f"{_HEAD}.lora_B.bias", "F32", _numbers("bias", (3,), "F32"))]
    accepted("bias-of-B", "K-2 F-4", bias, config=_config(lora_bias=True))
    at = "base_model.model.model.embed_tokens"
    A, B = _numbers("eA", (2, 5), "F32"), _numbers("eB", (4, 2), "F32")
    embedding = [(f"{at}.lora_embedding_A", "F32", A), (f"{at}.lora_embedding_B", "F32", B)]
    accepted("embedding", "K-2 F-5", embedding, path="model.embed_tokens",
             config=_config(target_modules=["embed_tokens"]))  # fmt: skip
    return out


def _damaged() -> list[Question]:
    """Files that are no safetensors files, or lie about themselves."""
    out = []

    def refused(name: str, why: str, weights: bytes | None, **more: bytes) -> None:
        files = {CONFIG: _config()} | ({} if weights is None else {WEIGHTS: weights})
        files |= {key.replace("__", "."): value for key, value in more.items()}
        out.append(_question(name, "K-4 K-7", {"refused": why}, files))

    header, data = _weights(_pair())
    good = _file(header, data)

    def changed(key: str, **fields: Any) -> dict[str, Any]:
        return header | {key: header[key] | fields}

    refused("no-weights", "there is no adapter_model.safetensors", None)
    refused("pickle", "a pickle runs code", None, adapter_model__bin=b"\x80\x02}q\x00.")
    refused("empty", "0 bytes", b"")
    refused("seven-bytes", "the length is cut off", good[:7])
    refused("header-cut-off", "the header ends early", good[:60])
    refused("data-cut-off", "the last tensor ends early", good[:-4])
    refused("one-byte-less", "the last tensor ends early", good[:-1])
    refused("one-byte-more", "a byte belongs to no tensor", good + b"\0")
    refused(
        "header-too-long", "the header is longer than the file", b"\xff" * 7 + b"\x7f" + good[8:]
    )
    refused("header-empty", "no JSON", _file(b"", data))
    refused("header-no-json", "no JSON", _file(b"{" + json.dumps(header).encode(), data))
    refused("header-a-list", "no object", _file([header], data))
    twice = json.dumps(header)[:-1] + ", " + json.dumps(header)[1:]
    refused("header-key-twice", "each tensor is named twice", _file(twice.encode(), data))
    refused("hole", "bytes 32 to 36 belong to no tensor",
            _file(changed(_B, data_offsets=[36, 60]), data + bytes(4)))  # fmt: skip
    refused("overlap", "the tensors overlap", _file(changed(_B, data_offsets=[8, 32]), data[:32]))
    refused("offsets-reversed", "the end is before the start",
            _file(changed(_B, data_offsets=[56, 32]), data))  # fmt: skip
    refused("offsets-negative", "the start is negative",
            _file(changed(_A, data_offsets=[-32, 0]), data))  # fmt: skip
    refused("offsets-beyond", "the end is beyond the file",
            _file(changed(_B, data_offsets=[32, 2**40]), data))  # fmt: skip
    refused("shape-larger", "the bytes are fewer than the shape says",
            _file(changed(_A, shape=[2, 5]), data))  # fmt: skip
    refused("shape-overflows", "2³² × 2³² × 4 is 0 in 64 bits",
            _file(changed(_A, shape=[2**32, 2**32]), data))  # fmt: skip
    refused("shape-negative", "a dimension is negative", _file(changed(_A, shape=[-2, -4]), data))
    refused("shape-fraction", "a dimension is no integer", _file(changed(_A, shape=[2.5, 4]), data))
    refused("dtype-unknown", "there is no F33", _file(changed(_A, dtype="F33"), data))
    refused("dtype-integers", "an adapter's numbers are no integers",
            _file(changed(_A, dtype="I32"), data))  # fmt: skip
    refused("dtype-missing", "the dtype is not said",
            _file(header | {_A: {"shape": [2, 4], "data_offsets": [0, 32]}}, data))  # fmt: skip
    for name, dtype, value in (
        ("nan", "F32", np.nan),
        ("infinity", "F32", np.inf),
        ("infinity-f16", "F16", -np.inf),
        ("nan-bf16", "BF16", np.nan),
    ):
        tensors = _pair(dtype)
        tensors[1][2][2, 1] = value
        refused(name, "lora_B holds a number that is not finite", _file(*_weights(tensors)))
    return out


def _misfits() -> list[Question]:
    """Files that are whole, and not what settings and model imply."""
    out = []

    def refused(name: str, why: str, tensors: Tensors, **settings: Any) -> None:
        files = {CONFIG: _config(**settings), WEIGHTS: _file(*_weights(tensors))}
        out.append(_question(name, "K-4", {"refused": why}, files))

    (_, _, A), (_, _, B) = _pair()
    a, b = (_A, "F32", A), (_B, "F32", B)
    other = [(key.replace("layers.0", "layers.1"), dtype, v) for key, dtype, v in (a, b)]
    refused("no-B", "lora_B is missing", [a])
    refused("no-tensors", "both are missing", [])
    refused("one-too-many", "a tensor that nothing implies", [a, b, ("extra", "F32", A)])
    refused("other-layer-too", "the model has no layer 1", [a, b, *other])
    refused("other-layer", "the model has no layer 1", other)
    refused("rank-of-settings", "r is 3, the tensors have 2", [a, b], r=3)
    refused("rank-of-tensors", "A has 3 rows, B 2 columns", [_pair(r=3)[0], b])
    refused("transposed", "A is [k, r]", [(_A, "F32", A.T), b])
    refused("transposed-B", "B is [r, d]", [a, (_B, "F32", B.T)])
    refused("flat", "A has one dimension", [(_A, "F32", A.reshape(-1)), b])
    refused("reshaped", "A is [4, 2]: as many numbers, another shape",
            [(_A, "F32", A.reshape(4, 2)), b])  # fmt: skip
    refused("one-dimension-more", "A is [1, 2, 4]", [(_A, "F32", A[None]), b])
    names = [f"{_HEAD}.lora_embedding_{part}" for part in "AB"]
    embedding = [(names[0], "F32", A), (names[1], "F32", B)]
    refused("embedding-names", "the module is linear", embedding)
    refused("bias-missing", "lora_B.bias is missing", [a, b], lora_bias=True)
    refused("bias-not-said", "lora_bias is false",
            [a, b, (f"{_HEAD}.lora_B.bias", "F32", B[:, 0])])  # fmt: skip
    return out


def _settings() -> list[Question]:
    """Settings that cannot be read, or that mean something that nobody knows."""
    out = []
    weights = _file(*_weights(_pair()))

    def refused(name: str, spec: str, why: str, config: bytes | None) -> None:
        files = {WEIGHTS: weights} | ({} if config is None else {CONFIG: config})
        out.append(_question(name, spec, {"refused": why}, files))

    good = _config()
    refused("no-settings", "K-1", "there is no adapter_config.json", None)
    refused("settings-empty", "K-1", "no JSON", b"")
    refused("settings-cut-off", "K-1", "no JSON", good[:-3])
    refused("settings-a-list", "K-1", "no object", b"[" + good + b"]")
    refused("settings-trailing-comma", "K-1", "no JSON", good.rstrip()[:-1].rstrip() + b",}")
    refused("settings-key-twice", "K-6", "r is said twice", good.replace(b"{", b'{"r": 1,', 1))
    refused("settings-nan", "K-6", "alpha is no number", good.replace(b": 4", b": NaN"))
    refused("settings-other-type", "K-6", "not LoRA", good.replace(b"LORA", b"LOHA"))
    refused("settings-unknown", "K-6", "nobody knows what it changes", _config(scale_by_depth=2))
    refused("settings-bias", "K-6", "'some' is no value of bias", _config(bias="some"))
    refused("settings-no-utf8", "K-1", "no UTF-8", good.replace(b"q_proj", b"q\xff\xfeproj"))
    return out
