"""The questions in JSON: pylora's own answers are the expected ones, and wrong ones are noticed."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pylora.adapters.adapter import Adapter
from pylora.adapters.loraconfig import LoraConfig
from pylora.adapters.plan import resolve
from pylora.conformance.vectors import adapterfiles, converters, plans
from pylora.conformance.vectors.questions import Question, differences, write
from pylora.errors import PyloraError
from pylora.formats.gguf import deinterleave
from pylora.model.config import ModuleSpec

PLANS, FILES, CONVERTERS = plans.questions(), adapterfiles.questions(), converters.questions()


def modules_of(models: dict[str, Any], name: str) -> dict[str, ModuleSpec]:
    return {
        m["path"]: ModuleSpec(m["kind"], m["d"], m["k"])
        for m in models[name]
        if m["kind"] != "other"
    }


def planned(q: Question) -> dict[str, Any]:
    try:
        config = LoraConfig.from_dict(q.given["config"])
        plan = resolve(config, modules_of(plans.models(), q.given["model"]))
    except PyloraError as error:
        return {"refused": str(error)}
    return {"modules": {e.path: {"r": e.r, "alpha": e.alpha, "scale": e.scale} for e in plan}}


def test_names_are_single_and_every_statement_of_plans_and_keys_is_asked() -> None:
    for some in (PLANS, FILES, CONVERTERS):
        assert max(Counter(q.name for q in some).values()) == 1
    shown = {s for q in (*PLANS, *FILES) for s in q.spec}
    assert shown >= {f"T-{i}" for i in range(1, 8)} | {f"K-{i}" for i in (1, 2, 4, 5, 6, 7, 8)}


def test_pylora_plans_as_expected() -> None:
    wrong = {q.name: differences("plans", q.expect, planned(q)) for q in PLANS}
    assert not {name: why for name, why in wrong.items() if why}


@pytest.mark.parity
def test_peft_chooses_the_same_modules() -> None:
    """Where PEFT takes the settings at all: what it passes over in silence is refused here."""
    peft = pytest.importorskip("peft")
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.other import get_pattern_key

    looked = 0
    for q in PLANS:
        if "modules" not in q.expect or q.name.startswith("unknown-setting"):
            continue
        config = peft.LoraConfig(**{k: v for k, v in q.given["config"].items() if k != "peft_type"})
        if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
            continue  # PEFT looks at the model's classes for this
        paths = modules_of(plans.models(), q.given["model"])
        chosen = [path for path in paths if check_target_module_exists(config, path)]
        assert chosen == list(q.expect["modules"]) or set(chosen) == set(q.expect["modules"]), (
            q.name
        )
        for path, want in q.expect["modules"].items():
            r = config.rank_pattern.get(get_pattern_key(config.rank_pattern, path), config.r)
            key = get_pattern_key(config.alpha_pattern, path)
            alpha = config.alpha_pattern.get(key, config.lora_alpha)
            assert (r, alpha) == (want["r"], want["alpha"]), (q.name, path)
        looked += 1
    assert looked > 25


def test_pylora_reads_files_as_expected(tmp_path: Path) -> None:
    models = adapterfiles.models()
    write(tmp_path, "files", models, FILES)
    modules = modules_of(models, "small")
    wrong = {}
    for q in FILES:
        try:
            adapter = Adapter.load(tmp_path / q.given["folder"], modules)
            answer: dict[str, Any] = {"modules": {}}
            for path, lora in adapter.items():
                fields = {"scale": lora.scale, "A": lora.A.tolist(), "B": lora.B.tolist()}
                if lora.bias is not None:
                    fields["bias_B"] = lora.bias.tolist()
                answer["modules"][path] = fields
        except PyloraError as error:
            answer = {"refused": str(error)}
        wrong[q.name] = differences("files", q.expect, answer)
    assert not {name: why for name, why in wrong.items() if why}


# ---- converters ----------------------------------------------------------------------------------


def test_the_order_of_rows_is_the_one_that_pylora_undoes() -> None:
    rows = np.arange(48.0).reshape(24, 2)
    for heads in (1, 2, 3):
        assert (deinterleave(converters.interleave(rows, heads), heads) == rows).all()


@pytest.mark.parity
def test_gguf_names_are_those_of_the_package_gguf() -> None:
    gguf = pytest.importorskip("gguf")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 4)
    for path in ("model.embed_tokens", "lm_head"):
        assert names.get_name(path) == converters.gguf_name(path)
    for module in converters._BLOCK:
        path = f"model.layers.3.{module}"
        assert names.get_name(path) == converters.gguf_name(path)


def _update(form: str, side: Any, base: Any) -> dict[str, Any]:
    """path -> s B A [d,k] of an adapter in any form, by the tables of the specification: read here
    anew, from the side that is given and from the one that is expected."""
    tensors = {n: np.array(rows) for n, rows in side["tensors"].items()}
    out = {}
    if form == "peft":
        config = side["config"]
        for name, A in tensors.items():
            if "A" not in name.split("lora_")[1]:
                continue
            B = tensors[name.replace("_A", "_B")]
            path = name.removeprefix("base_model.model.").split(".lora_")[0]
            end = path.rsplit(".", 1)[-1]
            r = config.get("rank_pattern", {}).get(end, config["r"])
            alpha = config.get("alpha_pattern", {}).get(end, config["lora_alpha"])
            assert r == len(A)
            s = alpha / (np.sqrt(r) if config.get("use_rslora") else r)
            out[path] = s * B @ A if "embedding" not in name else s * (B @ A)
    elif form == "gguf":
        back = {converters.gguf_name(p): p for p in [*_paths(), "model.embed_tokens", "lm_head"]}
        alpha = side["metadata"]["adapter.lora.alpha"]
        for name, A in tensors.items():
            if not name.endswith("lora_a"):
                continue
            short, B = name.removesuffix(".weight.lora_a"), tensors[name[:-1] + "b"]
            A = A.T if short == "token_embd" else A
            if base["architecture"] == "llama" and short.endswith(("attn_q", "attn_k")):
                B = deinterleave(B, base["heads" if short.endswith("q") else "kv_heads"])
            out[back[short]] = (alpha / len(A) if alpha else 1) * B @ A
    elif form == "mlx":
        scale = side["config"]["lora_parameters"]["scale"]
        for name, a in tensors.items():
            if name.endswith("lora_a"):
                b = tensors[name[:-1] + "b"]
                out[name.removesuffix(".lora_a")] = scale * (a @ b).T
    else:  # loralib: of one linear layer, or of parts side by side
        for name, A in tensors.items():
            if not name.endswith("lora_A"):
                continue
            path, B = name.removesuffix(".lora_A"), tensors[name[:-1] + "B"]
            both = zip(base.get("parts", ["o_proj"]), base.get("enabled", [True]))
            enabled = [part for part, on in both if on]
            r = len(A) // len(enabled)
            parts = zip(enabled, np.split(A, len(enabled)), np.split(B, len(enabled)))
            for part, a, b in parts:
                out[f"{path.rsplit('.', 1)[0]}.{part}"] = base["lora_alpha"] / r * b @ a
    return out


def _paths() -> list[str]:
    return [f"model.layers.{i}.{m}" for i in range(2) for m in converters._BLOCK]


@pytest.mark.parametrize("q", CONVERTERS, ids=lambda q: q.name)
def test_both_sides_of_a_conversion_update_the_weights_alike(q: Question) -> None:
    given, expected = (
        _update(form, side, q.given["base"])
        for form, side in ((q.given["from"], q.given), (q.given["to"], q.expect))
    )
    assert set(given) == set(expected)
    for path, delta in given.items():
        assert np.abs(delta - expected[path]).max() < 1e-6 * np.abs(delta).max(), path


# ---- answers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plans", "files", "converters"])
def test_what_is_expected_is_right_and_any_change_of_it_is_wrong(kind: str) -> None:
    some = {"plans": PLANS, "files": FILES, "converters": CONVERTERS}[kind]
    for q in some:
        assert not differences(kind, q.expect, json.loads(json.dumps(q.expect)))
        if "refused" in q.expect:
            assert differences(kind, q.expect, {"modules": {}})
            assert not differences(kind, q.expect, {"refused": True})
            continue
        assert differences(kind, q.expect, {"refused": "I will not"})
        for changed in _changes(q.expect):
            assert differences(kind, q.expect, changed), (q.name, changed)


def _changes(expect: Any) -> Any:
    """The answer with one number larger by a thousandth, one name missing, one too many."""
    inner = "modules" if "modules" in expect else "tensors"
    first = next(iter(expect[inner]))
    yield {**expect, inner: {k: v for k, v in expect[inner].items() if k != first}}
    yield {**expect, inner: expect[inner] | {"another": expect[inner][first]}}
    copy = json.loads(json.dumps(expect))
    at = copy[inner][first]
    if inner == "modules":
        at["scale"] *= 1.001
    else:
        at[0][0] = at[0][0] * 1.001 + 1e-3
    yield copy


def test_which_alpha_a_gguf_file_has_is_free_but_not_what_it_does() -> None:
    q = next(q for q in CONVERTERS if q.name == "rslora-ranks-to-gguf")
    other = json.loads(json.dumps(q.expect))
    other["metadata"]["adapter.lora.alpha"] /= 2
    assert differences("converters", q.expect, other)
    for name, rows in other["tensors"].items():
        if name.endswith("lora_b"):
            other["tensors"][name] = [[2 * x for x in row] for row in rows]
    assert not differences("converters", q.expect, other)


@pytest.mark.parametrize("answer", [None, 3, [], "x", {}, {"modules": 3}, {"modules": {"q": 1}}])
def test_answers_of_any_kind_are_said_to_be_wrong(answer: Any) -> None:
    expect = {"modules": {"q": {"r": 2, "scale": 2.0}}}
    assert differences("plans", expect, answer)
