"""Golden vectors of what families have beside A-1 to A-7: LayerNorm, activations, soft caps, parts
of heads that are rotated, stretched rotations, the choice of experts."""

from __future__ import annotations

from typing import Any

import numpy as np

from pylora.conformance.bounds import features as bounds
from pylora.conformance.bounds import ops as plain
from pylora.conformance.vectors.cases import Case
from pylora.conformance.vectors.ops import angles, draw, wide
from pylora.conformance.vectors.parts import attention_case
from pylora.model.frequencies import attention_factor, inverse_frequencies
from pylora.ops.mixture import choose, choose_backward
from pylora.reference import Reference
from pylora.types import Array

_ref = Reference()


def cases() -> list[Case]:
    """All cases of this file."""
    far = draw("layer-norm/far", (3, 8)) + np.float32(40)  # the mean is most of it
    flat = np.full((2, 5), 0.75, np.float32)
    return [
        _layer_norm("layer-norm", draw("layer-norm/x", (4, 10)), 1e-5, bias=True),
        _layer_norm("layer-norm-no-bias", far, 1e-3),
        _layer_norm("layer-norm-flat", flat, 0.5, bias=True),
        *(_activation(f"{kind.replace('_', '-')}", kind) for kind in _EDGES),
        *(_activation(f"{kind.replace('_', '-')}-plain", kind, gated=False) for kind in _EDGES),
        _soft_cap("soft-cap", 1.0, 2.5),
        _soft_cap("soft-cap-multiplied", 0.25, 30.0),
        _soft_cap("soft-cap-none", -1.75, 0.0),
        attention_case("attention-scale", 2, 1, 4, [4, 2], scale=0.125),
        attention_case("attention-capped", 4, 2, 4, [5, 2], window=3, scale=0.75, softcap=1.5),
        _partial("rope-part-half", "half", 8, 4),
        _partial("rope-part-interleaved", "interleaved", 6, 2, factor=1.25),
        *(_scaled(name, *settings) for name, settings in _SCALED.items()),
        _choose("choose", draw("choose/logits", (6, 5), 2.0), 2, True),
        _choose("choose-not-normalized", draw("choose/other", (5, 4), 3.0), 3, False),
        _choose("choose-one", draw("choose/one", (4, 3)), 1, True),
        _choose("choose-ties", np.array([[1, 2, 2, 1], [0, 0, 0, 0]], np.float32), 3, True),
        _choose(
            "choose-far", np.array([[800, 791, -5, 4], [-900, -899, -4, -6]], np.float32), 2, False
        ),
    ]


# ---- LayerNorm, activations, caps --------------------------------------------------------------


def _layer_norm(name: str, x: Array, eps: float, *, bias: bool = False) -> Case:
    case = Case(name, "layer_norm", ("A-20",), {"eps": eps})
    case.inputs |= {
        "x": x,
        "w": draw(f"{name}/w", (x.shape[1],)),
        "dy": draw(f"{name}/dy", x.shape),
    }
    if bias:
        case.inputs["b"] = draw(f"{name}/b", (x.shape[1],))
    x, w, dy = (wide(case.inputs[n]) for n in ("x", "w", "dy"))
    b = wide(case.inputs["b"]) if bias else None
    y, rstd = _ref.layer_norm_forward(x, w, b, eps)
    y_bound, rstd_bound = bounds.layer_norm_forward(x, w, b, eps)
    case.expect("rstd", rstd, rstd_bound, "bounds.layer_norm_forward")
    case.expect("y", y, y_bound + plain.tiny(), "bounds.layer_norm_forward")
    dx = _ref.layer_norm_backward(dy, x, w, rstd)
    limit = bounds.layer_norm_backward(dy, x, w, rstd)
    # rstd's own error: dx is a sum of r and r³ terms.
    r, g = rstd[:, None], np.abs(dy * w)
    n = np.abs(x - x.mean(axis=1, keepdims=True)) * r
    size = r * (g + g.mean(axis=1, keepdims=True) + 3 * n * (g * n).mean(axis=1, keepdims=True))
    spread = 1.01 * rstd_bound[:, None] / r * size + plain.tiny()
    case.expect("dx", dx, limit + spread, "bounds.layer_norm_backward, and rstd's error")
    return case


