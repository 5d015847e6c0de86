"""Whole models on the GPU's backends against the numpy backend: loss, gradients, training,
resuming, generation with and without graphs, pools, merging, check, and what they refuse.

Runs where PYLORA_TEST_BACKENDS names cuda or cupy (tests/support/gpu.py); their single operations
are in tests/ops/test_protocol.py. Rows of a GPU's results have no promised bits, so figures are
compared within bounds.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from small_models import write_hf
from structures import run, structures, weights_of
from training import interrupt_after

import pylora
from pylora import backends
from pylora.adapters.loraconfig import LoraConfig
from pylora.errors import BackendError, DtypeError, PyloraError, RangeError
from pylora.generation.generate import generate
from pylora.model.linear import DropKey
from pylora.model.llama import IGNORE
from pylora.numbers.precision import BF16, from_bf16, to_bf16
from pylora.types import LoRA, Seqs

GPU = [n for n in ("cuda", "cupy") if n in os.environ.get("PYLORA_TEST_BACKENDS", "").split(",")]
pytestmark = pytest.mark.skipif(not GPU, reason="PYLORA_TEST_BACKENDS names neither cuda nor cupy")

CONFIG = pylora.LlamaConfig.tiny()
SEQS = Seqs.of([5, 1, 6])


@pytest.fixture(params=GPU or ["none"])
def gpu(request: pytest.FixtureRequest) -> Any:
    return backends.exactly(request.param)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def an_adapter(rng: np.random.Generator, dropout: float = 0.0) -> pylora.Adapter:
    """On every module, with random A and B."""
    names = ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj")
    lora = LoraConfig(
        r=4, lora_alpha=8, target_modules=names, init_lora_weights=False, lora_dropout=dropout
    )
    return pylora.Adapter.init(pylora.resolve(lora, CONFIG.modules()), lora, seed=3)


def pair(gpu: Any, precision: str = "fp32") -> tuple[Any, Any]:
    """The same model on the GPU and in NumPy."""
    return tuple(
        pylora.Llama.random(CONFIG, seed=1, backend=ops, precision=precision)
        for ops in (gpu, "numpy")
    )


def close(got: Any, want: Any, size: float = 2e-5) -> None:
    assert got.shape == want.shape and np.isfinite(got).all()
    scale = max(1.0, float(abs(want).max(initial=0)))
    np.testing.assert_allclose(got, want, rtol=0, atol=size * scale)


def test_loss_and_gradients(gpu: Any, rng: np.random.Generator) -> None:
    net, ref = pair(gpu)
    adapter = an_adapter(rng, dropout=0.2)
    ids, labels = rng.integers(0, CONFIG.vocab_size, (2, 12))
    labels[3] = IGNORE
    results = []
    for model in (net, ref):
        model.attach(adapter)
        nll, grads = model.loss(ids, labels, SEQS, drop=DropKey(1, 2))
        results.append((model.ops.to_numpy(nll), grads, model.ops))
    close(results[0][0], results[1][0])
    for path, want in results[1][1].items():
        for name in ("A", "B"):
            close(gpu.to_numpy(getattr(results[0][1][path], name)), getattr(want, name))
    # By logits, of some rows, and with every block run again.
    rows = [0, 4, 4, 11]
    weight = rng.standard_normal((4, CONFIG.vocab_size)).astype(np.float32)
    found = []
    for model in (net, ref):
        logits, cache = model.forward(ids, SEQS, rows=rows, recompute=True)
        grads = model.backward(model.ops.place(weight), cache)
        path = "model.layers.0.self_attn.q_proj"
        found.append((model.ops.to_numpy(logits), model.ops.to_numpy(grads[path].A)))
    close(found[0][0], found[1][0])
    close(found[0][1], found[1][1], 1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_narrow_precisions(gpu: Any, rng: np.random.Generator, precision: str) -> None:
    net, ref = pair(gpu, precision)
    adapter, ids = an_adapter(rng), rng.integers(0, CONFIG.vocab_size, 12)
    net.attach(adapter), ref.attach(adapter)
    size = 3e-2 if precision == "bf16" else 4e-3
    close(gpu.to_numpy(net.forward(ids, SEQS)[0]), ref.forward(ids, SEQS)[0], size)
    (_, got), (_, want) = (model.loss(ids, ids, SEQS) for model in (net, ref))
    for path in want:
        close(gpu.to_numpy(got[path].A), want[path].A, size)
        close(gpu.to_numpy(got[path].B), want[path].B, size)


@pytest.mark.parametrize("name", GPU or ["none"])
@settings(max_examples=15)
@given(s=structures())
def test_a_whole_model_of_any_structure(name: str, s: dict[str, Any]) -> None:
    """Norms, activations, fused projections, caps, multipliers, positions and experts."""
    results = []
    for ops in (backends.exactly(name), backends.get("numpy")):
        w = weights_of(s, "fp32", ops)
        results.append(run(ops.llama(w), w, s, ops))
    for got, want in zip(*results, strict=True):
        close(got, want, 1e-4)


def test_training_writes_the_adapters_own_arrays(
    gpu: Any, rng: np.random.Generator, tmp_path: Path
) -> None:
    from pylora.training.examples import Example
    from pylora.training.train import TrainConfig, train

    examples = [
        Example(ids, np.roll(ids, -1))
        for ids in rng.integers(0, CONFIG.vocab_size, (6, 7)).astype(np.int64)
    ]
    trained = []
    for model in pair(gpu):
        adapter, out = an_adapter(rng), tmp_path / model.ops.name
        before = adapter.digest()
        settings = TrainConfig(steps=3, batch_size=2, learning_rate=1e-2, warmup_steps=0)
        result = train(model, adapter, examples, settings, out_dir=out)
        assert adapter.digest() != before
        stored = pylora.Adapter.load(out / "adapter", CONFIG.modules())
        assert stored.digest() == adapter.digest()
        trained.append((adapter, result.losses))
    np.testing.assert_allclose(trained[0][1], trained[1][1], atol=1e-4)
    for path in trained[1][0]:
        # AdamW's first steps divide by the gradient's own size, so small ones may go either way.
        away = abs(trained[0][0][path].A - trained[1][0][path].A)
        assert float(away.mean()) < 1e-4


def test_a_run_is_resumed(gpu: Any, rng: np.random.Generator, tmp_path: Path) -> None:
    from pylora.training.examples import Example
    from pylora.training.train import TrainConfig, train

    net, _ = pair(gpu)
    examples = [Example(i, np.roll(i, -1)) for i in rng.integers(0, 16, (4, 6)).astype(np.int64)]
    settings = TrainConfig(steps=4, batch_size=2, warmup_steps=0, save_every=2)
    whole = an_adapter(rng)
    train(net, whole, examples, settings, out_dir=tmp_path / "whole")

    part = an_adapter(rng)
    with pytest.raises(KeyboardInterrupt):
        train(net, part, examples, settings, out_dir=tmp_path / "part", on_step=interrupt_after(2))
    again = an_adapter(rng)
    train(net, again, examples, settings, out_dir=tmp_path / "part", resume=True)
    assert again.digest() == whole.digest()


def test_generation_replays_graphs(
    gpu: Any, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, ref = pair(gpu)
    prompts = [[1, 2, 3], [4], [5, 6]]
    pools = []
    for model in (net, ref):
        pool = pylora.AdapterPool(model)
        pool.add("one", an_adapter(rng))
        embedding = LoraConfig(
            r=2, lora_alpha=4, target_modules=("embed_tokens", "k_proj"), init_lora_weights=False
        )
        plan = pylora.resolve(embedding, CONFIG.modules())
        pool.add("two", pylora.Adapter.init(plan, embedding, seed=5))
        pools.append(pool)
    names = ["one", None, "two"]
    got = generate(net, prompts, 9, pool=pools[0], adapters=names)
    assert got == generate(ref, prompts, 9, pool=pools[1], adapters=names)
    if gpu.name == "cuda":
        assert net.op.replays > 0
    replayed = getattr(net.op, "replays", 0)
    monkeypatch.setenv("PYLORA_CUDA_GRAPHS", "0")
    assert generate(net, prompts, 9, pool=pools[0], adapters=names) == got
    assert getattr(net.op, "replays", 0) == replayed
    sampled = [
        generate(model, prompts, 5, temperature=0.8, seed=4, eos_ids=()) for model in (net, ref)
    ]
    assert sampled[0] == sampled[1]


def test_a_graph_sees_the_numbers_of_its_step(gpu: Any) -> None:
    """Replays of one graph with other tokens: logits of each step are those of the whole text."""
    net, ref = pair(gpu)
    kv, ids = net.kv_cache(2, 16), np.array([[3, 9, 1, 7, 2, 8], [4, 4, 6, 0, 5, 1]])
    for t in range(6):
        logits = gpu.to_numpy(net.decode(ids[:, t], kv, [1, 1]))
        want, _ = ref.forward(ids[:, : t + 1].reshape(-1), Seqs.of([t + 1, t + 1]))
        close(logits, want[[t, 2 * t + 1]])
    if gpu.name == "cuda":  # what a replay writes to belongs to the graph alone
        graphs = [g for g in net.op._graphs.values() if g.graph is not None]
        assert graphs and all(g.pool.total_bytes() >= g.logits.nbytes for g in graphs)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_merging_is_exact(gpu: Any, rng: np.random.Generator, dtype: str) -> None:
    W = rng.standard_normal((9, 12)).astype(np.float32)
    W = {"f32": W, "f16": W.astype(np.float16), "bf16": to_bf16(W).view(np.uint16)}[dtype]
    A, B = (rng.standard_normal(s).astype(np.float32) for s in ((3, 12), (9, 3)))
    lora = LoRA(A, B, 0.7)
    merged, residue = gpu.merge(W, lora, dtype)
    want, lost = backends.get("numpy").merge(W, lora, dtype)
    assert merged.tobytes() == want.tobytes()
    assert residue.position.tolist() == lost.position.tolist()
    assert residue.bits.tolist() == lost.bits.tolist()
    assert gpu.unmerge(merged, lora, residue, dtype).tobytes() == W.tobytes()
    spaced = np.zeros((9, 24), W.dtype)[:, ::2]
    spaced[...] = W
    there = gpu.xp.asarray(W)
    for weight in (W, spaced, there):
        gpu.merge_in_place(weight, lora, dtype)
        assert np.ascontiguousarray(gpu.xp.asnumpy(weight)).tobytes() == want.tobytes()
    W.setflags(write=False)
    with pytest.raises(ValueError, match="read-only"):
        gpu.merge_in_place(W, lora, dtype)


def test_check_holds(gpu: Any, tmp_path: Path) -> None:
    from pylora.check.check import check_model

    write_hf(tmp_path / "model", CONFIG)
    report = check_model(tmp_path / "model", tokens=12, backend=gpu)
    verdicts = {f.check: f.verdict for f in report.findings}
    assert "FAIL" not in verdicts.values(), report.findings
    assert verdicts["rows"] == "not tested"  # said, not left out


def test_auto_is_the_best_that_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        if name in gone:
            raise BackendError("not here")
        return whole(name)

    whole, gone = backends.exactly, [n for n in ("cuda", "cupy") if n not in GPU]
    monkeypatch.setattr(backends, "exactly", missing)
    assert backends.get("auto").name == GPU[0]
    gone.append(GPU[0])
    assert backends.get("auto").name == (GPU[1] if len(GPU) > 1 else "c")
    gone += GPU
    assert backends.get("auto").name == "c"


def test_arrays_of_the_host_are_refused(gpu: Any) -> None:
    x = np.ones((2, 8), np.float32)
    with pytest.raises((TypeError, PyloraError)):
        gpu.swiglu_forward(x, x)
    with pytest.raises(DtypeError, match="float64|int64"):
        gpu.asarray(np.ones(3, np.int64))
    there = gpu.asarray(x)
    assert gpu.asarray(there) is there


def test_bfloat16_goes_there_and_back(gpu: Any, rng: np.random.Generator) -> None:
    x = to_bf16(rng.standard_normal((3, 5)).astype(np.float32))
    back = gpu.to_numpy(gpu.place(x))
    assert back.dtype == BF16 and from_bf16(back).tolist() == from_bf16(x).tolist()


def test_numbers_out_of_range(gpu: Any) -> None:
    W = gpu.pack(gpu.asarray(np.ones((4, 8), np.float32)))
    with pytest.raises(RangeError, match="token id"):
        gpu.embedding_forward(np.array([0, 4]), W)
    if gpu.name == "cuda":  # on the device it is seen at the next copy to the host
        y = gpu.embedding_forward(gpu.index(np.array([0, 4])), W)
        with pytest.raises(RangeError):
            gpu.to_numpy(y)
        gpu.to_numpy(gpu.embedding_forward(np.array([1]), W))


def test_a_model_that_is_too_large(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.xp.cuda.runtime, "memGetInfo", lambda: (1000, 5000))
    with pytest.raises(BackendError, match=r"need [\d,]+ bytes .*1,000 of its 5,000 are free"):
        pylora.Llama.random(CONFIG, backend=gpu)


def test_precisions_that_are_refused(gpu: Any) -> None:
    if gpu.name == "cuda":
        with pytest.raises(PyloraError, match="int8; choose one of fp32, bf16, fp16"):
            pylora.Llama.random(CONFIG, backend=gpu, precision="int8")
    with pytest.raises(PyloraError, match="fp16, which is for GPUs"):
        pylora.Llama.random(CONFIG, backend="c", precision="fp16")


def test_without_the_library_cupy_computes_and_says_so(
    gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pylora.backends.cuda import library

    monkeypatch.setattr(backends, "_loaded", {})
    monkeypatch.setattr(library, "_library", [])
    monkeypatch.delenv("PYLORA_CUDA_LIBRARY", raising=False)
    monkeypatch.setattr(library, "library_path", lambda: None)
    with pytest.warns(RuntimeWarning, match="'cupy' computes in its place"):
        assert backends.get("cuda").name == "cupy"
    assert "cuda" not in backends.available() and "cupy" in backends.available()


def test_a_step_that_cannot_be_captured_is_launched_kernel_by_kernel(
    gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if gpu.name != "cuda":
        pytest.skip("graphs are the cuda backend's")
    net, _ = pair(gpu)
    want = generate(net, [[1, 2, 3]], 5)
    assert net.op.replays
    again, _ = pair(gpu)

    def broken(*args: Any, **kw: Any) -> Any:
        raise RuntimeError("an operation that a capture cannot have")

    whole, captured = again.op._run, []

    def run(cache: Any, step: Any, at: Any) -> Any:
        if again.op._stream is not None and again.op._stream.is_capturing():
            captured.append(at)
            broken()
        return whole(cache, step, at)

    monkeypatch.setattr(again.op, "_run", run)
    with pytest.warns(RuntimeWarning, match="cannot be captured.*an operation that"):
        got = generate(again, [[1, 2, 3]], 5)
    assert got == want and len(captured) == 1 and not again.op.replays
    assert not again.op._stream.is_capturing()


def test_arrays_of_other_libraries(gpu: Any) -> None:
    """DLPack from the host's memory: copied; columns of the host become rows where they must."""

    class Exported:
        def __init__(self, a: np.ndarray) -> None:
            self.a, self.dtype = a, a.dtype

        def __dlpack_device__(self) -> tuple[int, int]:
            return (1, 0)

        def __dlpack__(self, **kw: Any) -> Any:
            return self.a.__dlpack__(**kw)

    a = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert (gpu.to_numpy(gpu.place(Exported(a))) == a).all()
    assert (gpu.to_numpy(gpu.place(a.T)) == a.T).all()
    assert gpu.asarray(a.T).flags.c_contiguous


