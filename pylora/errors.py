"""The one exception hierarchy. Each message says what was wrong, where, and what to do.

And one table, `THINGS`, for what people mix up: a path in place of a model, text in place of ids.
`expect` looks a value up in it, so that each function refuses with the same advice.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn


class PyloraError(Exception):
    """Base of every error that pylora raises on purpose."""


class ShapeError(PyloraError, ValueError):
    """Array shapes do not fit each other or the model."""


class DtypeError(PyloraError, TypeError):
    """An array has a dtype that the operation or backend does not take."""


class WrongTypeError(PyloraError, TypeError):
    """Something of another kind was passed: a path where a model belongs, text where ids belong.

    The message says what was got, what is taken there, and what to pass.
    """


class RangeError(PyloraError, IndexError):
    """A token id, label, position or row number lies outside of what it indexes."""


class FileFormatError(PyloraError, ValueError):
    """A file is truncated, malformed or hostile. The message names the file and the tensor."""


class ConfigError(PyloraError, ValueError):
    """A configuration value is missing, out of range or contradicts another."""


class PlanError(PyloraError, ValueError):
    """An adapter does not fit the model: unknown target, missing, extra or misshapen tensor."""


class UnsupportedError(PyloraError, NotImplementedError):
    """A feature that changes the result and that pylora does not implement; never ignored."""


class DataError(PyloraError, ValueError):
    """A training or evaluation record cannot be used. The message names the file and line."""


class WrongDataError(WrongTypeError, DataError):
    """Text where ids belong, ids where text belongs: a wrong type, of the data."""


class TrainingError(PyloraError, ArithmeticError):
    """Training left the finite numbers. The message names the step and the last good checkpoint."""


class BackendError(PyloraError, RuntimeError):
    """A backend is unknown, unavailable, or reported a failure."""


class MissingExtraError(PyloraError, ImportError):
    """An optional package is needed. The message says which extra to install."""


class FetchError(PyloraError, RuntimeError):
    """A download failed or did not hash to what is known."""


def describe(value: Any) -> str:
    """What a value is, in a few words of a sentence: "the text 'abc'", "a list of 3"."""
    if value is None or isinstance(value, bool):
        return repr(value)
    if isinstance(value, str):
        return f"the text {value[:60]!r}{'...' if len(value) > 60 else ''}"
    if isinstance(value, (int, float)):
        return f"the number {value!r:.40}"
    if isinstance(value, type):
        return f"the class {value.__name__} itself"
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    name = type(value).__name__
    if hasattr(value, "__fspath__"):
        return f"the path {str(value)[:200]!r}"
    if isinstance(value, (list, tuple, set, frozenset, dict)):
        return f"a {name} of {len(value)}"
    if _is_array(value):
        return f"an array of {value.dtype} {list(value.shape)}"
    return f"{'an' if name[:1].lower() in 'aeio' else 'a'} {name}"


def wrong_type(
    where: str,
    takes: str,
    got: Any,
    advice: str = "",
    kind: type[WrongTypeError] = WrongTypeError,
) -> NoReturn:
    """Raises the WrongTypeError "`where` takes `takes`, got `got`; `advice`"."""
    raise kind(f"{where} takes {takes}, got {describe(got)}{advice and '; '}{advice}")


def _is_array(value: Any) -> bool:
    return hasattr(value, "dtype") and isinstance(getattr(value, "shape", None), tuple)


def kind_of(value: Any) -> str:
    """How the table below calls what a value is: "path", "text", "ids", a class's name, ..."""
    if isinstance(value, (str, bytes)):
        return "text"
    if isinstance(value, os.PathLike):
        return "path"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return "number"
    if isinstance(value, (list, tuple)):
        first = value[0] if value else None
        if hasattr(first, "__index__"):
            return "ids"
        return {"text": "texts", "ids": "lists of ids"}.get(kind_of(first) if value else "", "list")
    for base in type(value).__mro__:  # every checkpoint is a Checkpoint
        if base.__name__ in _NAMES:
            return base.__name__
    return "array" if _is_array(value) else type(value).__name__


