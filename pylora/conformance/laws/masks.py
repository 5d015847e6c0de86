"""Laws of which elements a module drops: by seed, module path, step and place in the batch."""

from __future__ import annotations

import math

import numpy as np

from pylora.conformance.laws.dropout import UNLIKELY
from pylora.conformance.laws.law import Law
from pylora.conformance.problems.layers import pick, st
from pylora.conformance.testcase import NotTested, Problem, Trial
from pylora.numbers import random
from pylora.numbers.philox import philox
from pylora.types import Array

# Paths that a key made carelessly takes for each other: prefixes, the same end, digits that run
# into the step, another layer, the same length, a dot for a slash.
PATHS = (
    "model.layers.1.self_attn.q_proj",
    "model.layers.10.self_attn.q_proj",
    "model.layers.2.self_attn.q_proj",
    "model.layers.1.self_attn.k_proj",
    "model.layers.1.self_attn.v_proj",
    "model.layers.1.mlp.q_proj",
    "model.layers.1.self_attn.q_proj1",
    "model.layers.1.self_attn.proj_q",
    "layers.1.self_attn.q_proj",
    "q_proj",
    "",
)
NAMED = tuple(path for path in PATHS if path)
STEPS = (1, 2, 3, 11, 12, 111, 256, 257, 65537, 2**31, 2**32 + 1)
SEEDS = (0, 1, 7, 2**31, 2**32 + 1, 2**63)


@st.composite  # type: ignore[untyped-decorator]
def masks(draw, large: bool = True):  # type: ignore[no-untyped-def]
    """A mask's shape, p, seed, path, step and row0; and another path, step and seed."""
    m, k = draw(pick(((200, 256), (320, 128)) if large else ((1, 7), (2, 7), (9, 3), (16, 5))))
    path, step, seed = draw(pick(PATHS)), draw(pick(STEPS)), draw(pick(SEEDS))
    return Problem(
        shape=(m, k),
        p=draw(pick((0.5, 0.1, 0.25, 0.9))),
        seed=seed,
        path=path,
        step=step,
        other_path=draw(pick(tuple(q for q in PATHS if q != path))),
        other_step=draw(pick(tuple(q for q in STEPS if q != step))),
        other_seed=draw(pick(tuple(q for q in SEEDS if q != seed))),
        row0=draw(pick((0, 1, 5, 1000, 2**20 + 3, 2**25 + 3, 2**33 + 1))),  # elements past 2³²
        cuts=sorted(draw(st.lists(st.integers(0, m), max_size=4))),
    )


def _mask(t: Trial, p: Problem, **changed: object) -> Array:
    q = p.replaced(**changed)
    mask: Array = t.dropout_mask(q.shape, q.p, q.seed, q.path, q.step, q.row0)
    return mask


def _independent(t: Trial, p: Problem, what: str, other: Array) -> None:
    """Two masks agree in a share p² + (1 - p)² of their elements, and in no row or column much
    more: Hoeffding, with UNLIKELY for each of the m + k + 1 sums."""
    mask = _mask(t, p)
    same, share = (mask == other).astype(np.float64), p.p**2 + (1 - p.p) ** 2
    m, k = p.shape
    for axis, n, where in ((None, m * k, "all"), (1, k, "a row's"), (0, m, "a column's")):
        mean = np.asarray(same.mean(axis=axis))
        off = math.sqrt(math.log(2 * (m + k + 1) / UNLIKELY) / (2 * n))
        worst = float(np.abs(mean - share).max())
        if worst > off:
            said = f"the masks of {what} agree in {worst + share:.2f} or {share - worst:.2f} of"
            said += f" {where} {n} elements; independent ones in {share:.2f} ± {off:.2f}"
            t.fail(said, other, f"abs((RESULT == result).mean() - {share}) <= {off}")


def _two_modules(t: Trial, p: Problem) -> None:
    other = _mask(t, p, path=p.other_path)
    _independent(t, p, f"{p.path!r} and {p.other_path!r}", other)


def _two_steps(t: Trial, p: Problem) -> None:
    other = _mask(t, p, step=p.other_step)
    _independent(t, p, f"steps {p.step} and {p.other_step}", other)


def _two_seeds(t: Trial, p: Problem) -> None:
    other = _mask(t, p, seed=p.other_seed)
    _independent(t, p, f"seeds {p.seed} and {p.other_seed}", other)


def _share(t: Trial, p: Problem) -> None:
    mask = _mask(t, p)
    n, kept = mask.size, int(mask.sum())
    off = math.sqrt(n * math.log(2 / UNLIKELY) / 2)
    if abs(kept - n * (1 - p.p)) > off:
        said = f"of {n} elements {kept} are kept with p = {p.p}; off by more than {off:.0f}"
        t.fail(said, mask, f"abs(RESULT.sum() - {n * (1 - p.p)}) <= {off}")


def _parts(t: Trial, p: Problem) -> None:
    """The batch in parts, each told where it starts."""
    m, k = p.shape
    whole = _mask(t, p)
    edges = [0, *p.cuts, m]
    for a, b in zip(edges, edges[1:]):
        part = _mask(t, p, shape=(b - a, k), row0=p.row0 + a)
        what = f"the mask of rows {a} .. {b - 1} by themselves against the whole batch's"
        t.expect(what, part, whole[a:b])


def _again(t: Trial, p: Problem) -> None:
    first = _mask(t, p).copy()
    _mask(t, p, path=p.other_path, step=p.other_step)
    t.expect("the same module's mask of the same step again", _mask(t, p), first)


