"""Why an adapter does not fit a model, in words: its layers, sizes and modules beside the model's.

Only names and shapes are compared; whether an adapter of the right shape was trained on this model
cannot be told from them. Called when reading has failed, so nothing is refused here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from pylora.model.config import ModuleSpec

Shape = tuple[int, ...]
_PART = re.compile(
    r"(?:base_model\.model\.)?(?P<path>.+?)\.lora_(?P<embedding>embedding_)?(?P<part>[AB])"
    r"(?:\.[^.]+)*"
)
_LAYER = re.compile(r"\.(\d+)\.")
# What a dimension of a module is called: (module, 0 for its outputs d or 1 for its inputs k).
_SIZES = (
    ("hidden size", (("q_proj", 1), ("k_proj", 1), ("v_proj", 1), ("gate_proj", 1), ("up_proj", 1),
                     ("o_proj", 0), ("down_proj", 0), ("embed_tokens", 0))),
    ("intermediate size", (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1))),
    ("query heads' size", (("q_proj", 0), ("o_proj", 1))),
    ("key and value heads' size", (("k_proj", 0), ("v_proj", 0))),
    ("vocabulary", (("lm_head", 0), ("embed_tokens", 1))),
)  # fmt: skip


def misfit(
    shapes: Mapping[str, Shape],
    modules: Mapping[str, ModuleSpec],
    *,
    some_layers: bool = False,
    base: str | None = None,
) -> str:
    """A sentence such as "this adapter was made for another base model: it has 30 layers, the model
    24", or "" where layers, sizes and modules agree.

    shapes: those of the adapter's tensors, by key in its file; modules: the model's; some_layers:
    the adapter is meant for some of the layers alone; base: what its settings say it was made for.
    """
    theirs: dict[str, list[int | None]] = {}
    for key, shape in shapes.items():
        found = _PART.fullmatch(key)
        if found is None or len(shape) != 2:
            continue
        outputs = found["part"] == "B"
        d_k = theirs.setdefault(found["path"], [None, None])
        d_k[0 if outputs else 1] = shape[0] if outputs else shape[1]
    if not theirs:
        return ""
    ours: dict[str, list[int | None]] = {path: [s.d, s.k] for path, s in modules.items()}
    parts = _layers(theirs, ours, some_layers) + _sizes(theirs, ours) + _names(theirs, ours)
    if not parts:
        return ""
    made = f"; its settings say that it was made for {base[:200]!r}" if base else ""
    return f"this adapter was made for another base model: {'; '.join(parts)}{made}"


def _layers(
    theirs: Mapping[str, object], ours: Mapping[str, object], some_layers: bool
) -> list[str]:
    here, there = _count(ours), _count(theirs)
    if not here or not there or here == there or (there < here and some_layers):
        return []
    return [f"it has {there} layers, the model {here}"]


def _count(paths: Mapping[str, object]) -> int:
    """How many layers there are, by the highest number; 0 where there are none."""
    return max((int(m[1]) + 1 for p in paths if (m := _LAYER.search(p))), default=0)


def _sizes(
    theirs: Mapping[str, list[int | None]], ours: Mapping[str, list[int | None]]
) -> list[str]:
    out = []
    for what, places in _SIZES:
        for module, side in places:
            there, here = _size(theirs, module, side), _size(ours, module, side)
            if there is not None and here is not None:
                if there != here:
                    out.append(f"its {what} is {there}, the model's {here}")
                break
    return out


def _size(modules: Mapping[str, list[int | None]], module: str, side: int) -> int | None:
    """The size that all modules of this name have; None where they differ: then a tensor is wrong,
    not the model."""
    found = {d_k[side] for path, d_k in modules.items() if path.rpartition(".")[2] == module}
    return found.pop() if len(found) == 1 else None


def _names(theirs: Mapping[str, object], ours: Mapping[str, object]) -> list[str]:
    known = {path.rpartition(".")[2] for path in ours}
    other = sorted({path.rpartition(".")[2] for path in theirs} - known)
    if not other:
        return []
    more = f" and {len(other) - 5} more" if len(other) > 5 else ""
    shown = ", ".join(name[:60] for name in other[:5])
    return [f"it adapts {shown}{more}, and the model has {', '.join(sorted(known))}"]
