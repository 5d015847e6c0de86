"""Laws of the tensors of adapter files: each value exactly, in its shape, under its key."""

from __future__ import annotations

import numpy as np

from pylora.conformance.laws.container import PEFT, REFUSED, Made, law, made_of, put, turned
from pylora.conformance.laws.files import PREFIX, compare, expected, fitting, tensors_of
from pylora.conformance.laws.law import Law
from pylora.conformance.problems.layers import pick, st
from pylora.conformance.testcase import Broken, Problem, Trial
from pylora.types import Array


def misfits(p: Problem) -> dict[str, list[tuple[str, Array, str]]]:
    """What does not fit -> the tensors: the right numbers in another shape or under another key."""
    tensors = [(name, a, "F32") for name, a in tensors_of(p)]
    i = p.seed % len(tensors)
    name, a, dtype = tensors[i]
    path = name[len(PREFIX) :].rsplit(".lora_", 1)[0]
    other = next((q for q in sorted(p.modules) if q not in expected(p.config, p.modules)), None)
    d, k = p.modules[path]

    def swapped(*new: tuple[str, Array]) -> list[tuple[str, Array, str]]:
        return [*tensors[:i], *((n, b, dtype) for n, b in new), *tensors[i + 1 :]]

    def more(*new: tuple[str, Array]) -> list[tuple[str, Array, str]]:
        return [*tensors, *((n, b, dtype) for n, b in new)]

    head, letter = f"{PREFIX}{path}", name.split(".lora_")[1][0]
    small, word = f"lora_{letter.lower()}", "down" if letter == "A" else "up"
    zeros, far = np.zeros((k, d), np.float32), name.replace("layers.", "layers.7", 1)
    out = {
        "a tensor with a third dimension of 1": swapped((name, a[:, :, None])),
        "a tensor with a leading dimension of 1": swapped((name, a[None])),
        "a tensor that is flat": swapped((name, a.reshape(-1))),
        "no element in a tensor": swapped((name, a[:0])),
        "a scalar in place of a tensor": swapped((name, a[0, 0])),
        "a tensor without its last row": swapped((name, a[:-1])),
        "a tensor without its last column": swapped((name, a[:, :-1])),
        "a key without .weight": swapped((name.removesuffix(".weight"), a)),
        "a key of an embedding": swapped((f"{head}.lora_embedding_{letter}", a)),
        "a key in small letters": swapped((name.replace(f"lora_{letter}", small), a)),
        "a key of another program": swapped((f"{head}.lora_{word}.weight", a)),
        "a key with a layer that does not exist": swapped((far, a)),
        "a tensor of DoRA": more((f"{head}.lora_magnitude_vector", a[:, 0])),
        "a bias of B that the settings do not name": more((f"{head}.lora_B.bias", zeros[0])),
        "a whole weight": more((f"{head}.weight", zeros)),
        "the weight of another module": more((f"{PREFIX}lm_head.weight", zeros)),
        "a tensor of no module": more(("step", zeros[0])),
        "a tensor under a wrong prefix as well": more((f"model.{name}", a)),
    }  # fmt: skip
    for more_ranks, named in (
        (-1, "one rank fewer"),
        (1, "one rank more"),
        (3, "three more"),
    ):
        if p.config["r"] + more_ranks > 0:
            every, one = _with_ranks(p, more_ranks, ""), _with_ranks(p, more_ranks, path)
            out[f"{named} in every tensor than the settings say"] = every
            out[f"{named} in both tensors of a module than the settings say"] = one
    if a.shape[0] != a.shape[1]:
        out["a tensor that is transposed"] = swapped((name, np.ascontiguousarray(a.T)))
        out["a tensor with its numbers in another shape"] = swapped(
            (name, a.reshape(a.shape[::-1]))
        )
    if other is not None:
        out["an adapter of a module that is no target"] = more(
            (f"{PREFIX}{other}.lora_A.weight", np.ones((p.config["r"], p.modules[other][1]), "f4")),
            (f"{PREFIX}{other}.lora_B.weight", np.ones((p.modules[other][0], p.config["r"]), "f4")),
        )
    return out


