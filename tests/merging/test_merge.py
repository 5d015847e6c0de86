"""Merging: single weights on every backend, and whole models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bounds
import numpy as np
import pytest
from merging import DTYPES, adapter_for, case, merged_model, tensors_of, write_model

from pylora.errors import ConfigError, UnsupportedError
from pylora.formats import hfdir, narrow, open_checkpoint
from pylora.formats.safetensors import SafeTensors
from pylora.merging import residue
from pylora.merging.merge import (
    merge_adapter,
    merge_checkpoint,
    merge_weight,
    unmerge_checkpoint,
    unmerge_weight,
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5, 2), (70, 300, 40), (129, 144, 8), (1, 1, 0)])
def test_merging_in_place_gives_the_same_weight(
    ops: Any, shape: tuple[int, int, int], dtype: str
) -> None:
    W, lora = case(5, *shape, 1e-3, dtype, "linear")
    merged, lost = merge_weight(ops, W, lora, dtype)
    before = W.tobytes()
    assert unmerge_weight(ops, merged, lora, lost, dtype).tobytes() == before
    spaced = np.zeros((W.shape[0], 2 * W.shape[1]), W.dtype)[:, ::2]
    spaced[...] = W
    for weight in (W, spaced):
        ops.merge_in_place(weight, lora, dtype)
        assert np.ascontiguousarray(weight).tobytes() == merged.tobytes()


def test_a_read_only_weight_is_not_merged_into(ops: Any) -> None:
    W, lora = case(0, 4, 8, 2, 1e-3, "f32", "linear")
    W.setflags(write=False)
    before = W.tobytes()
    with pytest.raises(ValueError, match="read-only"):
        ops.merge_in_place(W, lora)
    assert W.tobytes() == before


def test_report_says_how_large_residue_and_delta_are(tmp_path: Path) -> None:
    config = write_model(tmp_path / "base")
    adapter = adapter_for(config, target_modules=["q_proj"])
    with open_checkpoint(tmp_path / "base") as c:
        report = merge_adapter(c, adapter, tmp_path / "m")
    with SafeTensors(tmp_path / "m" / residue.FILE) as file:
        stored = sum(i.end - i.start for i in file.tensors.values())
        for m in report.modules:
            assert file.shape(f"{m.path}.columns") == (m.positions,)
            lora = adapter[m.path]
            want = abs(lora.scale * (lora.B @ lora.A)).max()
            assert m.max_delta == pytest.approx(want, rel=1e-6)
    assert report.residue_bytes == stored
    assert report.weight_bytes == 4 * config.num_parameters


def test_the_base_may_be_converted_and_then_that_is_what_comes_back(tmp_path: Path) -> None:
    config = write_model(tmp_path / "base", "f32")
    adapter_for(config).save(tmp_path / "adapter")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "m", dtype="bf16")
    unmerge_checkpoint(tmp_path / "m", tmp_path / "back")
    back = tensors_of(tmp_path / "back")
    with open_checkpoint(tmp_path / "base") as c:
        for name in c.names():
            assert back[name] == (narrow(c.load(name), "bf16").tobytes(), "bf16")
    assert json.loads((tmp_path / "m" / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]])
def test_tied_embeddings_are_untied_by_a_merge_and_tied_again(
    tmp_path: Path, targets: list[str]
) -> None:
    config = write_model(tmp_path / "base", tie_word_embeddings=True)
    adapter = adapter_for(config, target_modules=targets)
    adapter.save(tmp_path / "adapter")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    with open_checkpoint(tmp_path / "base") as c, open_checkpoint(tmp_path / "merged") as m:
        assert not m.config.tie_word_embeddings
        W = c.load("model.embed_tokens.weight")
        for path in ("model.embed_tokens", "lm_head"):
            delta = np.zeros_like(W)
            if path in adapter:
                lora = adapter[path]
                delta = lora.scale * (lora.B @ lora.A)
                delta = delta.T if path == "model.embed_tokens" else delta
            bound = 8 * bounds.unit() * (abs(W) + abs(delta) + 1)
            bounds.assert_within(m.load(f"{path}.weight"), W + delta, bound, path)
            assert (path in adapter) == bool((m.load(f"{path}.weight") != W).any())
    unmerge_checkpoint(tmp_path / "merged", tmp_path / "back")
    assert tensors_of(tmp_path / "back") == tensors_of(tmp_path / "base")
    with open_checkpoint(tmp_path / "back") as back:
        assert back.config == config


@pytest.mark.parametrize("dtype", DTYPES)
def test_biases_are_merged_and_restored(tmp_path: Path, dtype: str) -> None:
    config = write_model(
        tmp_path / "base", "f32", model_type="qwen2", attention_bias=True, num_hidden_layers=1
    )
    with open_checkpoint(tmp_path / "base") as c:
        adapter = adapter_for(config, c.load, bias="all", lora_bias=True, target_modules=["q_proj"])
        merge_adapter(c, adapter, tmp_path / "m", dtype=dtype)
    q, v = (f"model.layers.0.self_attn.{n}_proj" for n in "qv")
    with open_checkpoint(tmp_path / "m") as m:
        lora = adapter[q]
        assert lora.bias is not None and lora.base_bias is not None
        total = lora.base_bias + lora.scale * lora.bias
        bound = 2 * bounds.unit(dtype) * abs(total) + 1e-6
        bounds.assert_within(m.load(f"{q}.bias"), total, bound, "bias")
        want = narrow(adapter[v].base_bias, dtype)  # type: ignore[arg-type]
        assert m.raw(f"{v}.bias")[0].tobytes() == want.tobytes()
    unmerge_checkpoint(tmp_path / "m", tmp_path / "back")
    with open_checkpoint(tmp_path / "base") as c:
        base = {n: (narrow(c.load(n), dtype).tobytes(), dtype) for n in c.names()}
    assert tensors_of(tmp_path / "back") == base


def test_a_bias_that_the_architecture_cannot_hold_is_refused(tmp_path: Path) -> None:
    config = write_model(tmp_path / "base")
    adapter_for(config, lora_bias=True).save(tmp_path / "adapter")
    with pytest.raises(UnsupportedError, match=r"layers.0.*lora_bias.*llama"):
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_overflow_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    config = write_model(tmp_path / "base", "f16")
    adapter = adapter_for(config, target_modules=["up_proj"])
    for lora in adapter.values():
        lora.B[...] = 1e6
    adapter.save(tmp_path / "adapter")
    with pytest.raises(ConfigError, match=r"up_proj.weight'.*too large for f16"):
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "m")
    with pytest.raises(ConfigError, match="dtype = 'int4'"):
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "m", dtype="int4")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


def test_shards_hold_the_same_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = merged_model(tmp_path)
    split = hfdir.write_weights

    def small(*args: Any, **kw: Any) -> int:
        return split(*args, **kw, shard_bytes=9_000)

    monkeypatch.setattr("pylora.merging.merge.write_weights", small)
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 2
    assert tensors_of(tmp_path / "sharded") == tensors_of(whole)
    unmerge_checkpoint(tmp_path / "sharded", tmp_path / "back")
    assert tensors_of(tmp_path / "back") == tensors_of(tmp_path / "base")


def test_a_quantized_gguf_becomes_a_hugging_face_directory(tmp_path: Path) -> None:
    small = pytest.importorskip("small_models")
    small.write_gguf(tmp_path / "m.gguf", kind="Q8_0", tokenizer=True)
    with open_checkpoint(tmp_path / "m.gguf") as c:
        adapter = adapter_for(c.config, target_modules=["q_proj"])
        adapter.save(tmp_path / "adapter")
        base = {n: c.load(n).tobytes() for n in c.names()}
        tokens = c.tokenizer()
    report = merge_checkpoint(tmp_path / "m.gguf", tmp_path / "adapter", tmp_path / "merged")
    assert report.tokenizer == "written from the GGUF metadata"
    with open_checkpoint(tmp_path / "merged") as m:
        again = m.tokenizer()
        assert again.encode("hello 11") == tokens.encode("hello 11")
        assert again.chat_template == tokens.chat_template
        assert (again.bos_id, again.add_bos) == (tokens.bos_id, tokens.add_bos)
        assert set(tokens.eos_ids) <= set(again.eos_ids)
        assert {m.dtype(n) for n in m.names()} == {"f32"}
        changed = {n for n in m.names() if m.load(n).tobytes() != base[n]}
        assert changed == {f"{path}.weight" for path in adapter}
    unmerge_checkpoint(tmp_path / "merged", tmp_path / "back")
    with open_checkpoint(tmp_path / "back") as b:
        assert {n: b.load(n).tobytes() for n in b.names()} == base


def test_no_model_is_overwritten(tmp_path: Path) -> None:
    merged, base, adapter = merged_model(tmp_path), tmp_path / "base", tmp_path / "adapter"
    write_model(tmp_path / "other")
    for source, out in (
        (base, base),
        (merged, merged),  # would lose the residue, and with it the base
        (base, tmp_path / "merged" / ".." / "base"),
        (base, tmp_path / "other"),
        (base, adapter),
    ):
        before = {p: p.read_bytes() for p in out.iterdir()}
        with pytest.raises(ConfigError, match=out.name):
            merge_checkpoint(source, adapter, out)
        assert {p: p.read_bytes() for p in out.iterdir()} == before
    for out in (merged, tmp_path / "other"):
        before = {p: p.read_bytes() for p in out.iterdir()}
        with pytest.raises(ConfigError, match=out.name):
            unmerge_checkpoint(merged, out)
        assert {p: p.read_bytes() for p in out.iterdir()} == before
    merge_checkpoint(base, adapter, merged, dtype="bf16")  # a merge may be made again
    (tmp_path / "empty").mkdir()
    unmerge_checkpoint(merged, tmp_path / "empty")
