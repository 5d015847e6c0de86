"""PEFT directories: `adapter_config.json` and `adapter_model.safetensors`, read and written.

Keys are "base_model.model." + module path + one of the endings in `tensor_names`. Every tensor of
the file must be accounted for and every tensor of the plan must be there: a missing, extra,
repeated, misshapen or non-finite tensor is an error that names it. Pickle files
(adapter_model.bin) are refused: loading one runs code that its author wrote.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pylora.adapters.first import find_first
from pylora.adapters.fit import misfit
from pylora.adapters.inits import on_unchanged_base, takes_from_base, without_first
from pylora.adapters.locate import find_adapter
from pylora.adapters.loraconfig import LoraConfig
from pylora.adapters.older import fold_experts, text_part, under_names, with_experts
from pylora.adapters.plan import Plan, PlanEntry, resolve
from pylora.adapters.whole import Tables
from pylora.errors import FileFormatError, PlanError, UnsupportedError
from pylora.files.bounded import read_text
from pylora.files.whole import atomic_dir, atomic_write
from pylora.formats.base import check_finite, narrow, widen
from pylora.formats.safetensors import SafeTensors, save
from pylora.model import families
from pylora.model.config import LlamaConfig, ModuleSpec
from pylora.model.whole import Whole, grown
from pylora.types import LoRA

Array = np.ndarray[Any, Any]
Load = Callable[[str], Array]  # tensor name of the base model -> float32; Checkpoint.load

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_CONFIG_LIMIT = 16 << 20  # bytes; target_modules may list every module of a large model
_DTYPES = ("f32", "f16", "bf16", "f64")
# PEFT keeps an adapter's name in the keys of its model's state; files are written without it.
_NAMED = re.compile(r"\.(lora_(?:embedding_)?[AB])\.([^.]+)(\.weight|\.bias)?$")
_MAGNITUDE = re.compile(r"\.lora_magnitude_vector(\.[^.]+)?(\.weight)?$")


_MODULE = re.compile(r"(?:base_model\.model\.)?(?P<path>.+?)\.(?:lora_|base_layer)")
# An adapter of the language model inside a multimodal one: what the whole model calls its part.
_TEXT_PART = re.compile(
    r"^(base_model\.model\.|)"
    r"(?:model\.language_model|language_model\.model|model\.text_model)\."
)


def _own_name(path: str) -> str:
    return _TEXT_PART.sub(r"\1model.", path)


def tensor_names(plan: Plan) -> dict[str, tuple[str, str, tuple[int, ...]]]:
    """key in the file -> (module path, field of LoRA, shape), for every tensor of the plan."""
    out: dict[str, tuple[str, str, tuple[int, ...]]] = {}
    for e in plan.entries:
        head = _PREFIX + e.path
        if e.kind == "experts":
            at = f"{_PREFIX}{_wrapped(e, plan)}"
            out[f"{at}.lora_A.weight"] = e.path, "A", (e.r * e.experts, e.k)
            out[f"{at}.lora_B.weight"] = e.path, "B", (e.d, e.r * e.experts)
        elif e.kind == "embedding":
            out[f"{head}.lora_embedding_A"] = e.path, "A", (e.r, e.k)
            out[f"{head}.lora_embedding_B"] = e.path, "B", (e.d, e.r)
        else:
            out[f"{head}.lora_A.weight"] = e.path, "A", (e.r, e.k)
            out[f"{head}.lora_B.weight"] = e.path, "B", (e.d, e.r)
        if e.dora:
            out[f"{head}.lora_magnitude_vector"] = e.path, "magnitude", (e.d,)
        if e.lora_bias:
            out[f"{head}.lora_B.bias"] = e.path, "bias", (e.d,)
        if e.base_bias:
            out[f"{head}.base_layer.bias"] = e.path, "base_bias", (e.d,)
    for path, spec in plan.bias_only:
        out[f"{_PREFIX}{path}.bias"] = path, "base_bias", (spec.d,)
    return out


def _wrapped(e: PlanEntry, plan: Plan) -> str:
    """Where PEFT keeps the adapter of a parameter: at the module that has it; of several of the
    same module each wraps the ones before, so that they are deeper."""
    module = e.path.rpartition(".")[0]
    beside = [p.path for p in plan.entries if p.path.rpartition(".")[0] == module]
    return module + ".base_layer" * (len(beside) - 1 - beside.index(e.path))


def assemble(config: LoraConfig, plan: Plan, arrays: Mapping[str, Array]) -> dict[str, LoRA]:
    """Module path -> LoRA, from arrays under the keys of `tensor_names`.

    A module of which only the bias is replaced gets a LoRA of rank 0.
    """
    fields: dict[str, dict[str, Any]] = {}
    for key, (path, field, _) in tensor_names(plan).items():
        fields.setdefault(path, {})[field] = arrays[key]
    out = {
        e.path: LoRA(scale=e.scale, dropout=float(config.lora_dropout), **fields[e.path])
        for e in plan.entries
    }
    for path, spec in plan.bias_only:
        A, B = np.zeros((0, spec.k), np.float32), np.zeros((spec.d, 0), np.float32)
        out[path] = LoRA(A, B, scale=1.0, **fields[path])
    return out


def read(
    directory: str | os.PathLike[str],
    modules: Mapping[str, ModuleSpec],
    base: Load | None = None,
) -> tuple[LoraConfig, Plan, dict[str, LoRA]]:
    """`read_all` of an adapter that is A and B alone; UnsupportedError for one with whole weights,
    whose names and shapes take the model's whole configuration."""
    config, plan, modules_read, _ = _read(find_adapter(directory), modules, None, base)
    return config, plan, modules_read


