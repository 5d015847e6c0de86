"""LoraConfig: what an adapter_config.json says, checked; nothing in it is silently ignored.

Every field of PEFT's LoraConfig (0.21) is in one of three groups: those that pylora carries out
(the attributes of `LoraConfig`), those that have no effect on the result (`_INERT`), and those that
change the mathematics in a way that pylora does not implement (`_REFUSED`). A field of no group is
refused unless it is empty. This file does not know any model: see plan.py for the matching.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pylora.errors import ConfigError, UnsupportedError, wrong_type
from pylora.types import brief

# These say where a file came from, how A and B were first filled (init_lora_weights itself is
# checked; a file has them as trained), or are read only together with a field of _REFUSED.
_INERT = frozenset(
    "auto_mapping peft_version revision inference_mode runtime_config eva_config corda_config "
    "loftq_config lora_ga_config megatron_core qalora_group_size".split()
)
_REFUSED = {
    "alora_invocation_tokens": "activated LoRA (aLoRA) switches the adapter on inside a sequence",
    "layer_replication": "the model's layers are repeated",
    "megatron_config": "the layers are Megatron's parallel layers",
    "use_qalora": "QA-LoRA pools the input before A",
    "use_bdlora": "block-diagonal LoRA constrains A or B",
    "arrow_config": "Arrow routes between several adapters",
    "kasa_config": "KaSA truncates the base weight and puts a diagonal between A and B",
    "velora_config": "VeLoRA changes the gradient of A",
    "monteclora_config": "Monte Carlo LoRA samples the adapter's weights",
}
# Initialisations that leave the base weights alone: an adapter made so can be read and used.
_READABLE_INITS = ("eva", "orthogonal", "mica")
# What these take from the base can be computed of its weights: see inits.py.
FROM_BASE = re.compile(r"pissa(_niter_[0-9]{1,6})?|[oO][lL][oO][rR][aA]")
# Those that change the base by what is not in the adapter: it is relative to a base nobody has.
_CHANGES_BASE = {
    "corda": "by the covariance of its data, which PEFT itself needs again to load it",
    "loftq": "to its quantization by bitsandbytes",
    "lora_ga": "by its first gradients, and PEFT would load it as if it had not",
}
# What was saved before training has the values that were taken from the base: see first.py.
_WAY_OUT = {
    how: f"put the folder of the adapter as it was before training into its folder as {how}_init; "
    "or, "
    for how in ("corda", "lora_ga")
}
FRESH_TARGETS: str | tuple[str, ...] = "all-linear"  # as the literature recommends
_FOREIGN = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "rslora": "use_rslora"}
# PEFT of some age does not know these names: they are written where they say something.
_NEWER = ("target_parameters", "use_dora", "trainable_token_indices", "ensure_weight_tying")
_MAX_PATTERN = 4096  # characters of one regular expression


@dataclass(frozen=True)
class LoraConfig:
    """Settings of a LoRA adapter, with PEFT's names, meanings and defaults.

    `target_modules` is a list of module names (a name matches a module path that equals it or ends
    in "." and it), a regular expression for whole paths, or "all-linear" (every linear module but
    the output layer). Keys of `rank_pattern` and `alpha_pattern` are regular expressions for the
    end of a path; the first key that matches decides.

    Raises ConfigError for a value out of range, UnsupportedError for one not implemented.
    """

    __repr__ = brief

    r: int = 8
    lora_alpha: float = 8
    target_modules: Sequence[str] | None = None  # lists become tuples
    exclude_modules: Sequence[str] | None = None
    layers_to_transform: Sequence[int] | None = None
    layers_pattern: Sequence[str] | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    lora_dropout: float = 0.0
    bias: str = (
        "none"  # "none", "all" or "lora_only": which biases of the base the adapter replaces
    )
    lora_bias: bool = False  # a bias on B
    init_lora_weights: bool | str = True  # True (Kaiming-uniform), "gaussian" or False (B random)
    modules_to_save: Sequence[str] | None = None
    fan_in_fan_out: bool = False
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    peft_type: str = "LORA"
    target_parameters: Sequence[str] | None = None  # parameters of experts, by PEFT's names
    use_dora: bool = False  # rows of W + s B A are brought to lengths that are trained, too
    # Rows of the embedding that are trained as they are: token ids, or {module name: token ids}.
    trainable_token_indices: Sequence[int] | Mapping[str, Sequence[int]] | None = None
    ensure_weight_tying: bool = False  # a whole embedding is a tied head's, too

    def __post_init__(self) -> None:
        for name in (
            "target_modules", "exclude_modules", "modules_to_save", "layers_pattern",
            "target_parameters",
        ):  # fmt: skip
            value = getattr(self, name)
            if isinstance(value, str) and name in ("layers_pattern", "modules_to_save"):
                value = (value,)
            if not isinstance(value, str):
                value = _names(name, value)
            object.__setattr__(self, name, value)
        object.__setattr__(self, "trainable_token_indices", _tokens(self.trainable_token_indices))
        layers: Any = self.layers_to_transform
        if layers is not None:
            layers = (layers,) if isinstance(layers, int) else layers
            object.__setattr__(self, "layers_to_transform", _indices(layers))
        _check_scalars(self)
        _check_patterns(self)
        _check_combinations(self)

    @classmethod
    def fresh(
        cls,
        r: int = 8,
        lora_alpha: float | None = None,
        target_modules: str | Sequence[str] | None = None,
        **others: Any,
    ) -> LoraConfig:
        """Settings for a new adapter, by the one rule that the command line, `pylora.Model` and
        whoever calls this share: lora_alpha is 2 r unless given, so that the scale is 2 at every
        rank; target_modules is FRESH_TARGETS; task_type is CAUSAL_LM.

        The defaults of `LoraConfig` itself are PEFT's (lora_alpha 8), since they are what a file
        means that leaves a field out. ConfigError names a field that does not exist.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        for name in others:
            if name not in known:
                close = difflib.get_close_matches(_FOREIGN.get(name, name), known, n=1)
                hint = f"; did you mean {close[0]}?" if close else f"; there are {sorted(known)}"
                raise ConfigError(f"LoraConfig has no field {name!r}{hint}")
        check_rank("r", r)
        fields: dict[str, Any] = {"task_type": "CAUSAL_LM"} | others
        return cls(
            r=r,
            lora_alpha=2 * r if lora_alpha is None else lora_alpha,
            target_modules=FRESH_TARGETS if target_modules is None else target_modules,
            **fields,
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "adapter_config.json") -> LoraConfig:
        """A config from the fields of an adapter_config.json; `where` is named in errors."""
        if not isinstance(values, Mapping):
            wrong_type(
                "LoraConfig.from_dict",
                "the fields of an adapter_config.json as a dict",
                values,
                "of a folder: pylora.adapters.peft.read_config(directory)",
            )
        known = {f.name for f in dataclasses.fields(cls)}
        try:
            _refuse_others(values, known)
            kept = {name: value for name, value in values.items() if name in known}
            for name in ("rank_pattern", "alpha_pattern"):
                if kept.get(name, {}) is None:
                    kept[name] = {}
            return cls(**kept)
        except (ConfigError, UnsupportedError) as error:
            raise type(error)(f"{where}: {error}") from None

    @classmethod
    def from_json(cls, text: str | bytes, where: str = "adapter_config.json") -> LoraConfig:
        """A config from the text of an adapter_config.json; repeated keys are an error."""
        try:
            values = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_number)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{where} is not valid JSON: {error}") from None
        if not isinstance(values, dict):
            raise ConfigError(
                f"{where} holds {type(values).__name__}, expected an object of fields"
            )
        return cls.from_dict(values, where)

    def to_dict(self) -> dict[str, Any]:
        """The fields as PEFT reads them: lists for tuples."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name in _NEWER:
            if not values[name]:
                del values[name]
        return {name: _plain(value) for name, value in values.items()}

    def to_json(self) -> str:
        """The text of an adapter_config.json. The order of pattern keys matters and is kept."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number in JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} occurs twice")
    return values


