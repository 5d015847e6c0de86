"""A call of each method beyond the layer's own: of any sizes, in any dtype, made again from a seed.

What problems/sizes.py is for forward, backward and merging, this is for all the others: mixed
gradients, biases, embeddings, a cache, blocks, norms, gates, rotations, losses and steps. Sums
of small integers are exact (`exact`); the others are well conditioned, so that what is wrong is
wrong by more than any rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pylora.conformance.problems.drawn import Numbers
from pylora.conformance.problems.sizes import LIMITS, THOROUGH
from pylora.conformance.protocol import AttentionShape, LayerOrder
from pylora.ops.features import ACTIVATIONS
from pylora.types import AdamW, Array

DTYPES = ("float32", "float64", "bfloat16", "float16")
COUNTS = ("adapters", "arrays", "sequences")  # each of them has arrays of its own
Path = tuple[Any, ...]


Make = Callable[[Numbers], dict[str, Any]]


@dataclass(frozen=True)
class Kind:
    """How a method is called."""

    make: Make
    sizes: Mapping[str, int]
    exact: bool = False
    most: Mapping[str, int] = field(default_factory=dict)  # how far a dimension goes, 65536 else
    silent: tuple[str, ...] = ()  # arguments of which NaN says nothing here
    dtypes: tuple[str, ...] = DTYPES
    spreads: bool = False  # NaN in one argument may reach all of the result


def _adapter(q: Numbers, d: int, k: int, r: int) -> tuple[Array, Array, float]:
    return q.whole(r, k), q.whole(d, r), q.scale()


def _mixed(q: Numbers) -> dict[str, Any]:
    n = q.n
    ranks = [n.r if i == n.adapters - 1 else 1 + i % 2 for i in range(n.adapters)]
    adapters = [_adapter(q, n.d, n.k, r) for r in ranks]
    return {"x": q.whole(n.m, n.k), "W": q.whole(n.d, n.k), "adapters": adapters,
            "rows": q.rows(n.m, n.adapters)}  # fmt: skip


def _backward_mixed(q: Numbers) -> dict[str, Any]:
    return {"dy": q.whole(q.n.m, q.n.d), **_mixed(q)}


def _bias_mixed(q: Numbers) -> dict[str, Any]:
    p = _mixed(q)
    p["adapters"] = [(A, B, q.whole(len(B)), s) for A, B, s in p["adapters"]]
    return {**p, "bias": q.whole(q.n.d)}


def _bias_stacked(q: Numbers) -> dict[str, Any]:
    p = _bias_mixed(q)
    del p["rows"]
    return p


def _layer(q: Numbers) -> dict[str, Any]:
    n = q.n
    return {"x": q.whole(getattr(n, "m", 0), n.k), "W": q.whole(n.d, n.k), "A": q.whole(n.r, n.k),
            "B": q.whole(n.d, n.r), "bias_B": q.whole(n.d), "scale": q.scale()}  # fmt: skip


def _bias_backward(q: Numbers) -> dict[str, Any]:
    return {"dy": q.whole(q.n.m, q.n.d), **_layer(q)}


def _bias_merge(q: Numbers) -> dict[str, Any]:
    p = _layer(q)
    return {"W": p["W"], "bias": q.whole(q.n.d), "A": p["A"], "B": p["B"], "bias_B": p["bias_B"],
            "scale": p["scale"]}  # fmt: skip


def _embedding(q: Numbers) -> dict[str, Any]:
    n = q.n
    ids, W = q.ids(getattr(n, "m", 0), n.vocab), q.whole(n.vocab, n.hidden)
    A, B = q.whole(n.r, n.vocab), q.whole(n.hidden, n.r)
    return {"ids": ids, "W": W, "A": A, "B": B, "scale": q.scale()}


def _embed(q: Numbers) -> dict[str, Any]:
    m, seen = q.n.m, q.n.positions
    return {**_embedding(q), "multiplier": q.pick(2.0, 4.0), "position": q.ids(m, seen),
            "P": q.whole(seen, q.n.hidden)}  # fmt: skip


def _attention(q: Numbers, mlp: bool = False) -> dict[str, Any]:
    """Weights of a block whose shares are far from equal, adapters of half of its projections."""
    n = q.n
    heads, hidden = n.key_heads * n.group, n.hidden
    sizes = {"q_proj": (heads * n.D, hidden), "k_proj": (n.key_heads * n.D, hidden),
             "v_proj": (n.key_heads * n.D, hidden), "o_proj": (hidden, heads * n.D)}  # fmt: skip
    if mlp:
        sizes |= {"gate_proj": (n.inner, hidden), "up_proj": (n.inner, hidden)}
        sizes["down_proj"] = (hidden, n.inner)
    weights: dict[str, Array] = {name: q.matrix(*size) for name, size in sizes.items()}
    low = {name: (q.matrix(n.r, k), q.matrix(d, n.r), q.scale())
           for i, (name, (d, k)) in enumerate(sizes.items()) if (i + q.seed) % 2}  # fmt: skip
    window = getattr(n, "window", 0)
    first = n.positions if window < 8 else max(n.positions, window + 2)
    lengths = (first, *(1 + i % 2 for i in range(n.sequences - 1)))
    return {"weights": weights, "adapters": low,
            "shape": AttentionShape(heads, n.key_heads, n.D, lengths, window=window)}  # fmt: skip


def _whole(q: Numbers) -> dict[str, Any]:
    p = _attention(q)
    return {"x": q.real(sum(p["shape"].lengths), q.n.hidden), **p}


def _whole_backward(q: Numbers) -> dict[str, Any]:
    p = _whole(q)
    return {"dy": q.real(*p["x"].shape), **p}


def _block(q: Numbers) -> dict[str, Any]:
    p = _attention(q, True)
    for name in ("norm1", "norm2"):
        p["weights"][name] = q.positive(q.n.hidden)
    return {"x": q.real(sum(p["shape"].lengths), q.n.hidden), **p, "eps": 1e-5}


def _ordered(q: Numbers) -> dict[str, Any]:
    p = _block(q)
    for name in ("norm3", "norm4"):
        p["weights"][name] = q.positive(q.n.hidden)
    for name in ("q_norm", "k_norm"):
        p["weights"][name] = q.positive(q.n.D)
    order = LayerOrder(q.pick("before", "behind", "both"), q.pick(False, True), "head", 0.5)
    return {**p, "order": order}


def _decoder(q: Numbers) -> dict[str, Any]:
    """Two chunks of every sequence and then one row of the first; the adapters change between."""
    p, n = _attention(q), q.n
    runs = [[(i, rows) for i, rows in enumerate(p["shape"].lengths)],
            [(i, 1) for i in range(n.sequences)], [(0, 2)]]  # fmt: skip
    shape = AttentionShape(p["shape"].heads, n.key_heads, n.D, (), window=n.window)
    given = [
        (q.real(sum(rows for _, rows in each), n.hidden), each,
         [p["adapters"] if i % 2 else {} for i in range(len(each))])
        for each in runs
    ]  # fmt: skip
    return {"weights": p["weights"], "shape": shape, "chunks": given}


def _rms_norm(q: Numbers) -> dict[str, Any]:
    return {"x": q.heavy(q.n.m, q.n.n), "w": q.positive(q.n.n), "eps": 1e-5}


def _layer_norm(q: Numbers) -> dict[str, Any]:
    x = q.heavy(q.n.m, q.n.n)
    return {"x": x, "w": q.positive(q.n.n), "b": q.real(q.n.n), "eps": 1e-5}


def _layer_norm_backward(q: Numbers) -> dict[str, Any]:
    x, dy = q.heavy(q.n.m, q.n.n), q.heavy(q.n.m, q.n.n)
    return {"dy": dy, "x": x, "w": q.positive(q.n.n), "eps": 1e-5}


def _gates(*names: str, kind: bool = False) -> Make:
    def make(q: Numbers) -> dict[str, Any]:
        first = {"kind": q.option(*ACTIVATIONS)} if kind else {}
        return {**first, **{name: q.real(q.n.m, q.n.n) for name in names}}

    return make


def _caps(*names: str) -> Make:
    def make(q: Numbers) -> dict[str, Any]:
        more = {"multiplier": q.option(1.0, 0.5), "cap": q.option(0.0, 2.0, 3.0, step=2)}
        return {**{name: q.real(q.n.m, q.n.n) for name in names}, **more}

    return make


def _rope(q: Numbers) -> dict[str, Any]:
    n = q.n
    position = q.rng.integers(0, n.positions, n.m)
    position[-1] = n.positions - 1
    return {"x": q.real(n.m, n.heads * n.D), "position": position.astype(np.int64),
            "head_dim": n.D, "theta": q.pick(10000.0, 500.0),
            "layout": q.pick("half", "interleaved"), "inverse": q.pick(False, True)}  # fmt: skip


def _rope_part(q: Numbers) -> dict[str, Any]:
    p = _rope(q)
    return {"x": p["x"], "position": p["position"], "head_dim": p["head_dim"],
            "rotary_dim": max(2, p["head_dim"] // 4 * 2), "theta": p["theta"],
            "layout": p["layout"], "inverse": p["inverse"]}  # fmt: skip


def _experts(q: Numbers) -> dict[str, Any]:
    """The last expert and one in the middle are likely; no two are equal but in float16."""
    logits = np.stack([q.rng.permutation(q.n.n) for _ in range(q.n.m)]) / q.n.n * 4.0
    logits[:, [-1, q.n.n // 2]] += 6 + q.rng.integers(0, 2, (q.n.m, 2)) * 0.5
    return {"logits": logits.astype(q.dtype), "k": min(2, q.n.n), "normalize": q.pick(True, False)}


def _cross_entropy(q: Numbers) -> dict[str, Any]:
    m, n = q.n.m, q.n.n
    logits = q.real(m, n).astype(np.float64)
    logits[:, [0, n // 2, n - 1]] += np.log(n)  # each of these counts, however many there are
    labels = q.ids(m, n)
    labels[: m // 3] = -100
    return {"logits": logits.astype(q.dtype), "labels": labels}


def _adamw(q: Numbers) -> dict[str, Any]:
    shape = (q.n.m, q.n.n)
    settings = AdamW(
        lr=0.1, step=q.pick(1, 3, 10), beta1=0.5, beta2=0.75, eps=1e-3, weight_decay=0.1
    )
    return {"p": q.real(*shape), "g": q.real(*shape), "m": q.real(*shape), "v": q.positive(*shape),
            "settings": settings}  # fmt: skip


def _clip(q: Numbers) -> dict[str, Any]:
    """The last array has the largest part of the norm."""
    grads = [q.real(q.n.m, q.n.n) for _ in range(q.n.arrays - 1)]
    big = q.heavy(q.n.m, q.n.n).astype(np.float64) * max(1.0, np.sqrt(q.n.arrays) / 2)
    return {"grads": [*grads, big.astype(q.dtype)], "limit": q.option(0.5, 1e4)}


def _adapter_step(q: Numbers) -> dict[str, Any]:
    shapes: dict[str, tuple[int, ...]] = {
        "A": (q.n.r, q.n.n),
        "B": (q.n.m, q.n.r),
        "bias": (q.n.m,),
    }
    given = {"params": {n: q.real(*s) for n, s in shapes.items()},
             "grads": {n: q.real(*s) for n, s in shapes.items()}}  # fmt: skip
    return {**given, "lr": 0.1, "weight_decay": 0.25, "ratio": q.pick(2.0, 4.0)}


_ROWS = {"m": 5, "k": 3, "d": 4, "r": 2}
_MANY = {**_ROWS, "adapters": 3}
_TABLE = {"m": 5, "vocab": 7, "hidden": 3, "r": 2}
_HEADS = {"positions": 4, "sequences": 2, "key_heads": 2, "group": 2, "D": 4, "hidden": 3, "r": 2}
_ONCE = dict.fromkeys(_HEADS, 0)
_BLOCK = {"positions": 512, "sequences": 1024, "key_heads": 512, "group": 512, "D": 1024}
_PAIRS = {"m": 4, "n": 6}
KINDS: dict[str, Kind] = {
    "backward_mixed": Kind(_backward_mixed, _MANY, True, {"adapters": 1024}),
    "bias_forward": Kind(lambda q: {**_layer(q), "bias": q.whole(q.n.d)}, _ROWS, True),
    "bias_backward": Kind(_bias_backward, _ROWS, True),
    "bias_merge": Kind(_bias_merge, {n: _ROWS[n] for n in "kdr"}, True),
    "bias_mixed": Kind(_bias_mixed, _MANY, True, {"adapters": 1024}),
    "bias_stacked": Kind(_bias_stacked, _MANY, True, {"adapters": 1024}),
    "embedding_forward": Kind(_embedding, _TABLE, True),
    "embedding_backward": Kind(
        lambda q: {"dy": q.whole(q.n.m, q.n.hidden), **_embedding(q)}, _TABLE, True, silent=("W",)
    ),
    "embedding_merge": Kind(
        lambda q: {n: v for n, v in _embedding(q).items() if n != "ids"},
        {n: _TABLE[n] for n in ("vocab", "hidden", "r")}, True,
    ),
    "embedding_dropout": Kind(
        lambda q: {**_embedding(q), "p": q.pick(0.5, 0.25), "seed": q.seed}, _TABLE, True
    ),
    "embed": Kind(_embed, {**_TABLE, "positions": 6}, True),
    # Their other sizes are those of the laws F15 and B16.
    "attention": Kind(_whole, {**_HEADS, "window": 3}, most={**_ONCE, "window": 512}),
    "attention_backward": Kind(
        _whole_backward, {**_HEADS, "window": 3}, most={**_ONCE, "window": 256}
    ),
    "decoder": Kind(_decoder, {**_HEADS, "window": 3}, most={**_BLOCK, "window": 256}),
    "block": Kind(_block, {**_HEADS, "inner": 5}, most={**_BLOCK, "hidden": 4096}),
    "layer": Kind(_ordered, {**_HEADS, "inner": 5}, most={**_BLOCK, "hidden": 4096}),
    "rms_norm": Kind(_rms_norm, _PAIRS),
    "layer_norm": Kind(_layer_norm, _PAIRS),
    "layer_norm_backward": Kind(_layer_norm_backward, _PAIRS),
    "swiglu": Kind(_gates("gate", "up"), _PAIRS),
    "swiglu_backward": Kind(_gates("dy", "gate", "up"), _PAIRS),
    "activation": Kind(_gates("x", "up", kind=True), _PAIRS),
    "activation_backward": Kind(_gates("dy", "x", "up", kind=True), _PAIRS),
    "soft_cap": Kind(_caps("x"), _PAIRS),
    "soft_cap_backward": Kind(_caps("dy", "x"), _PAIRS),
    "rope": Kind(_rope, {"m": 4, "heads": 2, "D": 4, "positions": 9}, most={"positions": 4096}),
    "rope_part": Kind(_rope_part, {"m": 4, "heads": 2, "D": 8, "positions": 9},
                      most={"positions": 4096}),
    "experts": Kind(_experts, _PAIRS, most={"m": 1024, "n": 1024}, silent=("logits",)),
    "cross_entropy": Kind(_cross_entropy, _PAIRS, dtypes=("float32", "float64")),
    "adamw": Kind(_adamw, _PAIRS, dtypes=("float32", "float64")),
    "clip": Kind(_clip, {**_PAIRS, "arrays": 3}, most={"arrays": 1024},
                 dtypes=("float32", "float64"), spreads=True),
    "adapter_step": Kind(
        _adapter_step, {**_PAIRS, "r": 2}, dtypes=("float32", "float64")
    ),
}  # fmt: skip


# What changes with the seed beside the numbers: seeds in a row are tried of these.
OPTIONS = {"activation": 4, "activation_backward": 4, "soft_cap": 6, "soft_cap_backward": 6,
           "clip": 2, "layer": 3}  # fmt: skip


def arguments(method: str, dtype: str, seed: int = 0, **sizes: int) -> dict[str, Any]:
    """The arguments of one call, by name and in their order."""
    kind = KINDS[method]
    wanted = {**kind.sizes, **sizes}
    for name in ("D",):  # pairs are turned
        if name in wanted:
            wanted[name] += wanted[name] % 2
    return kind.make(Numbers(seed, dtype, wanted))


def walk(method: str, dtype: str, examples: int) -> Iterator[tuple[str, int]]:
    """Each dimension, and one beyond each limit: in dtypes beside float32 few of them."""
    kind = KINDS[method]
    for name in kind.sizes if dtype in kind.dtypes else ():
        top = kind.most.get(name, LIMITS[-1])
        of = [limit for limit in LIMITS if limit <= top and limit > kind.sizes[name]]
        if dtype != "float32" and examples < THOROUGH:
            of = [limit for limit in of if limit <= (256 if name in COUNTS else 1024)][-1:]
        elif examples < 30:
            of = of[-1:]
        elif name in COUNTS and examples < THOROUGH:  # each is a call, or several
            of = [limit for limit in of if limit in (8, 64) or limit == of[-1]]
        for limit in of:
            yield name, limit + 1


# ---- the arrays in the arguments -----------------------------------------------------------------


def leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Array]]:
    """The arrays in lists, tuples and dicts, each with the way to it."""
    if isinstance(value, np.ndarray):
        yield path, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from leaves(inner, (*path, name))
    elif isinstance(value, (list, tuple)):
        for i, inner in enumerate(value):
            yield from leaves(inner, (*path, i))


def mapped(value: Any, change: Callable[[Path, Array], Array], path: Path = ()) -> Any:
    """The same with every array as `change` makes it."""
    if isinstance(value, np.ndarray):
        return change(path, value)
    if isinstance(value, dict):
        return {n: mapped(inner, change, (*path, n)) for n, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(mapped(inner, change, (*path, i)) for i, inner in enumerate(value))
    return value
