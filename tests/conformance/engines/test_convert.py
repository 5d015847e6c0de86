"""Converters: what they write is compared as numbers, and what they drop is named."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from suites import book

from pylora.conformance.engines import verdict as v
from pylora.conformance.engines.convert import Conversion, judge
from pylora.conformance.engines.deltas import read
from pylora.conformance.engines.run import Finding
from pylora.conformance.suite import adapters, bases, cases, forms
from pylora.errors import ConfigError

COPY = f"""{sys.executable} -c "
import json, shutil, sys
source, out, fault = sys.argv[1:]
shutil.copytree(source, out)
path = out + '/adapter_config.json'
config = json.load(open(path))
if fault == 'alpha':
    config['lora_alpha'] *= config['r']
if fault == 'rslora':
    config.pop('use_rslora')
if fault == 'pattern':
    config.pop('alpha_pattern', None)
json.dump(config, open(path, 'w'))
if fault == 'refuse':
    sys.exit('I will not')
if fault == 'nothing':
    shutil.rmtree(out)
if fault == 'hang':
    import time
    time.sleep(60)
" {{in}} {{out}} """


def outcome(fault: str, only: tuple[str, ...], timeout: float = 30.0) -> dict[str, Finding]:
    found: list[Finding] = []
    Conversion(book(), COPY + fault, "peft", timeout, found.append, only).all(["llama"])
    return {f.test: f for f in found}


def test_a_copy_is_right_and_takes_what_must_be_refused() -> None:
    tests = ("alpha", "bias-all", "lora-bias", "dora", "refuse nan", "refuse pickle")
    found = {t: f.verdict for t, f in outcome("none", tests).items()}
    assert list(found) == list(tests)
    assert [found[t].kind for t in tests[:3]] == [v.RIGHT] * 3
    assert all(found[t].error == 0 for t in tests[:3])
    assert found["dora"].kind == v.RIGHT
    assert found["refuse nan"].kind == v.WRONG and "NaN" in found["refuse nan"].text


@pytest.mark.parametrize(
    ("fault", "test", "kind", "rule"),
    [
        ("alpha", "alpha", v.WRONG, "alpha-as-scale"),
        ("rslora", "rslora", v.WRONG, "rslora-ignored"),
        ("pattern", "alpha-pattern", v.WRONG, "default-alpha"),
        ("refuse", "alpha", v.FAILED, ""),
        ("refuse", "embedding", v.REFUSED, ""),
        ("refuse", "refuse nan", v.RIGHT, ""),
        ("nothing", "alpha", v.FAILED, ""),
        ("nothing", "refuse nan", v.RIGHT, ""),
    ],
)
def test_a_converter_is_told_what_it_does(fault: str, test: str, kind: str, rule: str) -> None:
    (found,) = outcome(fault, (test,)).values()
    assert (found.verdict.kind, found.verdict.rule) == (kind, rule), found.verdict


def test_a_converter_that_hangs_is_ended() -> None:
    (found,) = outcome("hang", ("alpha",), 1.0).values()
    assert found.verdict.kind == v.FAILED and "within 1 s" in found.verdict.text


@pytest.mark.parametrize("form", ["peft", "gguf", "mlx"])
@pytest.mark.parametrize("tied", [False, True])
def test_every_form_says_the_same_numbers(form: str, tied: bool, tmp_path: Path) -> None:
    """Each form is read back, and is the adapter's own update, or says that it cannot be."""
    base = bases.make("llama", tied, 5)
    bases.write_hf(base, tmp_path / "base")
    unsaid = set()
    for case in cases.CASES:
        if not case.of(base) or (form != "gguf" and "modules_to_save" in case.extra):
            continue
        adapter = adapters.draw(case, base, 5)
        try:
            forms.FORMS[form](adapter, tmp_path / case.name)
        except forms.CannotSay:
            unsaid.add(case.name)
            continue
        verdict = judge(adapter, read(tmp_path / case.name, tmp_path / "base"))
        assert verdict.kind == v.RIGHT, (case.name, verdict)
    biases = set() if tied else {"bias-all", "bias-lora-only", "lora-bias"}
    outside: dict[str, set[str]] = {
        "gguf": biases | ({"head"} if tied else {"dora", "modules-to-save"}),
        "mlx": biases | ({"head", "embedding"} if tied else set()),
        "peft": set(),
    }
    assert unsaid == outside[form]


def test_a_merged_model_is_compared_with_the_base(tmp_path: Path) -> None:
    base = bases.make("llama", False, 5)
    bases.write_hf(base, tmp_path / "base")
    adapter = adapters.draw(cases.CASES[0], base, 5)
    merged = {n: w.copy() for n, w in base.weights.items()}
    for path in adapter.loras:
        merged[f"{path}.weight"] = adapter.moved(path).astype(np.float32)

    def written(weights: bases.Arrays, name: str) -> Path:
        bases.write_hf(bases.Base(name, "llama", base.config, weights), tmp_path / name)
        return tmp_path / name

    good = judge(adapter, read(written(merged, "good"), tmp_path / "base"))
    assert (good.kind, good.text) == (v.RIGHT, "a merged model")
    nothing = judge(adapter, read(written(base.weights, "nothing"), tmp_path / "base"))
    assert (nothing.kind, nothing.rule) == (v.WRONG, "ignored")
    merged["model.norm.weight"] = merged["model.norm.weight"] * 2
    more = judge(adapter, read(written(merged, "more"), tmp_path / "base"))
    assert more.kind == v.WRONG and "model.norm.weight" in more.text


@pytest.mark.parametrize("command", ["convert {in}", "convert {out}", "convert"])
def test_a_command_without_both_places_is_refused(command: str) -> None:
    with pytest.raises(ConfigError, match="the command must have"):
        Conversion(book(), command, "peft", 1.0, print)


def test_an_mlx_file_of_another_scale_is_named(tmp_path: Path) -> None:
    base = bases.make("llama", False, 5)
    bases.write_hf(base, tmp_path / "base")
    adapter = adapters.draw(cases.CASES[0], base, 5)
    forms.write_mlx(adapter, tmp_path / "mlx")
    file = tmp_path / "mlx" / "adapter_config.json"
    config = json.loads(file.read_text())
    config["lora_parameters"]["scale"] = adapter.config["lora_alpha"]
    file.write_text(json.dumps(config))
    assert judge(adapter, read(tmp_path / "mlx", tmp_path / "base")).rule == "alpha-as-scale"
