"""A folder whose subfolders are adapters: what appears there is loaded, what changes is replaced,
what goes is unloaded.

A thread looks every few seconds at names, sizes and times of files, and reads what is new. What
cannot be taken (half written, damaged, for another model) is said in `errors` and looked at again
when its files change; until then an older content of that name stays. Nothing in the folder is
written.
"""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

from pylora.adapters.locate import CONFIG
from pylora.errors import ConfigError, FileFormatError, PyloraError, expect
from pylora.serving.adapters import Registry

_log = logging.getLogger(__name__)
_SHOWN = 1000  # errors that are kept

Signature = tuple[tuple[str, int, int, int], ...]


class Watch:
    """Keeps a registry as a folder is, until `close`."""

    def __init__(
        self, registry: Registry, folder: str | os.PathLike[str], interval: float = 2.0
    ) -> None:
        """Looks once before it returns, then every `interval` seconds. FileFormatError where there
        is no such folder."""
        expect("path", folder, "Watch(registry, folder)")
        self.registry, self.folder = registry, Path(folder)
        if not self.folder.is_dir():
            raise FileFormatError(f"{self.folder} is no folder; adapters are its subfolders")
        if not interval > 0:
            raise ConfigError(f"the interval must be above 0 seconds, got {interval!r}")
        self.errors: dict[str, str] = {}  # subfolder -> sentence
        self._seen: dict[str, Signature] = {}
        self._ours: set[str] = set()
        self._interval = interval
        self._stop = threading.Event()
        self.look()
        self._thread = threading.Thread(target=self._loop, name="pylora-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Looks no more; what is loaded stays. Closing twice is fine."""
        self._stop.set()
        self._thread.join()

    def _loop(self) -> None:
        while not self._stop.wait(self._interval):
            try:
                self.look()
            except Exception:  # the next look may go better
                _log.exception("looking at %s failed", self.folder)

    def look(self) -> None:
        """Takes in what has changed since the last look."""
        there = self._signatures()
        if there is None:
            return
        for name in [name for name in self._seen if name not in there]:
            del self._seen[name]
            self.errors.pop(name, None)
            if name in self._ours:
                self._ours.discard(name)
                if name in self.registry:
                    self.registry.unload(name)
                _log.info("adapter %s has gone from %s", name, self.folder)
        for name, signature in sorted(there.items()):
            if self._seen.get(name) != signature and not self._stop.is_set():
                self._take(name)
                self._seen[name] = signature

    def _take(self, name: str) -> None:
        try:
            if name in self.registry and name not in self._ours:
                raise ConfigError(
                    f"there is an adapter {name!r} that did not come from {self.folder}; "
                    "unload it, or rename the folder"
                )
            self.registry.load(
                name, self.folder / name, replace=name in self._ours, watched=True,
                pinned=name in self.registry and self.registry.get(name).pinned,
            )  # fmt: skip
        except (PyloraError, OSError) as error:
            if len(self.errors) < _SHOWN or name in self.errors:
                self.errors[name] = str(error)
            _log.warning("adapter %s was not taken: %s", name, error)
        else:
            self._ours.add(name)
            self.errors.pop(name, None)
            _log.info("adapter %s was loaded from %s", name, self.folder)

    def _signatures(self) -> dict[str, Signature] | None:
        """Of each subfolder with an adapter; None where the folder cannot be read just now."""
        found: dict[str, Signature] = {}
        try:
            with os.scandir(self.folder) as entries:
                folders = [e.name for e in entries if not e.name.startswith(".") and e.is_dir()]
        except OSError as error:
            _log.warning("%s cannot be read: %s", self.folder, error)
            return None
        for name in folders:
            try:
                with os.scandir(self.folder / name) as entries:
                    files = [(e.name, e.stat()) for e in entries if e.is_file()]
            except OSError:
                continue  # it goes away just now
            if any(file == CONFIG for file, _ in files):
                found[name] = tuple(
                    (file, s.st_size, s.st_mtime_ns, s.st_ino) for file, s in sorted(files)
                )
        return found
