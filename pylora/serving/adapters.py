"""The adapters that requests name: loaded and unloaded at run time, mixed by weight, kept within
limits.

A name stands for a PEFT directory, or for an adapter of the program's own. What runs is an adapter
packed for the model, and that is known by its content, not by its name: replacing a name's content
changes what later requests get, and those that run keep what they began with. Packed adapters that
nobody uses go when there is no room, the one used longest ago first; asked for again, they are read
again from their directory. The base weights are never touched.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pylora.adapters.adapter import Adapter
from pylora.adapters.locate import find_adapter
from pylora.errors import ConfigError, expect
from pylora.generation.sampling import whole_number
from pylora.model.decoder import pack_adapter
from pylora.model.llama import Llama
from pylora.serving.request import AdaptersFull, UnknownAdapter

Read = Callable[[Path], Adapter]
BASE = "base"  # the content of no adapter at all
_RETRY = 1.0  # seconds: what is in use is in use for an answer, not for long


@dataclass(frozen=True)
class AdapterInfo:
    """What is known of a name."""

    name: str
    directory: Path | None  # None: given by the program itself
    digest: str  # of A, B, scales and names (`Adapter.digest`)
    rank: int  # the largest of its modules
    nbytes: int  # of memory, packed; 0 where it is not resident
    resident: bool  # packed and ready
    pinned: bool
    requests: int  # that have named it so far
    watched: bool  # it came with the watched folder


@dataclass(eq=False)
class _Named:
    """A name and what it stands for now."""

    name: str
    directory: Path | None
    source: Adapter | None  # of those without a directory
    digest: str
    rank: int
    pinned: bool
    watched: bool
    requests: int = 0


@dataclass(eq=False)
class _Pack:
    """A packed adapter, or a packed sum of several."""

    key: str
    packed: Any
    members: tuple[str, ...]  # digests
    nbytes: int
    number: int
    leases: int = 0
    used: float = field(default_factory=time.monotonic)


class Lease:
    """The adapters of one request, which stay as they are until it gives them back."""

    def __init__(
        self, registry: Registry | None, pack: _Pack | None, names: tuple[str, ...]
    ) -> None:
        self._registry, self._pack, self.names = registry, pack, names
        self.packed: Any = None if pack is None else pack.packed
        self.key: str = BASE if pack is None else pack.key  # equal for equal content
        self.number: int = 0 if pack is None else pack.number  # rows of one number lie together

    def release(self) -> None:
        """Gives them back; a second time does nothing."""
        pack, self._pack = self._pack, None
        if pack is not None and self._registry is not None:
            self._registry._give_back(pack)


class Registry:
    """Adapters of one model by name. Threads may share it; who reads files waits alone."""

    def __init__(
        self,
        model: Llama,
        *,
        most: int | None = None,
        most_bytes: int | None = None,
        read: Read | None = None,
        base: Callable[[str], Any] | None = None,
    ) -> None:
        """`most` adapters, sums included, are resident at a time, and `most_bytes` bytes of them
        packed; None: no limit. `read` gives the adapter in a directory; default: PEFT's, where
        `base` (`Checkpoint.load`) is needed for those that carry copies of base weights."""
        expect("model", model, "Registry(model)")
        for name, limit in (("most", most), ("most_bytes", most_bytes)):
            if limit is not None:
                whole_number(name, limit, 1)
        self.model, self.most, self.most_bytes = model, most, most_bytes
        self._read = read or self._read_peft
        self._base = base
        self._lock = threading.Lock()  # of what follows; held for look-ups alone
        self._names: dict[str, _Named] = {}
        self._packs: dict[str, _Pack] = {}
        self._numbers = 0
        self._loading = threading.RLock()  # one reads and packs at a time; taken before _lock

    def __repr__(self) -> str:
        with self._lock:
            return f"Registry({len(self._names)} adapters, {len(self._packs)} resident)"

    def _read_peft(self, directory: Path) -> Adapter:
        return Adapter.load(directory, self.model.config, base=self._base)

    # ---- names --------------------------------------------------------------------------------

    def load(
        self,
        name: str,
        directory: str | os.PathLike[str],
        *,
        pinned: bool = False,
        replace: bool = False,
        watched: bool = False,
    ) -> AdapterInfo:
        """Reads a PEFT directory and gives it a name; whatever has that name is replaced at once,
        where `replace` says so. `pinned`: it is packed now and stays so.

        Raises what `Adapter.load` raises, PlanError where it does not fit the model, ConfigError
        for a name that is taken, AdaptersFull where it is to be pinned and there is no room.
        """
        self._check_name(name, replace)
        expect("path", directory, "Registry.load(name, directory)")
        folder = find_adapter(directory)
        return self._put(name, self._read(folder), folder, pinned, replace, watched)

    def add(
        self, name: str, adapter: Adapter, *, pinned: bool = False, replace: bool = False
    ) -> AdapterInfo:
        """The same for an adapter that is in memory. It must not be changed any more."""
        self._check_name(name, replace)
        expect("whole adapter", adapter, "Registry.add(name, adapter)")
        return self._put(name, adapter, None, pinned, replace, False)

    def unload(self, name: str) -> None:
        """Forgets a name. Requests that run with it end as they began. UnknownAdapter."""
        with self._lock:
            named = self._named(name)
            del self._names[name]
            self._sweep(named.digest)

    def pin(self, name: str, pinned: bool = True) -> AdapterInfo:
        """Says whether the adapter must stay resident. AdaptersFull where there is no room."""
        with self._loading:
            if pinned:
                self.resolve(((name, 1.0),), counted=False).release()
            with self._lock:
                named = self._named(name)
                named.pinned = bool(pinned)
                return self._info(named)

    def get(self, name: str) -> AdapterInfo:
        """What is known of a name. UnknownAdapter."""
        with self._lock:
            return self._info(self._named(name))

    def list(self) -> list[AdapterInfo]:
        """All of them, in the order in which they came."""
        with self._lock:
            return [self._info(named) for named in self._names.values()]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    @property
    def nbytes(self) -> int:
        """Bytes that all packed adapters take."""
        with self._lock:
            return sum(pack.nbytes for pack in self._packs.values())

    def _check_name(self, name: str, replace: bool) -> None:
        if not isinstance(name, str) or not name.strip() or not name.isprintable():
            raise ConfigError(
                f"the name of an adapter must be a text of visible letters, got {name!r:.100}"
            )
        if name in self._names and not replace:
            raise ConfigError(
                f"there is an adapter {name!r} already; unload it, or load with replace=True"
            )

    def _put(
        self,
        name: str,
        adapter: Adapter,
        directory: Path | None,
        pinned: bool,
        replace: bool,
        watched: bool,
    ) -> AdapterInfo:
        self.model.check(adapter)
        digest = adapter.digest()
        rank = max((lora.rank for lora in adapter.values()), default=0)
        source = adapter if directory is None else None
        with self._loading:
            try:
                self._pack(digest, (digest,), adapter)
            except AdaptersFull:
                if pinned:
                    raise  # else it is packed when somebody asks for it
            with self._lock:
                old = self._names.get(name)
                if old is not None and not replace:  # another thread was quicker
                    self._check_name(name, replace)
                requests = 0 if old is None else old.requests
                named = _Named(name, directory, source, digest, rank, pinned, watched, requests)
                self._names[name] = named
                if old is not None:
                    self._sweep(old.digest)
                return self._info(named)

    def _named(self, name: str) -> _Named:
        try:
            return self._names[name]
        except (KeyError, TypeError):
            some = ", ".join(list(self._names)[:5]) or "none"
            more = f" and {len(self._names) - 5} more" if len(self._names) > 5 else ""
            raise UnknownAdapter(f"there is no adapter {name!r}; there are: {some}{more}") from None

    def _info(self, named: _Named) -> AdapterInfo:
        pack = self._packs.get(named.digest)
        return AdapterInfo(
            named.name, named.directory, named.digest, named.rank,
            0 if pack is None else pack.nbytes, pack is not None,
            named.pinned, named.requests, named.watched,
        )  # fmt: skip

    # ---- for requests -------------------------------------------------------------------------

    def resolve(self, adapters: Sequence[tuple[str, float]], *, counted: bool = True) -> Lease:
        """What these names and weights are now, packed. One of weight 1 is itself; a weight of 0
        counts as if it were not named; others are summed (`Adapter.stack`, exactly, by rank).

        Reads the disk where an adapter is not resident. UnknownAdapter, AdaptersFull; and what
        reading raises, where a directory has gone or is damaged.
        """
        names = tuple(name for name, _ in adapters)
        with self._lock:
            for name in names:
                self._named(name).requests += counted
        wanted = [(name, float(weight)) for name, weight in adapters if weight != 0]
        if not wanted:
            return Lease(None, None, names)
        found = self._lease(wanted, names)
        if found is not None:
            return found
        with self._loading:
            found = self._lease(wanted, names)  # another thread may have packed it
            if found is not None:
                return found
            sources = [self._source(name) for name, _ in wanted]
            digests = tuple(digest for _, digest in sources)
            if _alone(wanted):
                adapter = sources[0][0]
            else:
                pairs = zip(sources, wanted, strict=True)
                adapter = Adapter.stack([(a, weight) for (a, _), (_, weight) in pairs])
            key = _key(digests, [weight for _, weight in wanted])
            pack = self._pack(key, digests, adapter)
            with self._lock:
                pack.leases += 1
                pack.used = time.monotonic()
            return Lease(self, pack, names)

    def is_ready(self, adapters: Sequence[tuple[str, float]]) -> bool:
        """Whether `resolve` would be a look-up. UnknownAdapter."""
        with self._lock:
            wanted = [(name, weight) for name, weight in adapters if weight != 0]
            digests = [self._named(name).digest for name, _ in wanted]
            key = _key(digests, [weight for _, weight in wanted])
            return not wanted or key in self._packs

    def _lease(self, wanted: Sequence[tuple[str, float]], names: tuple[str, ...]) -> Lease | None:
        with self._lock:
            digests = [self._named(name).digest for name, _ in wanted]
            pack = self._packs.get(_key(digests, [weight for _, weight in wanted]))
            if pack is None:
                return None
            pack.leases += 1
            pack.used = time.monotonic()
            return Lease(self, pack, names)

    def _source(self, name: str) -> tuple[Adapter, str]:
        """The adapter of a name, as it is on the disk now, and its digest."""
        with self._lock:
            named = self._named(name)
        if named.source is not None:
            return named.source, named.digest
        assert named.directory is not None
        adapter = self._read(named.directory)
        self.model.check(adapter)
        digest = adapter.digest()
        with self._lock:
            old, named.digest = named.digest, digest
            named.rank = max((lora.rank for lora in adapter.values()), default=0)
            if old != digest:
                self._sweep(old)
        return adapter, digest

    def _give_back(self, pack: _Pack) -> None:
        with self._lock:
            pack.leases -= 1
            pack.used = time.monotonic()
            if not pack.leases:
                self._sweep(*pack.members)

    # ---- memory -------------------------------------------------------------------------------

    def _pack(self, key: str, members: tuple[str, ...], adapter: Adapter) -> _Pack:
        """The packed adapter of this key, made where it is not there. Holds _loading."""
        with self._lock:
            pack = self._packs.get(key)
        if pack is not None:
            return pack
        packed = pack_adapter(self.model, adapter)
        with self._lock:
            self._make_room(int(packed.nbytes))
            self._numbers += 1
            pack = _Pack(key, packed, members, int(packed.nbytes), self._numbers)
            self._packs[key] = pack
        return pack

    def _make_room(self, nbytes: int) -> None:
        if self.most_bytes is not None and nbytes > self.most_bytes:
            raise ConfigError(
                f"the adapter takes {nbytes:,} bytes, and all adapters together may take "
                f"{self.most_bytes:,}; allow more (most_bytes)"
            )
        pinned = {named.digest for named in self._names.values() if named.pinned}
        while self._over(nbytes):
            free = [p for p in self._packs.values() if not p.leases and p.key not in pinned]
            if not free:
                raise AdaptersFull(
                    f"all {len(self._packs)} adapters that fit in memory are in use or pinned; "
                    "try again when an answer has ended, or allow more (most, most_bytes)",
                    _RETRY,
                )
            del self._packs[min(free, key=lambda p: p.used).key]

    def _over(self, nbytes: int) -> bool:
        if self.most is not None and len(self._packs) + 1 > self.most:
            return True
        total = sum(p.nbytes for p in self._packs.values()) + nbytes
        return self.most_bytes is not None and total > self.most_bytes

    def _sweep(self, *digests: str) -> None:
        """Drops what is packed of contents that no name stands for any more and nobody uses."""
        gone = set(digests) - {named.digest for named in self._names.values()}
        for pack in [p for p in self._packs.values() if gone.intersection(p.members)]:
            if not pack.leases:
                del self._packs[pack.key]


def _alone(wanted: Sequence[tuple[str, float]]) -> bool:
    return len(wanted) == 1 and wanted[0][1] == 1.0


def _key(digests: Iterable[str], weights: Sequence[float]) -> str:
    """The content of a sum, as a text: that of a single adapter of weight 1 is its digest."""
    pairs = [f"{d}*{w.hex()}" for d, w in zip(digests, map(float, weights), strict=True)]
    return pairs[0].partition("*")[0] if list(weights) == [1.0] else "+".join(pairs)
