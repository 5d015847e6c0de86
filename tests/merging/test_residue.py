"""The residue: how large it is, and that a damaged one is an error by name or harmless."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from merging import UP, altered, case, flip, merged_model, tensors_of

from pylora.errors import FileFormatError, PyloraError
from pylora.formats.safetensors import SafeTensors, save
from pylora.merging import residue
from pylora.merging.merge import merge_weight, unmerge_checkpoint, unmerge_weight
from pylora.types import Residue


@pytest.mark.parametrize("position", [-1, 6])
def test_a_residue_beyond_the_weight_is_refused(ops: Any, position: int) -> None:
    W, lora = case(0, 2, 3, 1, 1e-3, "f32", "linear")
    outside = Residue(np.array([position]), np.array([7], np.uint32))
    with pytest.raises(IndexError):
        unmerge_weight(ops, W, lora, outside)


def test_a_small_delta_leaves_a_small_residue(ops: Any) -> None:
    W, lora = case(0, 64, 256, 4, 1e-5, "f32", "linear")
    merged, lost = merge_weight(ops, W, lora)
    assert 0 < lost.position.size < 0.05 * W.size
    assert bool((merged != W).any())


DAMAGE: list[tuple[str, Any, str]] = [
    (f"{UP}.bits", flip, f"unmerging {UP}"),
    (f"{UP}.lora_B.weight", lambda a: a * 2, f"unmerging {UP}"),
    (f"{UP}.lora_A.weight", lambda a: a[:, :4].copy(), r"lora_A.weight' is F32 of shape \(3, 4\)"),
    (f"{UP}.rows", lambda a: a + 1, rf"{UP}.columns"),
    (f"{UP}.rows", lambda a: a[:-1].copy(), rf"{UP}.rows"),
    (f"{UP}.rows", lambda a: np.full_like(a, 2**32 - 1), rf"{UP}.columns"),
    (f"{UP}.columns", lambda a: a * 0 + 65535, "not in order"),
    (f"{UP}.columns", lambda a: a[::-1].copy(), "not in order"),
    (f"{UP}.bits", lambda a: a.astype("u2"), rf"{UP}.bits"),
]


@pytest.mark.parametrize(("name", "change", "message"), DAMAGE)
def test_a_damaged_residue_names_the_module(
    tmp_path: Path, name: str, change: Any, message: str
) -> None:
    merged = merged_model(tmp_path)
    altered(merged, residue.FILE, name, change)
    with pytest.raises(FileFormatError, match=message):
        unmerge_checkpoint(merged, tmp_path / "back")
    assert not (tmp_path / "back").exists()


METADATA: list[tuple[Any, str]] = [
    (lambda m: m.update(version=2), "version 2"),
    (lambda m: m.pop("tied"), "the metadata must have"),
    (lambda m: m.update(tied="yes"), "wrong type"),
    (lambda m: m["scales"].update({UP: "x"}), f"metadata of '{UP}'"),
    (lambda m: m["dtypes"].update({UP: "f64"}), f"metadata of '{UP}'"),
    (lambda m: m["dtypes"].update({UP: "f16"}), f"{UP} was merged as f16"),
    (lambda m: m["kinds"].update({UP: "embedding"}), rf"{UP} was merged as f32 \(embedding"),
    (lambda m: m["digests"].pop("model.norm.weight"), "no digest of tensor 'model.norm.weight'"),
    (lambda m: m["digests"].update({"x": {"base": 1, "merged": 2}}), "digests of 'x'"),
    (
        lambda m: [m[t].update(no=v) for t, v in (("dtypes", "f32"), ("kinds", "linear"),
                                                 ("scales", 1.0))],
        "no module 'no'",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), METADATA)
def test_damaged_metadata_are_named(tmp_path: Path, change: Any, message: str) -> None:
    merged = merged_model(tmp_path)
    with SafeTensors(merged / residue.FILE) as f:
        tensors = {n: np.array(f.view(n)) for n in f.tensors}
        values = json.loads(f.metadata["pylora_unmerge"])
    change(values)
    save(merged / residue.FILE, tensors, {"pylora_unmerge": json.dumps(values)})
    with pytest.raises(FileFormatError, match=message):
        unmerge_checkpoint(merged, tmp_path / "back")


@given(st.data())
def test_random_damage_is_an_error_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    where = tmp_path_factory.mktemp("damage")
    merged = merged_model(where, num_hidden_layers=1)
    file = merged / residue.FILE
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content)
    try:
        unmerge_checkpoint(merged, where / "back")
    except PyloraError:
        assert not (where / "back").exists()
    else:
        assert tensors_of(where / "back") == tensors_of(where / "base")
