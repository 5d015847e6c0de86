"""Writes a Hugging Face model directory: config.json, safetensors weights in shards, tokenizer.

Tensors are asked for one at a time and go straight to the file, so that memory does not grow with
the model. Reading is in formats/huggingface.py. Nothing here is atomic: write into `atomic_dir`.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pylora.errors import ConfigError, PyloraError
from pylora.extras import need
from pylora.formats.base import Checkpoint
from pylora.model.config import LlamaConfig

Array = np.ndarray[Any, Any]
Spec = tuple[tuple[int, ...], str]  # shape and dtype, "f32", "f16" or "bf16"

SHARD_BYTES = 5_000_000_000  # of a safetensors file, as in transformers
_BYTES = {"f32": 4, "f16": 2, "bf16": 2}
_TORCH = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
_TOKENIZER_FILES = (
    "tokenizer.json tokenizer_config.json tokenizer.model special_tokens_map.json "
    "added_tokens.json vocab.json vocab.txt merges.txt spiece.model tekken.json "
    "chat_template.jinja chat_template.json generation_config.json"
).split()
_LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")


def check_output(directory: Path, source: Path, marker: str | None = None) -> None:
    """ConfigError unless a model made from `source` may be written to `directory`: one that is new
    or empty, or that holds the file `marker`, which says that it was made in the same way."""
    if directory.resolve() == source.resolve():
        raise ConfigError(
            f"{directory} is the model that is read here, and would be lost; name another directory"
        )
    if not directory.is_dir() or not any(directory.iterdir()):
        return
    if marker is None or not (directory / marker).is_file():
        raise ConfigError(
            f"{directory} holds files already, which a new model would replace; name a new "
            "directory or empty this one"
        )


def write_config(
    directory: Path,
    config: LlamaConfig,
    specs: Mapping[str, Spec],
    settings: Mapping[str, Any] | None = None,
) -> None:
    """config.json; its torch_dtype is the one that most weights have.

    `settings` is the content of the file that the model came with: every key of it is carried over,
    also those that pylora does not know, but for those that say something else now.
    """
    sizes: dict[str, int] = {}
    for shape, dtype in specs.values():
        sizes[dtype] = sizes.get(dtype, 0) + math.prod(shape)
    made = _TORCH[max(sizes, key=lambda d: sizes[d])]
    if not settings:
        _write_json(directory / "config.json", config.to_hf() | {"torch_dtype": made})
        return
    values = dict(settings)
    before = LlamaConfig.from_hf(settings)
    if config != before:
        old, new = before.to_hf(), config.to_hf()
        values |= {key: new[key] for key in new if new[key] != old.get(key)}
    # transformers 5 calls it dtype; an older file that has both is given both.
    for name in [n for n in ("dtype", "torch_dtype") if n in values] or ["torch_dtype"]:
        values[name] = made
    if LlamaConfig.from_hf(values) != config:
        raise ConfigError(f"{directory}: the source's config.json cannot say what was written")
    _write_json(directory / "config.json", values)


def write_weights(
    directory: Path,
    specs: Mapping[str, Spec],
    produce: Callable[[str], Array],
    *,
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Writes `produce(name)` for every name of `specs`; returns the bytes of all tensors.

    bf16 arrays are given as uint16 bits. One file model.safetensors, or shards and an index where
    the tensors need more than `shard_bytes`; a larger single tensor gets a shard of its own.
    """
    sizes = {name: math.prod(shape) * _BYTES[dtype] for name, (shape, dtype) in specs.items()}
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name, size in sizes.items():
        if shards[-1] and size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    files = ["model.safetensors"]
    if len(shards) > 1:
        n = len(shards)
        files = [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
        table = {name: file for file, names in zip(files, shards) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": table}
        _write_json(directory / "model.safetensors.index.json", index)
    for file, names in zip(files, shards):
        _write_shard(directory / file, {name: specs[name] for name in names}, produce)
    return sum(sizes.values())


def _write_shard(file: Path, specs: Mapping[str, Spec], produce: Callable[[str], Array]) -> None:
    """One safetensors file. Wider types come first, so that every tensor is aligned."""
    order = sorted(specs, key=lambda name: -_BYTES[specs[name][1]])
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        shape, dtype = specs[name]
        start, end = end, end + math.prod(shape) * _BYTES[dtype]
        header[name] = {"dtype": dtype.upper(), "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            array = np.ascontiguousarray(produce(name))
            shape, dtype = specs[name]
            if array.shape != shape or array.dtype.itemsize != _BYTES[dtype]:
                raise ValueError(f"{name}: {array.dtype} {array.shape} is not {dtype} {shape}")
            little = array.astype(array.dtype.newbyteorder("<"), copy=False)
            out.write(little.data)  # tofile would hide what the system says


def write_tokenizer(directory: Path, source: Checkpoint, own: Path | None = None) -> str:
    """Copies the tokenizer's files, or writes them from a GGUF's metadata; says what was done.

    `own`: a directory whose files take the place of the source's, file by file. A tokenizer that
    cannot be had does not stop the writing of a model: the sentence says why.
    """
    if own is not None:
        said = write_tokenizer(directory, source)
        if (own / "tokenizer.json").is_file():  # what belongs to another one must not stay
            for name in _TOKENIZER_FILES:
                if name != "generation_config.json":
                    (directory / name).unlink(missing_ok=True)
        (directory / "chat_template.jinja").unlink(missing_ok=True)  # it would hide the adapter's
        return f"{said}; from the adapter: {_copy_tokenizer(directory, own)}"
    if source.path.is_dir():
        return _copy_tokenizer(directory, source.path)
    try:
        tokenizer, library = source.tokenizer(), need("tokenizers")
    except PyloraError as error:
        return f"no tokenizer was written: {error}"
    backend = tokenizer.backend_to_save()
    special = {name: token for name, token in tokenizer.special_tokens.items() if token}
    if tokenizer.add_bos:  # transformers adds what the post-processor says, and nothing else
        bos = special["bos_token"]
        backend.post_processor = library.processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos} $B",
            special_tokens=[(bos, tokenizer.bos_id)],
        )
    (directory / "tokenizer.json").write_text(backend.to_str(pretty=True), encoding="utf-8")
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": source.config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": tokenizer.add_bos,
    }
    if tokenizer.chat_template is not None:
        settings["chat_template"] = tokenizer.chat_template
        (directory / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")
    _write_json(directory / "tokenizer_config.json", settings | special)
    if len(tokenizer.eos_ids) > 1:
        _write_json(directory / "generation_config.json", {"eos_token_id": list(tokenizer.eos_ids)})
    return "written from the GGUF metadata"


def _copy_tokenizer(directory: Path, source: Path) -> str:
    found = [name for name in _TOKENIZER_FILES if (source / name).is_file()]
    templates = "additional_chat_templates"
    if (source / templates).is_dir():
        found += [f"{templates}/{p.name}" for p in sorted((source / templates).glob("*.jinja"))]
    said = f"copied {', '.join(found)}" if found else "the source directory has no tokenizer"
    found += sorted(p.name for mark in _LICENCES for p in source.glob(mark) if p.is_file())
    for name in found:
        (directory / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, directory / name)
    return said


def _write_json(file: Path, values: Mapping[str, Any]) -> None:
    text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False)
    file.write_text(text + "\n", encoding="utf-8")
