"""safetensors: what is written is what the library writes and reads; what is read is checked."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from pylora.errors import DtypeError, FileFormatError, UnsupportedError
from pylora.formats.base import narrow, widen
from pylora.formats.safetensors import Bf16, SafeTensors, save

DTYPES = ["float32", "float16", "float64", "int64", "int32", "uint32", "uint16", "uint8", "bool"]
ARRAYS = st.sampled_from(DTYPES).flatmap(
    lambda d: hnp.arrays(d, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
)
NAMES = st.text(max_size=8).filter(lambda s: s.isprintable() and s != "__metadata__")


def write(path: Path, header: Any, data: bytes, length: int | None = None) -> Path:
    """A safetensors file with any header, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + text + data)
    return path


def entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@hypothesis.given(st.dictionaries(NAMES, ARRAYS, max_size=4))
def test_what_is_saved_is_what_the_library_saves_and_what_is_read(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, np.ndarray]
) -> None:
    path = tmp_path_factory.mktemp("st") / "a.safetensors"
    save(path, tensors, {"made by": "a test"})
    contiguous = {k: np.asarray(v, order="C") for k, v in tensors.items()}
    assert path.read_bytes() == safetensors.numpy.save(contiguous, {"made by": "a test"})
    with SafeTensors(path) as file:
        assert file.metadata == {"made by": "a test"} and set(file.tensors) == set(tensors)
        for name, x in tensors.items():
            got = file.view(name)
            assert got.shape == x.shape == file.shape(name)
            assert got.tobytes() == x.tobytes() and not got.flags.writeable


def test_bfloat16_needs_no_ml_dtypes_and_agrees_with_it(tmp_path: Path) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)
    save(tmp_path / "ours", {"x": Bf16(bits)})
    theirs = {"x": bits.view(ml_dtypes.bfloat16)}
    assert (tmp_path / "ours").read_bytes() == safetensors.numpy.save(theirs)
    file = SafeTensors(tmp_path / "ours")
    assert file.dtype("x") == "bf16" and np.array_equal(file.view("x"), bits)
    expected = theirs["x"].astype(np.float32)
    assert np.array_equal(file.load("x"), expected, equal_nan=True)


@hypothesis.given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50))
def test_rounding_to_bfloat16_and_float16(words: list[int]) -> None:
    x = np.array(words, np.uint32).view(np.float32)
    with np.errstate(all="ignore"):
        expected = x.astype(ml_dtypes.bfloat16).astype(np.float32)
        half = x.astype(np.float16).astype(np.float32)
    assert np.array_equal(widen(narrow(x, "bf16"), "bf16"), expected, equal_nan=True)
    assert np.array_equal(widen(narrow(x, "f16"), "f16"), half, equal_nan=True)
    assert widen(narrow(x, "f32"), "f32").tobytes() == x.tobytes()


@pytest.mark.parametrize("bits", [0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0x00008000])
def test_bfloat16_ties_go_to_even(bits: int) -> None:
    x = np.array([bits], np.uint32).view(np.float32)
    assert narrow(x, "bf16") == x.astype(ml_dtypes.bfloat16).view(np.uint16)


def test_equal_tensors_and_metadata_make_equal_files(tmp_path: Path) -> None:
    """The library hashes metadata into an order that differs between processes."""
    code = (
        "import sys, numpy as np; from pylora.formats.safetensors import save;"
        "save(sys.argv[1], {'b': np.ones(3), 'a': np.ones(2)},"
        "{c: 'ü\\n' + c for c in 'qwertzuiop'})"
    )
    for name in "abc":
        subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], check=True)
    assert len({(tmp_path / name).read_bytes() for name in "abc"}) == 1
    metadata = SafeTensors(tmp_path / "a").metadata
    assert list(metadata) == sorted("qwertzuiop") and metadata["q"] == "ü\nq"


def test_non_contiguous_and_big_endian_input(tmp_path: Path) -> None:
    x = np.arange(12.0, dtype=">f4").reshape(3, 4)
    before = x.copy()
    save(tmp_path / "a", {"t": x.T, "s": x[:, ::2]})
    file = SafeTensors(tmp_path / "a")
    assert np.array_equal(file.load("t"), x.T) and np.array_equal(file.load("s"), x[:, ::2])
    assert np.array_equal(x, before)


def test_a_dtype_that_the_format_lacks_leaves_no_file(tmp_path: Path) -> None:
    for bad in (np.zeros(2, complex), np.array(["x"]), np.array([None])):
        with pytest.raises(DtypeError, match="'t'"):
            save(tmp_path / "a", {"t": bad})
    with pytest.raises(DtypeError, match="uint16"):
        save(tmp_path / "a", {"t": Bf16(np.zeros(2, np.float32))})
    assert not list(tmp_path.iterdir())


