"""A merge into one GGUF file: what it holds, what it says of rounding, and what it refuses."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_models import CONFIG, weights, write_gguf
from tiny_model import write_tiny_model
from travellers import draw

from pylora import backends
from pylora.adapters.adapter import Adapter
from pylora.backends.c.encoding import TYPES, encode_blocks
from pylora.errors import ConfigError, PyloraError, UnsupportedError
from pylora.formats import open_checkpoint
from pylora.formats.gguf import dequantize
from pylora.formats.gguf_header import read_header
from pylora.formats.gguf_types import MIXTURES, choose, mixture
from pylora.formats.gguf_write import tensor_bytes
from pylora.formats.gguf_write import write_gguf as write_file
from pylora.merging.to_gguf import GGUFReport, merge_to_gguf
from pylora.model.config import LlamaConfig
from pylora.types import LoRA

SETTINGS: dict[str, Any] = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"]}


def made(tmp_path: Path, kind: str = "F32", **settings: Any) -> tuple[Path, Path, Adapter]:
    """A base whose matrices are of this type, an adapter's folder, and the adapter."""
    base, folder = tmp_path / "base.gguf", tmp_path / "adapter"
    write_gguf(base, CONFIG)
    if kind != "F32":
        header = read_header(base)
        rows = {n: header.rows(n).copy() for n in header.tensors}
        specs = {}
        for name, tensor in header.tensors.items():
            matrix = len(tensor.shape) == 2
            specs[name] = (kind if matrix else "F32", tensor.shape)
            if matrix and kind in TYPES:
                rows[name] = encode_blocks(rows[name].view("<f4"), kind)
            elif matrix:  # all zeros, in a type that is read alone
                rows[name] = np.zeros(tensor_bytes(kind, tensor.shape), np.uint8)
        write_file(base, header.metadata, specs, rows.__getitem__)
    adapter = draw(CONFIG, SETTINGS | settings)
    adapter.save(folder)
    return base, folder, adapter


def test_the_sum_is_that_of_the_adapter_and_the_rest_is_copied(tmp_path: Path) -> None:
    base, folder, adapter = made(tmp_path)
    out = tmp_path / "out.gguf"
    report = merge_to_gguf(base, folder, out)
    assert report.type == "as stored" and set(report.kinds) == {"F32"}
    with open_checkpoint(base) as one, open_checkpoint(out) as two:
        assert one.config == two.config
        for name in one.names():
            W, path = one.load(name), name.removesuffix(".weight")
            if path in adapter:
                lora = adapter[path]
                delta = lora.scale * (lora.B.astype(np.float64) @ lora.A.astype(np.float64))
                W = (W.astype(np.float64) + delta).astype(np.float32)
            assert np.array_equal(W, two.load(name)), name
    mine, theirs = read_header(base), read_header(out)
    for key in mine.metadata:
        assert mine.value(key) == theirs.value(key), key
    assert list(mine.tensors) == list(theirs.tensors)


def test_tensors_that_keep_their_type_are_the_same_bytes(tmp_path: Path) -> None:
    base, folder, adapter = made(tmp_path, "Q4_K")
    out = tmp_path / "out.gguf"
    merge_to_gguf(base, folder, out)
    mine, theirs = read_header(base), read_header(out)
    changed = [n for n in mine.tensors if mine.rows(n).tobytes() != theirs.rows(n).tobytes()]
    assert all(mine.tensors[n].kind == theirs.tensors[n].kind for n in mine.tensors)
    assert sorted(changed) == sorted(
        f"blk.{i}.{stem}.weight" for i in range(2) for stem in ("attn_q", "ffn_down")
    )


