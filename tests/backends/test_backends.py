"""The registry of backends, and what every backend must have."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import weakref
from typing import Any

import numpy as np
import pytest

import pylora
from pylora import backends
from pylora.errors import BackendError, ConfigError, DtypeError, ShapeError
from pylora.model.config import LlamaConfig
from pylora.model.llama import Llama
from pylora.numbers.precision import BF16, Stored, from_bf16, to_bf16
from pylora.ops.protocol import Backend
from pylora.reference import Reference
from pylora.types import Attn, Drop, LoRA, Seqs


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> Any:
    """No choice made and no variable set; whatever was chosen comes back afterwards."""
    monkeypatch.delenv(backends.ENV, raising=False)
    monkeypatch.setattr(backends, "_chosen", None)
    return monkeypatch


def test_a_choice_beats_the_variable_which_beats_the_default(clean: Any) -> None:
    assert backends.get().name == backends.available()[0]
    clean.setenv(backends.ENV, "no such backend")
    with pytest.raises(BackendError, match="no such backend"):
        backends.get()
    clean.setenv(backends.ENV, "numpy")
    assert backends.get() is backends.get("numpy")
    pylora.use("numpy")
    clean.setenv(backends.ENV, "no such backend")
    assert backends.get().name == "numpy"
    pylora.use(None)
    with pytest.raises(BackendError):
        backends.get()
    mine = backends.get("numpy")
    assert backends.get(mine) is mine


def test_auto_without_a_gpu_is_the_host(clean: Any) -> None:
    clean.setattr(backends.importlib.util, "find_spec", lambda name: None)
    assert backends.get("auto") is backends.host()
    pylora.use("auto")
    assert pylora.build_info()["backend"] == backends.host().name


def test_the_default_falls_back_only_where_the_core_is_not_built(clean: Any) -> None:
    clean.setattr(backends, "_loaded", {})

    def not_built() -> Any:
        raise ImportError("no module named pylora.backends._core")

    clean.setitem(backends._OPEN, "c", not_built)
    assert backends.available() == ("numpy",)
    assert backends.get().name == "numpy"
    with pytest.raises(BackendError, match="'c' is not available"):
        backends.get("c")

    def broken() -> Any:
        raise BackendError("PYLORA_ISA is wrong")

    clean.setitem(backends._OPEN, "c", broken)
    with pytest.raises(BackendError, match="PYLORA_ISA is wrong"):
        backends.get()


def test_every_backend_has_every_operation_with_the_same_parameters(ops: Any) -> None:
    members = [n for n in vars(Backend) if not n.startswith("_")]
    # What is no function of its own, such as to_numpy, each backend has in its own way.
    operations = [n for n, f in vars(Reference).items() if n[0] != "_" and inspect.isfunction(f)]
    assert set(operations) <= set(members)
    for name in (*members, "name", "xp"):
        assert hasattr(ops, name), f"{ops.name} lacks {name}"
    for name in operations:
        want = [(p.name, p.kind, p.default) for p in signature(getattr(Reference, name))]
        assert [(p.name, p.kind, p.default) for p in signature(getattr(type(ops), name))] == want
        assert [(p.name, p.kind, p.default) for p in signature(getattr(Backend, name))] == want


def signature(f: Any) -> list[inspect.Parameter]:
    return list(inspect.signature(f).parameters.values())


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (33, 7), (64, 65)])
def test_packing_keeps_shape_and_bits(
    ops: Any, rng: np.random.Generator, shape: tuple[int, int]
) -> None:
    W = rng.standard_normal(shape).astype(np.float32)
    W[0, 0] = -0.0
    before = W.copy()
    packed = ops.pack(W)
    assert packed.shape == shape and packed.nbytes >= W.nbytes
    assert ops.to_numpy(ops.unpack(packed)).tobytes() == before.tobytes()
    assert ops.to_numpy(ops.unpack(ops.pack(np.asfortranarray(W)))).tobytes() == before.tobytes()
    ops.unpack(packed)[...] = 0
    assert ops.to_numpy(ops.unpack(packed)).tobytes() == before.tobytes()


def test_arrays(ops: Any) -> None:
    assert ops.zeros((2, 3)).dtype == np.float32 and not ops.zeros((2, 3)).any()
    assert ops.empty((300, 400)).shape == (300, 400)
    assert ops.zeros(4).shape == (4,)
    a = ops.asarray(np.ones((3, 4), np.float32).T)
    assert a.flags.c_contiguous and a.shape == (4, 3)
    for bad in (np.float16, np.int64):
        with pytest.raises(DtypeError, match=np.dtype(bad).name):
            ops.asarray(np.ones(3, bad))
    with pytest.raises(ShapeError):
        ops.pack(np.ones(3, np.float32))


def test_settings_that_do_not_exist_are_refused(ops: Any) -> None:
    x, table = np.ones((1, 4), np.float32), np.ones((1, 2), np.float32)
    with pytest.raises(BackendError, match="'halves' is none of half, interleaved"):
        ops.rope(x, table, table, np.array([0]), 4, layout="halves")
    if ops.name == "c":
        before = ops.num_threads
        for n in (0, -1, 257, 10**12, 1.0, True, None):
            with pytest.raises(BackendError, match="from 1 to 256"):
                ops.set_num_threads(n)
        assert ops.num_threads == before


def test_threads_are_set_for_the_process_where_the_backend_has_any(ops: Any) -> None:
    pylora.use(ops.name)
    try:
        if ops.name != "c":
            with pytest.raises(BackendError, match="no threads of its own"):
                pylora.set_num_threads(2)
            return
        before = ops.num_threads
        pylora.set_num_threads(before + 1)
        assert ops.num_threads == pylora.build_info()["num_threads"] == before + 1
        ops.set_num_threads(before)
    finally:
        pylora.use(None)


@pytest.mark.parametrize("value", ["many", "0", "-4", "1.5", "257", "9" * 30])
def test_a_number_of_threads_that_is_none_is_refused(clean: Any, value: str) -> None:
    if "c" not in backends.available():
        pytest.skip("the C core is not built")
    clean.setattr(backends, "_loaded", {})
    clean.setenv("PYLORA_NUM_THREADS", value)
    with pytest.raises(BackendError, match=f"PYLORA_NUM_THREADS='{value}' is not a number"):
        backends.get("c")


def test_the_number_of_threads_may_change_under_an_operation(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another Python thread may set it after a workspace was asked for and before it is used."""
    if "c" not in backends.available():
        pytest.skip("the C core is not built")
    ops: Any = backends.get("c")
    q, k, v = (rng.standard_normal((200, 64)).astype(np.float32) for _ in range(3))
    from pylora.backends.c.marshal import Scratch

    before, asked, nothing = ops.num_threads, list[int](), Scratch().room

    def run() -> bytes:
        return bytes(ops.attention_forward(q, k, v, Seqs.of([200]), Attn(4, 4, 16, 0.25))[0])

    want = run()
    right = ops._scratch.at_least

    def at_least(nbytes: int) -> Any:
        asked.append(nbytes)
        ops.set_num_threads(64)
        ops._scratch.room = nothing  # so that no earlier one suffices
        return right(nbytes)

    monkeypatch.setattr(ops._scratch, "at_least", at_least)
    try:
        ops.set_num_threads(1)
        ops._scratch.room = nothing
        assert run() == want
    finally:
        ops.set_num_threads(before)
    assert len(asked) == 2 and asked[0] < asked[1]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_remembered_adapter(precision: str) -> None:
    """A packed weight keeps the struct of its latest adapter: pointers to arrays, not numbers."""
    if "c" not in backends.available():
        pytest.skip("the C core is not built")
    ops: Any = backends.get("c")
    W, x = ops.pack(np.zeros((5, 6), np.float32), precision), np.ones((2, 6), np.float32)

    def y(lora: LoRA, drop: Drop | None = None) -> np.ndarray:
        out, h = ops.lora_forward(x, W, None, lora, drop)
        assert h.shape == (2, lora.rank)
        return np.asarray(out)

    A, B = np.ones((2, 6), np.float32), np.ones((5, 2), np.float32)
    plain, strided = LoRA(A, B, 1.0), LoRA(A.T.copy().T, np.repeat(B, 2, axis=1)[:, ::2], 1.0)
    for lora in (plain, strided, plain, strided):  # those of `strided` are read from copies
        for number in (1.0, 2.0):
            lora.A[...] = number
            assert (y(lora) == 12 * number).all()
    assert (y(plain, Drop(0.999, 0, 0)) != y(plain)).any()
    for array in (A, B):
        with pytest.raises(ValueError, match="resize"):  # the struct would point to freed memory
            array.resize(1, refcheck=False)
    held = weakref.ref(plain)
    del plain, lora
    assert held() is None
    assert (y(LoRA(A * 0, B, 1.0)) == 0).all()  # whatever its id is
    with pytest.raises(ShapeError, match=re.escape("A must have the shape [any, 6], got [2, 5]")):
        y(LoRA(A[:, :5], B, 1.0))


