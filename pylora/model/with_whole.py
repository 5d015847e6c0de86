"""The model that has an adapter's weights in place of its own, beside the one that it is made of.

`Llama.with_whole` makes it; it shares every other weight. Where those weights are trained,
`Llama.renew` makes it compute with what training left (trained.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from pylora.errors import UnsupportedError
from pylora.model.config import LlamaConfig
from pylora.model.trained import Trained
from pylora.model.whole import Whole, check_whole, whole_of
from pylora.ops.protocol import Packed
from pylora.types import Array


class Shared:
    """The tensors of a model that is loaded, some of them replaced: what `Llama(...)` is given.

    Matrices are the packed ones of the other model, not copies of them.
    """

    def __init__(self, model: Any, whole: Whole) -> None:
        self._whole, self._vectors = whole.tensors, model.vectors
        self._packed: dict[str, Packed] = {
            f"{model.embed_tokens.path}.weight": model.embed_tokens.W
        }
        names = model.config.names
        for block in model.blocks:
            self._packed |= {f"{p.path}.weight": p.W for p in block.numbered}
            if block.router is not None:
                self._packed[f"{block.path}.{names.router}.weight"] = block.router
        if model.trunk.positions is not None:
            self._packed[f"{names.positions}.weight"] = model.trunk.positions
        self._packed[f"{names.head}.weight"] = model.lm_head.W

    def __call__(self, name: str) -> Any:
        if name in self._whole:
            return self._whole[name]
        return self._packed[name] if name in self._packed else self._vectors[name]


# What of a model is of its weights, and is another's where an adapter brings weights of its own.
_PARTS = (
    "config", "vectors", "rope", "embed_tokens", "blocks", "norm", "lm_head", "trunk", "head",
    "modules", "whole",
)  # fmt: skip


class HasWhole:
    """A model (`Llama`) whose weights may be an adapter's in part."""

    config: LlamaConfig
    whole: Whole | None  # the weights here that are an adapter's
    trained: Trained | None  # those of them that are trained
    _home: dict[str, Any] | None  # the parts of the base while others are here

    def with_whole(self, whole: Whole) -> Any:
        """The model that has these weights in place of its own; it shares all the others.

        What is attached here is not attached there. PlanError for a tensor that does not fit.
        """
        if whole is self.whole:
            return self
        self._refuse_second()
        model: Any = self
        config = check_whole(self.config, whole)
        made = type(model)(
            config, Shared(self, whole), backend=model.ops, precision=model.precision, like=self
        )
        made.whole, made.stored_as = whole, model.stored_as
        return made

    @property
    def home_config(self) -> LlamaConfig:
        """The base's configuration, whatever is attached."""
        config: LlamaConfig = self._at_home("config")
        return config

    @property
    def home(self) -> Any:
        """The base's parts, by the names that they have here, whatever is attached."""
        return SimpleNamespace(**{name: self._at_home(name) for name in _PARTS})

    @property
    def whole_arrays(self) -> dict[str, Array]:
        """The whole weights that are trained, by tensor name, where the backend computes: float32
        arrays that training writes. `renew` has to follow."""
        return {} if self.trained is None else self.trained.arrays

    def renew(self) -> None:
        """Computes with the numbers that are in `whole_arrays` now."""
        if self.trained is not None:
            self.trained.put(self)
            self._forget()

    def _train_whole(self, new: bool) -> None:
        """Marks what is trained of the whole weights that are here, and takes their numbers unless
        the model is `new` with them."""
        trained = self.whole is not None and bool(self.whole.trained)
        self.trained = Trained(self, self.whole) if trained else None
        if not new:
            self.renew()

    def _forget(self) -> None:
        """Drops what was made of the weights for decoding."""
        for name in ("op", "mixed", "numbers"):
            vars(self).pop(name, None)

    def _refuse_second(self) -> None:
        if self._at_home("whole") is not None:
            raise UnsupportedError(
                "this model has the whole weights of an adapter already; load the base model again "
                "for another one"
            )

    def _at_home(self, name: str) -> Any:
        """A part as it is without the attached adapter's whole weights."""
        return getattr(self, name) if self._home is None else self._home[name]

    def _become(self, whole: Whole | None) -> bool:
        """Has these weights in place of the base's from now on; None: the base's. Whether it had
        others before."""
        if whole is self.whole or (whole is None and self._home is None):
            return False
        if self._home is not None:
            vars(self).update(self._home)
            self._home = None
        if whole is not None:
            whole.lay()
            made = self.with_whole(whole)
            self._home = {name: getattr(self, name) for name in _PARTS}
            vars(self).update({name: getattr(made, name) for name in _PARTS})
        self._forget()
        return True


def alone(model: Any, adapters: Sequence[Any]) -> Any:
    """The model to run these adapters on: one whose vocabulary is of another size, and that is
    the only one, gets a model that has its tables; it is the base from then on."""
    if len(adapters) != 1 or (whole := whole_of(adapters[0])) is None or whole.vocab is None:
        return model
    return model.with_whole(whole)