def _with_ranks(p: Problem, more: int, path: str) -> list[tuple[str, Array, str]]:
    """All tensors, with so many ranks more (zeros) or fewer in those of the module, or in all."""
    out = []
    for name, a in tensors_of(p):
        axis = 1 if name.endswith("lora_B.weight") else 0
        if name.startswith(f"{PREFIX}{path}.lora_" if path else PREFIX):
            if more < 0:
                a = a[:more] if axis == 0 else a[:, :more]
            else:
                a = np.pad(a, [(0, more * (i == axis)) for i in range(2)])
        out.append((name, np.ascontiguousarray(a), "F32"))
    return out


def _one_module(dtype: str, examples: int) -> list[Problem]:
    """Every module there is has its tensors, so that a rank is all that does not fit."""
    config = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    return [
        Problem(config=config, modules={"model.layers.0.q_proj": (4, 3)}, seed=i) for i in (0, 1)
    ]


def _refuses_misfits(t: Trial, p: Problem) -> None:
    p = fitting(p)
    t.load(put(t, p, made_of(p).bytes()), p.modules)  # as it is, it must be read
    bad = misfits(p)
    for why in turned(list(bad), p.seed):
        t.must_raise(why, "load", put(t, p, Made.of(bad[why]).bytes()), p.modules)


def _values(t: Trial, p: Problem) -> None:
    """Every finite number of 16 bits, and the edges of float32."""
    modules, config = (
        {"model.q_proj": (256, 256)},
        {"r": 256, "lora_alpha": 256, "target_modules": ["q_proj"]},
    )
    q = p.replaced(modules=modules, config=config)
    words = np.arange(1 << 16, dtype=np.uint16)
    if p.dtype == "F16":
        stored = np.where((words & 0x7C00) == 0x7C00, 0, words).astype(np.uint16)
        value = stored.view(np.float16).astype(np.float32)
    elif p.dtype == "BF16":
        stored = np.where((words & 0x7F80) == 0x7F80, 0, words).astype(np.uint16)
        value = (stored.astype(np.uint32) << 16).view(np.float32)
    else:
        rng = np.random.default_rng(p.seed)
        bits = rng.integers(0, 2**32, 1 << 16, np.uint32)
        edges = np.array(
            [0, 1, 2, 0x7FFFFF, 0x800000, 0x7F7FFFFF, 0x3F800000, 0x3F800001], np.uint32
        )
        bits[: 2 * len(edges)] = np.concatenate([edges, edges | np.uint32(1 << 31)])
        bits = np.where((bits & 0x7F800000) == 0x7F800000, 0, bits).astype(np.uint32)
        stored, value = bits.view(np.float32), bits.view(np.float32)
    A, B = stored.reshape(256, 256), stored[::-1].reshape(256, 256)
    want = {"model.q_proj": (value.reshape(256, 256), value[::-1].reshape(256, 256))}
    names = (f"{PREFIX}model.q_proj.lora_A.weight", f"{PREFIX}model.q_proj.lora_B.weight")
    file = Made.of([(names[0], A, p.dtype), (names[1], B, p.dtype)])
    got = t.load(put(t, q, file.bytes()), modules)
    wide = {path: (np.asarray(a, np.float32), np.asarray(b, np.float32), s)
            for path, (a, b, s) in got.items()}  # fmt: skip
    compare(t, wide, want, q)


NOT_FINITE = {
    "F32": (np.uint32, (0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0xFFFFFFFF)),
    "F16": (np.uint16, (0x7C00, 0xFC00, 0x7E00, 0x7C01, 0xFFFF)),
    "BF16": (np.uint16, (0x7F80, 0xFF80, 0x7FC0, 0x7F81, 0xFFFF)),
}


