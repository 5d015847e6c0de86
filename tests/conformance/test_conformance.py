"""The kit itself: what it passes, fails, reports and prints."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("hypothesis")
pytest.importorskip("ml_dtypes")

from pylora.conformance import LAWS, run
from pylora.conformance.bounds import layer as bounds
from pylora.conformance.bounds.running import Running
from pylora.conformance.correct.plain import Correct
from pylora.conformance.laws import oracle, registry
from pylora.conformance.problems.layers import KINDS, elements, laid_out
from pylora.conformance.protocol import find
from pylora.conformance.running.pytest_class import LoRAConformance
from pylora.conformance.running.report import text
from pylora.conformance.testcase import Problem
from pylora.errors import ConfigError

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


class WrongScale(Correct):
    """At the top of a module, so that a counterexample can import it."""

    def forward(self, x, W, A, B, scale, bias=None):
        return super().forward(x, W, A, B, scale * scale, bias)


class OnlyForward:
    def forward(self, x, W, A, B, scale, bias=None):
        return Correct().forward(x, W, A, B, scale, bias)


class WrongRank(Correct):
    def plan(self, config, modules):
        return {path: (r + 1, a, s) for path, (r, a, s) in super().plan(config, modules).items()}


class KeepsDirty(Correct):
    def load(self, directory, modules):
        try:
            return super().load(directory, modules)
        except ValueError:
            return {}


class TestCorrectOnC(LoRAConformance):
    """The pytest class, on a few laws of each kind."""

    implementation = Correct
    examples = 8
    laws = ("S1", "F1", "B3", "M6", "D2", "X6", "N4", "P5", "I3", "K1", "T1", "A2")


def status(report):
    return {o.law.id: o.status for o in report.outcomes}


def test_what_is_absent_is_not_tested_and_never_passed():
    found = status(run(OnlyForward, examples=3))
    assert found["F1"] == "passed"
    for law in LAWS.values():
        if not set(law.needs) <= {"forward", "float32"}:
            assert found[law.id] == "not tested"


def test_a_violation_is_found_shrunk_and_measured():
    report = run(WrongScale, ["F1", "F2", "S1"], examples=60)
    assert status(report) == {"F1": "FAILED", "F2": "FAILED", "S1": "passed"}
    assert not report.ok
    first = report.outcomes[0]
    assert first.ratio > 1000 and first.found_at is not None
    assert "np.array([[1.0]], np.float32)" in first.counterexample  # one token, one feature
    assert "error / bound" in text(report)


@pytest.mark.parametrize(
    "cls, law", [(WrongScale, "F1"), (WrongScale, "N7"), (WrongRank, "T1"), (KeepsDirty, "K6")]
)
def test_a_counterexample_is_a_program_that_fails_alone(cls, law, tmp_path):
    (outcome,) = run(cls, [law], examples=60).outcomes
    assert outcome.status == "FAILED"
    source = outcome.counterexample
    source = source.replace(f"from {cls.__module__} import", "from test_conformance import")
    done = subprocess.run(
        [sys.executable, "-c", source],
        cwd=tmp_path,
        env={"PYTHONPATH": f"{HERE}:{ROOT}", "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "AssertionError" in done.stderr or "Violation" in done.stderr
    mended = source.replace(cls.__name__, "Correct")
    done = subprocess.run(
        [sys.executable, "-c", mended],
        cwd=tmp_path,
        env={"PYTHONPATH": f"{HERE}:{ROOT}", "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_an_implementation_that_raises_is_broken_there_and_the_run_goes_on():
    class NoEmpty(Correct):
        def forward(self, x, W, A, B, scale, bias=None):
            if len(x) == 0:
                raise ValueError("an empty batch")
            return super().forward(x, W, A, B, scale, bias)

    report = run(NoEmpty, ["F2", "E1", "B2"], examples=60)
    assert status(report) == {"F2": "BROKEN", "E1": "BROKEN", "B2": "passed"}
    assert not report.ok
    outcome = report.outcomes[0]
    assert 0 < outcome.raised < outcome.examples == 60
    assert "an empty batch" in outcome.reason


@pytest.mark.parametrize(
    "wrong, said",
    [
        (lambda y: y[:, :0], "has shape"),
        (lambda y: y.astype(np.float64), "has dtype float64"),
        (lambda y: y.tolist(), "expected a NumPy array"),
        (lambda y: None, "expected a NumPy array"),
    ],
)
def test_results_of_the_wrong_form_are_broken(wrong, said):
    class Odd(Correct):
        def forward(self, x, W, A, B, scale, bias=None):
            return wrong(super().forward(x, W, A, B, scale, bias))

    (outcome,) = run(Odd, ["F1"], examples=5).outcomes
    assert outcome.status == "BROKEN" and said in outcome.reason


def test_a_dtype_that_is_claimed_and_not_delivered_is_broken():
    class Liar(OnlyForward):
        dtypes = ("float32", "float64", "int3")

        def forward(self, x, W, A, B, scale, bias=None):
            return super().forward(x, W, A, B, scale, bias).astype(np.float32)

    report = run(Liar, ["F4"], examples=5)
    assert status(report) == {"F4": "BROKEN"}
    assert "int3" in report.warnings[0]


def test_not_implemented_is_not_tested():
    class Partly(Correct):
        def scaling(self, alpha, r, use_rslora):
            if use_rslora:
                raise NotImplementedError("no rsLoRA")
            return alpha / r

    assert status(run(Partly, ["S1", "S2"], examples=5)) == {"S1": "passed", "S2": "not tested"}


def test_runs_are_repeatable():
    first, second = (run(WrongScale, ["F1"], examples=40, seed=3).outcomes[0] for _ in range(2))
    assert first.counterexample == second.counterexample
    assert first.found_at == second.found_at


def test_unknown_law():
    with pytest.raises(ConfigError, match="F99"):
        run(Correct, ["F99"])


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("Mine", "write package.module:Class"),
        (":Mine", "write package.module:Class"),
        ("no_such:Mine", "there is no module 'no_such'; its folder must be"),
        ("mine.py:Mine", "without a folder or .py"),
        ("mine:Other", "mine has no 'Other'; what has a method forward there: Mine, Asks"),
        ("mine:Mine.inner", "mine.Mine has no 'inner'"),
        ("mine:Nothing", "has no method forward"),
        ("mine:number", "has no method forward"),
        ("mine:Asks", "raised TypeError: .*; the class is made without arguments"),
        ("torn:Mine", "importing torn raised SyntaxError"),
        ("half:Mine", "importing half raised ModuleNotFoundError: No module named 'absent_one'"),
    ],
)
def test_a_path_that_names_nothing_is_told_in_a_sentence(tmp_path, monkeypatch, path, said):
    (tmp_path / "mine.py").write_text(
        "class Mine:\n    def forward(self, *a): pass\n"
        "class Asks(Mine):\n    def __init__(self, device): pass\n"
        "class Nothing: pass\nnumber = 7\n"
    )
    (tmp_path / "torn.py").write_text("def (")
    (tmp_path / "half.py").write_text("import absent_one")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=said):
        find(path)
    assert find("mine:Mine").forward() is None


def test_every_bound_is_within_a_thousandth_of_being_reached():
    """A bound that nothing comes near to would let mistakes through."""

    def bits(maths: str) -> bool:  # equality, or an implementation with itself
        return "exact" in maths or "as F17" in maths

    # Laws that ask for equality have a bound where 16 bits do not hold the sums; it is not theirs.
    asked = [law.id for law in LAWS.values() if not bits(law.maths)]
    with_bound = [o for o in run(Correct, asked, examples=25, seed=5).outcomes if o.tightness > 0]
    assert len(with_bound) >= 20
    # The analysis of a whole layer takes each norm's divisor at its worst; A40 has four of them.
    least = {"A40": 2e-4}
    loose = {o.law.id: o.tightness for o in with_bound if o.tightness < least.get(o.law.id, 1e-3)}
    assert loose == {}
    assert all(o.tightness <= 1 for o in with_bound)


@pytest.mark.parametrize("kind", KINDS)
def test_layouts_hold_the_same_numbers(kind, rng):
    a = elements(rng, (5, 7), kind, "float32")
    views = [
        laid_out(a, n) for n in ("C", "F", "stepped", "negative", "readonly", "part", "columns")
    ]
    assert all(np.array_equal(v, a) for v in views)
    assert views[3].strides[0] < 0 and not views[4].flags.writeable
    assert not views[2].flags.c_contiguous and not views[6].flags.c_contiguous


def test_the_forward_bound_holds_for_any_order_and_is_broken_by_less_precision(rng):
    x, W, A, B = (
        rng.normal(size=s).astype(np.float32) for s in ((9, 40), (8, 40), (3, 40), (8, 3))
    )
    lora = [(A, B, 2.0)]
    want, bound = oracle.forward(x, W, lora), bounds.forward(x, W, lora)
    for y in (
        x @ W.T + np.float32(2) * ((x @ A.T) @ B.T),
        x @ (W + np.float32(2) * (B @ A)).T,
        x[:, ::-1] @ W[:, ::-1].T + ((np.float32(2) * x) @ (B @ A).T),
    ):
        assert (np.abs(y - want) <= bound).all()
    half = lambda a: a.astype(np.float16).astype(np.float32)
    y = half(x) @ half(W).T + np.float32(2) * ((half(x) @ half(A).T) @ half(B).T)
    assert (np.abs(y - want) > bound).any()


def test_running_error_analysis_encloses_float32(rng):
    a, b = (rng.normal(size=(6, 6)).astype(np.float32) for _ in range(2))

    def compute(a, b, exp, total):
        c = a @ b - a * b
        e = exp(c - 9.0)
        return total(e @ b)

    got = compute(a, b, np.exp, lambda v: v.sum(axis=-1, keepdims=True))
    want = compute(Running(a), Running(b), lambda v: v.exp(), lambda v: v.sum())
    assert (np.abs(got - want.value) <= want.error).all()
    assert (want.error < 1e-2 * np.abs(want.value).max()).all()


@pytest.mark.parametrize("off", [1e-6, 0.1, 3.0, 80.0])
def test_softmax_encloses_scores_that_are_hardly_known(rng, off):
    """A bound of scores beyond 1, as long rows in bfloat16 have, still bounds the shares."""
    scores = 5 * rng.normal(size=(40, 6))
    scores -= scores.max(axis=1, keepdims=True)
    want = Running(scores, off).softmax()
    moved = np.exp(scores + off * rng.uniform(-1, 1, scores.shape))
    moved /= moved.sum(axis=1, keepdims=True)
    assert (np.abs(moved - want.value) <= want.error).all()
    assert (want.error <= 1 + 1e-5).all()


def test_problems_say_what_they_have():
    with pytest.raises(AttributeError, match="it has x"):
        _ = Problem(x=1).y


def test_laws_cite_statements_that_exist_and_are_listed_in_the_docs():
    spec = (ROOT / "docs" / "spec.md").read_text(encoding="utf-8")
    listed = (ROOT / "docs" / "laws.md").read_text(encoding="utf-8")
    for law in LAWS.values():
        assert law.spec and all(f"**{statement}**" in spec for statement in law.spec), law.id
    assert listed.endswith(registry.table()), (
        "python -m pylora.conformance.laws.registry has another table"
    )


def test_command_line(capsys):
    pytest.importorskip("typer")
    from pylora.commands.cli import main

    args = ["conformance", "--examples", "4", "--law", "F2", "--law", "S1"]
    assert main([*args, "pylora.conformance.correct.plain:Correct"]) == 0
    assert "2 passed" in capsys.readouterr().out
    args[2] = "40"
    assert main([*args, f"{__name__}:WrongScale"]) == 1
    assert "np.array" in capsys.readouterr().out
    assert main(["conformance", "--list"]) == 0
    assert "A fresh adapter" in capsys.readouterr().out
    for bad in (["no.such:Thing"], ["pylora.types:LoRA"], ["x"], ["a:b", "--profile", "slow"]):
        assert main(["conformance", *bad]) == 1
        assert capsys.readouterr().err.startswith("pylora: ")
    assert main(["conformance"]) == 2  # the command line itself
    assert capsys.readouterr().err.startswith("pylora conformance: give either")
