"""Damaged and hostile model files: a PyloraError or a valid load, never anything else.

Each property takes a small valid file, cuts or changes it anywhere, and reads all that a user
would: the configuration, every tensor, the tokenizer. Memory is capped, so that a size taken from
the file unchecked fails here.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from small_models import write_gguf, write_hf

from pylora.errors import FileFormatError, PyloraError, UnsupportedError
from pylora.formats import open_checkpoint
from pylora.model.config import LlamaConfig

TINY = LlamaConfig.tiny(num_hidden_layers=1)
GGUF_TINY = LlamaConfig.tiny(
    num_hidden_layers=1, hidden_size=32, intermediate_size=32, head_dim=8, vocab_size=280
)
LIMIT = 1 << 30  # bytes that reading a file of some kilobytes may add


@pytest.fixture(autouse=True)
def capped_memory() -> Iterator[None]:
    """Caps the address space, where the system can: an absurd allocation becomes a MemoryError."""
    resource = pytest.importorskip("resource")
    statm = Path("/proc/self/statm")
    if not statm.exists():
        yield
        return
    used = int(statm.read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + LIMIT, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def read_all(path: Path) -> bool:
    """Reads everything; whether it was accepted. Any error but a PyloraError passes through."""
    try:
        with open_checkpoint(path) as model:
            for name in model.names():
                assert model.load(name).shape == model.shape(name)
            try:
                model.tokenizer().decode(model.tokenizer().encode("hello 11 <|im_end|>"))
            except PyloraError as error:
                assert len(str(error)) > 20
        return True
    except PyloraError as error:
        assert path.name in str(error) and len(str(error)) < 2000
        return False


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    write_gguf(path, GGUF_TINY, "Q4_0", tokenizer=True)
    return path


def header_size(content: bytes) -> int:
    return content.index(b"output_norm.weight") + 60


@pytest.fixture(scope="module")
def valid(gguf_file: Path) -> bytes:
    assert read_all(gguf_file)
    return gguf_file.read_bytes()


def test_a_gguf_file_cut_anywhere_is_refused(gguf_file: Path, valid: bytes) -> None:
    """The last tensor may be followed by padding, so cuts start before it."""
    end = len(valid) - 32
    offsets = [*range(0, 64), *range(64, end, max(1, end // 150))]
    for at in offsets:
        (gguf_file.parent / "cut.gguf").write_bytes(valid[:at])
        assert not read_all(gguf_file.parent / "cut.gguf"), at


WORDS = st.sampled_from(
    [0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**40, 2**63 - 1, 2**63, 2**64 - 1]
)


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=150)
def test_a_gguf_file_with_changed_bytes(gguf_file: Path, valid: bytes, data: st.DataObject) -> None:
    content = bytearray(valid)
    end = header_size(valid)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, end))
        new = data.draw(
            st.binary(min_size=1, max_size=8) | WORDS.map(lambda w: struct.pack("<Q", w))
        )
        content[at : at + len(new)] = new
    path = gguf_file.parent / "changed.gguf"
    path.write_bytes(content)
    read_all(path)


def test_every_word_of_a_gguf_header_made_huge(gguf_file: Path, valid: bytes) -> None:
    """Counts, lengths, dimensions, offsets, types: whatever the word is, it is checked. The long
    arrays of the tokenizer are skipped: a thousand times the same place."""
    path = gguf_file.parent / "huge.gguf"
    array = valid.index(b"tokenizer.ggml.tokens"), valid.index(b"tokenizer.ggml.bos_token_id")
    for at in (*range(4, array[0] + 40, 2), *range(array[1], header_size(valid), 2)):
        content = bytearray(valid)
        content[at : at + 8] = b"\xff" * 7 + b"\x7f"
        path.write_bytes(content)
        read_all(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"GG", "truncated"),
        (b"GGML" + bytes(100), "not a GGUF"),
        (b"PK\x03\x04" + bytes(100), "not a GGUF"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**63, 0), "number of tensors is"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63), "metadata entries is"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**62) + bytes(50), "length of a metadata key"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"\xff" + bytes(50), "not UTF-8"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<I", 99), "type 99"),
        (
            b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 8, 2**60),
            "length of metadata 'k'",
        ),
        (
            b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 9, 1),
            "array of arrays",
        ),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "architecture"),
    ],
)
def test_a_bad_gguf_start_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises((FileFormatError, UnsupportedError), match=message) as caught:
        open_checkpoint(path)
    assert "bad.gguf" in str(caught.value)


def patch_tensor(
    content: bytes,
    name: str,
    *,
    offset: int | None = None,
    kind: int | None = None,
    dims: tuple[int, ...] | None = None,
) -> bytes:
    """Changes a two-dimensional tensor's entry in the header."""
    at = content.index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name) + 4
    out = bytearray(content)
    if dims is not None:
        out[at : at + 16] = struct.pack("<QQ", *dims)
    if kind is not None:
        out[at + 16 : at + 20] = struct.pack("<I", kind)
    if offset is not None:
        out[at + 20 : at + 28] = struct.pack("<Q", offset)
    return bytes(out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offset": 0}, "overlaps"),
        ({"offset": 33}, "not aligned"),
        ({"offset": 2**40}, "needs .* bytes"),
        ({"offset": 2**64 - 32}, "needs .* bytes"),
        ({"kind": 4}, "unknown ggml type 4"),
        ({"kind": 2**32 - 1}, "unknown ggml type"),
        ({"dims": (0, 32)}, "empty"),
        ({"dims": (33, 32)}, "blocks"),
        ({"dims": (2**63, 2**63)}, "needs .* bytes|overlaps"),
    ],
)
def test_a_bad_tensor_entry_is_named(
    tmp_path: Path, valid: bytes, change: dict[str, int], message: str
) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(patch_tensor(valid, "blk.0.ffn_up.weight", **change))
    with pytest.raises((FileFormatError, UnsupportedError), match=f"tensor .*({message})"):
        open_checkpoint(path)


