"""Adapters of CorDA and LoRA-GA whose first values are at hand: what was taken from the base.

Both took s B0 A0 from the base's weights before training: CorDA by the covariance of its data
(arXiv:2406.05223), LoRA-GA by the first gradients (arXiv:2407.05000), and neither can be computed
from the adapter and the base. PEFT's examples save the adapter before training, too, in a folder
that `path_initial_model_for_weight_conversion` names later. Where such a folder lies in the
adapter's, or beside it, the adapter is read by PEFT's conversion rule ([A; A0], [B, -B0]).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from pylora.adapters.inits import check_head
from pylora.adapters.loraconfig import LoraConfig
from pylora.adapters.plan import Plan
from pylora.errors import PlanError, UnsupportedError
from pylora.model.config import LlamaConfig

_NAMES = {
    "corda": ("corda_init",),
    "lora_ga": ("lora_ga_init", "loraga_init", "lora-ga_init"),
}


@dataclass(frozen=True)
class First:
    """The folder of an adapter as it was before training, and the trained one's settings, as those
    of an adapter that took nothing."""

    how: str
    folder: Path
    config: LoraConfig

    def check(self, plan: Plan, model: LlamaConfig | None) -> None:
        """UnsupportedError for modules of which nothing can have been taken so."""
        for e in plan.entries:
            if e.kind != "linear":
                raise UnsupportedError(
                    f"{e.path}: {self.how} is for linear modules, and this is an {e.kind}"
                )
        check_head(model, plan, self.how)


def find_first(file: Path, text: str) -> First | None:
    """The first values of an adapter that began as "corda" or "lora_ga", whose adapter_config.json
    is `file` and has this text; None where it began in another way, or they are not at hand.
    PlanError where it is not clear which are."""
    directory = file.parent
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return None  # whoever reads the settings says what is wrong
    if not isinstance(values, dict):
        return None
    how = str(values.get("init_lora_weights")).lower()
    places = [p / name for name in _NAMES.get(how, ()) for p in (directory, directory.parent)]
    found = [p for p in places if (p / "adapter_model.safetensors").is_file()]
    if not found:
        return None
    if len(found) > 1:
        raise PlanError(
            f"{directory}: {found[0]} and {found[1]} both look like the adapter before training; "
            "keep the one that it began as"
        )
    values["init_lora_weights"] = True
    return First(how, found[0], LoraConfig.from_json(json.dumps(values), str(file)))