# Both tails, where a slope cancels, zeros; of the ReLU the side of 0.
_EDGES = {
    "silu": [-90.0, 90.0, -1.2784645, 0.0],
    "gelu_tanh": [-12.0, 12.0, -0.7517916, -0.0],
    "gelu_erf": [-9.0, 9.0, -0.7517916, 0.0],
    "relu2": [-1.0, 0.0, -0.0, 1e-3],
}


def _activation(name: str, kind: str, *, gated: bool = True) -> Case:
    case = Case(name, "activation", ("A-23",), {"kind": kind})
    for key in ("x", "up", "dy") if gated else ("x", "dy"):
        case.inputs[key] = draw(f"{name}/{key}", (3, 7), 2.0)
    case.inputs["x"][0, : len(_EDGES[kind])] = _EDGES[kind]
    x, dy = wide(case.inputs["x"]), wide(case.inputs["dy"])
    up = wide(case.inputs["up"]) if gated else None
    y, limit = _ref.activation_forward(x, up, kind), bounds.activation_forward(x, up, kind)
    case.expect("y", y, limit, "bounds.activation_forward")
    grads, limits = (
        _ref.activation_backward(dy, x, up, kind),
        bounds.activation_backward(dy, x, up, kind),
    )
    for key, value, bound in zip(("dx", "dup"), grads, limits):
        if value is not None:
            case.expect(key, value, bound, "bounds.activation_backward")
    return case


def _soft_cap(name: str, multiplier: float, cap: float) -> Case:
    """Backward takes one's own y: its error moves 1 - (y / cap)² by twice it, at most."""
    case = Case(name, "soft_cap", ("A-27",), {"multiplier": multiplier, "cap": cap})
    case.inputs |= {"x": draw(f"{name}/x", (3, 6), 3.0), "dy": draw(f"{name}/dy", (3, 6))}
    case.inputs["x"][0, :3] = (0.0, 500.0, -500.0)
    x, dy = wide(case.inputs["x"]), wide(case.inputs["dy"])
    y, limit = (
        _ref.soft_cap_forward(x, multiplier, cap),
        bounds.soft_cap_forward(x, multiplier, cap),
    )
    case.expect("y", y, limit + plain.tiny(), "bounds.soft_cap_forward")
    dx, bound = (
        _ref.soft_cap_backward(dy, y, multiplier, cap),
        bounds.soft_cap_backward(dy, y, multiplier, cap),
    )
    own = 2.02 * np.abs(dy * multiplier) * limit / cap if cap else 0.0
    rule = "bounds.soft_cap_backward, and y's error"
    case.expect("dx", dx, bound + own + plain.tiny(), rule)
    return case


# ---- rotations ---------------------------------------------------------------------------------


def _partial(name: str, layout: str, D: int, R: int, factor: float = 1.0) -> Case:
    """The first R numbers of each head are turned; `factor` multiplies cos and sin, and what is not
    turned stays. The backward has the same factor, so it is the transpose and no inverse."""
    params: dict[str, Any] = {"head_dim": D, "rotary_dim": R, "theta": 1e4, "layout": layout}
    spec: tuple[str, ...] = ("A-24",)
    if factor != 1:
        params["attention_factor"], spec = factor, ("A-24", "A-25")
    case, position = Case(name, "rope", spec, params), np.array([0, 3, 11, 6], np.int64)
    cos, sin = (factor * t for t in angles(R, np.arange(12)))
    x = draw(f"rope/{name}", (4, 2 * D))
    case.inputs |= {"x": x, "position": position}
    case.inputs |= {"cos": cos.astype(np.float32), "sin": sin.astype(np.float32)}
    rule = "bounds.rope: gamma_2 (|a| + |b|), and u (|a| + |b|) for the tables' rounding"
    bound = 2 * factor * plain.rope(wide(x), D)
    for key, back in (("y", False), ("inverse", True)):
        case.expect(key, _ref.rope(wide(x), cos, sin, position, D, layout, back), bound, rule)
    return case