def _refuse_others(values: Mapping[str, Any], known: set[str]) -> None:
    for name, value in values.items():
        if name in known or name in _INERT or value in (None, False, 0, "", [], {}):
            continue
        if name in _REFUSED:
            raise UnsupportedError(
                f"{name} = {value!r} is not supported: {_REFUSED[name]}; "
                "merge this adapter into its base model with PEFT, or retrain without it"
            )
        raise UnsupportedError(
            f"the field {name!r} = {value!r} is unknown to pylora, so what it would change "
            "cannot be kept; remove the field if it has no effect on the result"
        )


def _names(name: str, value: Any) -> tuple[str, ...] | None:
    if value is None:
        return None
    if not isinstance(value, (list, tuple, set, frozenset)):
        raise ConfigError(f"{name} = {value!r}: expected a list of names or a string")
    items = sorted(value) if isinstance(value, (set, frozenset)) else value
    for item in items:
        if not isinstance(item, str) or not item:
            raise ConfigError(f"{name} contains {item!r}: expected a non-empty string")
    return tuple(items)


def _indices(value: Any) -> tuple[int, ...] | None:
    if not isinstance(value, (list, tuple)) or any(
        isinstance(i, bool) or not isinstance(i, int) for i in value
    ):
        raise ConfigError(f"layers_to_transform = {value!r}: expected an integer or a list of them")
    return tuple(value) or None  # PEFT takes an empty list as "every layer"


def _tokens(value: Any) -> tuple[int, ...] | dict[str, tuple[int, ...]] | None:
    """trainable_token_indices, checked: ids, or ids by the name of a table."""
    if not value and not isinstance(value, (str, bool, int)):
        return None
    if isinstance(value, Mapping):
        names = _names("trainable_token_indices", tuple(value))
        return {name: _ids(ids) for name, ids in zip(names or (), value.values(), strict=True)}
    return _ids(value)


