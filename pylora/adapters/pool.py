"""Many adapters of one model, resident and ready: added once, then named by each prompt.

    pool = AdapterPool(model)
    pool.add("legal", legal)
    pool.add("verse", verse)
    generate(model, prompts, 64, pool=pool, adapters=["legal", None, "verse"])

An adapter is checked and packed when it is added; from then on choosing it is a look-up, however
many there are. The base weights exist once. What a prompt yields does not depend on which other
adapters are in the pool or in the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pylora.errors import ConfigError, PyloraError, expect
from pylora.model.decoder import pack_adapter
from pylora.types import LoRA

if TYPE_CHECKING:
    from pylora.model.llama import Llama


class AdapterPool:
    """Named adapters, packed for one model. Threads may share it."""

    def __init__(self, model: Llama) -> None:
        expect("model", model, "AdapterPool(model)")
        self.model = model
        self._packed: dict[str, Any] | None = {}
        self._active: str | None = None

    def __repr__(self) -> str:
        if self._packed is None:
            return "AdapterPool(closed)"
        names = ", ".join(map(repr, list(self._packed)[:5]))
        more = f" and {len(self._packed) - 5} more" if len(self._packed) > 5 else ""
        return f"AdapterPool({names or 'empty'}{more}; active: {self._active!r})"

    # ---- members ------------------------------------------------------------------------------

    def _members(self) -> dict[str, Any]:
        if self._packed is None:
            raise PyloraError("this pool of adapters is closed; make a new one")
        return self._packed

    def add(self, name: str, adapter: Mapping[str, LoRA], *, replace: bool = False) -> None:
        """Packs an adapter under a name. Ranks and modules may differ from the others'.

        It is a copy: training that changes the arrays later is seen after adding it again with
        `replace`. Generations that run keep what they began with. Raises ConfigError for a name
        that is taken or no text, PlanError or DtypeError where the adapter does not fit the model.
        """
        members = self._members()
        if not isinstance(name, str) or not name:
            raise ConfigError(
                f"the name of an adapter must be a text of at least one letter, got {name!r}"
            )
        if name in members and not replace:
            raise ConfigError(
                f"the pool has an adapter {name!r} already; remove it, or add with replace=True"
            )
        expect("adapter", adapter, "pool.add(name, adapter)")
        self.model.check(adapter)
        members[name] = pack_adapter(self.model, adapter)

    def remove(self, name: str) -> None:
        """Forgets an adapter; its memory goes when the last generation that uses it ends."""
        self.packed(name)
        self._members().pop(name, None)
        if self._active == name:
            self._active = None

    def close(self) -> None:
        """Forgets all adapters. The pool cannot be used after that; closing twice is fine."""
        self._packed, self._active = None, None

    def __enter__(self) -> AdapterPool:
        self._members()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # ---- what is in it ------------------------------------------------------------------------

    def __contains__(self, name: object) -> bool:
        return name in self._members()

    def __len__(self) -> int:
        return len(self._members())

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._members()))

    @property
    def names(self) -> tuple[str, ...]:
        """The names, in the order in which they were added."""
        return tuple(self._members())

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the packed adapters take."""
        return sum(p.nbytes for p in list(self._members().values()))

    # ---- choosing -----------------------------------------------------------------------------

    @property
    def active(self) -> str | None:
        """The adapter of prompts that name none of their own; None: the base model."""
        self._members()
        return self._active

    def use(self, name: str | None) -> None:
        """Makes an adapter, or None for the base, the one of prompts that name none.

        Nothing is copied or computed. Raises ConfigError for a name that the pool does not have.
        """
        if name is None:
            self._members()
        else:
            self.packed(name)
        self._active = name

    def packed(self, name: str | None) -> Any:
        """The adapter as the backend takes it; None for None. ConfigError for an unknown name."""
        members = self._members()
        if name is None:
            return None
        try:
            return members[name]
        except (KeyError, TypeError):
            some = ", ".join(list(members)[:5]) or "none"
            raise ConfigError(
                f"the pool has no adapter {name!r}; it has {some}"
                f"{f' and {len(members) - 5} more' if len(members) > 5 else ''}"
            ) from None