_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
_LONG: dict[str, Any] = {
    "rope_type": "longrope",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "short_factor": [1.0, 1.125, 1.5, 2.0],
    "long_factor": [1.0, 2.5, 6.0, 20.0],
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
_DYNAMIC = {"rope_type": "dynamic", "factor": 3.0}
# scaling, R, theta, the length of the sequence, the length that the model was trained with
_SCALED: dict[str, tuple[dict[str, Any], int, float, int, int]] = {
    "rope-linear": ({"rope_type": "linear", "factor": 2.5}, 8, 1e4, 40, 64),
    "rope-llama3": (_LLAMA3, 16, 5e5, 40, 1024),
    "rope-dynamic": (_DYNAMIC, 8, 1e4, 40, 16),
    "rope-dynamic-short": (_DYNAMIC, 8, 1e4, 12, 16),
    "rope-yarn": (_YARN, 16, 1e4, 200, 256),
    "rope-yarn-settings": (
        _YARN | {"beta_fast": 8.0, "beta_slow": 2.0, "truncate": False, "attention_factor": 1.25},
        16, 5e5, 200, 256,
    ),
    "rope-yarn-not-cut": (_YARN | {"truncate": False}, 16, 1e4, 200, 256),
    "rope-yarn-all-slow": (
        _YARN | {"original_max_position_embeddings": 600}, 8, 10.0, 200, 256,
    ),  # the ramp would end behind the last pair
    "rope-yarn-step": (_YARN | {"beta_fast": 8.7}, 8, 10.0, 200, 256),  # a ramp of no width
    "rope-yarn-mscale": (
        _YARN | {"original_max_position_embeddings": 64, "mscale": 0.707, "mscale_all_dim": 1.5},
        8, 1e4, 200, 256,
    ),
    "rope-longrope": (_LONG, 8, 1e4, 40, 64),
    "rope-longrope-short": (_LONG, 8, 1e4, 16, 64),
}  # fmt: skip


def _scaled(
    name: str, scaling: dict[str, Any], R: int, theta: float, length: int, trained: int
) -> Case:
    """Tables of a stretched rotation, with its factor; the angle is computed in float64."""
    params = {"head_dim": R, "theta": theta, "length": length, "trained": trained, **scaling}
    case, position = Case(name, "rope_tables", ("A-25",), params), np.array([0, 1, 7, 11])
    position = np.append(position, length - 1)
    case.inputs["position"] = position
    frequency = inverse_frequencies(R, theta, scaling, length=length, trained=trained)
    angle, factor = position[:, None] * frequency, attention_factor(scaling)
    # A frequency in float64 is off by a few dozen roundings of the ramp's and the powers.
    off = plain.gamma(64, np.float64) * (1 + angle)
    for key, value in (("cos", factor * np.cos(angle)), ("sin", factor * np.sin(angle))):
        limit = plain.gamma(1) * np.abs(value) + factor * off
        case.expect(key, value, limit, "one rounding to float32; gamma_64 of the angle in float64")
    return case


# ---- experts -----------------------------------------------------------------------------------


def _choose(name: str, logits: Array, top_k: int, normalize: bool) -> Case:
    case = Case(name, "choose", ("A-29",), {"top_k": top_k, "normalize": normalize})
    case.inputs |= {"logits": logits, "dw": draw(f"{name}/dw", (len(logits), top_k))}
    logits, dw = (wide(a) for a in case.inputs.values())
    choice = choose(logits, top_k, normalize, np.asarray, np)
    p_bound, w_bound = bounds.choose(logits, choice.weights, normalize)
    case.expect("probabilities", choice.probabilities, p_bound, "bounds.choose")
    case.exact("chosen", choice.chosen.astype(np.int64))
    case.expect("weights", choice.weights, w_bound, "bounds.choose")
    d = choose_backward(dw, choice, normalize, np)
    limit = bounds.choose_backward(dw, choice.probabilities, choice.chosen, normalize)
    case.expect("dlogits", d, limit, "bounds.choose_backward")
    return case