def read_shown(
    directory: str | os.PathLike[str], modules: Mapping[str, ModuleSpec]
) -> tuple[LoraConfig, Plan, dict[str, LoRA], dict[str, tuple[int, ...]]]:
    """A and B alone of an adapter that may have whole weights, and the shapes of those by key: for
    who looks at an adapter without its model. It is not what the adapter computes."""
    config, plan, modules_read, _ = _read(find_adapter(directory), modules, None, None, True)
    with SafeTensors(find_adapter(directory) / WEIGHTS) as file:
        return config, plan, modules_read, {key: file.shape(key) for key in _others(file)}


def _others(file: SafeTensors) -> set[str]:
    """The keys that are neither A nor B nor a bias."""
    return {key for key in file.tensors if ".lora_" not in key and not key.endswith(".bias")}


def read_all(
    directory: str | os.PathLike[str], model: LlamaConfig, base: Load | None = None
) -> tuple[LoraConfig, Plan, dict[str, LoRA], Whole | None]:
    """The adapter in a PEFT directory, for a model of this configuration; tensors become float32.

    `directory` may be a training run's folder or a Hub id too: see `find_adapter`.

    `base` (Checkpoint.load) is needed where the file carries copies of base weights, as PEFT writes
    for adapted embeddings: they must equal the base model's; and for trained rows of a table. Last
    comes what is whole (pylora/adapters/whole.py), or None. Raises PlanError, FileFormatError,
    ConfigError or UnsupportedError, each naming the file and the tensor or field.
    """
    return _read(find_adapter(directory), model.modules(), model, base)


