"""Exact unmerging: every bit comes back, and a merged model that was altered is noticed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bounds
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from merging import (
    DTYPES,
    UP,
    adapter_for,
    altered,
    case,
    flip,
    merged_model,
    stateless,
    tensors_of,
    write_model,
)

from pylora.errors import FileFormatError
from pylora.formats import widen
from pylora.merging import residue
from pylora.merging.merge import merge_checkpoint, merge_weight, unmerge_checkpoint, unmerge_weight


@stateless
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 40), st.integers(0, 12)),
    size=st.sampled_from([0.0, 1e-40, 1e-6, 1e-4, 1e-2, 1.0, 1e4]),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(["linear", "embedding"]),
)
def test_unmerge_restores_every_bit(
    ops: Any, seed: int, shape: tuple[int, int, int], size: float, dtype: str, kind: str
) -> None:
    W, lora = case(seed, *shape, size, dtype, kind)
    before = W.tobytes()
    merged, lost = merge_weight(ops, W, lora, dtype, kind=kind)
    assert W.tobytes() == before
    delta = lora.scale * (lora.B.astype(np.float64) @ lora.A.astype(np.float64))
    want = widen(W, dtype).astype(np.float64) + (delta if kind == "linear" else delta.T)
    half = 2.0**-25 if dtype == "f16" else 2.0**-134 if dtype == "bf16" else 2.0**-150
    bound = bounds.unit(dtype) * abs(want) + half + bounds.gamma(20, np.float64) * abs(want)
    got = widen(merged, dtype).astype(np.float64)
    if dtype == "f16":  # beyond its largest number there is only infinity
        want, got = (np.where(abs(want) < 65504, x, 0) for x in (want, got))
    bounds.assert_within(got, want, bound + 1e-12 * size, "merged")
    back = unmerge_weight(ops, merged, lora, lost, dtype, kind=kind)
    assert back.dtype == W.dtype
    assert back.tobytes() == before


@stateless
@given(
    bits=st.lists(st.integers(0, 2**32 - 1), min_size=6, max_size=6), dtype=st.sampled_from(DTYPES)
)
def test_unmerge_restores_any_bits_at_all(ops: Any, bits: list[int], dtype: str) -> None:
    """Infinities, NaN with any payload, subnormal numbers and both zeros."""
    words = np.array(bits, np.uint32)
    W = {"f32": words.view("f4"), "f16": words.astype("u2").view("f2"), "bf16": words.astype("u2")}
    stored = np.ascontiguousarray(W[dtype].reshape(2, 3))
    _, lora = case(1, 2, 3, 2, 1e-3, dtype, "linear")
    with np.errstate(all="ignore"):
        merged, lost = merge_weight(ops, stored, lora, dtype)
        back = unmerge_weight(ops, merged, lora, lost, dtype)
    assert back.tobytes() == stored.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_and_unmerge_a_model(tmp_path: Path, ops: Any, dtype: str) -> None:
    config = write_model(tmp_path / "base", dtype)
    adapter_for(config).save(tmp_path / "adapter")
    report = merge_checkpoint(
        tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", backend=ops
    )
    assert [m.path for m in report.modules] == list(adapter_for(config))
    assert report.positions == sum(m.positions for m in report.modules) > 0
    before, after = tensors_of(tmp_path / "base"), tensors_of(tmp_path / "merged")
    targets = {f"{m.path}.weight" for m in report.modules}
    assert {n for n in before if before[n] != after[n]} == targets
    assert {n: d for n, (_, d) in before.items()} == {n: d for n, (_, d) in after.items()}
    assert (tmp_path / "merged" / "tokenizer.json").read_text() == "{}"
    back = unmerge_checkpoint(tmp_path / "merged", tmp_path / "back", backend=ops)
    assert back.tensors == len(before)
    assert tensors_of(tmp_path / "back") == before
    assert not (tmp_path / "back" / residue.FILE).exists()


@pytest.mark.parametrize("name", [f"{UP}.weight", "model.norm.weight"])
def test_altered_weights_are_noticed(tmp_path: Path, name: str) -> None:
    merged = merged_model(tmp_path)
    altered(merged, "model.safetensors", name, flip)
    with pytest.raises(FileFormatError, match=f"{name.rpartition('.')[0]} was altered"):
        unmerge_checkpoint(merged, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_an_altered_output_layer_is_noticed_though_it_would_be_dropped(tmp_path: Path) -> None:
    config = write_model(tmp_path / "base")
    adapter_for(config, target_modules=["embed_tokens"]).save(tmp_path / "adapter")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "m")
    altered(tmp_path / "m", "model.safetensors", "lm_head.weight", flip)
    with pytest.raises(FileFormatError, match="lm_head was altered"):
        unmerge_checkpoint(tmp_path / "m", tmp_path / "back")


def test_a_directory_that_was_never_merged(tmp_path: Path) -> None:
    write_model(tmp_path / "base")
    with pytest.raises(FileFormatError, match="no pylora_unmerge.safetensors"):
        unmerge_checkpoint(tmp_path / "base", tmp_path / "back")
