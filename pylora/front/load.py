"""`pylora.load`, and the verbs `pylora.generate` and `pylora.train` for who needs one call."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from typing import Any

from pylora.adapters.adapter import Adapter
from pylora.errors import ConfigError, WrongTypeError, describe
from pylora.formats import open_checkpoint
from pylora.front.adapters import read_adapter
from pylora.front.model import Model
from pylora.model.llama import Llama
from pylora.model.with_whole import alone
from pylora.numbers.precision import check_choice
from pylora.ops.protocol import Backend
from pylora.training.train import TrainResult

OneAdapter = str | os.PathLike[str] | Adapter
DEFAULT_NAME = "default"  # of an adapter that is given without one, as in PEFT

# What the settings are called elsewhere: transformers, mlx-lm, PEFT, llama.cpp.
_FOREIGN = {
    "dtype": "precision",
    "torch_dtype": "precision",
    "quantization_config": "precision",
    "load_in_4bit": "precision='int4'",
    "load_in_8bit": "precision='int8'",
    "device": "backend",
    "device_map": "backend",
    "adapter_path": "adapter",
    "adapters": "adapter",
    "lora_path": "adapter",
    "peft_model_id": "adapter",
}


def load(
    path: str | os.PathLike[str],
    adapter: OneAdapter | Mapping[str, OneAdapter] | None = None,
    *,
    precision: str | None = None,
    backend: str | Backend | None = None,
    **others: Any,
) -> Model:
    """A base model, ready to generate, chat, train and merge.

    path: a GGUF file, a Hugging Face directory, what `pylora pack` wrote, or the id of a model that
    the Hugging Face Hub's cache has ("org/name"). adapter: a PEFT directory, the folder of a
    training run, an id, or an Adapter; it gets the name "default" and is in use. {name: any of
    these, ...} adds several, of which none is in use until `model.adapters.use` says so. precision,
    of the base's weights: "fp32", "fp32x3", "bf16", "int8", "int4", "int8a8", "int4a8" (activations
    rounded to 8 bits, too), on a GPU "fp16"; "auto" is what trains fastest here; default: "fp32",
    or what a model is packed in. backend: "c", "numpy", "cuda", "cupy"; default: the one that
    `pylora.use` chose.

    Raises FileFormatError for what is missing or damaged, saying where to get it, UnsupportedError
    for a model that pylora does not run, PlanError for an adapter that does not fit it, ConfigError
    for an unknown precision or a setting of another name (`others`: there are none), BackendError
    for a backend that is not there.
    """
    known = ("adapter", "precision", "backend")
    for name in others:
        close = next(iter(difflib.get_close_matches(name, known, 1)), "")
        meant = _FOREIGN.get(name, close)
        hint = f"did you mean {meant}?" if meant else "there are adapter, precision, backend"
        raise ConfigError(f"load has no setting {name!r}; {hint}")
    check_choice(precision)
    if adapter is None:
        named: dict[str, OneAdapter] = {}
    elif isinstance(adapter, Mapping) and not hasattr(adapter, "plan"):
        named = dict(adapter)
    elif isinstance(adapter, (str, os.PathLike, Adapter)):
        named = {DEFAULT_NAME: adapter}
    else:
        raise WrongTypeError(
            "load(adapter=...) takes the path of a PEFT directory, an Adapter, or "
            f"{{name: path, ...}}, got {describe(adapter)}"
        )
    checkpoint = open_checkpoint(path)
    try:
        loaded = {  # before the weights: what does not fit is said at once
            name: read_adapter(checkpoint, one)
            if isinstance(one, (str, os.PathLike))
            else (one, None)
            for name, one in named.items()
        }
        llama = Llama.from_checkpoint(checkpoint, backend, precision)
        model = Model(checkpoint, alone(llama, [one for one, _ in loaded.values()]))
        for name, (one, tokenizer) in loaded.items():
            model.adapters.add(name, one, tokenizer=tokenizer)
        if named and not isinstance(adapter, Mapping) or isinstance(adapter, Adapter):
            model.adapters.use(DEFAULT_NAME)
    except BaseException:
        checkpoint.close()
        raise
    return model


def generate(model: Model | str | os.PathLike[str], prompt: Any, **settings: Any) -> Any:
    """`load(model).generate(prompt, ...)` in one call; `model` may be a Model that is loaded.

    The settings are `Model.generate`'s, and, where `model` is a path, `load`'s: adapter, precision,
    backend. Each call with a path reads the model again: for several prompts give a list, or load
    it once.
    """
    if isinstance(model, (str, os.PathLike)):
        with load(model, **_of_load(settings)) as loaded:
            if settings.get("stream"):
                raise WrongTypeError(
                    "stream=True needs a model that stays open: model = pylora.load(path), then "
                    "model.generate(prompt, stream=True)"
                )
            return loaded.generate(prompt, **settings)
    return _model_of(model, "pylora.generate").generate(prompt, **settings)


def train(
    model: Model | str | os.PathLike[str],
    data: Any,
    out: str | os.PathLike[str] | None = None,
    **settings: Any,
) -> TrainResult:
    """`load(model).train(data, out, ...)` in one call; `model` may be a Model that is loaded.

    The settings are `Model.train`'s, and, where `model` is a path, `load`'s precision and backend.
    """
    if isinstance(model, (str, os.PathLike)):
        opening = {k: settings.pop(k) for k in ("precision", "backend") if k in settings}
        with load(model, **opening) as loaded:
            return loaded.train(data, out, **settings)
    return _model_of(model, "pylora.train").train(data, out, **settings)


def _of_load(settings: dict[str, Any]) -> dict[str, Any]:
    """Takes the settings of `load` out of `settings`."""
    names = ("adapter", "precision", "backend")
    return {name: settings.pop(name) for name in names if name in settings}


def _model_of(value: Any, where: str) -> Model:
    """`value`, if it is a Model; else the sentence that says how to get one."""
    if isinstance(value, Model):
        return value
    advice = "model = pylora.load(path)"
    if isinstance(value, Llama):
        advice = (
            "a Llama knows token ids alone: load the model with pylora.load(path), or use the "
            "parts, pylora.generation.generate.generate and pylora.training.train.train"
        )
    raise WrongTypeError(f"{where} takes a pylora.Model, got {describe(value)}; {advice}")
