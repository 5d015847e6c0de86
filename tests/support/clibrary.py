"""The installed C library, through ctypes: models, adapters and sessions as a C program uses them.

PYLORA_C_PREFIX is where `cmake --install` put it (`make clib` sets it, and so does CI); without it
tests of the C library are skipped.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from ctypes import POINTER, byref, c_char_p, c_double, c_float, c_int, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from pylora.formats import open_checkpoint
from pylora.model.llama import Llama

PREFIX = Path(os.environ.get("PYLORA_C_PREFIX", ""))
needs_library = pytest.mark.skipif(
    not os.environ.get("PYLORA_C_PREFIX"), reason="needs PYLORA_C_PREFIX: run `make clib`"
)
PRECISIONS = {"fp32": 0, "bf16": 1, "int8": 3, "int4": 5, "fp32x3": 6, "int8a8": 67, "int4a8": 69}
STATUS = {6: "unsupported", 10: "file", 11: "plan"}


class Tensor(ctypes.Structure):
    _fields_ = (
        ("name", c_char_p),
        ("type", c_char_p),
        ("kind", c_int32),
        ("dims", c_int32),
        ("shape", c_int64 * 16),
        ("data", c_void_p),
        ("bytes", c_int64),
    )


class About(ctypes.Structure):
    _fields_ = (
        ("family", c_char_p),
        ("vocab", c_int64),
        ("hidden", c_int64),
        ("inner", c_int64),
        ("positions", c_int64),
        ("layers", c_int32),
        ("heads", c_int32),
        ("kv_heads", c_int32),
        ("head_dim", c_int32),
        ("precision", c_int32),
        ("tied", c_int32),
        ("bos", c_int64),
        ("eos", c_int64 * 16),
        ("eos_count", c_int32),
        ("weight_bytes", c_int64),
    )


class Entry(ctypes.Structure):
    _fields_ = (
        ("module", c_char_p),
        ("r", c_int64),
        ("d", c_int64),
        ("k", c_int64),
        ("alpha", c_double),
        ("scale", c_double),
    )


class CError(Exception):
    """A status of the library and its sentence."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = STATUS.get(status, str(status))


@cache
def library() -> ctypes.CDLL:
    folders = [PREFIX / "lib", *sorted((PREFIX / "lib").glob("*-linux-gnu")), PREFIX / "lib64"]
    found = next(
        p for f in folders for p in (f / "libpylora.so", f / "libpylora.dylib") if p.exists()
    )
    lib = ctypes.CDLL(str(found))
    lib.pylora_file_open.argtypes = [c_char_p, POINTER(c_void_p), c_char_p]
    lib.pylora_file_close.argtypes = [c_void_p]
    lib.pylora_file_find.argtypes = [c_void_p, c_char_p]
    lib.pylora_file_find.restype = POINTER(Tensor)
    lib.pylora_tensor_read.argtypes = [c_void_p, c_int64, c_int64, c_void_p, c_char_p]
    lib.pylora_model_open.argtypes = [c_char_p, c_int, POINTER(c_void_p), c_char_p]
    lib.pylora_model_close.argtypes = [c_void_p]
    lib.pylora_model_about.argtypes = [c_void_p]
    lib.pylora_model_about.restype = POINTER(About)
    lib.pylora_model_rope.argtypes = [c_void_p, c_int32, c_int64, c_void_p, c_void_p]
    lib.pylora_adapter_open.argtypes = [c_void_p, c_char_p, POINTER(c_void_p), c_char_p]
    lib.pylora_adapter_close.argtypes = [c_void_p]
    lib.pylora_adapter_struct.argtypes = [c_void_p]
    lib.pylora_adapter_struct.restype = c_void_p
    lib.pylora_adapter_entry.argtypes = [c_void_p, c_int64]
    lib.pylora_adapter_entry.restype = POINTER(Entry)
    lib.pylora_session_open.argtypes = [c_void_p, c_int64, POINTER(c_void_p), c_char_p]
    lib.pylora_session_close.argtypes = [c_void_p]
    lib.pylora_session_forward.argtypes = [
        c_void_p,
        c_void_p,
        c_void_p,
        c_int64,
        c_void_p,
        c_char_p,
    ]
    lib.pylora_greedy.argtypes = [POINTER(c_float), c_int64, POINTER(c_int64)]
    return lib


