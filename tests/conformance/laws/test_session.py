"""The exact attention, cache and block are those of the formulas, written down once more here."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("hypothesis")

from pylora.conformance.laws.session import Block, Decoder, seen, transformer
from pylora.conformance.problems.attending import NAMES, Arrays, projections
from pylora.conformance.protocol import AttentionShape

SHAPE = AttentionShape(4, 2, 4, (5, 3, 7), 100.0)


def drawn(rng, shape, hidden=3):
    make, sizes = Arrays(rng, "float64"), projections(shape, hidden)
    x = make.rows(sum(shape.lengths), hidden)
    return x, make.weights(sizes), make.adapters(sizes, NAMES, 2)


def plainly(x, weights, adapters, s):
    """Row by row, head by head, pair by pair, key by key."""
    full = {n: W + adapters[n][2] * adapters[n][1] @ adapters[n][0] for n, W in weights.items()}
    q, k, v = (x @ full[n].T for n in NAMES[:3])
    D, out = s.head_dim, np.zeros((len(x), s.heads * s.head_dim))

    def turned(row, position):
        row = row.copy()
        for i in range(D // 2):
            a, b = (i, i + D // 2) if s.rope_layout == "half" else (2 * i, 2 * i + 1)
            angle = position * s.rope_theta ** (-2 * i / D)
            c, z = np.cos(angle), np.sin(angle)
            row[a], row[b] = row[a] * c - row[b] * z, row[b] * c + row[a] * z
        return row

    start = 0
    for n in s.lengths:
        for p in range(n):
            for h in range(s.heads):
                g = h // (s.heads // s.kv_heads)
                mine, theirs = slice(h * D, h * D + D), slice(g * D, g * D + D)
                first = max(0, p - s.window + 1) if s.window else 0
                query = turned(q[start + p, mine], p)
                keys = [turned(k[start + j, theirs], j) for j in range(first, p + 1)]
                scale = D**-0.5 if s.scale is None else s.scale
                e = np.exp([scale * query @ key for key in keys])
                values = v[start + first : start + p + 1, theirs]
                out[start + p, mine] = (e / e.sum()) @ values
        start += n
    return out @ full["o_proj"].T


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"window": 1},
        {"window": 3},
        {"window": 99},
        {"rope_layout": "interleaved"},
        {"scale": 0.1},
        {"heads": 6, "lengths": (4,)},
    ],
)
def test_the_block_is_the_formula(rng, changed):
    s = replace(SHAPE, **changed)
    x, weights, adapters = drawn(rng, s)
    got = Block(weights, adapters, s).forward(x)
    assert np.allclose(got.value, plainly(x, weights, adapters, s), rtol=1e-12, atol=1e-14)
    assert (got.error < 1e-10).all()


@pytest.mark.parametrize("window, layout", [(0, "half"), (2, "interleaved")])
def test_its_gradients_are_differences(rng, window, layout):
    s = replace(SHAPE, window=window, rope_layout=layout, lengths=(4, 2))
    x, weights, adapters = drawn(rng, s)
    dy = rng.normal(size=x.shape)
    block = Block(weights, adapters, s)
    block.forward(x)
    dx, grads = block.backward(dy)

    def slope(moved_x, moved):
        h = 1e-6
        ahead, behind = (plainly(x + t * moved_x, weights, moved(t), s) for t in (h, -h))
        return (dy * (ahead - behind)).sum() / (2 * h)

    v = rng.normal(size=x.shape)
    assert np.isclose(slope(v, lambda t: adapters), (dx.value * v).sum(), rtol=1e-6)
    for name in NAMES:
        for j in range(2):
            v = rng.normal(size=adapters[name][j].shape)

            def moved(t, name=name, j=j, v=v):
                pair = list(adapters[name])
                pair[j] = pair[j] + t * v
                return {**adapters, name: tuple(pair)}

            along = (grads[name][j].value * v).sum()
            assert np.isclose(slope(0 * x, moved), along, rtol=1e-6, atol=1e-9), (name, j)


def test_chunks_are_the_whole(rng):
    s = replace(SHAPE, window=3, lengths=(9,))
    x, weights, adapters = drawn(rng, s)
    whole = Block(weights, adapters, s).forward(x)
    for sizes in ([1] * 9, [4, 0, 5], [9], [2, 3, 4]):
        decoder, at, parts = Decoder(weights, replace(s, lengths=())), 0, []
        for n in sizes:
            parts.append(decoder.extend(x[at : at + n], [(5, n)], [adapters]).value)
            at += n
        assert np.allclose(np.concatenate(parts), whole.value, rtol=1e-12, atol=1e-14)
        assert decoder.length(5) == 9


def test_keys_stay_those_of_their_adapter_and_go_when_they_are_cut_off(rng):
    s = replace(SHAPE, lengths=(4,))
    x, weights, adapters = drawn(rng, s)
    first, other, again = (Decoder(weights, replace(s, lengths=())) for _ in range(3))
    for decoder, lora in ((first, adapters), (other, {}), (again, adapters)):
        decoder.extend(x[:3], [(0, 3)], [lora])
    mixed = first.extend(x[3:], [(0, 1)], [{}]).value
    assert not np.allclose(mixed, other.extend(x[3:], [(0, 1)], [{}]).value)
    again.extend(x[:2], [(0, 2)], [{}])
    again.truncate(0, 3)
    assert np.array_equal(mixed, again.extend(x[3:], [(0, 1)], [{}]).value)
    again.drop(0)
    assert again.length(0) == 0


def test_what_a_query_sees():
    sees = seen(np.array([3, 4]), 5, 2)
    assert sees.tolist() == [[False, False, True, True, False], [False, False, False, True, True]]
    assert seen(np.arange(3), 3, 0).tolist() == np.tril(np.ones((3, 3), bool)).tolist()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_bound_holds_and_is_no_wish(rng, dtype):
    """What is right to a rounding is within it, a window that is one too short is not (in bfloat16,
    where errors add up to half of y, it may be)."""
    from pylora.conformance.correct.plain import Correct

    s = replace(SHAPE, window=3)
    make, sizes = Arrays(rng, dtype), projections(s, 3)
    x, weights = make.rows(15, 3), make.weights(sizes)
    want = Block(weights, {}, s).forward(x)
    y = Correct().attention(x, weights, {}, s).astype(np.float64)
    assert (np.abs(y - want.value) <= want.error).all()
    assert np.median(want.error) < {"float32": 1e-4, "float16": 0.1, "bfloat16": 1.0}[dtype]
    shifted = Correct().attention(x, weights, {}, replace(s, window=2)).astype(np.float64)
    if dtype != "bfloat16":
        assert (np.abs(shifted - want.value) > want.error).any()


def test_the_whole_block(rng):
    s = AttentionShape(2, 1, 2, (4,))
    x, weights, adapters = drawn(rng, s)
    more = {"gate_proj": (5, 3), "up_proj": (5, 3), "down_proj": (3, 5)}
    weights |= {n: rng.normal(size=size) for n, size in more.items()}
    norms = {"norm1": rng.normal(size=3), "norm2": rng.normal(size=3)}
    got = transformer(x, {**weights, **norms}, adapters, s, 1e-5, "fp32")

    def norm(a, w):
        return a / np.sqrt((a * a).mean(axis=1, keepdims=True) + 1e-5) * w

    four = {n: weights[n] for n in NAMES}
    x1 = x + plainly(norm(x, norms["norm1"]), four, adapters, s)
    inner = norm(x1, norms["norm2"])
    gate, up = inner @ weights["gate_proj"].T, inner @ weights["up_proj"].T
    want = x1 + (gate / (1 + np.exp(-gate)) * up) @ weights["down_proj"].T
    assert np.allclose(got.value, want, rtol=1e-12, atol=1e-13)