_NAMES = frozenset(
    "Model Llama Adapter LoraConfig Plan Checkpoint Tokenizer AdapterPool TrainConfig LlamaConfig "
    "TrainResult LoRA".split()
)
_DATA = ("ids", "prompts", "text", "messages")
_OPEN = "open it first: model = pylora.load(path), or of the parts {}"
_LLAMA = _OPEN.format("Llama.from_checkpoint(open_checkpoint(path))")
_LOAD = "load it first: Adapter.load(path, model.config.modules())"


@dataclass(frozen=True)
class Thing:
    """Something that a function takes: its name in a sentence, how it is known, and what to say of
    other things (by `kind_of`) that are given in its place."""

    takes: str
    fits: Callable[[Any], bool]
    advice: Mapping[str, str]


def _has(*names: str) -> Callable[[Any], bool]:
    """Known by what it can do, so that a stand-in is as good; a class is not its instance."""
    return lambda value: not isinstance(value, type) and all(hasattr(value, name) for name in names)


def _mapping_to(*names: str) -> Callable[[Any], bool]:
    def fits(value: Any) -> bool:
        if not isinstance(value, Mapping):
            return False
        return all(all(hasattr(v, name) for name in names) for v in value.values())

    return fits


def _ids(value: Any) -> bool:
    """Token ids, or what the function's own checks say more about."""
    return kind_of(value) in ("ids", "list", "array", "range", "lists of ids") or (
        hasattr(value, "__len__") and not isinstance(value, (str, bytes, Mapping, os.PathLike))
    )


