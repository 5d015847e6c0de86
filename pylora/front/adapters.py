"""The adapters of a `pylora.Model`, by name: added, chosen, weighted, removed.

    model.adapters.add("legal", "runs/legal")
    model.adapters.use("legal")                      # one
    model.adapters.use({"legal": 0.7, "verse": 0.3})  # several at once, weighted
    model.adapters.weights = {"legal": 0.2, "verse": 0.8}
    model.adapters.use(None)                         # the base model

A thin face on AdapterPool (packed once, chosen by a look-up) and on Adapter.stack (the weighted sum
as one adapter). The base weights are never touched.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any

from pylora.adapters.adapter import Adapter
from pylora.adapters.combine import combine
from pylora.adapters.locate import find_adapter
from pylora.adapters.own_tokenizer import has_own, tokenizer_for
from pylora.adapters.pool import AdapterPool
from pylora.errors import ConfigError, WrongTypeError, describe, expect

if TYPE_CHECKING:
    from pylora.formats.base import Checkpoint
    from pylora.text.tokenizer import Tokenizer

Choice = str | None | Mapping[str, float] | Sequence[str]
_MIXTURES = 8  # packed sums that are kept besides the adapters themselves


Read = Callable[[str | os.PathLike[str]], "tuple[Adapter, Tokenizer | None]"]


class Active(Enum):
    """The adapter that is in use: what each call takes that names none."""

    ACTIVE = "the adapter in use"


ACTIVE = Active.ACTIVE


class Adapters(Mapping[str, Adapter]):
    """Name -> Adapter, and which of them answer."""

    def __init__(self, pool: AdapterPool, read: Read) -> None:
        """`read` gives the adapter in a PEFT directory, for the model of `pool`, and the tokenizer
        that lies beside it, if that is another than the model's."""
        self.pool, self._read = pool, read
        self.tokenizers: dict[str, Tokenizer] = {}  # of those that have one of their own
        self._kept: dict[str, Adapter] = {}
        self._use: dict[str, float] = {}
        self._mixtures: dict[tuple[tuple[str, float], ...], str] = {}

    def __getitem__(self, name: str) -> Adapter:
        self._known(name)
        return self._kept[name]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._kept

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._kept))

    def __len__(self) -> int:
        return len(self._kept)

    def __repr__(self) -> str:
        def shown(name: str) -> str:
            if name not in self._use:
                return name
            weight = self._use[name]
            return f"{name} (in use)" if weight == 1 else f"{name} (in use, weight {weight:g})"

        return f"Adapters({', '.join(map(shown, self._kept)) or 'none'})"

    def add(
        self,
        name: str,
        adapter: Adapter | str | os.PathLike[str],
        *,
        replace: bool = False,
        tokenizer: Tokenizer | None = None,
    ) -> Adapter:
        """Adds an adapter under a name, and returns it; which one is in use does not change.

        `adapter` is an Adapter, a PEFT directory, the folder of a training run, or the id of an
        adapter in the Hugging Face Hub's cache. `tokenizer` is what it was trained with, and is
        used where it answers alone; default: the one in its folder, else the model's. Raises
        ConfigError for a name that is taken (unless
        `replace`), PlanError where it does not fit the model, and what `Adapter.load` raises.
        """
        expect("name", name, "adapters.add(name, adapter)")
        if name in self._kept and not replace:
            raise ConfigError(
                f"there is an adapter {name!r} already; remove it, or add with replace=True"
            )
        if isinstance(adapter, (str, os.PathLike)):
            adapter, own = self._read(adapter)
            tokenizer = own if tokenizer is None else tokenizer
        expect("whole adapter", adapter, "adapters.add(name, adapter)")
        self.pool.add(name, adapter, replace=replace)
        self._kept[name] = adapter
        self.tokenizers.pop(name, None)
        if tokenizer is not None:
            self.tokenizers[name] = tokenizer
        self._forget_mixtures(name)
        return adapter

    def add_weighted(
        self, name: str, weights: Mapping[str, float], method: str = "cat", **settings: Any
    ) -> Adapter:
        """Adds a combination of adapters that are there as one more, and returns it: PEFT's
        add_weighted_adapter. "cat" is the exact weighted sum; the other methods and their settings
        (`density`, `rank`, `majority_sign`, `seed`) are those of `pylora.adapters.combine`."""
        chosen = self._weights(weights)
        if not chosen:
            raise ConfigError("give at least one name and weight, such as {'legal': 0.5}")
        items = [(self._kept[n], w) for n, w in chosen.items()]
        return self.add(name, combine(items, method, **settings).adapter)

    def remove(self, name: str) -> None:
        """Forgets an adapter. If it is in use, the others that are stay in use."""
        self._known(name)
        self._forget_mixtures(name)
        self.pool.remove(name)
        del self._kept[name]
        self.tokenizers.pop(name, None)
        self._use.pop(name, None)

    def use(self, *names: Choice) -> None:
        """Says which adapters answer from now on: use("legal"); use("legal", "verse"), the sum of
        both; use({"legal": 0.7, "verse": 0.3}), weighted; use(None), the base model alone.

        Raises ConfigError for a name that is not there, and for no name at all.
        """
        if not names:
            raise ConfigError("name the adapter to use, or None for the base model: use(None)")
        one: Any = names[0] if len(names) == 1 else names
        chosen = self._weights(one)
        self.named(chosen)  # packs a sum now, so that what cannot be summed is refused here
        self._use = chosen

    @property
    def active(self) -> tuple[str, ...]:
        """The names in use; none: the base model."""
        return tuple(self._use)

    @property
    def weights(self) -> dict[str, float]:
        """The names in use, and how much each counts; 1 is as it was trained. May be assigned."""
        return dict(self._use)

    @weights.setter
    def weights(self, weights: Mapping[str, float]) -> None:
        if not isinstance(weights, Mapping):
            raise WrongTypeError(
                f"adapters.weights takes a mapping such as {{'legal': 0.5}}, got "
                f"{describe(weights)}"
            )
        self.use(weights)

    # ---- for Model ----------------------------------------------------------------------------

    def named(self, choice: Choice | Active = ACTIVE) -> str | None:
        """The name in the pool of what `choice` means; None: the base model."""
        chosen = self._use if isinstance(choice, Active) else self._weights(choice)
        if not chosen:
            return None
        if list(chosen.values()) == [1.0]:
            return next(iter(chosen))
        key = tuple(chosen.items())
        if key not in self._mixtures:
            while len(self._mixtures) >= _MIXTURES:
                self.pool.remove(self._mixtures.pop(next(iter(self._mixtures))))
            name = "\0" + repr(key)  # no name that somebody gives
            mixture = Adapter.stack([(self._kept[n], w) for n, w in key])
            self.pool.add(name, mixture)
            self._mixtures[key] = name
        return self._mixtures[key]

    def tokenizer(self, choice: Choice | Active = ACTIVE) -> Tokenizer | None:
        """The tokenizer that `choice` brings; None: the model's, also of several adapters."""
        chosen = self._use if isinstance(choice, Active) else self._weights(choice)
        return self.tokenizers.get(next(iter(chosen))) if len(chosen) == 1 else None

    def adapter(self, choice: Choice | Active = ACTIVE) -> Adapter | None:
        """What `choice` means as one Adapter; None: the base model."""
        chosen = self._use if isinstance(choice, Active) else self._weights(choice)
        if not chosen:
            return None
        if list(chosen.values()) == [1.0]:
            return self._kept[next(iter(chosen))]
        return Adapter.stack([(self._kept[n], w) for n, w in chosen.items()])

    def refresh(self, name: str) -> None:
        """Takes in what training has written to an adapter's arrays."""
        self.pool.add(name, self._kept[name], replace=True)
        self._forget_mixtures(name)

    def _forget_mixtures(self, name: str) -> None:
        for key in [k for k in self._mixtures if any(n == name for n, _ in k)]:
            self.pool.remove(self._mixtures.pop(key))

    def _weights(self, choice: Any) -> dict[str, float]:
        """Names and weights of a choice, checked."""
        if choice is None:
            return {}
        if isinstance(choice, Mapping) and not isinstance(choice, Adapter):
            found: dict[str, Any] = dict(choice)
        elif isinstance(choice, str):
            found = {choice: 1.0}
        elif isinstance(choice, (list, tuple)):
            found = dict.fromkeys(choice, 1.0) if all(isinstance(n, str) for n in choice) else {}
            if len(found) != len(choice):
                raise ConfigError(f"name each adapter once, and by its name; got {list(choice)!r}")
        else:
            advice = ""
            if isinstance(choice, (Adapter, os.PathLike)):
                advice = "; add it first: adapters.add(name, adapter)"
            raise WrongTypeError(
                "an adapter is chosen by its name, by a mapping from names to weights, or by None "
                f"for the base model, not by {describe(choice)}{advice}"
            )
        for name, weight in found.items():
            self._known(name)
            number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
            if not number or not math.isfinite(weight):
                raise ConfigError(
                    f"the weight of {name!r} is {weight!r:.60}; it must be a finite number"
                )
        return {name: float(weight) for name, weight in found.items()}

    def _known(self, name: Any) -> None:
        expect("name", name, "adapters")
        if name not in self._kept:
            there = f"known: {', '.join(self._kept)}" if self._kept else "none has been added"
            path = (
                "; a path is added first: adapters.add(name, path)" if os.path.exists(name) else ""
            )
            raise ConfigError(f"there is no adapter {name!r}; {there}{path}")


def read_adapter(
    checkpoint: Checkpoint, path: str | os.PathLike[str]
) -> tuple[Adapter, Tokenizer | None]:
    """The adapter in a PEFT directory for this model, and the tokenizer that lies beside it, if
    that is another than the model's (pylora.adapters.own_tokenizer); its `notes` then say so."""
    folder = find_adapter(path)
    adapter = Adapter.load(folder, checkpoint.config, base=checkpoint.load)
    tokenizer, note = tokenizer_for(checkpoint, folder) if has_own(folder) else (None, None)
    if tokenizer is None or note is None:
        return adapter, None
    tokenizer.notes += (note,)
    return adapter, tokenizer
