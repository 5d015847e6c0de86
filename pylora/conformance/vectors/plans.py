"""Which modules an adapter's settings choose, and with which rank, alpha and scale: the statements
S and T as cases in JSON. Expectations are written out here, not computed by pylora."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from pylora.conformance.vectors.questions import Question

LAYERS = 12
_SIZES = {"q": (16, 16), "k": (8, 16), "v": (8, 16), "o": (16, 16)}
_MLP = {"gate": (24, 16), "up": (24, 16), "down": (16, 24)}


def models() -> dict[str, list[dict[str, Any]]]:
    """Modules by model, in the order of the model. `kind` "other": it cannot take LoRA."""

    def module(path: str, kind: str, d: int, k: int) -> dict[str, Any]:
        return {"path": path, "kind": kind, "d": d, "k": k}

    llama = [module("model.embed_tokens", "embedding", 16, 40)]
    for i in range(LAYERS):
        at = f"model.layers.{i}"
        llama.append(module(f"{at}.input_layernorm", "other", 16, 16))
        llama += [module(f"{at}.self_attn.{n}_proj", "linear", *s) for n, s in _SIZES.items()]
        llama += [module(f"{at}.mlp.{n}_proj", "linear", *s) for n, s in _MLP.items()]
    llama.append(module("lm_head", "linear", 40, 16))
    nested = [
        module(f"model.layers.{i}.experts.{e}.down_proj", "linear", 6, 10)
        for i in range(3)
        for e in range(2)
    ]
    nested += [module(f"vision.blocks.{i}.q_proj", "linear", 6, 6) for i in range(2)]
    return {"llama": llama, "nested": nested}


def _at(names: str, layers: Iterable[int] = range(LAYERS)) -> list[str]:
    """Paths of projections such as "q v down" in these layers."""
    wing = {n: "mlp" if n in _MLP else "self_attn" for n in names.split()}
    return [f"model.layers.{i}.{wing[n]}.{n}_proj" for i in layers for n in wing]


_LEFT_OUT: Any = object()
ALL = _at("q k v o gate up down")
_NESTED = [f"model.layers.{i}.experts.{e}.down_proj" for i in range(3) for e in range(2)]


def questions() -> list[Question]:
    """All cases; without other settings r = 8 and lora_alpha = 16, so the scale is 2."""
    out: list[Question] = []

    def put(name: str, spec: str, settings: Mapping[str, Any], expect: Any, model: str) -> None:
        config: dict[str, Any] = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, **settings}
        config = {key: value for key, value in config.items() if value is not _LEFT_OUT}
        given = {"model": model, "config": config}
        out.append(Question(name, tuple(spec.split()), given, expect))

    def chosen(
        name: str,
        spec: str,
        paths: Iterable[str],
        model: str = "llama",
        ranks: Mapping[str, int] | None = None,
        alphas: Mapping[str, float] | None = None,
        **settings: Any,
    ) -> None:
        """`ranks`, `alphas`: of the paths that have their own."""
        modules = {}
        for path in paths:
            r = (ranks or {}).get(path, settings.get("r", 8))
            alpha = (alphas or {}).get(path, settings.get("lora_alpha", 16))
            root = math.sqrt(r) if settings.get("use_rslora") else r
            modules[path] = {"r": r, "alpha": alpha, "scale": alpha / root}
        put(name, spec, settings, {"modules": modules}, model)

    def refused(name: str, spec: str, why: str, model: str = "llama", **settings: Any) -> None:
        put(name, spec, settings, {"refused": why}, model)

    q, v = ["q_proj"], ["q_proj", "v_proj"]
    one = "model.layers.1.self_attn.q_proj"

    chosen("list", "T-1", _at("q v"), target_modules=v)
    chosen("list-twice", "T-1", _at("q"), target_modules=["q_proj", "q_proj"])
    chosen("list-of-two-parts", "T-1", _at("q"), target_modules=["self_attn.q_proj"])
    chosen("list-whole-path", "T-1", [one], target_modules=[one])
    chosen("list-end-with-number", "T-1", [one], target_modules=["1.self_attn.q_proj"])
    chosen("list-output-layer", "T-1", ["lm_head"], target_modules=["lm_head"])
    chosen("list-embedding", "T-1", ["model.embed_tokens"], target_modules=["embed_tokens"])
    refused("list-no-end", "T-1 T-6", "'proj' is not what follows a dot", target_modules=["proj"])
    refused("list-prefix", "T-1 T-6", "no path ends so", target_modules=["model.layers.1"])
    refused("list-no-regex", "T-1 T-6", "a list holds names", target_modules=[".*q_proj"])
    refused("list-dot-is-a-dot", "T-1 T-6", "'.' is no wildcard here", target_modules=["q.proj"])
    refused("list-case", "T-1 T-6", "case counts", target_modules=["Q_PROJ"])
    refused(
        "list-one-unknown", "T-6", "'w_proj' matches nothing", target_modules=["q_proj", "w_proj"]
    )
    refused("list-empty", "T-6", "nothing is chosen", target_modules=[])
    refused("list-null", "T-6", "nothing is chosen", target_modules=None)
    refused("list-norm", "T-7", "a norm cannot take LoRA", target_modules=["input_layernorm"])

    chosen("regex", "T-2", [one], target_modules=r"model\.layers\.1\..*q_proj")
    chosen("regex-wildcard-dot", "T-2", _at("q", (1, 10, 11)), target_modules=r".*s.1.*q_proj")
    chosen("regex-groups", "T-2", _at("q v", (0, 2)), target_modules=r".*\.(0|2)\..*\.[qv]_proj")
    chosen("all-linear", "T-2", ALL, target_modules="all-linear")
    chosen("all-linear-any-case", "T-2", ALL, target_modules="All-Linear")
    refused("regex-part", "T-2 T-6", "it must match the whole path", target_modules="q_proj")
    refused("regex-start", "T-2 T-6", "it must match to the end", target_modules=r"model\.layers")
    refused("regex-invalid", "T-2", "not a regular expression", target_modules="(q_proj")
    refused("regex-empty", "T-6", "nothing is chosen", target_modules="")

    chosen("exclude", "T-3", _at("q"), target_modules=v, exclude_modules=["v_proj"])
    chosen("exclude-regex", "T-3", _at("q", range(2, LAYERS)), target_modules=q,
           exclude_modules=r".*\.[01]\..*")  # fmt: skip
    chosen("exclude-wins", "T-3", _at("q", range(1)), exclude_modules=["1.self_attn.q_proj"],
           target_modules=["model.layers.0.self_attn.q_proj", one])  # fmt: skip
    chosen("exclude-from-all", "T-2 T-3", _at("q k v o gate up"), target_modules="all-linear",
           exclude_modules=["down_proj"])  # fmt: skip
    refused("exclude-all", "T-3 T-6", "nothing is left", target_modules=q, exclude_modules=q)
    refused("exclude-unknown", "T-3 T-6", "it matches nothing", target_modules=q,
            exclude_modules=["w_proj"])  # fmt: skip
    refused("exclude-regex-part", "T-3 T-6", "it must match a whole path", target_modules=q,
            exclude_modules="v_proj")  # fmt: skip

    chosen("layers", "T-4", _at("q", (0, 11)), target_modules=q, layers_to_transform=[0, 11])
    chosen("layers-number", "T-4", [one], target_modules=q, layers_to_transform=1)
    chosen("layers-none", "T-4", _at("q"), target_modules=q, layers_to_transform=[])
    chosen("layers-whole-path-stays", "T-4", [*_at("q", (0,)), "model.layers.3.mlp.down_proj"],
           target_modules=["q_proj", "model.layers.3.mlp.down_proj"],
           layers_to_transform=[0])  # fmt: skip
    chosen("layers-named-whole", "T-4", [*_at("q", (2,)), "lm_head"], layers_to_transform=[2],
           target_modules=["q_proj", "lm_head"])  # fmt: skip
    chosen("layers-pattern", "T-4", [one], target_modules=q, layers_to_transform=[1],
           layers_pattern="layers")  # fmt: skip
    chosen("layers-first-number", "T-4", _NESTED[2:4], "nested", target_modules=["down_proj"],
           layers_to_transform=[1])  # fmt: skip
    chosen("layers-number-of-pattern", "T-4", _NESTED[1::2], "nested", layers_to_transform=[1],
           target_modules=["down_proj"], layers_pattern=["experts"])  # fmt: skip
    chosen("layers-none-in-path", "T-4", _at("q", (2,)), layers_to_transform=[2],
           target_modules=["q_proj", "embed_tokens"])  # fmt: skip
    chosen("layers-pattern-none-in-path", "T-4", _at("q", (2,)), layers_to_transform=[2],
           layers_pattern=["layers"], target_modules=["q_proj", "embed_tokens"])  # fmt: skip
    refused("layers-beyond", "T-4 T-6", "there is no layer 12", target_modules=q,
            layers_to_transform=[0, 12])  # fmt: skip
    refused("layers-of-regex", "T-4", "a regular expression names layers itself",
            target_modules=".*q_proj", layers_to_transform=[0])  # fmt: skip
    refused("layers-pattern-unknown", "T-4 T-6", "no path has 'h'", target_modules=q,
            layers_to_transform=[0], layers_pattern=["h"])  # fmt: skip

    chosen("rank-pattern", "S-2 T-5", _at("q v"), ranks=dict.fromkeys(_at("v"), 4),
           target_modules=v, rank_pattern={"v_proj": 4})  # fmt: skip
    chosen("rank-pattern-one-layer", "S-2 T-5", _at("q"), ranks={one: 32}, target_modules=q,
           rank_pattern={r"layers\.1\.self_attn\.q_proj": 32})  # fmt: skip
    chosen("rank-pattern-whole-path", "T-5", _at("q"), ranks={one: 2}, target_modules=q,
           rank_pattern={one: 2})  # fmt: skip
    chosen("rank-pattern-first-key", "T-5", _at("q"), ranks=dict.fromkeys(_at("q"), 2),
           target_modules=q, rank_pattern={"q_proj": 2, one: 16})  # fmt: skip
    chosen("rank-pattern-first-key-again", "T-5", _at("q"), target_modules=q,
           ranks=dict.fromkeys(_at("q"), 2) | {one: 16},
           rank_pattern={one: 16, "q_proj": 2})  # fmt: skip
    chosen("rank-pattern-alternatives", "T-5", _at("q v o"), target_modules=[*v, "o_proj"],
           ranks=dict.fromkeys(_at("q o"), 3), rank_pattern={"q_proj|o_proj": 3})  # fmt: skip
    chosen("rank-pattern-grouped", "T-5", _at("q v"), ranks=dict.fromkeys(_at("v"), 3),
           target_modules=v, rank_pattern={"v_proj|proj": 3})  # fmt: skip
    chosen("alpha-pattern", "S-2 T-5", _at("q v"), alphas=dict.fromkeys(_at("q"), 5.0),
           target_modules=v, alpha_pattern={"self_attn.q_proj": 5.0})  # fmt: skip
    chosen("both-patterns", "S-2 T-5", _at("q v"), ranks=dict.fromkeys(_at("q"), 4),
           alphas=dict.fromkeys(_at("v"), 1.0), target_modules=v, rank_pattern={"q_proj": 4},
           alpha_pattern={"v_proj": 1.0})  # fmt: skip
    chosen("rslora", "S-1", _at("q"), target_modules=q, use_rslora=True)
    chosen("rslora-rank-pattern", "S-1 S-2", _at("q v"), ranks=dict.fromkeys(_at("v"), 64),
           target_modules=v, use_rslora=True, rank_pattern={"v_proj": 64})  # fmt: skip
    chosen("alpha-fraction", "S-1", _at("q"), target_modules=q, r=3, lora_alpha=0.7)
    eights = dict.fromkeys(_at("q"), 8)
    chosen("left-out", "S-1 K-1", _at("q"), target_modules=q, r=_LEFT_OUT, lora_alpha=_LEFT_OUT,
           ranks=eights, alphas=eights)  # fmt: skip
    chosen("rank-1", "S-1", _at("q"), target_modules=q, r=1, lora_alpha=1)
    refused("rank-pattern-part", "T-5 T-6", "'proj' is not what follows a dot", target_modules=q,
            rank_pattern={"proj": 4})  # fmt: skip
    refused("rank-pattern-prefix", "T-5 T-6", "it must match to the end", target_modules=q,
            rank_pattern={"model.layers.1": 4})  # fmt: skip
    refused("rank-pattern-not-chosen", "T-5 T-6", "v_proj is not adapted", target_modules=q,
            rank_pattern={"v_proj": 4})  # fmt: skip
    refused("alpha-pattern-not-chosen", "T-5 T-6", "v_proj is not adapted", target_modules=q,
            alpha_pattern={"v_proj": 4})  # fmt: skip
    refused("rank-0-in-pattern", "S-2", "a rank is positive", target_modules=q,
            rank_pattern={"q_proj": 0})  # fmt: skip
    refused("rank-0", "S-1", "a rank is positive", target_modules=q, r=0)
    refused("rank-fraction", "S-1", "a rank is whole", target_modules=q, r=2.5)
    refused("alpha-text", "S-1", "alpha is a number", target_modules=q, lora_alpha="16")
    refused("unknown-setting", "K-6", "nobody knows what it changes", target_modules=q,
            scale_by_depth=2)  # fmt: skip
    refused("unknown-setting-true", "K-6", "nobody knows what it changes", target_modules=q,
            use_depth=True)  # fmt: skip
    refused("unknown-setting-list", "K-6", "nobody knows what it changes", target_modules=q,
            depths=[1])  # fmt: skip
    chosen("unknown-setting-false", "K-6", _at("q"), target_modules=q, use_depth=False, depth=0,
           depths=[], by_depth={}, depth_name="")  # fmt: skip
    chosen("unknown-setting-empty", "K-6", _at("q"), target_modules=q, scale_by_depth=None)
    return out
