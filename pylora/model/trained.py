"""The whole weights of an adapter that are trained: where in a model their gradients are wanted,
and how what training left gets into the weights that the model computes with.

Training writes `Trained.arrays`, float32, whatever the precision of the model; `put` packs them in
that precision, so that a model in int8 or int4 is trained through the weights as it will run them.
The gradients are computed by the modules themselves (`Own` in linear.py) and in normed.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from pylora.model.linear import Own
from pylora.ops.protocol import Backend
from pylora.types import Array, Norm

_ROLES = ("input_norm", "mid_norm", "after_attention", "after_mlp")


class Trained:
    """What of `model.whole` is trained, by tensor name, where the backend computes."""

    def __init__(self, model: Any, whole: Any) -> None:
        """Marks the modules of `model`, which must have the weights of `whole` (a `Whole`)."""
        ops, names = model.ops, model.config.names
        self.whole = whole
        self.arrays: dict[str, Array] = {n: ops.place(a) for n, a in whole.trained.items()}
        rows = [name for name in whole.rows if name in self.arrays]
        self._tables: dict[str, Array] = {n: ops.place(whole.tensors[n]) for n in rows}
        self._rows = {n: ops.xp.asarray(np.array(whole.rows[n], np.int64)) for n in rows}
        # What takes the numbers of a tensor, packed or as they are.
        self._packed: dict[str, list[Any]] = {name: [] for name in self.arrays}
        self._plain: dict[str, list[Callable[[Array], None]]] = {n: [] for n in self.arrays}
        for path, module in model.modules.items():
            if hasattr(module, "own"):
                self._mark(model, path, module)
        for block in model.blocks:
            if block.router is not None:
                self._mark_router(f"{block.path}.{names.router}", block.mlp, ops)
            for role in _ROLES:
                self._mark_norm(model, (block,), role, f"{block.path}.{getattr(names, role)}")
            for role in ("q_norm", "k_norm"):
                path = f"{block.path}.{getattr(names, role)}"
                self._mark_norm(model, (block.attention,), role, path)
        self._mark_norm(model, (model, model.head), "norm", names.norm)
        self._mark_positions(names.positions, model.trunk, ops)

    # ---- where -----------------------------------------------------------------------------------

    def _mark(self, model: Any, path: str, module: Any) -> None:
        """A linear module or the embedding. A tied head is the embedding's weight once more."""
        names, tied = model.config.names, model.config.tie_word_embeddings
        name = f"{names.embedding if tied and path == names.head else path}.weight"
        if name not in self.arrays:
            return
        bias, places = f"{path}.bias", None
        if name in self._rows:
            rows = self.whole.rows[name]
            places = np.full(self.whole.tensors[name].shape[0], len(rows), np.int64)
            places[list(rows)] = np.arange(len(rows))
            places = model.ops.xp.asarray(places)
        own = name.rpartition(".")[0]
        module.own = Own(own, bias in self.arrays, self._rows.get(name), places)
        self._packed[name].append(module)
        if bias in self.arrays:
            self._plain[bias].append(_into(module.bias))

    def _mark_router(self, path: str, experts: Any, ops: Backend) -> None:
        if (name := f"{path}.weight") in self.arrays:
            experts.own = Own(path)

            def put(array: Array) -> None:
                experts.mix = replace(experts.mix, router=ops.pack(array))

            self._plain[name].append(put)

    def _mark_positions(self, path: str, trunk: Any, ops: Backend) -> None:
        if (name := f"{path}.weight") in self.arrays:
            trunk.own = Own(path)

            def put(array: Array) -> None:
                trunk.positions = ops.pack(array)

            self._plain[name].append(put)

    def _mark_norm(self, model: Any, owners: tuple[Any, ...], role: str, path: str) -> None:
        norm: Norm | None = getattr(owners[0], role)
        tensors = [(n, s) for n, s in model.config.tensors().items() if n.startswith(f"{path}.")]
        if norm is None or not any(name in self.arrays for name, _ in tensors):
            return
        for owner in owners:
            setattr(owner, role, replace(norm, trained=tuple(tensors)))
        # A norm of 1 + its weight has that sum; those of single heads have none.
        each = role in ("q_norm", "k_norm") and model.config.qk_norm_of == "each"
        one = int(model.config.family.unit_offset and not each)
        at = 0
        for name, shape in tensors:
            target = norm.b
            if not name.endswith(".bias"):
                size = int(np.prod(shape))
                target = norm.w[at : at + size]
                at += size
            if name in self.arrays:
                self._plain[name].append(_into(target, 0 if target is norm.b else one))

    # ---- the numbers -----------------------------------------------------------------------------

    def put(self, model: Any) -> None:
        """Makes the model compute with the arrays as they are now."""
        for name, array in self.arrays.items():
            if name in self._tables:
                self._tables[name][self._rows[name]] = array
                array = self._tables[name]
            for take in self._plain[name]:
                take(array)
            if self._packed[name]:
                W = model.ops.pack(array, model.precision)
                for module in self._packed[name]:
                    module.W = W

    def collect(self, ops: Backend) -> None:
        """Brings the numbers back into the adapter's own arrays."""
        for name, own in self.whole.trained.items():
            if self.arrays[name] is not own:
                own[...] = ops.to_numpy(self.arrays[name])
        self.whole.lay()


def _into(target: Any, more: int = 0) -> Callable[[Array], None]:
    """Writes an array's numbers, plus `more`, into another of as many."""

    def put(array: Array) -> None:
        target[...] = (array + array.dtype.type(more) if more else array).reshape(target.shape)

    return put