def _ids(value: Any) -> tuple[int, ...]:
    whole = isinstance(value, (list, tuple)) and value
    if not whole or any(
        isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < 2**31 for i in value
    ):
        raise ConfigError(
            f"trainable_token_indices = {value!r:.100}: expected token ids, or an object of module "
            "names and token ids"
        )
    if len(set(value)) != len(value):
        twice = next(i for i in value if value.count(i) > 1)
        raise ConfigError(f"trainable_token_indices names the token {twice} twice")
    return tuple(value)


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_rank(name: str, value: Any) -> None:
    """Raises ConfigError unless `value` is a positive integer."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
        raise ConfigError(f"{name} = {value!r}: a rank must be a positive integer")


def check_alpha(name: str, value: Any) -> None:
    """Raises ConfigError unless `value` is a number whose scale float32 can hold."""
    if not _number(value) or not 1e-30 <= value <= 1e30:
        raise ConfigError(f"{name} = {value!r}: alpha must be a positive number, 1e-30 to 1e30")


def _check_scalars(c: LoraConfig) -> None:
    check_rank("r", c.r)
    check_alpha("lora_alpha", c.lora_alpha)
    if not _number(c.lora_dropout) or not 0 <= c.lora_dropout < 1:
        raise ConfigError(f"lora_dropout = {c.lora_dropout!r}: expected a number in [0, 1)")
    flags = ("use_rslora", "lora_bias", "fan_in_fan_out", "use_dora", "ensure_weight_tying")
    for name in flags:
        if not isinstance(getattr(c, name), bool):
            raise ConfigError(f"{name} = {getattr(c, name)!r}: expected true or false")
    for name in ("task_type", "base_model_name_or_path"):
        if not isinstance(getattr(c, name), (str, type(None))):
            raise ConfigError(f"{name} = {getattr(c, name)!r}: expected a string or null")
    if c.bias not in ("none", "all", "lora_only"):
        raise ConfigError(f"bias = {c.bias!r}: expected 'none', 'all' or 'lora_only'")
    if c.peft_type != "LORA":
        raise UnsupportedError(f"peft_type = {c.peft_type!r} is not supported, only 'LORA' is")
    init = c.init_lora_weights
    if isinstance(init, str) and FROM_BASE.fullmatch(init):
        return
    if not isinstance(init, bool) and str(init).lower() not in ("gaussian", *_READABLE_INITS):
        if isinstance(init, str) and init.lower() in _CHANGES_BASE:
            raise UnsupportedError(
                f"init_lora_weights = {init!r} changed the base weights before training, "
                f"{_CHANGES_BASE[init.lower()]}, so this adapter does not fit the base model that "
                f"it names; {_WAY_OUT.get(init.lower(), '')}in PEFT, save it as an ordinary one "
                "(save_pretrained(..., path_initial_model_for_weight_conversion=...), which keeps "
                "the first values to subtract), or merge it there"
            )
        raise UnsupportedError(
            f"init_lora_weights = {init!r} is not known; expected true, false, "
            f"'gaussian', 'pissa', 'olora', {', '.join(_READABLE_INITS)}"
        )


def _check_patterns(c: LoraConfig) -> None:
    for name, check in (("rank_pattern", check_rank), ("alpha_pattern", check_alpha)):
        patterns = getattr(c, name)
        if not isinstance(patterns, Mapping):
            raise ConfigError(f"{name} = {patterns!r}: expected an object of pattern: number")
        for key, value in patterns.items():
            check(f"{name}[{key!r}]", value)
    texts = [c.target_modules, c.exclude_modules, *c.rank_pattern, *c.alpha_pattern]
    for text in [*texts, *(c.layers_pattern or ())]:
        if isinstance(text, str) and len(text) > _MAX_PATTERN:
            raise ConfigError(
                f"the pattern {text[:40]!r}... is longer than {_MAX_PATTERN} characters"
            )


def _check_combinations(c: LoraConfig) -> None:
    if isinstance(c.target_modules, str):
        for name in ("layers_to_transform", "layers_pattern"):
            if getattr(c, name):
                raise ConfigError(
                    f"{name} needs target_modules to be a list of names, not a string"
                )
    if c.layers_pattern and c.layers_to_transform is None:
        raise ConfigError(
            "layers_pattern is given without layers_to_transform: name the layers too"
        )
    if c.target_parameters and (c.lora_dropout or c.lora_bias or c.fan_in_fan_out):
        raise ConfigError(
            "target_parameters takes no lora_dropout, lora_bias or fan_in_fan_out (as in PEFT)"
        )
    for name in ("lora_bias", "target_parameters"):
        if c.use_dora and getattr(c, name):
            raise ConfigError(f"use_dora = true does not go together with {name} (as in PEFT)")
    if c.lora_bias and not isinstance(c.init_lora_weights, bool):
        raise ConfigError("lora_bias = true needs init_lora_weights = true or false (as in PEFT)")
