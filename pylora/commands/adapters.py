"""What `train` and `plan` share: the settings of an adapter from options or a file, and a word
about an adapter that is larger than what it adapts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pylora.commands.guard import warn

if TYPE_CHECKING:
    from pylora.adapters.loraconfig import LoraConfig
    from pylora.adapters.plan import Plan

_CONFIG = "adapter_config.json"
_OTHERS = ("a tokenizer", "settings of a", "an index", "the configuration", "records", "a JSON")


def lora_config(
    file: Path | None,
    rank: int,
    alpha: float | None,
    targets: str,
    rslora: bool,
    dropout: float,
    base: Path,
    dora: bool = False,
    modules_to_save: str | None = None,
    trainable_token_indices: str | None = None,
) -> LoraConfig:
    """The settings in an adapter_config.json (or in the folder that has one), or the options'."""
    from pylora.adapters.locate import find_adapter
    from pylora.adapters.loraconfig import LoraConfig
    from pylora.errors import ConfigError, FileFormatError
    from pylora.files.bounded import read_text
    from pylora.files.kinds import what_is

    if file is not None:
        if not (file.is_file() and file.suffix == ".json"):
            file = find_adapter(file) / _CONFIG
        if (what := what_is(file)).startswith(_OTHERS):
            raise FileFormatError(f"{file} is {what}, not an {_CONFIG}")
        return LoraConfig.from_json(read_text(file, limit=1 << 24), str(file))
    names = _words(targets)
    if not names:
        raise ConfigError("--targets names no module; write q_proj,v_proj, or all-linear")
    plain = all(name.replace("_", "").replace(".", "").isalnum() for name in names)
    listed = plain and targets.strip().lower() != "all-linear"
    return LoraConfig.fresh(
        rank,
        alpha,
        names if listed else targets.strip(),
        use_rslora=rslora,
        lora_dropout=dropout,
        use_dora=dora,
        modules_to_save=_saved(modules_to_save),
        trainable_token_indices=_tokens(trainable_token_indices),
        base_model_name_or_path=base.name,
    )


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _saved(text: str | None) -> tuple[str, ...] | None:
    from pylora.errors import ConfigError

    if text is not None and not _words(text):
        raise ConfigError("--modules-to-save names no module; write embed_tokens,lm_head")
    return None if text is None else _words(text)


def _tokens(text: str | None) -> Any:
    """Ids, or an object of names and ids; `LoraConfig` checks what is in it."""
    from pylora.errors import ConfigError

    if text is None:
        return None
    plain = text.strip()
    try:
        return json.loads(plain if plain.startswith(("[", "{")) else f"[{plain}]")
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"--trainable-token-indices {text!r:.100}: write token ids, 151665,151666, or ids by "
            'table, {"embed_tokens": [151665], "lm_head": [151666]}'
        ) from error


def refuse_too_large(plan: Plan, backend: str, whole: int = 0) -> None:
    """ConfigError where the adapter alone needs more memory for training than there is. `whole`:
    how many numbers of the base it trains beside A and B."""
    from pylora.check.sample import available_memory
    from pylora.errors import ConfigError

    trained, free = plan.num_parameters + whole, available_memory()
    needed = 16 * trained  # themselves, their gradient, two moments
    if backend in ("c", "numpy") and needed > free:
        raise ConfigError(
            f"to train {trained:,} parameters takes {needed / 1e9:.1f} GB for them, "
            f"their gradient and the optimizer, and {free / 1e9:.1f} GB are free; choose a lower "
            f"--rank or fewer --targets{' or --modules-to-save' if whole else ''}"
        )


def warn_about_size(plan: Plan, total: int) -> None:
    """A warning where the rank exceeds what a weight can have, or the adapter its weights."""
    beyond = [e for e in plan.entries if e.r > min(e.d, e.k)]
    share = f"{plan.num_parameters:,} parameters, {100 * plan.num_parameters / total:.0f} % of the"
    if beyond:
        most = max(beyond, key=lambda e: e.r / min(e.d, e.k))
        warn(
            f"rank {most.r} is above {min(most.d, most.k)}, the highest that a weight of "
            f"{most.d} × {most.k} has ({most.path}, and {len(beyond) - 1} other modules): more "
            f"than that adds nothing to what the adapter can be. It has {share} model's"
        )
        return
    weights = sum(e.d * e.k for e in plan.entries)
    if plan.num_parameters > weights:
        warn(
            f"the adapter has {share} model's, and more than the {weights:,} of the weights that "
            "it adapts; a lower rank does the same with less"
        )
