"""PEFT's `add_weighted_adapter` and `pylora.combine` on the same adapters, method by method.

PEFT computes in float32, pylora in float64 rounded once. A product, a weight and each of n terms of
a sum are a rounding of 2⁻²⁴ each in PEFT; so is a division, and the weight is a rounded root of a
rounded product: n + 5 in all, relative to the sum of the magnitudes.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pylora.adapters.adapter import Adapter
from pylora.adapters.combine import METHODS, combine
from pylora.adapters.inspect import modules_of
from pylora.numbers import random

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

UNIT = 2.0**-24
NAMES = ("one", "two", "three")
WEIGHTS = (0.7, -0.4, 1.3)
SIZES = {"lin": (6, 9), "wide": (4, 12), "emb": (5, 11)}  # path -> (d, k)


class Small(torch.nn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.emb = torch.nn.Embedding(11, 5)
        self.lin = torch.nn.Linear(9, 6)
        self.wide = torch.nn.Linear(12, 4)

    def forward(self, x: Any) -> Any:
        return self.emb(x)


@pytest.fixture(scope="module")
def model() -> Any:
    """A model with three adapters; the third does not have the module `wide`."""
    torch.manual_seed(0)
    made = None
    for i, name in enumerate(NAMES):
        targets = ["lin", "emb"] + ["wide"] * (i < 2)
        config = peft.LoraConfig(r=3, lora_alpha=2 + i, target_modules=targets, use_rslora=i == 1)
        if made is None:
            made = peft.get_peft_model(Small(), config, adapter_name=name)
        else:
            made.add_adapter(name, config)
    for key, parameter in made.named_parameters():
        if "lora_" in key:
            parameter.data = torch.randn_like(parameter)
    return made


@pytest.fixture(scope="module")
def ours(model: Any, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Adapter, float]]:
    out = tmp_path_factory.mktemp("adapters")
    model.save_pretrained(str(out))
    loaded = [Adapter.load(out / name, modules_of(out / name)) for name in NAMES]
    return list(zip(loaded, WEIGHTS, strict=True))


def theirs(model: Any, name: str, path: str) -> tuple[np.ndarray, np.ndarray]:
    layer = model.base_model.model.get_submodule(path)
    if path == "emb":
        pair = layer.lora_embedding_A[name], layer.lora_embedding_B[name]
    else:
        pair = layer.lora_A[name].weight, layer.lora_B[name].weight
    A, B = (p.detach().numpy().astype(np.float64) for p in pair)
    assert layer.scaling[name] == 1
    return A, B


def masks(path: str, which: str, shape: tuple[int, ...], n: int, density: float) -> list[Any]:
    """The elements that pylora's DARE keeps, which PEFT is given."""
    streams = [random.stream("dare", path, which, str(i)) for i in range(n)]
    return [random.unit(5, s, 0, int(np.prod(shape))).reshape(shape) < density for s in streams]


@pytest.mark.parametrize("sign", ["total", "frequency"])
@pytest.mark.parametrize("method", METHODS)
def test_the_same_as_peft(
    model: Any,
    ours: list[tuple[Adapter, float]],
    method: str,
    sign: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = method.removesuffix("_svd")
    if sign != "total" and not base.endswith("ties"):
        pytest.skip("it elects no sign")
    settings: dict[str, Any] = {}
    if base not in ("cat", "svd", "linear"):
        settings["density"] = 0.45
    whole = method.endswith("svd")
    drawn: list[Any] = []
    if base.startswith("dare"):
        settings["seed"] = 5
        order = [p for p, _ in model.base_model.model.named_modules() if p in SIZES]
        for path in order:
            d, k = SIZES[path]
            n = 3 - (path == "wide")
            if whole:  # of an embedding PEFT makes the transposed delta
                found = masks(path, "delta", (d, k), n, 0.45)
                drawn += [m.T if path == "emb" else m for m in found]
            else:
                drawn += masks(path, "A", (3, k), n, 0.45) + masks(path, "B", (d, 3), n, 0.45)
        given = iter(drawn)
        monkeypatch.setattr(
            torch, "bernoulli", lambda input: torch.from_numpy(next(given).astype(np.float32))
        )
    if base.endswith("ties"):
        settings["majority_sign"] = sign
    name = f"{method}_{sign}"
    model.base_model.add_weighted_adapter(
        list(NAMES), list(WEIGHTS), name, combination_type=method,
        density=settings.get("density"), majority_sign_method=sign,
    )  # fmt: skip
    got = combine(ours, method, **settings).adapter
    assert sorted(got) == sorted(SIZES)
    for path in SIZES:
        A, B = theirs(model, name, path)
        lora = got[path]
        if whole:  # vectors may have the other sign; the products are compared
            size = sum(
                abs(w) * a[path].scale * np.linalg.norm(a[path].A) * np.linalg.norm(a[path].B)
                for a, w in ours
                if path in a
            ) / settings.get("density", 1)
            # A singular value decomposition in float32 has an error of a few roundings times its
            # sizes; what is cut off must not be near what is kept, and is not with these numbers.
            bound = 64 * max(SIZES[path]) * UNIT * size
            assert np.linalg.norm(lora.B.astype(np.float64) @ lora.A - B @ A) <= bound
            continue
        if method == "cat":  # pylora has the scale in B, PEFT in A
            product = lora.B.astype(np.float64) @ lora.A
            bound = 16 * UNIT * float((abs(B) @ abs(A)).max())
            assert np.abs(product - B @ A).max() <= bound
            continue
        for mine, peers, letter in ((lora.A, A, "A"), (lora.B, B, "B")):
            size = sum(
                np.sqrt(abs(w * a[path].scale)) * np.abs(getattr(a[path], letter))
                for a, w in ours
                if path in a
            ) / settings.get("density", 1)
            assert (np.abs(mine - peers) <= 8 * UNIT * size).all(), (path, letter)
    assert not list(given) if drawn else True


def test_peft_reads_what_is_written(ours: list[tuple[Adapter, float]], tmp_path: Path) -> None:
    made = combine(ours, "svd", rank=2).adapter
    made.save(tmp_path / "both")
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT's way to say that a key is left over
        loaded = peft.PeftModel.from_pretrained(Small(), str(tmp_path / "both"), adapter_name="x")
    for path in SIZES:
        A, B = theirs(loaded, "x", path)
        np.testing.assert_array_equal(A, made[path].A)
        np.testing.assert_array_equal(B, made[path].B)
