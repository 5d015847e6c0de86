"""LoRA adapters of mlx-lm: `adapters.safetensors` beside an `adapter_config.json` of its own.

y += scale (x lora_a) lora_b, with lora_a [k, r] and lora_b [r, d], and with DoRA m [d]: one rank
and one scale for all modules, given as they are. Lower ranks are filled up with zeros; what a
module's scale is beyond the common one is multiplied into its B (carry.py). PEFT's settings are
kept in a key of pylora's own, which mlx-lm passes over, and what rounding took in a file beside; an
adapter that was made here is read back as it was, bit for bit. What mlx-lm cannot say is refused by
name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pylora.adapters.carry import carry
from pylora.adapters.fit import misfit
from pylora.adapters.loraconfig import LoraConfig
from pylora.adapters.mlx_names import homes, in_layer, layer_prefix, name_of
from pylora.adapters.plan import Plan, resolve
from pylora.adapters.restore import Read, restored
from pylora.adapters.settings import settings_of
from pylora.adapters.stacks import joined
from pylora.errors import FileFormatError, PlanError, PyloraError, UnsupportedError
from pylora.files.bounded import read_json
from pylora.formats.base import Array, check_finite
from pylora.formats.safetensors import SafeTensors
from pylora.model.config import LlamaConfig, ModuleSpec
from pylora.types import LoRA

CONFIG, WEIGHTS, BITS = "adapter_config.json", "adapters.safetensors", "pylora_bits.safetensors"
DORA = "dora"  # a fine_tune_type
OWN = "pylora"  # the key of the settings that PEFT has and mlx-lm has not
_LIMIT = 16 << 20  # bytes of the settings
_FLOATS = ("f32", "f16", "bf16")


# ---- reading -------------------------------------------------------------------------------------


def read(folder: Path, config: LlamaConfig) -> Read:
    """The adapter in a folder of mlx-lm's, for a model of `config`; tensors become float32.

    Raises FileFormatError for a damaged file or a number that is not finite, PlanError, naming it,
    for a tensor that has no home, another shape than the settings and the model say, or that is
    missing, and UnsupportedError for full fine-tuning, DoRA on an embedding or on experts, and
    embeddings that are tied.
    """
    where, settings = folder / CONFIG, read_json(folder / CONFIG, limit=_LIMIT)
    rank, scale, dropout = _parameters(where, settings)
    dora = settings.get("fine_tune_type") == DORA
    modules, magnitudes = config.modules(), {}
    with SafeTensors(folder / WEIGHTS) as file:
        try:
            names = _wanted(file, where, settings, config)
            halves = {
                home: (_numbers(file, f"{name}.lora_a"), _numbers(file, f"{name}.lora_b"))
                for name, home in names.items()
            }
            if dora:
                magnitudes = {
                    path: _lengths(file, f"{name}.m", path, modules[path])
                    for name, (path, _) in names.items()
                }
            parts = _together(file, halves, config, rank)
        except PlanError as error:
            raise _reason(file, config, error) from error
    own = _as_it_was(folder, settings, parts, modules, scale)
    if own is not None and own[0].use_dora == dora:
        return *own[:2], {p: replace(x, magnitude=magnitudes.get(p)) for p, x in own[2].items()}
    chosen = {path: (A.shape[0] // modules[path].experts, scale) for path, (A, _) in parts.items()}
    base = settings.get("model")
    said, plan = settings_of(
        chosen, modules, dropout=dropout, base=base if isinstance(base, str) else None, dora=dora
    )
    loras = {e.path: LoRA(*parts[e.path], e.scale, said.lora_dropout) for e in plan}
    return said, plan, {p: replace(x, magnitude=magnitudes.get(p)) for p, x in loras.items()}


def _lengths(file: SafeTensors, name: str, path: str, spec: ModuleSpec) -> Array:
    if spec.kind != "linear":
        raise UnsupportedError(
            f"{file.path}: {path} is adapted by DoRA, and of {spec.kind} mlx-lm's is another than "
            "PEFT's; fuse it into its base with mlx_lm.fuse"
        )
    m = _numbers(file, name)
    if m.shape != (spec.d,):
        raise PlanError(f"{file.path}: {path}: m has the shape {m.shape}, expected ({spec.d},)")
    return m


def _parameters(where: Path, settings: Mapping[str, Any]) -> tuple[int, float, float]:
    """Rank, scale and dropout, checked."""
    kind = settings.get("fine_tune_type", "lora")
    if kind not in ("lora", DORA):
        what = {"full": "whole weights that were trained"}
        said = f" ({what[kind]})" if isinstance(kind, str) and kind in what else ""
        raise UnsupportedError(
            f"{where}: fine_tune_type is {kind!r:.40}{said}, which is not supported; fuse it into "
            "its base with mlx_lm.fuse"
        )
    given = settings.get("lora_parameters")
    if not isinstance(given, dict):
        raise FileFormatError(f"{where}: lora_parameters is missing, so this is none of mlx-lm's")
    rank, scale, dropout = given.get("rank"), given.get("scale"), given.get("dropout", 0.0)
    if isinstance(rank, bool) or not isinstance(rank, int) or not 0 < rank < 1 << 31:
        raise FileFormatError(f"{where}: lora_parameters.rank is {rank!r:.40}, no positive integer")
    number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
    if not number or scale is None or not 1e-30 <= scale <= 1e30:
        raise FileFormatError(
            f"{where}: lora_parameters.scale is {scale!r:.40}; it must be a positive number"
        )
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise FileFormatError(f"{where}: lora_parameters.dropout is {dropout!r:.40}")
    return rank, float(scale), float(dropout)


def _wanted(
    file: SafeTensors, where: Path, settings: Mapping[str, Any], config: LlamaConfig
) -> dict[str, tuple[str, int]]:
    """mlx-lm's modules that the settings name -> where they are here. The file must have both
    tensors of each, and no others."""
    known, prefix = homes(config), layer_prefix(config)
    stored = {_bare(key): key for key in file.tensors}
    if len(stored) != len(file.tensors):
        raise PlanError(f"{file.path}: a tensor is there twice, with a prefix and without")
    there: dict[str, set[str]] = {}
    wanted = {"lora_a", "lora_b"} | ({"m"} if settings.get("fine_tune_type") == DORA else set())
    for key, full in stored.items():
        name, _, end = key.rpartition(".")
        if end not in wanted:
            raise PlanError(f"{file.path}: tensor {full[:200]!r} is none of {sorted(wanted)}")
        if name not in known:
            tied = name == name_of(config.names.head, config)
            raise PlanError(
                f"{file.path}: tensor {full[:200]!r} is of a module that "
                + ("is the embedding, in this model" if tied and config.tie_word_embeddings
                   else "the model does not have, or that takes no adapter here")
            )  # fmt: skip
        there.setdefault(name, set()).add(end)
    if not there:
        raise PlanError(f"{file.path}: the adapter has no tensors")
    own = _own_plan(settings, config.modules())
    if own is not None:  # mlx-lm's names stand for a layer's other modules, too: those stay zero
        asked = [name for name, (path, _) in known.items() if any(e.path == path for e in own[1])]
    else:
        asked = _asked(where, settings, known, prefix, config)
    for name in dict.fromkeys([*asked, *there]):
        lacking = wanted - there.get(name, set())
        if lacking:
            raise PlanError(
                f"{file.path}: {name} lacks {' and '.join(sorted(lacking))}, though {CONFIG} names "
                "the module"
            )
        if name not in asked:
            raise PlanError(
                f"{file.path}: there are tensors of {name}, which {CONFIG} does not name"
            )
    for name in asked:
        if config.tie_word_embeddings and known[name][0] == config.names.embedding:
            raise UnsupportedError(
                f"{file.path}: {name} is adapted, and is the model's output layer, too: mlx-lm "
                "adapts both, which no adapter of PEFT's does; fuse it with mlx_lm.fuse"
            )
    return {name: known[name] for name in known if name in asked}


def _bare(key: str) -> str:
    return key.removeprefix("language_model.")  # of a multimodal model


def _asked(
    where: Path,
    settings: Mapping[str, Any],
    known: Mapping[str, tuple[str, int]],
    prefix: str,
    config: LlamaConfig,
) -> list[str]:
    """The modules that mlx-lm makes LoRA of by these settings."""
    count = settings.get("num_layers", settings.get("lora_layers", -1))
    if isinstance(count, bool) or not isinstance(count, int):
        raise FileFormatError(f"{where}: num_layers is {count!r:.40}, no integer")
    keys = settings["lora_parameters"].get("keys")
    if keys is not None and not (
        isinstance(keys, list) and all(isinstance(key, str) for key in keys)
    ):
        raise FileFormatError(f"{where}: lora_parameters.keys is no list of names")
    if count > config.num_hidden_layers:
        raise PlanError(
            f"{where}: num_layers is {count}, and the model has {config.num_hidden_layers} layers"
        )
    first = config.num_hidden_layers - count if count > 0 else 0
    chosen = []
    for name in known:
        layer, inner = in_layer(name, prefix)
        if layer < 0:
            if keys is not None and name in keys:
                chosen.append(name)
        elif layer >= first and (keys is None or inner in keys):
            chosen.append(name)
    inner_names = {in_layer(name, prefix)[1] for name in known} | set(known)
    for key in keys or ():
        if _bare(key) not in inner_names:
            raise PlanError(f"{where}: lora_parameters.keys names {key[:200]!r}, which the model "
                            "does not have, or which takes no adapter here")  # fmt: skip
    return chosen


def _reason(file: SafeTensors, config: LlamaConfig, error: PlanError) -> PlanError:
    """Where the adapter is one of another base model, that is what the error says."""
    known = homes(config)
    shapes: dict[str, tuple[int, ...]] = {}
    for key in file.tensors:
        name, _, end = _bare(key).rpartition(".")
        path = known.get(name, (name, 0))[0]
        if end in ("lora_a", "lora_b") and len(file.shape(key)) == 2 and "embed" not in path:
            shapes[f"{path}.lora_{end[-1].upper()}.weight"] = file.shape(key)[::-1]
    why = misfit(shapes, config.modules(), some_layers=True)
    return PlanError(f"{file.path}: {why}") if why else error


def _numbers(file: SafeTensors, name: str) -> Array:
    key = name if name in file.tensors else f"language_model.{name}"
    if file.dtype(key) not in _FLOATS:
        raise PlanError(
            f"{file.path}: tensor {key!r} is {file.dtype(key).upper()}, expected F32, F16 or BF16"
        )
    array = np.array(file.load(key), np.float32, order="C")
    return check_finite(array, f"{file.path}: tensor {key!r}")


def _together(
    file: SafeTensors,
    halves: Mapping[tuple[str, int], tuple[Array, Array]],
    config: LlamaConfig,
    rank: int,
) -> dict[str, tuple[Array, Array]]:
    """Module path -> A [r, k] and B [d, r] as PEFT has them, in the model's order."""
    out: dict[str, tuple[Array, Array]] = {}
    for path, spec in config.modules().items():
        n = 2 if spec.kind == "experts" and not path.endswith(".down_proj") else 1
        found = [halves[path, part] for part in range(n) if (path, part) in halves]
        if not found:
            continue
        d = spec.d // n
        experts = spec.kind == "experts"
        want_a = (spec.experts, rank, spec.k) if experts else (spec.k, rank)
        want_b = (spec.experts, d, rank) if experts else (rank, d)
        for a, b in found:
            if a.shape != want_a or b.shape != want_b:
                raise PlanError(
                    f"{file.path}: {path}: lora_a has the shape {a.shape} and lora_b {b.shape}; "
                    f"the settings and the model say {want_a} and {want_b}"
                )
        if not experts:
            a, b = found[0]
            out[path] = np.ascontiguousarray(a.T), np.ascontiguousarray(b.T)
        else:
            out[path] = joined(path, spec, [halves.get((path, part)) for part in range(n)])
    return out