THINGS: dict[str, Thing] = {
    "model": Thing(
        "a model (pylora.Llama)",
        _has("modules", "config", "ops"),
        {
            "text": _LLAMA,
            "path": _LLAMA,
            "Checkpoint": "build it first: Llama.from_checkpoint(checkpoint)",
            "LlamaConfig": "a configuration has no weights: Llama.random(config), or "
            "Llama.from_checkpoint(open_checkpoint(path))",
            "Model": "pass its part: model.llama",
            "Adapter": "an adapter needs its base: model.attach(adapter)",
        },
    ),
    "adapter": Thing(
        "an adapter (pylora.Adapter, or a mapping from module path to LoRA)",
        _mapping_to("A", "B", "scale"),
        {
            "text": _LOAD,
            "path": _LOAD,
            "LoraConfig": "make one of it: Adapter.init(resolve(config, model.config.modules()), "
            "config)",
            "Plan": "make one of it: Adapter.init(plan, config)",
            "TrainResult": "pass its part: result.adapter",
            "LoRA": "one module's A and B go under its path: {path: lora}",
            "NoneType": "to take an adapter away: model.detach()",
        },
    ),
    "whole adapter": Thing(
        "a pylora.Adapter (with its config and plan)",
        _has("plan", "config", "digest"),
        {
            "text": _LOAD,
            "path": _LOAD,
            "TrainResult": "pass its part: result.adapter",
            "dict": "make one of the mapping: Adapter(config, plan, modules)",
        },
    ),
    "plan": Thing(
        "a plan (pylora.Plan)",
        _has("entries", "bias_only"),
        {
            "LoraConfig": "resolve it first: resolve(config, model.config.modules())",
            "Adapter": "pass its part: adapter.plan",
            "Llama": "make one: resolve(config, model.config.modules())",
        },
    ),
    "LoRA settings": Thing(
        "the settings of an adapter (pylora.LoraConfig)",
        _has("target_modules", "lora_alpha"),
        {
            "dict": "make them of it: LoraConfig.from_dict(values)",
            "text": "read the file: pylora.adapters.peft.read_config(directory)",
            "path": "read the file: pylora.adapters.peft.read_config(directory)",
            "TrainConfig": "that says how to train; LoraConfig says what",
            "Plan": "a plan is made of them; pass the LoraConfig that it was made of",
            "Adapter": "pass its part: adapter.config",
            "LlamaConfig": "that is the model's configuration; LoraConfig is the adapter's",
        },
    ),
    "training settings": Thing(
        "the settings of a run (TrainConfig)",
        _has("learning_rate", "batch_size", "identity"),
        {
            "dict": "make them of it: TrainConfig(**values)",
            "LoraConfig": "that says what to train; TrainConfig says how",
            "number": "write TrainConfig(steps=...)",
        },
    ),
    "modules": Thing(
        "the modules of a model (path -> ModuleSpec)",
        _mapping_to("kind", "d", "k"),
        {
            "LlamaConfig": "call it: config.modules()",
            "Llama": "pass model.config.modules()",
            "Model": "pass model.config.modules()",
            "Checkpoint": "pass checkpoint.config.modules()",
            "text": "open the model first: open_checkpoint(path).config.modules()",
            "path": "open the model first: open_checkpoint(path).config.modules()",
            "dict": "modules as Llama.modules has them are layers; pass model.config.modules()",
        },
    ),
    "LoRA": Thing(
        "the A and B of one module (pylora.LoRA)",
        _has("A", "B", "scale"),
        {
            "Adapter": "an adapter is of many modules: model.attach(adapter), or adapter[path]",
            "dict": "a mapping is of many modules: model.attach(adapter), or adapter[path]",
            "text": _LOAD,
            "path": _LOAD,
        },
    ),
    "array": Thing(
        "an array",
        _is_array,
        {
            "list": "make one: numpy.asarray(values, numpy.float32)",
            "ids": "make one: numpy.asarray(values, numpy.float32)",
            "texts": "make one: numpy.asarray(numbers, numpy.float32)",
            "text": "text becomes ids, ids are embedded by the whole model: model.forward(ids)",
        },
    ),
    "Seqs": Thing(
        "where sequences begin (pylora.Seqs)",
        _has("q_start", "k_start", "k_len"),
        {"ids": "make it of lengths: Seqs.of(lengths)", "number": "make it: Seqs.of([length])"},
    ),
    "KV cache": Thing(
        "a KV cache",
        _has("place", "capacity", "length"),
        {"NoneType": "make one: kv = model.kv_cache(slots, capacity)"},
    ),
    "forward's cache": Thing(
        "the cache that forward returned",
        _has("trunk", "head"),
        {
            "array": "forward gives both: logits, cache = model.forward(ids)",
            "list": "forward gives both: logits, cache = model.forward(ids)",
        },
    ),
    "backend": Thing(
        "the name of a backend, or a backend",
        lambda value: isinstance(value, str) or _has("pack", "name")(value),
        {"path": "its name is a text such as 'c' or 'numpy'"},
    ),
    "messages": Thing(
        "a list of messages {'role': ..., 'content': ...}",
        lambda value: not isinstance(value, (str, bytes, Mapping)) and hasattr(value, "__len__"),
        {
            "text": "write [{'role': 'user', 'content': text}]",
            "dict": "one message goes into a list too: [message]",
        },
    ),
    "model configuration": Thing(
        "the configuration of a model (pylora.LlamaConfig)",
        _has("num_hidden_layers", "hidden_size", "modules"),
        {
            "dict": "make it of a config.json's fields: LlamaConfig.from_hf(values)",
            "Llama": "pass model.config",
            "Checkpoint": "pass checkpoint.config",
            "LoraConfig": "that is the adapter's; LlamaConfig is the model's",
            "text": "open the model: open_checkpoint(path).config",
            "path": "open the model: open_checkpoint(path).config",
        },
    ),
    "checkpoint": Thing(
        "an open checkpoint",
        _has("config", "load", "names"),
        {
            "text": "open it first: open_checkpoint(path)",
            "path": "open it first: open_checkpoint(path)",
            "Llama": "a model has only packed weights; open_checkpoint(path) reads its file",
        },
    ),
    "pool": Thing(
        "a pool of adapters (pylora.AdapterPool)",
        _has("packed", "active", "model"),
        {
            "dict": "make one: pool = AdapterPool(model), then pool.add(name, adapter)",
            "Adapter": "make one: pool = AdapterPool(model), then pool.add(name, adapter)",
            "list": "make one: pool = AdapterPool(model), then pool.add(name, adapter)",
        },
    ),
    "tokenizer": Thing(
        "a tokenizer",
        _has("eos_ids"),  # text can be encoded too, and bytes decoded
        {
            "text": "open the model: open_checkpoint(path).tokenizer()",
            "path": "open the model: open_checkpoint(path).tokenizer()",
            "Checkpoint": "pass checkpoint.tokenizer()",
            "Llama": "a Llama knows token ids alone; open_checkpoint(path).tokenizer() has it",
            "Model": "pass its part: model.tokenizer",
        },
    ),
    "examples": Thing(
        "examples (of load_examples, or a list of Example)",
        lambda value: (
            (
                isinstance(value, (list, tuple))
                or (hasattr(value, "__getitem__") and hasattr(value, "__len__"))
            )
            and not isinstance(value, (str, bytes, Mapping))
            and (not len(value) or hasattr(value[0], "labels"))
        ),
        {
            "text": "read the file first: load_examples(path, tokenizer)",
            "path": "read the file first: load_examples(path, tokenizer)",
            "texts": "tokenize them first: load_examples(path, tokenizer) reads JSONL",
            "list": "make Examples of them: load_examples(path, tokenizer), or Example.of(tokens, "
            "counted)",
            "ids": "make Examples of them: Example.of(tokens, counted)",
            "lists of ids": "make Examples of them: Example.of(tokens, counted)",
        },
    ),
    "ids": Thing(
        "token ids (whole numbers)",
        _ids,
        {
            "text": "encode it first: tokenizer.encode(text)",
            "path": "read the file and encode its text: tokenizer.encode(text)",
            "number": "give a list of ids, even of one",
        },
    ),
    "prompts": Thing(
        "a list of prompts, each a list of token ids",
        lambda value: _ids(value) and kind_of(value) not in ("texts", "ids"),
        {
            "text": "encode it first: [tokenizer.encode(text)]; or ask a pylora.Model: "
            "model.generate(text)",
            "texts": "encode them first: [tokenizer.encode(t) for t in texts]; or ask a "
            "pylora.Model: model.generate(texts)",
            "ids": "one prompt goes into a list too: [ids]",
        },
    ),
    "text": Thing(
        "text (str)",
        lambda value: isinstance(value, str),
        {
            "ids": "decode them first: tokenizer.decode(ids)",
            "array": "decode them first: tokenizer.decode(ids)",
            "text": "decode the bytes first: data.decode()",
            "path": "read the file first: Path(path).read_text()",
            "texts": "one text at a time; for many: [tokenizer.encode(t) for t in texts]",
        },
    ),
    "path": Thing(
        "a path",
        lambda value: isinstance(value, (str, os.PathLike)),
        {
            "Checkpoint": "pass the path that it was opened from",
            "Adapter": "save it first: adapter.save(directory), and pass the directory",
            "Model": "pass the path that it was loaded from",
            "Llama": "pass the path that it was loaded from",
            "text": "a path is str or Path, not bytes",
        },
    ),
    "name": Thing(
        "the name of an adapter (text)",
        lambda value: isinstance(value, str),
        {
            "Adapter": "the name comes first: add(name, adapter)",
            "list": "one name at a time",
            "texts": "one name at a time",
            "path": "the name comes first: add(name, adapter)",
        },
    ),
}


def expect(thing: str, value: Any, where: str) -> None:
    """Raises WrongTypeError unless `value` is what THINGS calls `thing`; `where` takes it."""
    known = THINGS[thing]
    if not known.fits(value):
        kind = WrongDataError if thing in _DATA else WrongTypeError
        wrong_type(where, known.takes, value, known.advice.get(kind_of(value), ""), kind)
