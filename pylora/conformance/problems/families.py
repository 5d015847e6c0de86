"""Hypothesis strategies for the operations that families add: norms, activations, caps, rotations,
the choice of experts."""

from __future__ import annotations

from typing import Any

import numpy as np

from pylora.conformance.problems.adapted import ALL_DTYPES
from pylora.conformance.problems.layers import SEEDS, elements, np_dtype, pick, st
from pylora.conformance.testcase import Problem
from pylora.ops.features import ACTIVATIONS

DTYPES = ALL_DTYPES


def _rng(draw: Any) -> np.random.Generator:
    return np.random.default_rng(draw(SEEDS))


@st.composite  # type: ignore[untyped-decorator]
def layer_norms(draw: Any, dtype: str = "float32") -> Problem:
    """x and dy [m,n], w and perhaps b [n]; rows whose mean is several deviations, rows of equal
    numbers, an eps that counts."""
    m, n = draw(pick((1, 2, 5, 0))), draw(pick((2, 3, 1, 8, 17, 64)))
    rng, mean = _rng(draw), draw(pick((0.0, 1.0, 8.0, -3.0)))
    size = draw(pick((1.0, 0.01, 0.0)))
    x = (mean + size * rng.normal(size=(m, n))).astype(np_dtype(dtype))
    return Problem(
        x=x,
        w=elements(rng, (n,), draw(pick(("normal", "positive", "zeros"))), dtype),
        b=elements(rng, (n,), "normal", dtype) if draw(st.booleans()) else None,
        dy=elements(rng, (m, n), draw(pick(("normal", "integers"))), dtype),
        eps=draw(pick((1e-5, 1e-6, 1e-2))),
    )


@st.composite  # type: ignore[untyped-decorator]
def activations(draw: Any, dtype: str = "float32") -> Problem:
    """x, dy and perhaps up [m,n]; x about 0, where the kinds differ, and large, where exp ends."""
    shape = draw(pick((1, 2, 5, 0))), draw(pick((1, 3, 8, 33)))
    rng, size = _rng(draw), draw(pick((1.0, 3.0, 30.0, 200.0)))
    x = (rng.normal(size=shape) * size).astype(np_dtype(dtype))
    up = elements(rng, shape, draw(pick(("normal", "zeros"))), dtype)
    return Problem(
        kind=draw(pick(ACTIVATIONS)),
        x=x,
        up=up if draw(st.booleans()) else None,
        dy=elements(rng, shape, "normal", dtype),
    )


@st.composite  # type: ignore[untyped-decorator]
def caps(draw: Any, dtype: str = "float32") -> Problem:
    """x and dy [m,n], a multiplier and a cap: neither, one, both; far beyond the cap, too."""
    shape = draw(pick((1, 2, 5, 0))), draw(pick((1, 3, 8, 33)))
    rng, size = _rng(draw), draw(pick((1.0, 10.0, 300.0)))
    return Problem(
        x=(rng.normal(size=shape) * size).astype(np_dtype(dtype)),
        dy=elements(rng, shape, "normal", dtype),
        multiplier=draw(pick((1.0, 0.25, 3.0, -0.5))),
        cap=draw(pick((30.0, 0.0, 2.0, 50.0))),
    )


@st.composite  # type: ignore[untyped-decorator]
def parts(draw: Any, dtype: str = "float32") -> Problem:
    """x [m, heads * D] of which R numbers of each head are rotated: some, or all."""
    m, heads, D = draw(pick((1, 2, 5))), draw(pick((2, 1, 3))), draw(pick((8, 4, 6, 64)))
    rng = _rng(draw)
    return Problem(
        x=elements(rng, (m, heads * D), "normal", dtype),
        position=rng.choice([0, 1, 3, 17, 255, 257, 4097], m).astype(np.int64),
        head_dim=D,
        rotary_dim=draw(pick((2, 4, D // 2 // 2 * 2 or 2, D))),
        theta=draw(pick((10000.0, 100.0, 1e6))),
        layout=draw(pick(("half", "interleaved"))),
        inverse=draw(st.booleans()),
    )


@st.composite  # type: ignore[untyped-decorator]
def scalings(draw: Any) -> Problem:
    """Rotary settings of each kind, as a config.json has them, and a length on either side of the
    one that the model was trained for."""
    R, trained = draw(pick((16, 4, 64))), draw(pick((64, 2048)))
    kind = draw(pick(("linear", "dynamic", "llama3", "yarn", "longrope")))
    scaling: dict[str, Any] = {"rope_type": kind, "factor": draw(pick((2.0, 8.0, 1.5)))}
    if kind in ("llama3", "yarn", "longrope"):
        scaling["original_max_position_embeddings"] = trained
    if kind == "llama3":
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": draw(pick((4.0, 2.0)))}
    if kind == "yarn" and draw(st.booleans()):
        scaling |= {"beta_fast": 16.0, "beta_slow": 2.0, "truncate": draw(st.booleans())}
    if kind in ("yarn", "longrope") and draw(st.booleans()):
        scaling["attention_factor"] = 1.25
    if kind == "longrope":
        rng = _rng(draw)
        for name in ("short_factor", "long_factor"):
            scaling[name] = [float(v) for v in 1 + rng.integers(0, 9, R // 2) / 4]
    return Problem(
        rotary_dim=R,
        theta=draw(pick((10000.0, 500000.0, 100.0))),
        scaling=scaling,
        length=draw(pick((trained * 2, trained, trained + 1, 1))),
        trained=trained,
    )


@st.composite  # type: ignore[untyped-decorator]
def choices(draw: Any, dtype: str = "float32") -> Problem:
    """logits [m,experts], quarters of whole numbers, so that they are equal or well apart in every
    dtype; k experts of them."""
    m, E = draw(pick((3, 1, 8, 0))), draw(pick((4, 1, 2, 8, 60)))
    rng, most = _rng(draw), draw(pick((16, 2, 1)))
    logits = (rng.integers(-most, most + 1, (m, E)) / 4).astype(np_dtype(dtype))
    return Problem(
        logits=logits, k=draw(pick((2, 1, 8, E))) % E or 1, normalize=draw(st.booleans())
    )
