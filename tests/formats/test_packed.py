"""Packed models: the same bits as the model that they were made of, from a file used in place; and
damaged ones, which are refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from merging import adapter_for
from small_models import CONFIG, weights, write_gguf, write_hf
from whole_model import an_adapter

from pylora import backends
from pylora.errors import BackendError, ConfigError, FileFormatError, PyloraError, UnsupportedError
from pylora.formats import open_checkpoint
from pylora.formats.pack import pack_checkpoint, pack_model
from pylora.formats.packed import PackedCheckpoint
from pylora.formats.panels import FILE, LAYOUT, NUMBERS, Panels
from pylora.generation.generate import generate
from pylora.merging.merge import merge_checkpoint
from pylora.model import families
from pylora.model.llama import Llama
from pylora.model.summary import example
from pylora.numbers.blocks import BLOCKS, row_bytes
from pylora.numbers.precision import PRECISIONS, Stored, weights_of

C: Any = backends.get("c")
FLOATS = [p for p in ("fp32", "fp32x3", "bf16") if C.computes(p) == p]
PACKED = [*FLOATS, "int8", "int4"]
SMALL = dataclasses.replace(CONFIG, num_hidden_layers=1, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model"
    write_hf(path, SMALL)
    return path


@pytest.fixture
def packed(model: Path, tmp_path: Path) -> Path:
    pack_model(model, tmp_path / "packed", "int8")
    return tmp_path / "packed"


def opened(path: Path, precision: str | None = None, backend: str = "c") -> Llama:
    with open_checkpoint(path) as checkpoint:
        return Llama.from_checkpoint(checkpoint, backend, precision)


def same(ours: Llama, theirs: Llama) -> None:
    """Logits, loss, gradients of an adapter on every module, and tokens."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, ours.config.vocab_size, 9)
    adapter = an_adapter(ours.config, rng)
    found = []
    for llama in (ours, theirs):
        llama.attach(adapter)
        logits, cache = llama.forward(ids)
        grads = llama.backward(np.cos(logits), cache)
        tokens = generate(llama, [ids.tolist()], 4, eos_ids=())
        arrays = {(p, n): a for p, g in grads.items() for n, a in vars(g).items() if a is not None}
        found.append((logits, arrays, tokens))
    (a, grads_a, tokens_a), (b, grads_b, tokens_b) = found
    assert a.tobytes() == b.tobytes() and tokens_a == tokens_b
    assert grads_a.keys() == grads_b.keys() and grads_a
    assert all(grads_a[k].tobytes() == grads_b[k].tobytes() for k in grads_a)


@pytest.mark.parametrize("precision", [p for p in PRECISIONS if weights_of(p) in PACKED])
def test_a_packed_model_has_the_bits_of_its_source(
    model: Path, tmp_path: Path, precision: str
) -> None:
    report = pack_model(model, tmp_path / "p", weights_of(precision))
    assert report.nbytes == (tmp_path / "p" / FILE).stat().st_size
    assert sum(report.kinds.values()) == 8 + 1  # of a layer q, k, v, o, gate, up, down; two more
    same(opened(tmp_path / "p", precision), opened(model, precision))
    assert opened(tmp_path / "p").precision == opened(tmp_path / "p", "auto").precision
    assert opened(tmp_path / "p").precision == weights_of(precision)


@pytest.mark.parametrize("name", families.ALL)
def test_every_family_is_packed(tmp_path: Path, name: str) -> None:
    config = dataclasses.replace(
        example(families.ALL[name]), vocab_size=96, bos_token_id=1, eos_token_ids=(2,)
    )
    if config.experts:
        config = dataclasses.replace(config, experts=8)
    if config.windows is None and config.ropes is None:
        config = dataclasses.replace(config, num_hidden_layers=2)
    values = weights(config)

    class Source:
        """A checkpoint of these numbers."""

        path, settings, notes = tmp_path / "source", {}, ()

        def __init__(self) -> None:
            self.config = config

        def names(self) -> tuple[str, ...]:
            return tuple(values)

        def shape(self, name: str) -> tuple[int, ...]:
            return values[name].shape

        def dtype(self, name: str) -> str:
            return "f32"

        form = dtype

        def load(self, name: str) -> np.ndarray:
            return values[name] / np.float32(np.sqrt(values[name].shape[-1]))

        stored = staticmethod(lambda name: None)

    source: Any = Source()
    source.path.mkdir()
    pack_checkpoint(source, tmp_path / "p", "int4")
    with open_checkpoint(tmp_path / "p") as checkpoint:
        assert checkpoint.config == config
        ours = Llama.from_checkpoint(checkpoint, "c")
    theirs = Llama.from_checkpoint(source, "c", "int4")
    ids = np.arange(7)
    assert ours.forward(ids)[0].tobytes() == theirs.forward(ids)[0].tobytes()