def _read(
    directory: Path,
    modules: Mapping[str, ModuleSpec],
    model: LlamaConfig | None,
    base: Load | None,
    shown: bool = False,
) -> tuple[LoraConfig, Plan, dict[str, LoRA], Whole | None]:
    settings, text = _config_text(directory)
    first = None if shown else find_first(settings, text)
    said = LoraConfig.from_json(text, str(settings)) if first is None else first.config
    began = takes_from_base(said)
    config = dataclasses.replace(said, init_lora_weights=True) if began else said
    with SafeTensors(_weights_file(directory)) as file, _saying_why(file, config, modules):
        whole, claimed = None, set[str]()
        if shown:
            claimed = _others(file)
        elif model is None:
            _refuse_whole(file, config)
        else:
            tables = Tables(config, model)
            found = tables.find(file, _own_name)
            whole, claimed = tables.read(file, found, partial(_load, file), base), found.claimed
            modules = grown(model, whole).modules()
        paths = [m["path"] for key in file.tensors if (m := _MODULE.match(key))]
        called = text_part(paths, modules)
        named = with_experts(map(_own_name, paths), modules)
        try:
            if any(called(path) != path for path in modules):
                config, plan = under_names(config, modules if named is None else named, called)
            else:
                plan = resolve(config, modules if named is None else named)
        except (PlanError, UnsupportedError) as error:
            raise type(error)(f"{directory / CONFIG}: {error}") from None
        wanted = tensor_names(plan)
        refuse_both(plan, whole, f"{directory / CONFIG}: ")
        source = _match(file, plan, wanted, base, claimed)
        rules = {e.path: f"r = {e.r} by {e.rule_r}" for e in plan.entries}
        arrays = {
            key: _load(file, source[key], shape, rules.get(path, ""))
            for key, (path, _, shape) in wanted.items()
        }
        if named is not None:
            each = {(path, field): arrays[key] for key, (path, field, _) in wanted.items()}
            config, plan, each = fold_experts(config, plan, each, modules)
            keys = {(path, field): key for key, (path, field, _) in tensor_names(plan).items()}
            arrays = {key: each[which] for which, key in keys.items()}
        elif first is not None:
            with SafeTensors(_weights_file(first.folder)) as there:
                source = _match(there, plan, wanted, base, claimed)
                began_as = {
                    which[:2]: _load(there, source[key], which[2]) for key, which in wanted.items()
                }
    loras = assemble(config, plan, arrays)
    if first is not None:
        first.check(plan, model)
        return (
            *without_first(
                config,
                plan,
                loras,
                lambda e: (began_as[e.path, "A"], began_as[e.path, "B"]),
                modules,
            ),
            whole,
        )
    if began and not shown:
        if base is None:
            raise PlanError(
                f"{directory / CONFIG}: init_lora_weights = {said.init_lora_weights!r} took a part "
                "of the base's weights into the adapter; give the base model's tensors "
                "(base=checkpoint.load; on the command line: --model), so that it is known which"
            )
        if any(e.kind == "experts" for e in plan.entries):
            raise UnsupportedError(f"{directory / CONFIG}: {began} of experts is not supported")
        weight = partial(base_weight, base)
        config = dataclasses.replace(config, init_lora_weights=said.init_lora_weights)
        config, plan, loras = on_unchanged_base(config, plan, loras, weight, model, modules)
    return config, plan, loras, whole


def refuse_both(plan: Plan, whole: Whole | None, where: str = "") -> None:
    """PEFT puts trained rows on a plain table, never on one with A and B."""
    for e in plan.entries:
        if whole is not None and f"{e.path}.weight" in whole.rows:
            raise PlanError(
                f"{where}{e.path} has both LoRA (target_modules) and rows that are "
                "trained as they are (trainable_token_indices); a table takes one of them"
            )


@contextmanager
def _saying_why(
    file: SafeTensors, config: LoraConfig, modules: Mapping[str, ModuleSpec]
) -> Iterator[None]:
    """Where the adapter is one of another base model, that is what the error says, not a list of
    tensors."""
    try:
        yield
    except PlanError as error:
        paths = [_own_name(m["path"]) for key in file.tensors if (m := _MODULE.match(key))]
        why = misfit(
            {key: file.shape(key) for key in file.tensors},
            with_experts(paths, modules) or modules,
            some_layers=config.layers_to_transform is not None,
            base=config.base_model_name_or_path,
        )
        if not why:
            raise
        raise PlanError(f"{file.path}: {why}") from error


