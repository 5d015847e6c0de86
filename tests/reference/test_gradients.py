"""Each hand-written backward pass is the derivative of its forward pass.

By the complex step: for an analytic f, f'(x) v = Im f(x + i h v) / h with no subtraction, so h can
be 1e-100 and the result is as exact as f itself (Squire & Trapp, SIAM Review 40(1), 1998). The
reference runs in complex arithmetic; its float64 gradients then hold for every backend, which
tests/ops/test_protocol.py holds to the float64 reference.
"""

from __future__ import annotations

from typing import Any

import bounds
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from op_table import TABLE, Arrays, in_float64, normal

from pylora.reference import Reference
from pylora.types import Attn, Drop, LoRA, Seqs

R = Reference()
OPS = {op.name: op for op in TABLE}
STEP = 1e-100
seeds = st.integers(0, 2**32 - 1)
tokens = st.sampled_from([0, 1, 2, 7, 20])


def check(f: Any, inputs: dict[str, Any], grads: dict[str, Any], limits: dict[str, Any]) -> None:
    """`f(**inputs)` is a list of (output, its cotangent); grads are the claimed gradients of
    sum(output * cotangent), limits what rounding may do to them. Each is tried along a direction.

    The directional derivative sums what the gradient sums, and its own rounding is within a small
    multiple of the same magnitudes; 16 is that multiple."""
    rng = np.random.default_rng(7)
    for name, grad in grads.items():
        v = rng.normal(size=inputs[name].shape)
        bent = {n: a.astype(np.complex128) for n, a in inputs.items()}
        bent[name] = bent[name] + 1j * STEP * v
        terms = [(np.imag(y) / STEP * c) for y, c in f(**bent)]
        slope = sum(float(t.sum()) for t in terms)
        bound = 16 * float((np.abs(limits[name]) * np.abs(v)).sum())
        bound += bounds.gamma(sum(t.size for t in terms), np.float64) * sum(
            float(np.abs(t).sum()) for t in terms
        )
        bounds.assert_within(np.float64((grad * v).sum()), np.float64(slope), bound, f"d{name}")


def inputs_of(name: str, seed: int, m: int) -> Arrays:
    return in_float64(OPS[name].make(np.random.default_rng(seed), m))


def pick(i: Arrays, *names: str) -> dict[str, Any]:
    return {n: i[n] for n in names}


@given(seed=seeds, m=tokens)
def test_lora_linear(seed: int, m: int) -> None:
    i = inputs_of("lora_backward", seed, m)
    lora, drop, dy = LoRA(i["A"], i["B"], i["scale"]), i["drop"], i["dy"]
    h = R.lora_forward(i["x"], i["W"], None, lora, drop)[1]
    dx, dA, dB = R.lora_backward(dy, i["x"], h, i["W"], lora, drop)
    p = drop.p if drop else 0.0
    dx_limit, dA_limit, dB_limit = bounds.lora_backward(
        dy, i["x"], h, i["W"], lora, p=p, dtype=np.float64
    )
    # dB is made of h, which forward rounded.
    h_limit = bounds.lora_forward(i["x"], i["W"], None, lora, p=p, dtype=np.float64)[1]
    dB_limit = dB_limit + abs(lora.scale) * np.abs(dy).T @ h_limit

    def f(x: Any, A: Any, B: Any) -> list[Any]:
        W = i["W"].astype(x.dtype)
        return [(R.lora_forward(x, W, None, LoRA(A, B, i["scale"]), drop)[0], dy)]

    check(
        f,
        pick(i, "x", "A", "B"),
        {"x": dx, "A": dA, "B": dB},
        {"x": dx_limit, "A": dA_limit, "B": dB_limit},
    )


@given(seed=seeds, m=tokens)
def test_rms_norm(seed: int, m: int) -> None:
    i = inputs_of("rms_norm_backward", seed, m)
    rstd = R.rms_norm_forward(i["x"], i["w"], 1e-5)[1]
    dx, dw = R.rms_norm_backward(i["dy"], i["x"], i["w"], rstd, None, True)
    limits = bounds.rms_norm_backward(i["dy"], i["x"], i["w"], rstd, dtype=np.float64)
    check(
        lambda x, w: [(R.rms_norm_forward(x, w, 1e-5)[0], i["dy"])],
        pick(i, "x", "w"),
        {"x": dx, "w": dw},
        {"x": limits[0], "w": limits[1]},
    )


@given(seed=seeds, m=tokens)
def test_rope(seed: int, m: int) -> None:
    i = inputs_of("rope", seed, m)
    dy = np.random.default_rng(seed).normal(size=i["x"].shape)
    rotate = lambda x, inverse: R.rope(
        x, i["cos"], i["sin"], i["position"], i["D"], i["layout"], inverse
    )
    check(
        lambda x: [(rotate(x, i["inverse"]), dy)],
        pick(i, "x"),
        {"x": rotate(dy, not i["inverse"])},
        {"x": bounds.rope(dy, i["D"], np.float64)},
    )


@given(seed=seeds, m=tokens)
def test_swiglu(seed: int, m: int) -> None:
    i = inputs_of("swiglu_backward", seed, m)
    dgate, dup = R.swiglu_backward(i["dy"], i["gate"], i["up"])
    limits = bounds.swiglu_backward(i["dy"], i["gate"], i["up"], np.float64)
    check(
        lambda gate, up: [(R.swiglu_forward(gate, up), i["dy"])],
        pick(i, "gate", "up"),
        {"gate": dgate, "up": dup},
        {"gate": limits[0], "up": limits[1]},
    )