def test_a_delta_that_the_type_swallows_is_named(tmp_path: Path) -> None:
    base, folder = tmp_path / "base.gguf", tmp_path / "adapter"
    write_gguf(base, CONFIG, "F32")
    adapter = draw(CONFIG, SETTINGS)
    loras = dict(adapter)
    for path, lora in loras.items():
        if path.endswith("q_proj"):  # too small for four bits, and for eight
            loras[path] = LoRA(lora.A, lora.B * np.float32(1e-7), lora.scale)
    Adapter(adapter.config, adapter.plan, loras).save(folder)
    seen: list[GGUFReport] = []
    report = merge_to_gguf(base, folder, tmp_path / "out.gguf", "q4_0", look=seen.append)
    assert seen == [report]
    assert set(report.swallowed) == {p for p in loras if p.endswith("q_proj")}
    by_path = {m.path: m for m in report.modules}
    large = by_path["model.layers.0.mlp.down_proj"]
    assert 0.9 < large.kept < 1.1 and large.kind == "Q4_0"
    # by hand: what merging changes in the rounded weight, along the delta
    with open_checkpoint(base) as checkpoint:
        W = checkpoint.load("model.layers.0.mlp.down_proj.weight")
    lora = loras[large.path]
    merged = np.array(W)
    backends.get("c").merge_in_place(merged, lora)
    before, after = (dequantize(encode_blocks(x, "Q4_0"), "q4_0", "") for x in (W, merged))
    delta = lora.scale * (lora.B.astype(np.float64) @ lora.A.astype(np.float64))
    kept = np.vdot(after.astype(np.float64) - before, delta) / np.vdot(delta, delta)
    assert abs(large.kept - kept) < 1e-9
    whole = merge_to_gguf(base, folder, tmp_path / "f32.gguf", "f32")
    kept = {m.path: m.kept for m in whole.modules}
    assert all(abs(kept[p] - 1) < 1e-5 for p in kept if p.endswith("down_proj"))


def test_a_dry_run_writes_nothing_and_says_the_same(tmp_path: Path) -> None:
    base, folder, _ = made(tmp_path)
    out = tmp_path / "out.gguf"
    dry = merge_to_gguf(base, folder, out, "q8_0", dry=True)
    assert not out.exists()
    assert merge_to_gguf(base, folder, out, "q8_0") == dry


def test_who_looks_may_leave_it_unwritten(tmp_path: Path) -> None:
    base, folder, _ = made(tmp_path)

    def no(_: GGUFReport) -> None:
        raise ConfigError("not so")

    before = sorted(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="not so"):
        merge_to_gguf(base, folder, tmp_path / "out.gguf", "q8_0", look=no)
    assert sorted(tmp_path.iterdir()) == before


def test_one_of_two_tied_embeddings_unties_them(tmp_path: Path) -> None:
    base, folder, adapter = made(tmp_path, target_modules=["lm_head"])
    assert CONFIG.tie_word_embeddings
    merge_to_gguf(base, folder, tmp_path / "out.gguf")
    with open_checkpoint(tmp_path / "out.gguf") as out, open_checkpoint(base) as was:
        assert not out.config.tie_word_embeddings
        lora, W = adapter["lm_head"], was.load("model.embed_tokens.weight")
        delta = lora.scale * (lora.B.astype(np.float64) @ lora.A.astype(np.float64))
        assert np.array_equal(out.load("lm_head.weight"), (W + delta).astype(np.float32))
        assert np.array_equal(out.load("model.embed_tokens.weight"), W)


def test_what_it_refuses_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    base, folder, _ = made(tmp_path)
    for args, said in (
        ((base, folder, tmp_path / "out.bin"), "must end in .gguf"),
        ((base, folder, base), "would be lost"),
        ((base, folder, tmp_path / "o.gguf", "iq2_xs"), "no type 'iq2_xs'; choose one of f32"),
    ):
        with pytest.raises(ConfigError, match=said):
            merge_to_gguf(*args)
    huge = weights(CONFIG)
    huge["model.layers.1.mlp.down_proj.weight"][0, 0] = 1e30
    write_gguf(tmp_path / "huge.gguf", CONFIG, "F32", tensors=huge)
    with pytest.raises(ConfigError, match="down_proj.*too large for f16"):
        merge_to_gguf(tmp_path / "huge.gguf", folder, tmp_path / "o.gguf", "f16")
    assert not (tmp_path / "o.gguf").exists()