def test_another_device_is_refused_with_a_sentence(
    gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if gpu.name != "cuda":
        pytest.skip("only the library has a device of its own")
    x = gpu.place(np.ones((2, 2), np.float32))
    monkeypatch.setattr(gpu, "device", gpu.device + 1)
    with pytest.raises(BackendError, match="current device in this thread is"):
        gpu.cast(x, np.float16)
    monkeypatch.setenv("PYLORA_CUDA_DEVICE", "first")
    with pytest.raises(BackendError, match="must be the number of a GPU"):
        type(gpu)()
    monkeypatch.setenv("PYLORA_CUDA_DEVICE", "99")
    with pytest.raises(BackendError, match="there is no GPU 99"):
        type(gpu)()


def test_what_the_benchmark_asks_of_a_gpu(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "bench"))
    import gpu_pylora
    import gpu_shapes

    for name, value in vars(gpu_shapes).items():  # put back afterwards
        if name.isupper():
            monkeypatch.setattr(gpu_shapes, name, dict(value) if name == "GEOMETRY" else value)
    gpu_shapes.tiny()
    engine = gpu_pylora.Engine(gpu.name)
    for key in gpu_shapes.linears()[-2:]:
        engine.linear(**key)()
    for key in gpu_shapes.merges():
        for part in ("merge", "unmerge"):
            engine.merge(part, **key)()
    for shapes, job in ((gpu_shapes.steps(), engine.step), (gpu_shapes.decodes(), engine.decode)):
        for key in shapes:
            run = job(**{k: v for k, v in key.items() if k != "alone"})
            run()
            run()
