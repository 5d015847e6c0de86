"""Quantized Hugging Face checkpoints: what config.json's `quantization_config` says, carried out.

`scheme` reads it, or refuses its kind by name; a `Scheme` then puts the tensors of each quantized
weight together, so that a checkpoint finds one tensor where the file has several. Each way of
quantizing has a module of its own, which says what its tensors are and whose bits it gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pylora.errors import FileFormatError, UnsupportedError
from pylora.formats.quantized import awq, bitsandbytes, compressed, fp8, gptq
from pylora.formats.quantized.parts import Parts, Quantized, Spec, whole_number
from pylora.formats.safetensors import SafeTensors

__all__ = ["READ", "Quantized", "Scheme", "Source", "plain_settings", "scheme"]

Source = SafeTensors | Quantized
READ = ("bitsandbytes", "fp8", "fbgemm_fp8", "awq", "gptq", "compressed-tensors")
_KEYS = ("quantization_config", "compression_config")
_DTYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
# What the lists of modules that stay as they were are called.
_LISTS = ("modules_to_not_convert", "llm_int8_skip_modules", "ignored_layers", "ignore")
# Scales of activations and of the cache: of engines that round those.
_OF_ENGINES = (".k_scale", ".v_scale", ".q_scale", ".k_zero_point", ".v_zero_point")


def plain_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a config.json without what it says of quantization."""
    out = {key: value for key, value in settings.items() if key not in _KEYS}
    if isinstance(out.get("text_config"), Mapping):
        out["text_config"] = plain_settings(out["text_config"])
    return out


def scheme(where: str, settings: Mapping[str, Any]) -> Scheme | None:
    """How the weights of a config.json are quantized; None where they are not.

    `where` names the file in errors: UnsupportedError for a kind that is not read.
    """
    text = settings.get("text_config")
    config = None
    for at in (settings, text if isinstance(text, Mapping) else {}):
        for key in _KEYS:
            config = at[key] if config is None and key in at else config
    if config is None:
        return None
    if not isinstance(config, Mapping):
        raise UnsupportedError(f"{where}: quantization_config is {config!r:.60}, not an object")
    method = config.get("quant_method")
    if config.get("load_in_4bit") or config.get("load_in_8bit"):
        method = "bitsandbytes"
    if method is None:
        raise UnsupportedError(
            f"{where}: quantization_config names no quant_method, so nothing says what the weights "
            f"are; read are {', '.join(READ)}"
        )
    if not isinstance(method, str) or method not in READ:
        raise UnsupportedError(
            f"{where}: quantization_config's quant_method is {method!r:.60}, which is not read; "
            f"read are {', '.join(READ)}. Take the model's unquantized files, or a GGUF of it"
        )
    dtype = next((at.get(k) for at in (settings, text or {}) for k in ("dtype", "torch_dtype")
                  if isinstance(at, Mapping) and at.get(k) in _DTYPES), "bfloat16")  # fmt: skip
    return Scheme(where, method, config, _DTYPES[str(dtype)])


@dataclass(frozen=True)
class _Way:
    """What a scheme reads a weight by."""

    endings: tuple[str, ...]  # of its tensors, the longer ones first, beside "weight"
    read: Callable[[Parts], Spec]


class Scheme:
    """A `quantization_config` that is read. method: its quant_method; label: in words."""

    def __init__(self, where: str, method: str, config: Mapping[str, Any], dtype: str) -> None:
        """dtype: "f32", "f16" or "bf16", of the model's plain tensors."""
        self.where, self.method, self.dtype = where, method, dtype
        self._way = _WAYS[method](where, config, dtype)
        self.kept: list[str] = []  # modules that are not quantized, but for patterns
        for key in _LISTS:
            names = config.get(key)
            if isinstance(names, str):
                names = [names]
            if not isinstance(names, list | None) or not all(
                isinstance(name, str) for name in names or ()
            ):
                raise UnsupportedError(
                    f"{where}: quantization_config's {key} is {names!r:.60}, not a list of names"
                )
            self.kept += [n for n in names or () if n and not n.startswith("re:")]

    def apart(self, name: str) -> tuple[str, str]:
        """A tensor's module and ending; an empty ending for one that belongs to no weight."""
        for ending in self._way.endings:
            if name.endswith(f".{ending}"):
                return name.removesuffix(f".{ending}"), ending
        return name, ""

    def plain(self, names: Iterable[str]) -> list[str]:
        """The names that the tensors would have, were the weights not quantized."""
        out: dict[str, None] = {}
        for name in names:
            if not name.endswith(_OF_ENGINES):
                module, ending = self.apart(name)
                out[self._stacked(module, name) or (f"{module}.weight" if ending else name)] = None
        return list(out)

    @staticmethod
    def _stacked(module: str, name: str) -> str:
        """The name of stacked experts that a tensor has the scales of; "" for any other."""
        stem = name.removesuffix("_scale_inv")
        return stem if stem != name and stem.rpartition(".")[0].endswith(".experts") else ""

    def weights(self, stored: Mapping[str, SafeTensors]) -> dict[str, Source]:
        """By the names that they would have in plain files: each tensor's file, or what puts a
        quantized weight together.

        FileFormatError where nothing is quantized, or what is said not to be.
        """
        out: dict[str, Source] = {}
        found: dict[str, Parts] = {}
        for name, file in stored.items():
            module, ending = self.apart(name)
            weight = self._stacked(module, name)
            if weight:
                ending = "weight_scale_inv"
            elif ending:
                weight = f"{module}.weight"
            if not weight:
                if not name.endswith(_OF_ENGINES):
                    out[name] = file
                continue
            found.setdefault(weight, Parts(module, weight)).add(ending, file, name)
        for weight, parts in found.items():
            if weight in out:
                del out[weight]
                parts.add("weight", stored[weight], weight)
            self._check_kept(parts)
            out[weight] = Quantized(parts, self._way.read)
        if not found:
            raise FileFormatError(
                f"{self.where}: quantization_config says {self.method}, but no weight is stored "
                "so; if the weights are plain, take the key out of config.json"
            )
        return out

    def _check_kept(self, parts: Parts) -> None:
        name = parts.module
        for key in self.kept:
            if name == key or name.startswith(f"{key}.") or name.endswith(f".{key}"):
                raise FileFormatError(
                    f"{parts.path}: the weight {parts.weight[:200]!r} is stored quantized, and "
                    f"{self.where} says that {key[:100]!r} is not"
                )


