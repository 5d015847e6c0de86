"""Merging and exact unmerging: single weights on every backend, whole models, hostile files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bounds
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pylora.adapters.adapter import Adapter, parameters
from pylora.adapters.loraconfig import LoraConfig
from pylora.adapters.plan import resolve
from pylora.errors import ConfigError, FileFormatError, PyloraError, UnsupportedError
from pylora.formats import hfdir, narrow, open_checkpoint, widen
from pylora.formats.safetensors import Bf16, SafeTensors, save
from pylora.merging import residue
from pylora.merging.merge import (
    merge_adapter,
    merge_checkpoint,
    merge_weight,
    unmerge_checkpoint,
    unmerge_weight,
)
from pylora.model.config import LlamaConfig
from pylora.model.llama import random_weights
from pylora.types import LoRA, Residue

DTYPES = ["f32", "f16", "bf16"]
stateless = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # `ops` is


# ---- one weight ----------------------------------------------------------------------------------


def case(
    seed: int, d: int, k: int, r: int, size: float, dtype: str, kind: str
) -> tuple[np.ndarray, LoRA]:
    """A stored weight and an adapter whose delta has about this size."""
    rng = np.random.default_rng(seed)
    W = (rng.standard_normal((d, k)) * 0.02).astype(np.float32)
    a, b = (k, d) if kind == "linear" else (d, k)
    A = rng.standard_normal((r, a)).astype(np.float32)
    B = (rng.standard_normal((b, r)) * size).astype(np.float32)
    return narrow(W, dtype), LoRA(A, B, 1.5)


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


@pytest.mark.parametrize("position", [-1, 6])
def test_a_residue_beyond_the_weight_is_refused(ops: Any, position: int) -> None:
    W, lora = case(0, 2, 3, 1, 1e-3, "f32", "linear")
    outside = Residue(np.array([position]), np.array([7], np.uint32))
    with pytest.raises(IndexError):
        unmerge_weight(ops, W, lora, outside)


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


def test_a_small_delta_leaves_a_small_residue(ops: Any) -> None:
    W, lora = case(0, 64, 256, 4, 1e-5, "f32", "linear")
    merged, lost = merge_weight(ops, W, lora)
    assert 0 < lost.position.size < 0.05 * W.size
    assert bool((merged != W).any())


# ---- a whole model -------------------------------------------------------------------------------


def write_model(where: Path, dtype: str = "f32", **over: Any) -> LlamaConfig:
    """A random tiny model as a Hugging Face directory; norms are always float32."""
    config = LlamaConfig.tiny(**over)
    tensors: dict[str, Any] = {}
    weights = random_weights(config)
    for name in config.tensors():
        a = weights(name)
        stored = narrow(a, dtype) if a.ndim == 2 else a
        tensors[name] = Bf16(stored) if dtype == "bf16" and a.ndim == 2 else stored
    where.mkdir()
    (where / "config.json").write_text(json.dumps(config.to_hf()))
    (where / "tokenizer.json").write_text("{}")
    save(where / "model.safetensors", tensors)
    return config


def adapter_for(config: LlamaConfig, base: Any = None, **fields: Any) -> Adapter:
    settings = LoraConfig(**{"r": 3, "target_modules": "all-linear", **fields})
    adapter = Adapter.init(resolve(settings, config.modules()), settings, base=base)
    rng = np.random.default_rng(9)
    for array in parameters(adapter).values():
        array += (rng.standard_normal(array.shape) * 0.05).astype(np.float32)
    return adapter


def tensors_of(where: Path) -> dict[str, tuple[bytes, str]]:
    with open_checkpoint(where) as c:
        return {n: (c.raw(n)[0].tobytes(), c.dtype(n)) for n in c.names()}


def merged_model(tmp_path: Path, **over: Any) -> Path:
    config = write_model(tmp_path / "base", **over)
    adapter_for(config).save(tmp_path / "adapter")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    return tmp_path / "merged"


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


# ---- files that were changed ---------------------------------------------------------------------


def altered(directory: Path, file: str, name: str, change: Any) -> None:
    """Rewrites one tensor of a safetensors file."""
    with SafeTensors(directory / file) as f:
        tensors: dict[str, Any] = {n: np.array(f.view(n)) for n in f.tensors}
        metadata = dict(f.metadata)
    tensors[name] = change(tensors[name])
    save(directory / file, tensors, metadata)


def flip(a: np.ndarray) -> np.ndarray:
    a.reshape(-1).view(np.uint8)[0] ^= 1
    return a


UP = "model.layers.0.mlp.up_proj"


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


def test_a_directory_that_was_never_merged(tmp_path: Path) -> None:
    write_model(tmp_path / "base")
    with pytest.raises(FileFormatError, match="no pylora_unmerge.safetensors"):
        unmerge_checkpoint(tmp_path / "base", tmp_path / "back")


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