def _bits(t: Trial, p: Problem) -> None:
    m, k = p.shape
    stream = random.stream("dropout", p.path, str(p.step))
    words = philox(p.seed, stream, p.row0 * k, m * k).reshape(m, k)
    want = words >= math.floor(float(np.float32(p.p)) * 2**32)
    t.expect("kept", _mask(t, p), want)


# Elements (seed, number) of the stream dropout/q_proj/1 whose words are 0, 1, 1 and 2. They
# were found by a search through the first 2³²; one word in 2³² is 0.
_RARE = ((7, 2679380839), (7, 3446331816), (0, 884366182), (0, 99479647))


def _edges(t: Trial, p: Problem) -> None:
    """p = word / 2³² of one element, and half a step and a step beyond: it is kept, kept, dropped.
    The words near it are what a threshold that is rounded otherwise lets through."""
    m, k = p.shape
    words = philox(p.seed, random.stream("dropout", p.path, str(p.step)), p.row0 * k, m * k)
    exact = words[words < 2**23].astype(np.float64)  # these and their halves are float32 / 2³²
    if not exact.size:
        raise NotTested("no word of the window is small enough for p to be exact")
    least = float(exact.min())
    for more in (-1.0, 0.0, 0.5, 1.0, 1.5):
        chance = max(least + more, 0.0) * 2.0**-32
        want = words.reshape(m, k) >= math.floor(chance * 2**32)
        got = t.dropout_mask((m, k), chance, p.seed, p.path, p.step, p.row0)
        t.expect(f"kept, with p = {chance!r} and {int(least)} the smallest word", got, want)


def _tiny(t: Trial, p: Problem) -> None:
    """Below 2⁻³² nothing is dropped, not even where a word is 0; from 2⁻²⁴ on something is."""
    seed, at = p.rare
    k = 64
    window = p.replaced(shape=(2, k), seed=seed, path="q_proj", step=1, row0=at // k)
    words = philox(seed, random.stream("dropout", "q_proj", "1"), at // k * k, 2 * k).reshape(2, k)
    for chance in (2.0**-24, 2.0**-25, 2.0**-32, 2.0**-33, 2.0**-60, 2.0**-149):
        want = words >= math.floor(chance * 2**32)
        got = _mask(t, window.replaced(p=chance))
        t.expect(f"kept, with p = 2**{int(math.log2(chance))}", got, want)


NEEDS = ("dropout_mask",)
LAWS = (
    Law(
        "D30",
        "Two modules do not share a mask.",
        "masks of two paths agree in p² + (1 - p)² of all, of each row's and of each column's "
        "elements (Hoeffding, chance 10⁻¹⁸); paths that are alike: prefixes, other layers",
        "the path does not enter the key, or only its end or its length does",
        ("D-5",),
        NEEDS,
        masks,
        _two_modules,
        (),
    ),
    Law(
        "D31",
        "Two steps do not share a mask.",
        "as D30, of two steps of one module, beyond 8, 16 and 32 bits too",
        "the same elements are dropped all through training",
        ("D-5",),
        NEEDS,
        masks,
        _two_steps,
        (),
    ),
    Law(
        "D32",
        "Two seeds do not share a mask.",
        "as D30, of two seeds, beyond 32 bits too",
        "half of the seed's bits are thrown away",
        ("D-5", "R-1"),
        NEEDS,
        masks,
        _two_seeds,
        (),
    ),
    Law(
        "D33",
        "A module drops the share p at each step.",
        "|kept - n (1 - p)| <= sqrt(n ln(2 / 10⁻¹⁸) / 2)",
        "p and 1 - p are exchanged, or p is quantized",
        ("D-2",),
        NEEDS,
        masks,
        _share,
        (),
    ),
    Law(
        "D34",
        "Parts of a batch draw what the whole would.",
        "mask(rows a .. b-1, row0 + a) = mask(whole, row0)[a:b], for every way of cutting",
        "gradient accumulation, or several devices, change which elements are dropped",
        ("D-8",),
        (*NEEDS, "bits"),
        lambda: masks(large=False),
        _parts,
        (),
    ),
    Law(
        "D35",
        "The same module and step give the same mask.",
        "mask(path, step) = mask(path, step) after calls for others",
        "backward, or gradient checkpointing, sees another mask than forward did",
        ("D-3", "D-5", "R-1"),
        NEEDS,
        lambda: masks(large=False),
        _again,
        (),
    ),
    Law(
        "D36",
        "The mask is the one that the specification says, bit for bit.",
        "kept iff word (row0 + i) k + j of the stream dropout/<path>/<step> >= floor(p 2³²)",
        "another stream, another threshold, steps counted from 0: a run is not reproduced",
        ("D-7", "D-8", "R-1", "R-2"),
        (*NEEDS, "bits"),
        lambda: st.one_of(masks(large=False), masks()),
        _bits,
        (),
    ),
    Law(
        "D37",
        "The threshold is exact where words lie at it.",
        "p = w / 2³² for the smallest word w: its element is kept, and so it is with half a step "
        "more; a whole step more drops it",
        "p 2³² is rounded in place of cut off, > stands for >=, or fewer bits are compared",
        ("D-7", "D-10"),
        (*NEEDS, "bits"),
        masks,
        _edges,
        (),
    ),
    Law(
        "D38",
        "A p below 2⁻³² drops nothing, one of 2⁻²⁴ drops what lies below it.",
        "kept iff word >= floor(p 2³²), p from 2⁻²⁴ to the smallest number, at elements "
        "whose words are 0 or nearly so",
        "a small p is taken for none, or a threshold of 0 is made 1",
        ("D-7", "D-10"),
        (*NEEDS, "bits"),
        lambda: st.sampled_from(_RARE).map(lambda rare: Problem(rare=rare)),
        _tiny,
        (),
    ),
)