def read_config(directory: str | os.PathLike[str]) -> LoraConfig:
    """The settings in a PEFT directory. Raises FileFormatError, ConfigError or UnsupportedError."""
    file, text = _config_text(directory)
    return LoraConfig.from_json(text, str(file))


def _config_text(directory: str | os.PathLike[str]) -> tuple[Path, str]:
    file = find_adapter(directory) / CONFIG
    return file, read_text(file, limit=_CONFIG_LIMIT)


def write(
    directory: str | os.PathLike[str], config: LoraConfig, arrays: Mapping[str, Array]
) -> None:
    """Writes a PEFT directory with these tensors, float32, whole or not at all.

    Where the directory holds other files already they are kept, and each of the two files appears
    whole by itself.
    """
    target, text = Path(directory), config.to_json()
    tensors = {key: np.ascontiguousarray(array, np.float32) for key, array in arrays.items()}
    meta = {"format": "pt"}
    if target.is_dir() and any(p.name not in (CONFIG, WEIGHTS) for p in target.iterdir()):
        save(target / WEIGHTS, tensors, meta)
        with atomic_write(target / CONFIG) as beside:
            beside.write_text(text, encoding="utf-8")
        return
    with atomic_dir(target) as beside:
        save(beside / WEIGHTS, tensors, meta)
        (beside / CONFIG).write_text(text, encoding="utf-8")


# ---- the tensors of a file -----------------------------------------------------------------------


def _weights_file(directory: Path) -> Path:
    file = directory / WEIGHTS
    if not file.is_file():
        pickle = directory / "adapter_model.bin"
        if pickle.is_file():
            raise FileFormatError(
                f"{pickle} is a pickle file, which can run code when it is loaded, so pylora does "
                f"not read it; save the adapter as {WEIGHTS} (PEFT: safe_serialization=True)"
            )
        raise FileFormatError(f"{directory}: there is no {WEIGHTS}")
    return file


def _refuse_whole(file: SafeTensors, config: LoraConfig) -> None:
    """UnsupportedError for settings that bring whole weights, where the model is not known."""
    for name in ("modules_to_save", "trainable_token_indices"):
        if getattr(config, name):
            key = next((k for k in file.tensors if ".lora_" not in k), "")
            raise UnsupportedError(
                f"{file.path}: {f'tensor {key!r} is' if key else 'there are'} whole weights that "
                f"were trained beside the adapter ({name} = {getattr(config, name)!r:.100}), which "
                "takes the base model's configuration: give its LlamaConfig, or --model"
            )


def _match(
    file: SafeTensors,
    plan: Plan,
    wanted: Mapping[str, tuple[str, str, tuple[int, ...]]],
    base: Load | None,
    claimed: Collection[str] = (),
) -> dict[str, str]:
    """Wanted key -> key in the file. PlanError unless every tensor of each side has its partner."""
    adapted = {e.path for e in plan.entries}
    source: dict[str, str] = {}
    extra: list[str] = []
    has_parts = any(_TEXT_PART.match(path) for path in adapted)  # then their names are meant
    for stored in file.tensors:
        if stored in claimed:  # whole weights
            continue
        key = _plain(stored, file)
        if not has_parts:
            key = _TEXT_PART.sub(r"\1model.", key)
        alias = _PREFIX + key[len(_PREFIX) : -len(".bias")] + ".base_layer.bias"
        if key in wanted:
            name = key
        elif key.endswith(".bias") and alias in wanted:
            name = alias  # PEFT before 0.6 did not wrap the layer
        else:
            path = key[len(_PREFIX) : -len(".base_layer.weight")]
            if key == f"{_PREFIX}{path}.base_layer.weight" and path in adapted:
                _check_copy(file, stored, path, base)
            else:
                extra.append(stored)
            continue
        if name in source:
            raise PlanError(
                f"{file.path}: {source[name]!r} and {stored!r} are the same tensor, twice"
            )
        source[name] = stored
    missing = [key for key in wanted if key not in source]
    if missing and not extra and all(wanted[key][1] == "base_bias" for key in missing):
        raise PlanError(
            f"{file.path}: {CONFIG} says that biases of the base model were trained, but the file "
            f"has none of the {len(missing)}: PEFT of some versions did not save them. Save the "
            "adapter with PEFT 0.13 or newer from the trained model; or, to use it with the base "
            f'model\'s own biases, set "bias" to "none" in {CONFIG}'
        )
    if missing or extra:
        parts = [f"missing {_some(missing)}"] * bool(missing)
        parts += [f"not expected {_some(extra)}"] * bool(extra)
        raise PlanError(
            f"{file.path}: the tensors are not those that {CONFIG} and the model imply: "
            f"{'; '.join(parts)}"
        )
    return source