def test_nan_and_infinity_in_weights_are_read_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, GGUF_TINY, "Q4_0")
    content = bytearray(path.read_bytes())
    content[-4096:] = b"\xff" * 4096
    path.write_bytes(content)
    assert read_all(path)


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hf")
    write_hf(path, TINY, "bf16")
    assert read_all(path)
    return path


def test_a_safetensors_file_cut_anywhere_is_refused(hf_dir: Path, tmp_path: Path) -> None:
    whole = (hf_dir / "model.safetensors").read_bytes()
    (tmp_path / "config.json").write_bytes((hf_dir / "config.json").read_bytes())
    for at in [*range(0, 32), *range(32, len(whole), len(whole) // 100), len(whole) - 1]:
        (tmp_path / "model.safetensors").write_bytes(whole[:at])
        assert not read_all(tmp_path), at


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=150)
def test_a_directory_with_changed_bytes(hf_dir: Path, data: st.DataObject) -> None:
    directory = hf_dir / "changed"
    directory.mkdir(exist_ok=True)
    hit = data.draw(st.sampled_from(["config.json", "model.safetensors"]))
    for name in ("config.json", "model.safetensors"):
        content = bytearray((hf_dir / name).read_bytes())
        end = min(len(content), 8 + int.from_bytes(content[:8], "little"))
        for _ in range(data.draw(st.integers(1, 3)) if name == hit else 0):
            at = data.draw(st.integers(0, end - 1))
            new = data.draw(
                st.binary(min_size=1, max_size=4) | st.sampled_from([b"9", b"-", b'"', b"}"])
            )
            content[at : at + len(new)] = new
        (directory / name).write_bytes(content)
    read_all(directory)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=150)
def test_a_configuration_with_any_value_anywhere(hf_dir: Path, data: st.DataObject) -> None:
    directory = hf_dir / "config"
    directory.mkdir(exist_ok=True)
    config = json.loads((hf_dir / "config.json").read_text())
    extra = ["rope_scaling", "rope_parameters", "quantization_config", "head_dim", "layer_types"]
    config[data.draw(st.sampled_from([*config, *extra]))] = data.draw(JSON)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "model.safetensors").write_bytes((hf_dir / "model.safetensors").read_bytes())
    read_all(directory)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"null", b"{", b"\xff", b"[" * 100_000])
def test_a_broken_config_json_is_named(hf_dir: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes((hf_dir / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(PyloraError, match=r"config\.json"):
        open_checkpoint(tmp_path)


def test_a_float16_weight_that_is_infinite_is_read(tmp_path: Path) -> None:
    tensors = {n: np.full(s, 1e9, np.float32) for n, s in TINY.tensors().items()}
    write_hf(tmp_path, TINY, "f16", tensors=tensors)
    assert np.isinf(open_checkpoint(tmp_path).load("model.norm.weight")).all()
