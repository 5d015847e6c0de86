"""A correct engine passes; every fault is found, and called by its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tokenizers")

from fake_engine import FAULTS, SEQUENCES, TIED, Careless, Dora, Engine, SharedPrefix
from suites import book, found, outcome

from pylora.conformance.engines import verdict as v
from pylora.conformance.engines.run import SEQUENCES as TESTS
from pylora.conformance.engines.run import failed
from pylora.conformance.suite.wrong import SENTENCES


@pytest.mark.parametrize("base", ["llama", "llama-tied"])
def test_a_correct_engine_is_right_in_everything(base: str) -> None:
    findings = outcome(Engine, base=base)
    kinds = {f.test: f.verdict.kind for f in findings}
    assert all(k == v.RIGHT for k in kinds.values()), kinds
    (entry,) = book().bases([base])
    refused = {f"refuse {r['name']}" for r in entry["refuse"] if r["form"] == "peft"}
    assert set(kinds) == {"base", *TESTS, *refused, *(c["name"] for c in entry["cases"])}
    assert not list(failed(findings))
    # Float32 uses a part of what it is allowed, and no more.
    used = [f.verdict.error / f.verdict.tolerance for f in findings if f.verdict.error]
    assert 1e-3 < max(used) < 0.3


@pytest.mark.parametrize("fault", [*FAULTS, *TIED, *SEQUENCES])
def test_a_fault_is_called_by_its_name(fault: str) -> None:
    test, rule, kind = {**FAULTS, **TIED, **SEQUENCES}[fault]
    base = "llama-tied" if fault in TIED else "llama"
    verdict = found(outcome(kind, ("alpha", "second", test), base), test)
    assert verdict.kind == v.WRONG
    assert verdict.rule == rule or (rule.endswith(":") and verdict.rule.startswith(rule))
    assert verdict.text


def test_every_wrong_rule_has_a_faulty_engine() -> None:
    shown = {rule for table in (FAULTS, TIED) for _, rule, _ in table.values()}
    assert set(SENTENCES) <= shown


def test_an_engine_that_has_dora_is_right() -> None:
    assert found(outcome(Dora, ("dora",)), "dora").kind == v.RIGHT


def test_an_engine_that_takes_anything_is_wrong_about_each_that_must_be_refused() -> None:
    findings = outcome(Careless)
    verdicts = {f.test: f.verdict for f in findings if f.test.startswith("refuse ")}
    refused = {t.removeprefix("refuse ") for t, f in verdicts.items() if f.kind == v.RIGHT}
    # What it cannot make a product of raises in its model; nothing else does.
    assert refused <= {"wrong-rank", "huge-rank"}, refused
    assert verdicts["refuse extra-module"].kind == v.WRONG
    assert "the base's" in verdicts["refuse pickle"].text


@pytest.mark.parametrize("kept", [13, 32, 43])
def test_a_foreign_cache_is_named_however_much_of_it_was_used(kept: int) -> None:
    class Cache(SharedPrefix):
        pass

    Cache.kept = kept
    verdict = found(outcome(Cache, ("alpha", "second", "prefix-cache")), "prefix-cache")
    assert verdict.kind == v.WRONG
    assert f"the first {kept} of 44 tokens" in verdict.text or f"prefix:base:{kept}" == verdict.rule


def test_in_a_coarse_precision_nothing_is_claimed_that_cannot_be_told() -> None:
    verdict = found(outcome(Engine, ("alpha",), precision="int4"), "alpha")
    assert verdict.kind == v.CANNOT_TELL
    assert found(outcome(Engine, ("alpha",), precision="bf16"), "alpha").kind == v.RIGHT


def test_a_base_that_is_wrong_ends_the_tests_of_it() -> None:
    class Other(Engine):
        def __init__(self, base: Path) -> None:
            super().__init__(base.parent / "llama-tied")

    (only,) = outcome(Other)
    assert (only.test, only.verdict.kind) == ("base", v.WRONG)
    assert "nothing can be said about adapters" in only.verdict.text


def test_a_precision_that_would_allow_the_base_is_named() -> None:
    class Half(Engine):
        def logits(self, *args: Any) -> Any:
            logits = super().logits(*args)
            return logits * (1 + 2.0**-12)

    (only,) = outcome(Half)
    assert "--precision tf32 would allow it" in only.verdict.text


def test_an_engine_that_dies_ends_in_sentences(monkeypatch: pytest.MonkeyPatch) -> None:
    class Dies(Engine):
        def load(self, name: str, path: Path) -> None:
            if name == "rslora":
                raise SystemExit  # the connection closes without an answer
            super().load(name, path)

        def complete(self, body: dict[str, Any]) -> dict[str, Any]:
            if body.get("model") == "rslora":
                raise SystemExit
            return super().complete(body)

    findings = outcome(Dies, ("alpha", "rslora", "second", "in-flight"))
    assert found(findings, "rslora").kind == v.FAILED
    assert found(findings, "in-flight").kind == v.RIGHT