@pytest.mark.parametrize("name", ["numpy", "c"])
def test_precisions(name: str, rng: np.random.Generator) -> None:
    if name not in backends.available():
        pytest.skip("the C core is not built")
    ops: Any = backends.get(name)
    W = rng.standard_normal((5, 33)).astype(np.float32)
    packed = ops.pack(W, "bf16")
    kept = from_bf16(to_bf16(W))
    assert packed.precision == "bf16" and packed.shape == (5, 33)
    assert ops.unpack(packed).tobytes() == kept.tobytes() != W.tobytes()
    raw = Stored("bf16", to_bf16(W).view(np.uint8).reshape(5, 66), (5, 33))
    for precision in ("fp32", "bf16"):
        assert ops.unpack(ops.pack(raw, precision)).tobytes() == kept.tobytes()
    assert ops.pack(W, "fp32x3").precision == ops.computes("fp32x3")
    with pytest.raises(
        ConfigError, match="'half'; choose one of fp32, fp32x3, bf16, fp16, int8, int4"
    ):
        ops.pack(W, "half")
    with pytest.raises(DtypeError, match="'iq1_s'"):
        Stored("iq1_s", np.zeros((1, 1), np.uint8), (1, 32))


@pytest.mark.parametrize("name", ["numpy", "c"])
def test_a_model_states_its_precision(name: str) -> None:
    if name not in backends.available():
        pytest.skip("the C core is not built")
    net = Llama.random(LlamaConfig.tiny(), backend=name, precision="bf16")
    assert net.precision == net.computes == net.precision_report == "bf16"
    assert all(m.W.precision == "bf16" for m in net.modules.values())
    said = Llama.random(LlamaConfig.tiny(), backend=name, precision="fp32x3").precision_report
    assert said.startswith("fp32x3") and (("strict fp32" in said) == ("AMX" in said))
    with pytest.raises(ConfigError, match="choose one of fp32, fp32x3, bf16, fp16, int8, int4"):
        Llama.random(LlamaConfig.tiny(), backend=name, precision="half")