def _not_finite(t: Trial, p: Problem) -> None:
    """Infinity and every kind of NaN, in each dtype, at the first and the last element."""
    p = fitting(p)
    tensors = [name for name, _ in tensors_of(p)]
    shapes = {name: a.shape for name, a in tensors_of(p)}
    at = tensors[p.seed % len(tensors)]
    for dtype, (kind, words) in NOT_FINITE.items():
        good = [(n, np.zeros(shapes[n], kind), dtype) for n in tensors]
        t.load(put(t, p, Made.of(good).bytes()), p.modules)
        for word in words:
            for where in (0, -1):
                bad = [(n, a.copy(), d) for n, a, d in good]
                for n, a, _ in bad:
                    if n == at:
                        a.reshape(-1)[where] = word
                said = f"the bits {word:#x} of {dtype} in {at!r}"
                t.must_raise(said, "load", put(t, p, Made.of(bad).bytes()), p.modules)


def _wide(t: Trial, p: Problem) -> None:
    """float64, where it is read, is rounded once, to nearest even; what does not fit is refused."""
    p = fitting(p)
    rng = np.random.default_rng(p.seed)
    tensors, want = [], {}
    for path, (r, _, _) in expected(p.config, p.modules).items():
        d, k = p.modules[path]
        pair = []
        for letter, shape in (("A", (r, k)), ("B", (d, r))):
            near = rng.normal(size=shape).astype(np.float32).astype(np.float64)
            half = np.spacing(np.abs(near).astype(np.float32)).astype(np.float64) / 2
            a = near + half * rng.choice([1.0, 1 + 2.0**-20, 1 - 2.0**-20, 0.0], shape)
            tensors.append((f"{PREFIX}{path}.lora_{letter}.weight", a, "F64"))
            pair.append(a.astype(np.float32))
        want[path] = pair[0], pair[1]
    try:
        got = t.load(put(t, p, Made.of(tensors).bytes()), p.modules)
    except Broken:
        return  # it does not read float64, which nobody has to
    narrow = {q: (np.asarray(A, np.float32), np.asarray(B, np.float32), s)
              for q, (A, B, s) in got.items()}  # fmt: skip
    compare(t, narrow, want, p)
    name, a, dtype = tensors[0]
    large = [
        (name, np.where(np.arange(a.size).reshape(a.shape) == 0, 1e300, a), dtype),
        *tensors[1:],
    ]
    if all(np.asarray(A).dtype == np.float32 for A, _, _ in got.values()):
        said = f"1e300 in {name!r}, which float32 does not hold"
        t.must_raise(said, "load", put(t, p, Made.of(large).bytes()), p.modules)


def _dtypes() -> object:
    return st.builds(
        lambda dtype, seed: Problem(dtype=dtype, seed=seed, modules={}, config={}),
        pick(("F16", "BF16", "F32")),
        st.integers(0, 2**16),
    )


def _every_dtype(dtype: str, examples: int) -> list[Problem]:
    return [Problem(dtype=d, seed=1, modules={}, config={}) for d in ("F16", "BF16", "F32")]


LAWS = (
    law(
        "K21",
        "Tensors of another shape, or under another key, are an error.",
        f"reshaped, empty, other ranks, other keys, other modules, DoRA, biases: {REFUSED}",
        "numbers are used where they do not belong, or are dropped",
        ("K-4", "K-2"),
        _refuses_misfits,
        30,
        _one_module,
    ),
    Law(
        "K23",
        "Every number of float16, bfloat16 and float32 is read exactly.",
        "all 2¹⁶ words of 16 bits but infinities and NaN; float32 at its edges: equal, signs of "
        "zeros too",
        "subnormal numbers become zeros, or large ones infinite",
        ("K-8",),
        PEFT,
        _dtypes,
        _values,
        (),
        covering=_every_dtype,
        cost=20,
    ),
    law(
        "K24",
        "Infinity and NaN are errors, in every dtype and place.",
        REFUSED,
        "one kind of NaN, or infinity, is let through",
        ("K-4",),
        _not_finite,
        50,
    ),
    law(
        "K27",
        "float64 is rounded once or refused.",
        "load of float64 near halves = float32 of them; 1e300 is refused",
        "an overflow becomes infinite, or a value is rounded twice",
        ("K-8", "K-4"),
        _wide,
        5,
    ),
)
