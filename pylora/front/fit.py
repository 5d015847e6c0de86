"""What `Model.train` does: sorts the settings, reads the data, trains, and puts the adapter to use.

The loop itself is pylora/training/train.py.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pylora.adapters.loraconfig import LoraConfig
from pylora.errors import ConfigError, expect, wrong_type
from pylora.formats.base import Checkpoint
from pylora.front.adapters import Adapters
from pylora.model.llama import Llama
from pylora.training.beginnings import begin, of_config
from pylora.training.config import TrainConfig
from pylora.training.examples import Example, load_examples
from pylora.training.train import TrainResult
from pylora.training.train import train as run

if TYPE_CHECKING:
    from pylora.text.tokenizer import Tokenizer

_LORA = {f.name for f in dataclasses.fields(LoraConfig)} | {"lora"}
_RUN = {f.name for f in dataclasses.fields(TrainConfig)}
_REST = {"eval_data", "max_length", "truncate", "fields", "template_args", "on_step", "resume"}
_REST |= {"overwrite"}
# What the settings are called elsewhere: transformers' Trainer, TRL, mlx-lm, the command line.
_FOREIGN = {
    "lr": "learning_rate",
    "rank": "r",
    "alpha": "lora_alpha",
    "targets": "target_modules",
    "dropout": "lora_dropout",
    "rslora": "use_rslora",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "max_steps": "steps",
    "iters": "steps",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "accumulation",
    "gradient_checkpointing": "recompute",
    "lr_scheduler_type": "schedule",
    "warmup": "warmup_steps",
    "loraplus_lr_ratio": "lora_plus_ratio",
    "eval_dataset": "eval_data",
    "eval": "eval_data",
    "eval_steps": "eval_every",
    "save_steps": "save_every",
    "max_seq_length": "max_length",
    "output_dir": "out",
    "peft_config": "lora",
}


def lora_config(settings: Mapping[str, Any], base: str | None = None) -> LoraConfig:
    """The adapter's settings: `lora`, a LoraConfig, as it is; or those of `LoraConfig.fresh`."""
    others = dict(settings)
    if (whole := others.pop("lora", None)) is None:
        if base is not None:
            others.setdefault("base_model_name_or_path", base)
        return LoraConfig.fresh(**others)
    if others:
        raise ConfigError(f"lora has the adapter's settings already; leave out {', '.join(others)}")
    expect("LoRA settings", whole, "lora=")
    config: LoraConfig = whole
    return config


@dataclasses.dataclass(frozen=True)
class Parts:
    """The parts of a Model that training needs."""

    llama: Llama
    checkpoint: Checkpoint
    tokenizer: Tokenizer
    adapters: Adapters


def train(
    model: Parts,
    data: Any,
    out: str | os.PathLike[str] | None,
    name: str,
    settings: Mapping[str, Any],
) -> TrainResult:
    """See `Model.train`."""
    lora, how, rest = _sorted(settings)
    _no_idle_setting(settings)
    config = TrainConfig(**how)
    expect("name", name, "train(adapter=...)")
    if out is not None:
        expect("path", out, "train(data, out)")
    there = name in model.adapters
    if there and lora:
        raise ConfigError(
            f"there is an adapter {name!r} already, which is trained further as it is: leave out "
            f"{', '.join(lora)}, or give another name (adapter=...)"
        )
    limit = {
        "fields": rest.pop("fields", None),
        "max_length": rest.pop("max_length", None),
        "too_long": "truncate" if rest.pop("truncate", False) else "error",
    }
    arguments = rest.pop("template_args", None)
    if not isinstance(arguments, (Mapping, type(None))):
        wrong_type("train(template_args=...)", "a dict of the template's variables", arguments)
    examples = _examples(model, data, limit, arguments)
    evals = rest.pop("eval_data", None)
    rest["eval_examples"] = None if evals is None else _examples(model, evals, limit, arguments)
    if there:
        adapter = model.adapters[name]
    else:
        made = lora_config(lora, model.checkpoint.path.name)
        made, init = of_config(made, "kaiming")
        adapter = begin(init, made, model.llama, model.checkpoint.load, examples, config.seed)
    llama = model.llama
    try:
        result = run(llama, adapter, examples, config, out, **rest)
    finally:  # an interrupted run's adapter is as far as it came
        llama.detach()
        if there:
            model.adapters.refresh(name)
    if not there:
        model.adapters.add(name, adapter)
    model.adapters.use(name)
    return result


def _sorted(
    settings: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The settings of the adapter, of the run, and the rest. ConfigError for unknown ones."""
    known = _LORA | _RUN | _REST
    for name in settings:
        if name not in known:
            meant = _FOREIGN.get(name) or next(iter(difflib.get_close_matches(name, known, 1)), "")
            hint = (
                f"; did you mean {meant}?" if meant else f"; there are {', '.join(sorted(known))}"
            )
            raise ConfigError(f"train has no setting {name!r}{hint}")
    parts = ({k: v for k, v in settings.items() if k in names} for names in (_LORA, _RUN, _REST))
    lora, how, rest = parts
    return lora, how, rest


def _no_idle_setting(settings: Mapping[str, Any]) -> None:
    """ConfigError for a setting that would change nothing beside the others."""
    given = {name for name, value in settings.items() if value not in (None, False)}
    if {"epochs", "steps"} <= given:
        raise ConfigError("steps and epochs each say how long to train; give one of them")
    for name, needed, why in (
        ("truncate", "max_length", "the number of tokens to cut to"),
        ("eval_every", "eval_data", "the records to evaluate on"),
    ):
        if name in given and settings.get(needed) is None:
            raise ConfigError(f"{name} needs {needed}, {why}")


def _examples(model: Parts, data: Any, limit: Mapping[str, Any], arguments: Any) -> Any:
    """Examples of a file, of records, or as they are."""
    if hasattr(data, "__getitem__") and not isinstance(data, (str, bytes, Mapping)):
        if len(data) and isinstance(data[0], Example):
            return data
    tokenizer, kept = model.tokenizer, model.tokenizer.arguments
    try:
        tokenizer.arguments = kept | dict(arguments or {})
        examples = load_examples(data, tokenizer, **limit)
    finally:
        tokenizer.arguments = kept
    for note in examples.notes:  # what was converted or split
        warnings.warn(note, stacklevel=4)
    return examples