def test_a_type_that_is_not_written_is_refused_where_the_adapter_changes_it(tmp_path: Path) -> None:
    base, folder, _ = made(tmp_path, "IQ4_XS")
    with pytest.raises(UnsupportedError, match="attn_q.weight' is IQ4_XS.*choose a --type"):
        merge_to_gguf(base, folder, tmp_path / "o.gguf")
    merge_to_gguf(base, folder, tmp_path / "o.gguf", "q8_0")


def test_a_folder_becomes_a_file_with_its_tokenizer(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model")
    with open_checkpoint(model) as checkpoint:
        config, own = checkpoint.config, checkpoint.tokenizer()
    draw(config, SETTINGS).save(tmp_path / "adapter")
    out = tmp_path / "out.gguf"
    report = merge_to_gguf(model, tmp_path / "adapter", out, "f32")
    with open_checkpoint(out) as made_of_it:
        assert dataclasses.replace(made_of_it.config, model_type="llama", bos_token_id=None,
                                   eos_token_ids=()) == dataclasses.replace(
            config, bos_token_id=None, eos_token_ids=())  # fmt: skip
        tokenizer = made_of_it.tokenizer()
    for text in ("truth exists:", "life 12 34\n\n  it's", "Zürich 你好"):
        assert tokenizer.encode(text) == own.encode(text)
    assert "rule" in report.tokenizer


def test_the_adapter_s_own_template_goes_with_it(tmp_path: Path) -> None:
    _, folder, _ = made(tmp_path)
    written = tmp_path / "with.gguf"
    write_gguf(written, CONFIG, "F32", tokenizer=True)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    merge_to_gguf(written, folder, tmp_path / "out.gguf")
    assert (
        read_header(tmp_path / "out.gguf").metadata["tokenizer.chat_template"]
        == "{{ messages[0].content }}!"
    )


# ---- the mixtures --------------------------------------------------------------------------------


def test_names_of_types_are_taken_as_llama_cpp_takes_them() -> None:
    assert mixture("Q4_K_M") == mixture("q4_k") == ("q4_k_m", MIXTURES["q4_k_m"])
    with pytest.raises(ConfigError, match="no type 'int4'"):
        mixture("int4")


def test_vectors_norms_and_routers_stay_and_narrow_rows_get_smaller_blocks() -> None:
    config = LlamaConfig.tiny()
    shapes = {"token_embd.weight": (61, 24), "blk.0.ffn_down.weight": (24, 40),
              "blk.0.ffn_up.weight": (64, 32), "blk.0.attn_norm.weight": (24,),
              "blk.0.ffn_gate_inp.weight": (4, 32), "output.weight": (61, 288)}  # fmt: skip
    got = choose(shapes, dict.fromkeys(shapes, "F32"), "q4_k_m", config)
    assert got == {
        "token_embd.weight": "F16", "blk.0.ffn_down.weight": "F16",
        "blk.0.ffn_up.weight": "Q5_0", "blk.0.attn_norm.weight": "F32",
        "blk.0.ffn_gate_inp.weight": "F32", "output.weight": "Q8_0",
    }  # fmt: skip


def test_a_backend_without_the_core_says_so(tmp_path: Path, monkeypatch: Any) -> None:
    base, folder, _ = made(tmp_path)
    import pylora.formats.encode as module

    def broken(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(module.importlib, "import_module", broken)
    with pytest.raises(PyloraError, match="C core, which is not built here"):
        merge_to_gguf(base, folder, tmp_path / "o.gguf", "q8_0")
    monkeypatch.undo()