def test_blocks_of_a_gguf_stay_as_they_are(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    write_gguf(tmp_path / "m.gguf", CONFIG, "Q5_0", tokenizer=True)
    report = pack_model(tmp_path / "m.gguf", tmp_path / "p", "int4")
    assert set(report.kinds) == {"q5_0"}
    same(opened(tmp_path / "p"), opened(tmp_path / "m.gguf", "int4"))
    with open_checkpoint(tmp_path / "p") as ours, open_checkpoint(tmp_path / "m.gguf") as theirs:
        assert ours.tokenizer().encode("hello") == theirs.tokenizer().encode("hello")
        name = "model.layers.0.mlp.up_proj.weight"
        assert (ours.load(name) == theirs.load(name)).all() and ours.dtype(name) == "q5_0"
        with pytest.raises(UnsupportedError, match="packed as q5_0"):
            ours.raw(name)


def test_nothing_is_copied_and_the_file_is_not_written(packed: Path) -> None:
    before = (packed / FILE).read_bytes()
    with open_checkpoint(packed) as checkpoint:
        llama = Llama.from_checkpoint(checkpoint, "c")
    data = llama.blocks[0].linears[0].W._data  # type: ignore[attr-defined]
    assert not data.flags.owndata and not data.flags.writeable
    llama.forward(np.arange(5))  # the checkpoint is closed, and its map lives
    assert (packed / FILE).read_bytes() == before


def test_other_backends_and_precisions(model: Path, packed: Path, tmp_path: Path) -> None:
    """Where numbers are asked for, they are those that the panels stand for."""
    ids = np.arange(6)
    there = opened(packed, "fp32", "numpy").forward(ids)[0]
    W = opened(packed).lm_head.W
    assert (
        opened(packed, "fp32").ops.unpack(opened(packed, "fp32").lm_head.W) == C.unpack(W)
    ).all()
    assert np.abs(there - opened(packed, "fp32").forward(ids)[0]).max() < 1e-3 * np.abs(there).max()
    for precision, backend in (("int4", "c"), ("int8", "numpy"), (None, "numpy")):
        with pytest.raises(UnsupportedError, match="packed in int8 for the c backend"):
            opened(packed, precision, backend)
    pack_model(model, tmp_path / "bf16", "bf16")
    wide, narrow = opened(tmp_path / "bf16", "fp32"), opened(tmp_path / "bf16")
    assert (C.unpack(wide.lm_head.W) == C.unpack(narrow.lm_head.W)).all()
    assert opened(tmp_path / "bf16", "int8").stored_as == {"q8_0": 9}


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_merging_takes_the_numbers_that_panels_stand_for(
    model: Path, tmp_path: Path, precision: str
) -> None:
    pack_model(model, tmp_path / "p", precision)
    with open_checkpoint(tmp_path / "p") as checkpoint:
        adapter = adapter_for(checkpoint.config)
        adapter.save(tmp_path / "adapter")
        name = "model.layers.0.mlp.up_proj.weight"
        W, lora = checkpoint.load(name), adapter[name.removesuffix(".weight")]
    merge_checkpoint(tmp_path / "p", tmp_path / "adapter", tmp_path / "merged")
    with open_checkpoint(tmp_path / "merged") as merged:
        stored = "bf16" if precision == "bf16" else "f32"
        assert merged.dtype(name) == stored
        delta = lora.scale * (lora.B.astype(np.float64) @ lora.A)
        step = 2.0**-8 if stored == "bf16" else 2.0**-23  # of the sum, and of what is added
        size = np.abs(W) + np.abs(delta)
        assert (np.abs(merged.load(name) - (W + delta)) <= step * size).all()


def test_what_is_packed_in_fp32x3_needs_tiles(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(C), "computes", lambda self, precision: precision)
    pack_model(model, tmp_path / "p", "fp32x3")
    monkeypatch.undo()
    monkeypatch.setattr(type(C), "computes", lambda s, p: "fp32" if p == "fp32x3" else p)
    for precision in (None, "fp32x3", "fp32"):
        with pytest.raises(UnsupportedError, match=r"fp32x3, which .* strict fp32, having no"):
            opened(tmp_path / "p", precision)
    with pytest.raises(UnsupportedError, match="pack in fp32"):
        pack_model(model, tmp_path / "q", "fp32x3")


def test_what_is_refused_when_packing(model: Path, packed: Path, tmp_path: Path) -> None:
    for precision, said in (("int4a8", "pack in int4"), ("int3", "no precision")):
        with pytest.raises(ConfigError, match=said):
            pack_model(model, tmp_path / "q", precision)
    with pytest.raises(ConfigError, match="packed already, in int8"):
        pack_model(packed, tmp_path / "q", "int8")
    with pytest.raises(ConfigError, match="would be lost"):
        pack_model(model, model, "int8")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds files already"):
        pack_model(model, tmp_path / "full", "int8")
    pack_model(model, packed, "bf16")  # an earlier one is replaced
    assert opened(packed).precision == "bf16"
    assert not (tmp_path / "q").exists()


# ---- damage -----------------------------------------------------------------------------------


def changed(packed: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """The file with another table, whose digest fits."""
    content = (packed / FILE).read_bytes()
    at, n = struct.unpack_from("<QQ", content, 16)
    table = json.loads(content[at : at + n])
    table = change(table) or table
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    start = content[:16] + struct.pack("<QQ", at, len(text)) + hashlib.sha256(text).digest()
    (packed / FILE).write_bytes(start + content[64:at] + text)


def test_a_packed_model_cut_anywhere_is_refused(packed: Path) -> None:
    whole = (packed / FILE).read_bytes()
    for at in (*range(0, 70), *range(70, len(whole), len(whole) // 50)):
        (packed / FILE).write_bytes(whole[:at])
        with pytest.raises(FileFormatError, match=FILE):
            open_checkpoint(packed)
    (packed / FILE).write_bytes(whole + b"\0")
    with pytest.raises(FileFormatError, match="truncated or damaged"):
        open_checkpoint(packed)


def test_every_byte_of_the_start_and_some_of_the_table_changed(packed: Path) -> None:
    whole = (packed / FILE).read_bytes()
    at = struct.unpack_from("<Q", whole, 16)[0]
    for i in (*range(64), *range(at, len(whole), 37)):
        (packed / FILE).write_bytes(whole[:i] + bytes([whole[i] ^ 0x11]) + whole[i + 1 :])
        with pytest.raises((FileFormatError, UnsupportedError), match=FILE):
            open_checkpoint(packed)


NAME = "model.layers.0.mlp.up_proj.weight"


def put(name: str, place: int, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(table: dict[str, Any]) -> None:
        table["tensors"][name][place] = value

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t["tensors"].pop(NAME), "missing tensors: 'model.layers.0.mlp.up_proj.weight'"),
        (lambda t: t["tensors"].update(extra=t["tensors"].pop("lm_head.weight")), "'extra'"),
        (lambda t: b"[]", "table cannot be read"),
        (lambda t: b"[" * 100000, "table cannot be read"),
        (lambda t: t.pop("precision"), "table cannot be read"),
        (lambda t: t.update(precision="int3"), "no precision 'int3'"),
        (lambda t: t.update(precision="int4a8"), "no precision 'int4a8'"),
        (put(NAME, 0, "q9_9"), "kind 'q9_9'"),
        (put(NAME, 0, "q4_0"), "cannot have"),
        (put(NAME, 1, [512, 255]), r"shape \(512, 255\)"),
        (put(NAME, 1, [512]), "shape"),
        (put(NAME, 2, 64), "overlaps|aligned"),
        (put(NAME, 2, -64), "table cannot be read"),
        (put(NAME, 2, 1 << 62), "ends at byte"),
        (put(NAME, 3, 1 << 62), "ends at byte"),
        (put(NAME, 3, -1), "table cannot be read"),
        (put(NAME, 3, 2.5), "table cannot be read"),
        (put(NAME, 1, [512, True]), "table cannot be read"),
        (put(NAME, 3, None), "table cannot be read"),
        (put(NAME, 3, float("inf")), "table cannot be read"),
    ],
)
def test_a_table_that_says_something_else(
    packed: Path, change: Callable[[dict[str, Any]], Any], said: str
) -> None:
    changed(packed, lambda t: found if isinstance(found := change(t), bytes) else None)
    with pytest.raises((FileFormatError, UnsupportedError), match=said):
        open_checkpoint(packed)


def test_another_byte_order_version_and_layout(packed: Path) -> None:
    whole = (packed / FILE).read_bytes()
    other = "big" if sys.byteorder == "little" else "little"
    changed(packed, lambda t: t.update(byte_order=other))
    with pytest.raises(UnsupportedError, match=f"{other}-endian"):
        open_checkpoint(packed)
    for at, said in ((8, "version 9 with panels of layout 1"), (12, "layout 9")):
        (packed / FILE).write_bytes(whole[:at] + struct.pack("<I", 9) + whole[at + 4 :])
        with pytest.raises(UnsupportedError, match=said):
            open_checkpoint(packed)


def test_damage_in_the_data(packed: Path) -> None:
    """Numbers are looked at as they are read; panels when that is asked for."""
    whole = (packed / FILE).read_bytes()
    file = Panels(packed / FILE)
    for kind in (NUMBERS, "q8_0"):
        name, t = next((n, t) for n, t in file.tensors.items() if t.kind == kind)
        at = t.start + t.nbytes // 2
        (packed / FILE).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with open_checkpoint(packed) as checkpoint:
            assert isinstance(checkpoint, PackedCheckpoint)
            with pytest.raises(FileFormatError, match=f"{name}.* is not what was written"):
                checkpoint.verify()
            if kind == NUMBERS:
                with pytest.raises(FileFormatError, match="is not what was written"):
                    Llama.from_checkpoint(checkpoint, "c")
    (packed / FILE).write_bytes(whole)
    with open_checkpoint(packed) as checkpoint:
        assert isinstance(checkpoint, PackedCheckpoint)
        assert checkpoint.verify() == sum(t.nbytes for t in file.tensors.values())


def test_files_that_do_not_belong_together(model: Path, packed: Path) -> None:
    with pytest.raises(FileFormatError, match="give the directory"):
        open_checkpoint(packed / FILE)
    (packed / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    with pytest.raises(FileFormatError, match="weights.pylora and model.safetensors"):
        open_checkpoint(packed)
    (packed / "model.safetensors").unlink()
    (packed / "config.json").unlink()
    with pytest.raises(PyloraError, match="config.json"):
        open_checkpoint(packed)


# ---- the layout -------------------------------------------------------------------------------

# SHA-256, its first 16 digits, of the panels of [40, 512], little-endian. Where one changes, the
# layout's number must (csrc/pylora.h, formats/panels.py), and these with it.
PANELS: dict[str, str] = {
    "f32": "d16bd5c9f8cad59e",
    "bf16": "cf3b9cab5e055229",
    "f32x3": "8617d0cf609ec01d",
    "q8_0": "3f74d7535672e9b8",
    "q4_0": "9d03c5b16fdec9c1",
    "q4_1": "938d9a3b14aeafcb",
    "q5_0": "6cce779dd237253c",
    "q5_1": "bfb26094c9b27d5f",
    "q2_k": "f7e1b560eeea90f1",
    "q3_k": "426321bb8a96bb6d",
    "q4_k": "8d566350451760be",
    "q5_k": "8e853e7f61f70604",
    "q6_k": "25ccb8187f59f374",
    "iq4_nl": "fd81d5aa3f5be230",
    "iq4_xs": "093a6635b9ae8104",
    "mxfp4": "9351933b75d9ad04",
}  # fmt: skip


def panels_of(kind: str) -> np.ndarray:
    """Of bytes that are different enough, or of numbers that each kind of them holds exactly."""
    d, k = 40, 512
    if kind in BLOCKS:
        n = d * row_bytes(kind, k)
        rows = (np.arange(n, dtype=np.uint64) ** 3 // 7 % 251).astype(np.uint8).reshape(d, -1)
        packed = C.pack(Stored(kind, rows, (d, k)), "int8")
    else:
        numbers = (np.arange(d * k, dtype=np.float32).reshape(d, k) % 211 - 100) / 8
        packed = C.pack(numbers, {"f32": "fp32", "bf16": "bf16", "f32x3": "fp32x3"}[kind])
    found, data = C.panels_of(packed)
    assert found == kind
    again = C.adopt(kind, data, (d, k), packed.precision)
    assert (C.unpack(again) == C.unpack(packed)).all() or kind in BLOCKS  # random scales: NaN
    return np.asarray(data)


@pytest.mark.skipif(sys.byteorder != "little", reason="these are of little-endian machines")
@pytest.mark.parametrize("kind", PANELS)
def test_the_layout_is_the_one_that_its_number_names(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(C), "computes", lambda self, precision: precision)
    before = C.isa
    try:
        for isa in C.isas():  # each table has the same
            C.use_isa(isa)
            digest = hashlib.sha256(panels_of(kind)).hexdigest()
            assert digest[:16] == PANELS[kind], isa
    finally:
        C.use_isa(before)


def test_the_layout_has_one_number() -> None:
    header = (Path(__file__).parents[2] / "csrc" / "pylora.h").read_text(encoding="utf-8")
    assert f"#define PYLORA_LAYOUT {LAYOUT}\n" in header
    assert set(PANELS) == {*BLOCKS, "f32", "bf16", "f32x3"}


def test_what_cannot_be_adopted_is_refused() -> None:
    _, data = C.panels_of(C.pack(np.ones((33, 64), np.float32)))
    for wrong in (data[:-1], np.zeros(0, np.uint8)):
        with pytest.raises(BackendError, match="no panels of a weight"):
            C.adopt("f32", wrong, (33, 64), "fp32")
    off = np.zeros(data.nbytes + 128, np.uint8)
    at = 1 - off.ctypes.data % 64 + 64
    with pytest.raises(BackendError, match="adopt"):
        C.adopt("f32", off[at : at + data.nbytes], (33, 64), "fp32")