def _bitsandbytes(where: str, config: Mapping[str, Any], dtype: str) -> _Way:
    bitsandbytes.check_config(where, config)
    return _Way(bitsandbytes.ENDINGS, bitsandbytes.read)


def _fp8(where: str, config: Mapping[str, Any], dtype: str) -> _Way:
    said = config.get("weight_block_size", [128, 128] if config["quant_method"] == "fp8" else None)
    block = None
    if said is not None:
        if not isinstance(said, list) or len(said) != 2:
            raise UnsupportedError(f"{where}: quantization_config's weight_block_size is {said!r}")
        high, wide = (whole_number(n, "weight_block_size", where) for n in said)
        block = (high, wide)
    if config.get("expert_dtype", "fp8") != "fp8":
        raise UnsupportedError(
            f"{where}: quantization_config's expert_dtype is {config['expert_dtype']!r:.40}, "
            "which is not read"
        )
    return _Way(fp8.ENDINGS, lambda parts: fp8.read(parts, dtype, block))


def _group(where: str, config: Mapping[str, Any]) -> int:
    group = config.get("group_size", config.get("q_group_size", 128))
    return -1 if group in (-1, None) else whole_number(group, "group_size", where)


def _awq(where: str, config: Mapping[str, Any], dtype: str) -> _Way:
    layout = str(config.get("version", config.get("format", "gemm"))).lower()
    bits = config.get("bits", config.get("w_bit", 4))
    if layout != "gemm" or bits != 4:
        raise UnsupportedError(
            f"{where}: AWQ of {bits!r:.20} bits in the layout {layout!r:.40} is not read; only 4 "
            "bits in 'gemm' are"
        )
    group = _group(where, config)
    return _Way(awq.ENDINGS, lambda parts: awq.read(parts, group))


def _gptq(where: str, config: Mapping[str, Any], dtype: str) -> _Way:
    form = str(config.get("checkpoint_format") or config.get("format") or "gptq").lower()
    if form not in ("gptq", "gptq_v2"):
        raise UnsupportedError(
            f"{where}: GPTQ in the format {form!r:.40} is not read; only 'gptq' and 'gptq_v2' are"
        )
    bits = config.get("bits")
    if type(bits) is not int or bits not in gptq.BITS:
        raise UnsupportedError(
            f"{where}: GPTQ of {bits!r:.20} bits is not read; only "
            f"{', '.join(map(str, gptq.BITS))} are"
        )
    if config.get("pack_dtype", "int32") not in ("int32", "torch.int32", None):
        raise UnsupportedError(
            f"{where}: quantization_config's pack_dtype is {config['pack_dtype']!r:.40}; only "
            "int32 is read"
        )
    group, rules = _group(where, config), bool(config.get("dynamic"))
    ordered = not config.get("desc_act")
    return _Way(
        gptq.ENDINGS,
        lambda parts: gptq.read(parts, bits, group, form == "gptq", ordered, rules),
    )


def _compressed(where: str, config: Mapping[str, Any], dtype: str) -> _Way:
    groups = compressed.check_config(where, config)
    return _Way(compressed.ENDINGS, lambda parts: compressed.read(parts, groups))


_WAYS: Mapping[str, Callable[[str, Mapping[str, Any], str], _Way]] = {
    "bitsandbytes": _bitsandbytes,
    "fp8": _fp8,
    "fbgemm_fp8": _fp8,
    "awq": _awq,
    "gptq": _gptq,
    "compressed-tensors": _compressed,
}
