"""The head: rows that count, in chunks and by choice, and its dropout."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from bounds import gamma
from whole_model import SEQS, TOLERANCE, M, a_batch, an_adapter, bits

from pylora import Adapter, LoraConfig, resolve
from pylora.errors import UnsupportedError
from pylora.model.config import LlamaConfig
from pylora.model.llama import IGNORE, DropKey, Llama


def test_backward_of_some_rows_is_that_of_all_with_zeros_elsewhere(
    rng: np.random.Generator,
) -> None:
    config = LlamaConfig.tiny()
    net = Llama.random(config, backend="numpy", dtype=np.float64)
    net.attach(an_adapter(config, rng, dtype=np.float64))
    ids, _ = a_batch(rng, config)
    rows = np.array([8, 2, 8])  # a row may be asked for twice
    some, cache = net.forward(ids, SEQS, rows=rows)
    dlogits = rng.standard_normal(some.shape)
    got = net.backward(dlogits, cache)
    whole, cache = net.forward(ids, SEQS)
    scattered = np.zeros_like(whole)
    np.add.at(scattered, rows, dlogits)
    want = net.backward(scattered, cache)
    for path, grad in want.items():
        for name in "AB":
            array = getattr(grad, name)
            np.testing.assert_allclose(
                getattr(got[path], name), array, rtol=0, atol=TOLERANCE * np.abs(array).max()
            )


def test_loss_by_chunks_is_the_loss_of_whole_logits(
    ops: Any, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = LlamaConfig.tiny()
    net = Llama.random(config, backend=ops)
    net.attach(an_adapter(config, rng, biases=True))
    ids, labels = a_batch(rng, config)
    weight = rng.uniform(0.1, 1, M).astype(np.float32)
    logits, cache = net.forward(ids, SEQS)
    nll, lse = ops.cross_entropy_forward(logits, labels)
    want = net.backward(ops.cross_entropy_backward(logits, labels, lse, weight), cache)
    for size in (2, 1000):
        monkeypatch.setattr(ops, "head_rows", size)
        got_nll, got = net.loss(ids, labels, SEQS, weight=weight)
        assert got is not None and got_nll.tobytes() == nll.tobytes()
        for path, grad in want.items():
            for name, array in vars(grad).items():
                if array is not None:
                    # The sums run over the same rows, in another order and without the zero rows.
                    scale = float(np.abs(array).max())
                    np.testing.assert_allclose(
                        getattr(got[path], name), array, rtol=0, atol=gamma(2**9) * scale
                    )


def test_rows_without_a_label_count_nothing(ops: Any, rng: np.random.Generator) -> None:
    config = LlamaConfig.tiny()
    net = Llama.random(config, backend=ops)
    net.attach(an_adapter(config, rng))
    ids, labels = a_batch(rng, config)
    counted = labels != IGNORE
    nll, grads = net.loss(ids, labels, SEQS)
    _, by_number = net.loss(ids, labels, SEQS, weight=1 / int(counted.sum()))
    assert grads is not None and by_number is not None
    assert not nll[~counted].any() and (nll[counted] > 0).all()
    assert bits(ops, grads) == bits(ops, by_number)
    nothing, zeros = net.loss(ids, np.full(M, IGNORE), SEQS)
    assert zeros is not None and set(zeros) == set(config.modules())
    assert not nothing.any()
    assert not any(a.any() for g in zeros.values() for a in (g.A, g.B))
    empty, none = net.loss([], [])
    assert empty.shape == (0,) and none is not None and set(none) == set(config.modules())


def test_head_dropout_is_keyed_by_row_whatever_is_counted(
    ops: Any, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = LlamaConfig.tiny()
    net = Llama.random(config, backend=ops)
    net.attach(an_adapter(config, rng, only=("lm_head",), dropout=0.5))
    ids, labels = rng.integers(0, config.vocab_size, (2, M))
    key = DropKey(3, 1, row0=10)
    whole, _ = net.loss(ids, labels, SEQS, drop=key)
    monkeypatch.setattr(ops, "head_rows", 5)
    few = labels.copy()
    few[::2] = IGNORE
    some, _ = net.loss(ids, few, SEQS, drop=key)
    assert some[1::2].tobytes() == whole[1::2].tobytes()
    with pytest.raises(UnsupportedError, match="lm_head"):
        net.forward(ids, SEQS, drop=key, rows=[0])


def test_smoothed_labels_by_the_formula_and_by_differences() -> None:
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = Llama.random(LlamaConfig.tiny(), seed=3)
    low = Adapter.init(resolve(config, model.config.modules()), config, seed=0)
    model.attach(low)
    rng, e, V = np.random.default_rng(0), 0.1, model.config.vocab_size
    ids, labels = rng.integers(0, V, 12), rng.integers(0, V, 12)
    labels[:3] = IGNORE
    z = model.forward(ids)[0].astype(np.float64)
    logs = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
    want = -((1 - e) * logs[np.arange(12), np.maximum(labels, 0)] + e * logs.mean(axis=1))
    nll, grads = model.loss(ids, labels, smoothing=e)
    assert np.allclose(nll, np.where(labels == IGNORE, 0, want), atol=2e-6)
    path = next(iter(grads))
    A, step = low[path].A, np.float32(1e-2)
    for at in ((0, 0), (1, 2)):
        before, found = A[at], []
        for value in (before + step, before - step):
            A[at] = value
            found.append(model.loss(ids, labels, smoothing=e, grads=False)[0].sum() / 9)
        A[at] = before
        assert grads[path].A[at] == pytest.approx((found[0] - found[1]) / (2 * step), rel=2e-3)
    plain = model.loss(ids, labels)[0]
    assert (model.loss(ids, labels, smoothing=0.0)[0] == plain).all() and (plain != nll).any()


@pytest.mark.parity
def test_smoothed_labels_are_transformers() -> None:
    torch = pytest.importorskip("torch")
    smoother = pytest.importorskip("transformers.trainer_pt_utils").LabelSmoother(epsilon=0.1)
    model = Llama.random(LlamaConfig.tiny(), seed=3)
    rng, V = np.random.default_rng(1), model.config.vocab_size
    ids, labels = rng.integers(0, V, 15), rng.integers(0, V, 15)
    labels[::4] = IGNORE
    logits = torch.from_numpy(model.forward(ids)[0])[None]
    theirs = float(smoother({"logits": logits}, torch.from_numpy(labels)[None]))
    nll, _ = model.loss(ids, labels, smoothing=0.1, grads=False)
    assert nll.sum() / (labels != IGNORE).sum() == pytest.approx(theirs, rel=1e-5)