def _call(function: str, *arguments: object) -> None:
    """Calls with a message behind the arguments; CError unless it succeeds."""
    why = ctypes.create_string_buffer(768)
    if status := getattr(library(), function)(*arguments, why):
        raise CError(status, why.value.decode())
    assert why.value == b""


class CModel:
    """A model, and at most one adapter of it, as the C library has them."""

    def __init__(self, path: Path, precision: str = "fp32") -> None:
        self._model, self._adapter = c_void_p(), c_void_p()
        _call("pylora_model_open", os.fsencode(path), PRECISIONS[precision], byref(self._model))

    @property
    def about(self) -> About:
        about: About = library().pylora_model_about(self._model).contents
        return about

    def attach(self, path: Path) -> None:
        """Puts the adapter in place of the one that is there."""
        fresh = c_void_p()
        _call("pylora_adapter_open", self._model, os.fsencode(path), byref(fresh))
        library().pylora_adapter_close(self._adapter)
        self._adapter = fresh

    def plan(self) -> list[tuple[str, int, float, float]]:
        """(module, r, alpha, scale) of the adapter."""
        out = []
        while entry := library().pylora_adapter_entry(self._adapter, len(out)):
            e = entry.contents
            out.append((e.module.decode(), int(e.r), float(e.alpha), float(e.scale)))
        return out

    def rope(self, positions: int) -> tuple[np.ndarray, np.ndarray]:
        shape = positions, self.about.head_dim // 2
        cos, sin = np.empty(shape, np.float32), np.empty(shape, np.float32)
        assert not library().pylora_model_rope(
            self._model, 0, positions, cos.ctypes.data, sin.ctypes.data
        )
        return cos, sin

    def generate(self, ids: Sequence[int], count: int) -> tuple[list[int], np.ndarray]:
        """Greedily `count` tokens after the prompt, whatever they are; the logits of each step."""
        session = c_void_p()
        _call("pylora_session_open", self._model, len(ids) + count, byref(session))
        adapter = library().pylora_adapter_struct(self._adapter)
        out, logits, latest = [], [], list(ids)
        for _ in range(count):
            new = np.array(latest, np.int64)
            row = np.empty(self.about.vocab, np.float32)
            _call(
                "pylora_session_forward",
                session,
                adapter,
                new.ctypes.data,
                len(new),
                row.ctypes.data,
            )
            token = c_int64()
            pointer = row.ctypes.data_as(POINTER(c_float))
            assert not library().pylora_greedy(pointer, len(row), byref(token))
            latest = [token.value]
            out.append(token.value)
            logits.append(row)
        library().pylora_session_close(session)
        return out, np.stack(logits)

    def close(self) -> None:
        library().pylora_adapter_close(self._adapter)
        library().pylora_model_close(self._model)
        self._model, self._adapter = c_void_p(), c_void_p()

    def __enter__(self) -> CModel:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def read_tensor(path: Path, name: str) -> np.ndarray:
    """A matrix of a GGUF or safetensors file as float32."""
    file = c_void_p()
    _call("pylora_file_open", os.fsencode(path), byref(file))
    tensor = library().pylora_file_find(file, name.encode())
    assert tensor, f"there is no tensor {name}"
    out = np.empty(tuple(tensor.contents.shape[:2]), np.float32)
    _call("pylora_tensor_read", tensor, 0, len(out), out.ctypes.data)
    library().pylora_file_close(file)
    return out


def python_model(path: Path, precision: str) -> Llama:
    with open_checkpoint(path) as checkpoint:
        return Llama.from_checkpoint(checkpoint, "c", precision)


def greedy(model: Llama, ids: list[int], count: int) -> tuple[list[int], np.ndarray]:
    """Tokens and logits of the C backend under Python, step by step."""
    kv = model.kv_cache(1, len(ids) + count)
    out: list[int] = []
    logits = []
    for i in range(count):
        row = model.decode(out[-1:] if i else ids, kv, [1 if i else len(ids)])[0]
        out.append(int(np.argmax(row)))
        logits.append(np.array(row))
    return out, np.stack(logits)