@given(seed=seeds, m=tokens)
def test_layer_norm(seed: int, m: int) -> None:
    i = inputs_of("layer_norm_backward", seed, m)
    rstd = R.layer_norm_forward(i["x"], i["w"], i["b"], 1e-3)[1]
    dx = R.layer_norm_backward(i["dy"], i["x"], i["w"], rstd)
    limit = bounds.layer_norm_backward(i["dy"], i["x"], i["w"], rstd, dtype=np.float64)
    check(
        lambda x: [(R.layer_norm_forward(x, i["w"], i["b"], 1e-3)[0], i["dy"])],
        pick(i, "x"),
        {"x": dx},
        {"x": limit},
    )


@given(seed=seeds, m=tokens)
def test_activations(seed: int, m: int) -> None:
    i = inputs_of("activation_backward", seed, m)
    kind, gated = i["kind"], i["up"] is not None
    dx, dup = R.activation_backward(i["dy"], i["x"], i["up"], kind)
    limits = bounds.activation_backward(i["dy"], i["x"], i["up"], kind, np.float64)
    names = ("x", "up") if gated else ("x",)
    check(
        lambda x, up=None: [(R.activation_forward(x, up, kind), i["dy"])],
        pick(i, *names),
        {"x": dx, "up": dup} if gated else {"x": dx},
        dict(zip(names, limits)),
    )


@given(seed=seeds, m=tokens)
def test_soft_cap(seed: int, m: int) -> None:
    i = inputs_of("soft_cap_backward", seed, m)
    y = R.soft_cap_forward(i["x"], i["times"], i["cap"])
    check(
        lambda x: [(R.soft_cap_forward(x, i["times"], i["cap"]), i["dy"])],
        pick(i, "x"),
        {"x": R.soft_cap_backward(i["dy"], y, i["times"], i["cap"])},
        {"x": bounds.soft_cap_backward(i["dy"], y, i["times"], i["cap"], np.float64)
         + bounds.gamma(40, np.float64) * np.abs(i["dy"])},
    )  # fmt: skip


def _check_attention(i: Arrays) -> None:
    seqs, attn, do = i["seqs"], i["attn"], i["do"]
    o, lse = R.attention_forward(i["q"], i["k"], i["v"], seqs, attn)
    arguments = (do, i["q"], i["k"], i["v"], o, lse, seqs, attn)
    names = ("q", "k", "v")
    check(
        lambda q, k, v: [(R.attention_forward(q, k, v, seqs, attn)[0], do)],
        pick(i, *names),
        dict(zip(names, R.attention_backward(*arguments))),
        dict(zip(names, bounds.attention_backward(*arguments, np.float64))),
    )


@given(seed=seeds, m=tokens)
def test_attention(seed: int, m: int) -> None:
    _check_attention(inputs_of("attention_backward", seed, m))


@pytest.mark.parametrize("window", [0, 3])
def test_attention_with_keys_of_earlier_steps(rng: np.random.Generator, window: int) -> None:
    seqs = Seqs(np.array([0, 2, 2, 6]), np.array([1, 4, 8]), np.array([3, 3, 9]))
    i = {"q": (6, 24), "k": (18, 12), "v": (18, 12), "do": (6, 24)}
    arrays = {n: normal(rng, *shape).astype(np.float64) for n, shape in i.items()}
    _check_attention(arrays | {"seqs": seqs, "attn": Attn(4, 2, 6, 0.4, window)})


@given(seed=seeds, m=tokens)
def test_embedding(seed: int, m: int) -> None:
    i = inputs_of("embedding_backward", seed, m)
    ids, dy, rows = i["ids"], i["dy"], len(i["W"])
    check(
        lambda W: [(R.embedding_forward(ids, W), dy)],
        pick(i, "W"),
        {"W": R.embedding_backward(ids, dy, rows)},
        {"W": bounds.embedding_backward(ids, dy, rows, np.float64)},
    )


@given(seed=seeds, m=tokens)
def test_cross_entropy(seed: int, m: int) -> None:
    i = inputs_of("cross_entropy_backward", seed, m)
    labels, weight = i["labels"], i["weight"]
    lse = R.cross_entropy_forward(i["logits"], labels)[1]
    check(
        lambda logits: [(R.cross_entropy_forward(logits, labels)[0], weight)],
        pick(i, "logits"),
        {"logits": R.cross_entropy_backward(i["logits"], labels, lse, weight)},
        {
            "logits": bounds.cross_entropy_backward(i["logits"], labels, lse, weight, np.float64)
            + bounds.gamma(i["logits"].shape[1], np.float64) * weight[:, None]
        },
    )


def test_dropout_is_its_own_transpose(ops: Any, rng: np.random.Generator) -> None:
    """Backward applies forward's mask and factor: drop(x) y = x drop(y), element by element."""
    x, drop = normal(rng, 5, 40), Drop(0.4, 3, 4)
    mask = ops.dropout(np.ones_like(x), drop)
    kept = mask != 0
    bounds.assert_within(ops.dropout(x, drop), x * mask, bounds.gamma(1) * np.abs(x * mask))
    assert 0 < kept.sum() < kept.size and (mask[kept] == mask[kept][0]).all()


def test_the_check_itself_can_fail(rng: np.random.Generator) -> None:
    """A gradient that forgot one factor is found."""
    gate, up, dy = (normal(rng, 3, 5).astype(np.float64) for _ in range(3))
    dgate, _ = R.swiglu_backward(dy, gate, up)
    with pytest.raises(AssertionError, match="dgate"):
        check(
            lambda gate, up: [(R.swiglu_forward(gate, up), dy)],
            {"gate": gate, "up": up},
            {"gate": 1.000001 * dgate},
            {"gate": bounds.swiglu_backward(dy, gate, up, np.float64)[0]},
        )
