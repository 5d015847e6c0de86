"""What `train` and `plan` share: the settings of an adapter from options or a file, and a word
about an adapter that is larger than what it adapts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

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
    names = tuple(name.strip() for name in targets.split(",") if name.strip())
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
        base_model_name_or_path=base.name,
    )


def refuse_too_large(plan: Plan, backend: str) -> None:
    """ConfigError where the adapter alone needs more memory for training than there is."""
    from pylora.check.sample import available_memory
    from pylora.errors import ConfigError

    needed, free = 16 * plan.num_parameters, available_memory()  # itself, gradient, two moments
    if backend in ("c", "numpy") and needed > free:
        raise ConfigError(
            f"to train {plan.num_parameters:,} parameters takes {needed / 1e9:.1f} GB for them, "
            f"their gradient and the optimizer, and {free / 1e9:.1f} GB are free; choose a lower "
            "--rank or fewer --targets"
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
