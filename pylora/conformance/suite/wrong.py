"""The wrong rules: what each makes of an adapter. A verdict names the one that an engine follows.

Each is a mistake that a real engine, converter or server has made, or one beside it. Only those
that give another meaning than the right one are listed for an adapter. Rules about several adapters
(one left over, one taken for another) are in sequences.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from pylora.conformance.suite.adapters import Adapter, Meaning, wide
from pylora.conformance.suite.bases import interleave
from pylora.formats.gguf import deinterleave
from pylora.types import LoRA

_EMBEDDING, _HEAD = "model.embed_tokens", "lm_head"

SENTENCES = {
    "ignored": "the adapter is ignored: the answers are the base model's",
    "alpha-as-scale": "alpha is used in place of alpha / r",
    "scale-1": "the scale is 1, whatever alpha and r are",
    "scale-twice": "the scale is multiplied in twice",
    "rslora-ignored": "alpha / r is used although use_rslora asks for alpha / sqrt(r)",
    "rslora-assumed": "alpha / sqrt(r) is used although use_rslora is not set",
    "default-rank": "the scale is alpha / the file's r, not alpha / the module's own r",
    "default-alpha": "alpha_pattern is ignored: every module has the file's lora_alpha",
    "patterns-by-name": "a pattern for one layer's module is used for that module of every layer",
    "other-layer": "B of a layer is used with A of the next",
    "layer-above": "each layer has the update of the layer below it",
    "layer-below": "each layer has the update of the layer above it",
    "not-permuted": "the rows of B of q and k are not brought into the order of the base's rows",
    "permuted": "the rows of B of q and k are reordered, where the base's rows are not",
    "gate-up-swapped": "the updates of gate_proj and up_proj are exchanged",
    "tied-head-too": "the embedding's update is applied to the tied head, too",
    "tied-embedding-too": "the head's update is applied to the tied embedding, too",
    "bias-dropped": "the file's biases are dropped: the base's own are used",
    "bias-added": "the file's biases are added to the base's, not put in their place",
    "lora-bias-dropped": "the bias of B is dropped",
    "lora-bias-unscaled": "the bias of B is added without the scale",
    "dora-as-lora": "DoRA is run as plain LoRA: the magnitudes are dropped",
    "dora-base-norm": "DoRA divides by the length of W's rows, not of those of W + s B A",
    "saved-ignored": "the module of modules_to_save is dropped: the base's own is used",
    "rank-cut": "of a rank of 256 only the first 64 are used",
}
DROPPED = "dropped:"  # and a module's name


def sentence(rule: str) -> str:
    """The rule in words."""
    if rule.startswith(DROPPED):
        return f"the update of {rule.removeprefix(DROPPED)} is dropped"
    return SENTENCES[rule]


def wrongs(adapter: Adapter) -> dict[str, Meaning]:
    """Wrong rule -> what it makes of this adapter."""
    found = {"ignored": Meaning()}
    for rule, meaning in _all(adapter):
        if not _same(meaning, adapter.meaning()):
            found[rule] = meaning
    return found


def _all(a: Adapter) -> Iterator[tuple[str, Meaning]]:
    right, entries = a.meaning(), {e.path: e for e in a.plan.entries}
    case = a.case.config

    def scaled(scale: Callable[[Any], float]) -> Meaning:
        loras = {p: _scaled(wide(l), scale, entries.get(p)) for p, l in a.loras.items()}
        if a.magnitudes:
            return replace(a, loras=loras).meaning()
        return replace(right, loras=loras)

    rs = case.get("use_rslora", False)
    yield "alpha-as-scale", scaled(lambda e: e.alpha)
    yield "scale-1", scaled(lambda e: 1.0)
    yield "scale-twice", scaled(lambda e: e.scale**2)
    yield (
        "rslora-ignored" if rs else "rslora-assumed",
        scaled(lambda e: e.alpha / e.r if rs else e.alpha / e.r**0.5),
    )
    if case.get("rank_pattern"):
        yield "default-rank", scaled(lambda e: e.alpha / case["r"])
    if case.get("alpha_pattern"):
        yield "default-alpha", scaled(lambda e: case["lora_alpha"] / e.r)
        last = {p.rsplit(".", 1)[-1]: alpha for p, alpha in case["alpha_pattern"].items()}
        yield "patterns-by-name", scaled(lambda e: last.get(_leaf(e.path), e.alpha) / e.r)
    if a.magnitudes:
        plain = {path: wide(lora) for path, lora in a.loras.items()}
        yield "dora-as-lora", Meaning(plain, {n: w.astype(np.float64) for n, w in a.saved.items()})
        yield "dora-base-norm", Meaning({}, dict(_base_norm(a)))
        return
    yield from _moved(a, right)
    yield from _parts(a, right)
    yield from _biases(a, right)
    if a.saved:
        yield "saved-ignored", replace(right, weights={})
    if any(lora.rank == 256 for lora in right.loras.values()):
        cut = {p: replace(l, A=l.A[:64], B=l.B[:, :64]) for p, l in right.loras.items()}
        yield "rank-cut", replace(right, loras=cut)


def _leaf(path: str) -> str:
    return path.rsplit(".", 1)[-1]


def _scaled(lora: LoRA, scale: Callable[[Any], float], entry: Any) -> LoRA:
    return lora if entry is None else replace(lora, scale=float(scale(entry)))


def _base_norm(a: Adapter) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    for path, m in a.magnitudes.items():
        length = np.linalg.norm(a.base.weights[f"{path}.weight"].astype(np.float64), axis=1)
        yield f"{path}.weight", (m.astype(np.float64) / length)[:, None] * a.moved(path)


def _moved(a: Adapter, right: Meaning) -> Iterator[tuple[str, Meaning]]:
    """Updates of the right module in another layer, or rows in another order."""
    layers, loras = a.base.config.num_hidden_layers, right.loras
    modules = a.base.config.modules()

    def shifted(by: int, only: str = "AB") -> dict[str, LoRA]:
        out = (
            dict(loras) if only == "B" else {p: l for p, l in loras.items() if ".layers." not in p}
        )
        for path, lora in loras.items():
            if ".layers." not in path:
                continue
            head, number, rest = _cut(path)
            to = f"{head}{(number + by) % layers}.{rest}"
            if only == "B":
                if to in loras and loras[to].rank == lora.rank:
                    out[to] = replace(loras[to], B=lora.B)
            elif to in modules:
                out[to] = lora
        return out

    yield "layer-above", replace(right, loras=shifted(1))
    yield "layer-below", replace(right, loras=shifted(-1))
    yield "other-layer", replace(right, loras=shifted(-1, "B"))
    heads = {
        "q_proj": a.base.config.num_attention_heads,
        "k_proj": a.base.config.num_key_value_heads,
    }
    for rule, order in (("not-permuted", deinterleave), ("permuted", interleave)):
        rows = {
            p: replace(l, B=order(l.B, heads[_leaf(p)])) if _leaf(p) in heads else l
            for p, l in loras.items()
        }
        yield rule, replace(right, loras=rows)
    swap = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
    other = {
        p: loras.get(p.replace(_leaf(p), swap.get(_leaf(p), _leaf(p))), l) for p, l in loras.items()
    }
    yield "gate-up-swapped", replace(right, loras=other)


def _cut(path: str) -> tuple[str, int, str]:
    head, rest = path.split(".layers.", 1)
    number, rest = rest.split(".", 1)
    return f"{head}.layers.", int(number), rest


def _parts(a: Adapter, right: Meaning) -> Iterator[tuple[str, Meaning]]:
    """Updates of some modules dropped, or used for another module as well."""
    loras = right.loras
    names = dict.fromkeys(_leaf(p) for p in loras)
    if len(names) > 1:
        for name in names:
            rest = {p: l for p, l in loras.items() if _leaf(p) != name}
            yield DROPPED + name, replace(right, loras=rest)
    if a.base.tied and _EMBEDDING in loras and _HEAD not in loras:
        e = loras[_EMBEDDING]
        turned = replace(e, A=e.B.T.copy(), B=e.A.T.copy())
        yield "tied-head-too", replace(right, loras={**loras, _HEAD: turned})
    if a.base.tied and _HEAD in loras and _EMBEDDING not in loras:
        h = loras[_HEAD]
        turned = replace(h, A=h.B.T.copy(), B=h.A.T.copy())
        yield "tied-embedding-too", replace(right, loras={**loras, _EMBEDDING: turned})


def _biases(a: Adapter, right: Meaning) -> Iterator[tuple[str, Meaning]]:
    loras = right.loras
    if any(l.base_bias is not None for l in loras.values()):
        none = {p: replace(l, base_bias=None) for p, l in loras.items()}
        yield "bias-dropped", replace(right, loras=none)
        added = {}
        for path, lora in loras.items():
            own = a.base.weights.get(f"{path}.bias")
            if lora.base_bias is not None and own is not None:
                lora = replace(lora, base_bias=lora.base_bias + own)
            added[path] = lora
        yield "bias-added", replace(right, loras=added)
    if any(l.bias is not None for l in loras.values()):
        none = {p: replace(l, bias=None) for p, l in loras.items()}
        yield "lora-bias-dropped", replace(right, loras=none)
        plain = {
            p: l if l.bias is None else replace(l, bias=l.bias / l.scale) for p, l in loras.items()
        }
        yield "lora-bias-unscaled", replace(right, loras=plain)


def _same(one: Meaning, other: Meaning) -> bool:
    if one.loras.keys() != other.loras.keys() or one.weights.keys() != other.weights.keys():
        return False
    for path, a in one.loras.items():
        b = other.loras[path]
        if a.scale != b.scale:
            return False
        for name in ("A", "B", "bias", "base_bias"):
            x, y = getattr(a, name), getattr(b, name)
            if (x is None) != (y is None) or (x is not None and not np.array_equal(x, y)):
                return False
    return all(np.array_equal(w, other.weights[n]) for n, w in one.weights.items())
