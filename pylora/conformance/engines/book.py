"""Reads a suite: its manifest, and the answers of each adapter as they are needed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from pylora.conformance.engines.ask import Names, Prompt
from pylora.conformance.suite.tolerance import Sensitivity
from pylora.conformance.suite.write import FORMAT, MANIFEST, VERSION
from pylora.errors import ConfigError, FileFormatError


class Book:
    """A suite's folder. ConfigError where it is none, FileFormatError where it is damaged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        if not (folder / MANIFEST).is_file():
            raise ConfigError(
                f"{folder} has no {MANIFEST}; write a suite: pylora suite --out {folder}"
            )
        found = self._json(MANIFEST)
        if found.get("format") != FORMAT or found.get("version") != VERSION:
            raise FileFormatError(f"{folder / MANIFEST} is no suite of version {VERSION}")
        self.manifest = found

    def _json(self, name: str) -> Any:
        try:
            return json.loads((self.folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise FileFormatError(f"{self.folder / name}: {error}") from None

    @cached_property
    def prompts(self) -> tuple[Prompt, ...]:
        """What is asked."""
        return tuple(Prompt(p["text"], tuple(p["ids"])) for p in self.manifest["prompts"])

    @cached_property
    def names(self) -> Names:
        """The tokens' texts."""
        return Names(self.manifest["tokens"])

    def bases(self, wanted: Sequence[str] = ()) -> Iterator[Any]:
        """The entries of the bases with these names, or of all. ConfigError for an unknown one."""
        known = {b["name"]: b for b in self.manifest["bases"]}
        for name in wanted or known:
            if name not in known:
                raise ConfigError(f"the suite has no base {name!r}; it has {', '.join(known)}")
            yield known[name]

    def answers(self, case: Any) -> Any:
        """{"right": answer, "wrong": {rule: answer}} of an adapter."""
        return self._json(case["answers"])

    def path(self, relative: str) -> str:
        """A file or folder of the suite, absolute."""
        return str(self.folder / relative)

    @staticmethod
    def tolerance(entry: Any, precision: str) -> float:
        """What is allowed for a base or an adapter."""
        return Sensitivity(*entry["sensitivity"]).tolerance(precision)