def _own_plan(
    settings: Mapping[str, Any], modules: Mapping[str, ModuleSpec]
) -> tuple[LoraConfig, Plan] | None:
    """PEFT's settings that are kept in mlx-lm's, and their plan; None where there are none."""
    own = settings.get(OWN)
    if not isinstance(own, dict) or not isinstance(own.get("adapter_config"), dict):
        return None
    try:
        config = LoraConfig.from_dict(own["adapter_config"], OWN)
        return config, resolve(config, modules)
    except PyloraError:
        return None


def _as_it_was(
    folder: Path,
    settings: Mapping[str, Any],
    parts: Mapping[str, tuple[Array, Array]],
    modules: Mapping[str, ModuleSpec],
    scale: float,
) -> Read | None:
    """The adapter by those settings; None where they are not what its tensors and scale say (any
    more): those count."""
    own = _own_plan(settings, modules)
    if own is None:
        return None
    config, plan = own
    bits = None
    try:
        if (folder / BITS).is_file():
            with SafeTensors(folder / BITS) as file:
                bits = np.array(file.view("low_bits"))
    except PyloraError:
        return None
    cut = {}
    for e in plan:
        A, B = parts[e.path]
        rank = A.shape[0] // e.experts
        if rank < e.r:
            return None
        wide_A = A.reshape(e.experts, rank, -1)
        wide_B = B.reshape(B.shape[0], rank, e.experts)
        if wide_A[:, e.r :].any() or wide_B[:, e.r :].any():
            return None
        cut[e.path] = (
            np.ascontiguousarray(wide_A[:, : e.r]).reshape(-1, A.shape[1]),
            np.ascontiguousarray(wide_B[:, : e.r]).reshape(B.shape[0], -1),
        )
    return restored(config, plan, cut, carry(plan.entries, over_rank=False), scale, bits)
