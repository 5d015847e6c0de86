"""Combining adapters: what each method promises of whole adapters. PEFT beside it: tests/parity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapters_made import MODULES, delta, filled
from hypothesis import given
from hypothesis import strategies as st

from pylora.adapters.adapter import Adapter
from pylora.adapters.combine import METHODS, combine, truncate
from pylora.errors import ConfigError, PlanError, PyloraError, UnsupportedError

UNIT = 2.0**-24  # a float32's rounding, relative


def size(adapter: Adapter, path: str) -> float:
    """What the roundings of A and B to float32 are relative to."""
    lora = adapter[path]
    return float(abs(lora.scale) * np.linalg.norm(lora.A) * np.linalg.norm(lora.B))


@given(
    st.lists(
        st.tuples(st.integers(1, 5), st.floats(-2, 2).map(lambda w: round(w, 3))),
        min_size=1,
        max_size=3,
    ),
    st.sampled_from(["cat", "svd"]),
)
def test_the_exact_methods_give_the_sum(items: list[tuple[int, float]], method: str) -> None:
    pairs = [(filled(i, r=r, lora_alpha=3), w) for i, (r, w) in enumerate(items)]
    rank = {"rank": sum(r for r, _ in items)} if method == "svd" else {}
    made = combine(pairs, method, **rank)
    for path in made.adapter:
        want = sum(w * delta(a, path) for a, w in pairs)
        bound = (
            4 * UNIT * (sum(abs(w) * size(a, path) for a, w in pairs) + size(made.adapter, path))
        )
        assert np.linalg.norm(delta(made.adapter, path) - want) <= bound
        assert made.lost[path] <= 1e-12


def test_adapters_may_have_different_modules_and_ranks() -> None:
    one = filled(1, r=3, target_modules=["q_proj", "embed_tokens"])
    two = filled(2, r=5, target_modules=["v_proj", "embed_tokens"], use_rslora=True)
    for method in ("cat", "svd", "ties_svd"):
        density = {"density": 0.5} if method == "ties_svd" else {}
        made = combine([(one, 1.0), (two, -0.5)], method, **density)
        assert sorted(made.adapter) == sorted({*one, *two})
        assert all(lora.scale == 1 for lora in made.adapter.values())
    path = "model.layers.0.self_attn.v_proj"
    np.testing.assert_allclose(
        delta(combine([(one, 1.0), (two, -0.5)], "svd").adapter, path),
        -0.5 * delta(two, path),
        atol=4 * UNIT * size(two, path),
    )


def test_one_minus_itself_is_nothing() -> None:
    one = filled(3, r=4)
    for lora in combine([(one, 1.0), (one, -1.0)], "svd").adapter.values():
        assert np.abs(lora.B.astype(np.float64) @ lora.A).max() < 1e-12


def test_truncating_says_what_is_lost() -> None:
    one = filled(4, r=6, lora_alpha=9)
    cut = truncate(one, 2)
    squares = [0.0, 0.0]
    for path, lora in cut.adapter.items():
        assert lora.A.shape[0] == 2
        whole = delta(one, path)
        rest = np.linalg.norm(np.linalg.svd(whole, compute_uv=False)[2:])
        assert cut.lost[path] == pytest.approx(rest / np.linalg.norm(whole), rel=1e-6)
        assert np.linalg.norm(whole - delta(cut.adapter, path)) == pytest.approx(rest, rel=1e-5)
        squares[0] += rest**2
        squares[1] += np.linalg.norm(whole) ** 2
    assert cut.total_lost == pytest.approx((squares[0] / squares[1]) ** 0.5, rel=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_the_result_is_an_adapter_that_can_be_saved(method: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {}
    if method.removesuffix("_svd") not in ("cat", "svd", "linear"):
        settings["density"] = 0.4
    pairs = [(filled(5, r=4), 0.7), (filled(6, r=4), -0.3)]
    made = combine(pairs, method, **settings)
    assert made.adapter.digest() == combine(pairs, method, **settings).adapter.digest()
    made.adapter.save(tmp_path / "both")
    assert Adapter.load(tmp_path / "both", MODULES).digest() == made.adapter.digest()


def test_dare_depends_on_the_seed_and_keeps_its_share() -> None:
    pairs = [(filled(7, r=8), 1.0)]
    a, b = (combine(pairs, "dare_linear", density=0.5, seed=s).adapter for s in (0, 1))
    assert a.digest() != b.digest()
    kept = np.concatenate([lora.A.ravel() != 0 for lora in a.values()])
    # Six standard deviations; the seed is fixed.
    assert abs(kept.mean() - 0.5) < 6 * 0.5 / kept.size**0.5


@pytest.mark.parametrize(
    "method, settings, said",
    [
        ("tie", {}, "unknown method 'tie'"),
        ("ties", {}, "needs density"),
        ("ties", {"density": 0}, "needs density"),
        ("ties", {"density": 1.5}, "needs density"),
        ("ties", {"density": float("nan")}, "needs density"),
        ("dare_ties", {"density": True}, "needs density"),
        ("cat", {"density": 0.5}, "keeps every element"),
        ("linear", {"rank": 3}, "rank is for svd"),
        ("svd", {"rank": 0}, "rank must be"),
        ("svd", {"rank": 2.0}, "rank must be"),
        ("ties", {"density": 0.5, "majority_sign": "most"}, "majority_sign must be"),
        ("svd", {"majority_sign": "frequency"}, "elects no sign"),
        ("svd", {"seed": -1}, "seed"),
    ],
)
def test_settings_that_are_wrong(method: str, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        combine([(filled(0, r=2), 1.0)], method, **settings)


def test_adapters_that_cannot_be_combined() -> None:
    one, other = filled(0, r=2), filled(1, r=3)
    with pytest.raises(PlanError, match="ranks must agree: take cat, svd or ties_svd"):
        combine([(one, 1.0), (other, 1.0)], "ties", density=0.5)
    with pytest.raises(UnsupportedError, match="'cat' alone"):
        combine([(filled(2, r=2, lora_bias=True), 1.0)], "svd")
    for weight in (float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="finite"):
            combine([(one, weight)], "svd")
    for wrong in ([], [one], one, [(one, "1")]):
        with pytest.raises(PyloraError):
            combine(wrong, "svd")  # type: ignore[arg-type]