def _plain(key: str, file: SafeTensors) -> str:
    """The key as PEFT writes it to files: without an adapter's name, with the wrappers' prefix."""
    key = _MAGNITUDE.sub(".lora_magnitude_vector", key)
    named = _NAMED.search(key)
    if named and named[2] not in ("weight", "bias"):
        parts = key[: named.start()], named[1], named[3] or ""
        key = f"{parts[0]}.{parts[1]}{parts[2]}"
    return key if key.startswith(_PREFIX) or ".lora_" not in key else _PREFIX + key


def _load(file: SafeTensors, key: str, shape: tuple[int, ...], rule: str = "") -> Array:
    found, dtype = file.shape(key), file.dtype(key)
    if found != shape:
        raise PlanError(
            f"{file.path}: tensor {key!r} has shape {found}, expected {shape}"
            f"{f' ({rule})' if rule else ''}"
        )
    if dtype not in _DTYPES:
        raise PlanError(
            f"{file.path}: tensor {key!r} is {dtype.upper()}, expected F32, F16, BF16 or F64"
        )
    return check_finite(_float32(file, key), f"{file.path}: tensor {key!r}")


def _float32(file: SafeTensors, key: str) -> Array:
    """A tensor in float32: exact, but for float64, which is rounded once. What does not fit becomes
    infinite, which is refused with all that is not finite."""
    if file.dtype(key) != "f64":
        return np.array(file.load(key), np.float32, order="C")
    with np.errstate(over="ignore"):
        return np.array(file.view(key), np.float32, order="C")


def _check_copy(file: SafeTensors, key: str, path: str, base: Load | None) -> None:
    """A copy of a base weight must be the base model's, at the precision that the copy has."""
    if base is None:
        raise PlanError(
            f"{file.path}: tensor {key!r} is a copy of a base weight; give the base model's "
            "tensors too (base=checkpoint.load) so that it can be compared, or save the adapter "
            "without it (PEFT: save_embedding_layers=False)"
        )
    want, dtype = base_weight(base, path), file.dtype(key)
    if file.shape(key) != want.shape or dtype not in _DTYPES:
        raise PlanError(
            f"{file.path}: tensor {key!r} is {dtype.upper()} of shape {file.shape(key)}, expected "
            f"the base model's weight of shape {want.shape}"
        )
    same = _float32(file, key) if dtype == "f64" else file.load(key)
    if not np.array_equal(want if dtype == "f64" else widen(narrow(want, dtype), dtype), same):
        raise PlanError(
            f"{file.path}: tensor {key!r} differs from the base model's weight of {path}: this "
            "adapter belongs to another base model, or that weight was trained too"
        )


def base_weight(base: Load, path: str) -> Array:
    """The weight of a module; that of the embedding for an output layer that is tied to it."""
    try:
        return base(f"{path}.weight")
    except (KeyError, FileFormatError):
        names = [family.names for family in families.ALL.values()]
        for embedding in dict.fromkeys(n.embedding for n in names if n.head == path):
            try:
                return base(f"{embedding}.weight")
            except (KeyError, FileFormatError):
                continue
        raise


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - 5} more" if len(listed) > 5 else ""
    return ", ".join(repr(name[:200]) for name in listed[:5]) + more