def test_loading_an_aligned_float32_copies_nothing(tmp_path: Path) -> None:
    save(tmp_path / "a", {"t": np.ones((4, 4), np.float32)})
    file = SafeTensors(tmp_path / "a")
    assert np.shares_memory(file.load("t"), file.view("t"))
    kept = file.view("t")
    file.close()
    assert kept.sum() == 16  # the view keeps the mapping alive
    with pytest.raises(FileFormatError, match="no tensor 't'"):
        file.view("t")


def test_unaligned_data_is_read_right(tmp_path: Path) -> None:
    x = np.arange(3, dtype=np.float32)
    path = write(tmp_path / "a", {"t": entry("F32", [3], 0, 12)}, x.tobytes())
    text = path.read_bytes()[8:-12]
    for pad in range(8):
        write(path, text + b" " * pad, x.tobytes())
        got = SafeTensors(path).load("t")
        assert np.array_equal(got, x) and got.flags.aligned


F32 = entry("F32", [2], 0, 8)
BAD_HEADERS: dict[str, tuple[Any, int, str]] = {
    "not JSON": (b"{", 0, "not JSON"),
    "not UTF-8": (b"\xff{}", 0, "not JSON"),
    "not an object": ([], 0, "not a JSON object"),
    "deep": (b"[" * 100_000, 0, "not JSON"),
    "a name twice": (b'{"t":%s,"t":%s}' % ((json.dumps(F32).encode(),) * 2), 8, "'t' twice"),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, 0, "__metadata__"),
    "entry is a list": ({"t": [1]}, 0, "'t'"),
    "no dtype": ({"t": {"shape": [], "data_offsets": [0, 0]}}, 0, "'t'"),
    "unknown dtype": ({"t": entry("F7", [2], 0, 8)}, 8, "F7"),
    "dtype is a number": ({"t": {**F32, "dtype": 1}}, 8, "dtype"),
    "negative shape": ({"t": entry("F32", [-2], 0, 8)}, 8, "shape"),
    "fractional shape": ({"t": {**F32, "shape": [2.0]}}, 8, "shape"),
    "true in a shape": ({"t": {**F32, "shape": [True, 2]}}, 8, "shape"),
    "shape and size": ({"t": entry("F32", [3], 0, 8)}, 8, "needs 12 bytes"),
    "overflow": ({"t": entry("F32", [2**62, 2**62], 0, 8)}, 8, "needs"),
    "many dimensions": ({"t": entry("F32", [1] * 1000, 0, 4)}, 4, "dimensions"),
    "three offsets": ({"t": {**F32, "data_offsets": [0, 4, 8]}}, 8, "offsets"),
    "reversed": ({"t": entry("F32", [2], 8, 0)}, 8, "'t'"),
    "out of bounds": ({"t": entry("F32", [2**40], 0, 2**42)}, 8, "truncated"),
    "overlap": ({"t": F32, "u": entry("F32", [2], 4, 12)}, 12, "overlaps"),
    "same bytes": ({"t": F32, "u": F32}, 8, "overlaps"),
    "hole": ({"t": F32, "u": entry("F32", [1], 12, 16)}, 16, "hole"),
    "left over": ({"t": F32}, 9, "left over"),
    "nothing claims": ({}, 4, "left over"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_a_bad_header_is_named(tmp_path: Path, case: str) -> None:
    header, size, message = BAD_HEADERS[case]
    path = write(tmp_path / "bad.safetensors", header, bytes(size))
    with pytest.raises(FileFormatError, match=message) as caught:
        SafeTensors(path)
    assert "bad.safetensors" in str(caught.value)


@pytest.mark.parametrize("length", [3, 2**31, 2**63, 2**64 - 1, 100_000_001])
def test_an_absurd_header_length_allocates_nothing(tmp_path: Path, length: int) -> None:
    with pytest.raises(FileFormatError, match="header"):
        SafeTensors(write(tmp_path / "a", {}, b"", length))


def test_other_dtypes_are_valid_but_not_weights(tmp_path: Path) -> None:
    header = {"t": entry("F8_E4M3", [4], 0, 4), "u": entry("I32", [1], 4, 8)}
    file = SafeTensors(write(tmp_path / "a", header, bytes(8)))
    with pytest.raises(UnsupportedError, match="F8_E4M3"):
        file.view("t")
    with pytest.raises(UnsupportedError, match="I32"):
        file.load("u")