def test_bf16_in_numpy() -> None:
    """To nearest even, as the bits say; NaN and infinity stay what they are."""
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x7F800001, 0xFF800000, 0x7F7FFFFF])
    got = to_bf16(bits.astype(np.uint32).view(np.float32))
    want = [0x3F80, 0x3F82, 0x3F81, 0x7FC0, 0xFF80, 0x7F80]
    assert got.dtype == BF16 and got.view(np.uint16).tolist() == want
    assert from_bf16(got)[:3].tolist() == [1.0, 1.015625, 1.0078125]
    assert to_bf16(np.ones((2, 3), np.float32).T).shape == (3, 2)


def test_the_numpy_backend_never_writes_to_a_packed_weight() -> None:
    packed = backends.get("numpy").pack(np.ones((2, 2)))
    with pytest.raises(ValueError, match="read-only"):
        packed.values[0, 0] = 2


def test_importing_pylora_imports_no_heavy_part() -> None:
    heavy = "pylora.model.llama pylora.formats pylora.commands.cli gguf tokenizers safetensors"
    heavy += " matplotlib typer"
    code = f"import sys, pylora; print([m for m in '{heavy}'.split() if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_every_public_name_is_there() -> None:
    assert set(pylora.__all__) == set(pylora._HOME) | {
        "__version__",
        "build_info",
        "set_num_threads",
        "use",
    }
    for name in pylora.__all__:
        assert getattr(pylora, name) is not None
        assert name in dir(pylora)
    with pytest.raises(AttributeError, match="nothing"):
        _ = pylora.nothing


def test_build_info_says_what_computes() -> None:
    info = pylora.build_info()
    assert info["pylora"] == pylora.__version__ == "0.1.0"
    assert info["backend"] in info["backends"]
    assert ("isa" in info) == ("c" in info["backends"])


def test_a_misaligned_array_is_copied_before_the_core_reads_it() -> None:
    from pylora.backends.c.marshal import read

    bytes_ = np.zeros(4 * 6 + 1, np.uint8)[1:]
    odd = bytes_.view(np.float32).reshape(2, 3)
    odd[...] = np.arange(6).reshape(2, 3)
    assert not odd.flags.aligned
    taken = read("x", odd, 2, 3)
    assert taken.flags.aligned and taken.flags.c_contiguous
    assert taken.tolist() == odd.tolist()
