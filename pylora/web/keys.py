"""Who may ask: API keys, some of them for some adapters only.

    --api-key KEY           may do everything (or the variable PYLORA_API_KEY)
    --api-keys FILE         a JSON list: [{"name": "ann", "key": "...", "adapters": ["legal"]}]

A key of the file may be given as the SHA-256 of itself ("sha256"), so that the file is no secret.
`adapters` are the names it may use (all, if left out; [] is the base alone), `manage` whether it
may load, unload and weight adapters for everybody. A key is compared by its digest, with every
known one, in a time that does not depend on either.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pylora.errors import ConfigError
from pylora.files.bounded import read_text
from pylora.web.fields import Record, flag, list_of, text
from pylora.web.problem import Problem

_MOST = 16 << 20  # bytes of the file
_SHORT = 8  # characters; a shorter key is guessed
_ENTRY = Record(
    "a key",
    {
        "name": text(least=1, most=100),
        "key": text(least=_SHORT, most=1000),
        "sha256": text(least=64, most=64),
        "adapters": list_of(text(least=1, most=512), most=100000),
        "manage": flag(),
    },
    needs=("name",),
)


@dataclass(frozen=True)
class Key:
    """Whose request it is. adapters: the names that may be used, None: all."""

    name: str
    adapters: frozenset[str] | None = None
    manage: bool = True

    def may(self, adapter: str) -> bool:
        """Whether it may use the adapter of this name."""
        return self.adapters is None or adapter in self.adapters

    def must_manage(self) -> None:
        """Problem (403) unless it may change what others are served with."""
        if not self.manage:
            raise Problem(
                403,
                "this API key may use adapters, but not load, unload or weight them for everybody; "
                'a key with "manage": true may',
                code="not_allowed",
                kind="permission_error",
            )


OPEN = Key("")  # everybody, where there are no keys


class Keys:
    """All keys of a server; none: everybody may do everything."""

    def __init__(self, known: Iterable[tuple[bytes, Key]] = ()) -> None:
        """(SHA-256 of the key, who it is)."""
        self._known = tuple(known)

    def __bool__(self) -> bool:
        return bool(self._known)

    @classmethod
    def of(cls, whole: Sequence[str] = (), file: str | os.PathLike[str] | None = None) -> Keys:
        """Of keys that may do everything, and of a file. ConfigError for a short or double key;
        FileFormatError, OSError for a file that cannot be read."""
        known: list[tuple[bytes, Key]] = []
        for i, key in enumerate(whole):
            if len(key) < _SHORT:
                raise ConfigError(
                    f"an API key has at least {_SHORT} characters, this one {len(key)}; make one: "
                    "python -c 'import secrets; print(secrets.token_urlsafe(32))'"
                )
            known.append((_digest(key), Key("key" if i == 0 else f"key {i + 1}")))
        if file is not None:
            known += _read(Path(file))
        digests = [digest for digest, _ in known]
        if len(set(digests)) < len(digests):
            raise ConfigError("two API keys are the same; each must be one person's alone")
        names = [key.name for _, key in known]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"two API keys have the name {name!r}; give each its own")
        return cls(known)

    def who(self, authorization: str | None, other: str | None = None) -> Key:
        """Whose the header `Authorization: Bearer KEY` (or X-API-Key) is. Problem (401) for none,
        and for one that is not known."""
        if not self._known:
            return OPEN
        scheme, _, given = (authorization or "").partition(" ")
        given = given.strip() if scheme.lower() == "bearer" else (other or "")
        digest, found = _digest(given), None
        for known, key in self._known:  # all of them, so that the time says nothing
            if hmac.compare_digest(known, digest):
                found = key
        if found is None:
            raise Problem(
                401,
                "this API key is not known here"
                if given
                else "an API key is needed: Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return found


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _read(path: Path) -> list[tuple[bytes, Key]]:
    try:
        listed: Any = json.loads(read_text(path, limit=_MOST))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: this is no JSON ({str(error)[:100]})") from None
    if not isinstance(listed, list) or not listed:
        raise ConfigError(f'{path} must be a list of keys: [{{"name": "ann", "key": "..."}}]')
    found = []
    for i, entry in enumerate(listed):
        try:
            said = _ENTRY(entry, f"[{i}]")
        except Problem as problem:
            raise ConfigError(f"{path}: {problem}") from None
        if ("key" in said) == ("sha256" in said):
            raise ConfigError(f"{path}: [{i}] needs either a key or its sha256")
        if "sha256" in said and not re.fullmatch("[0-9a-fA-F]{64}", said["sha256"]):
            raise ConfigError(f"{path}: [{i}].sha256 must be 64 hexadecimal digits")
        digest = _digest(said["key"]) if "key" in said else bytes.fromhex(said["sha256"])
        adapters = None if "adapters" not in said else frozenset(said["adapters"])
        found.append((digest, Key(said["name"], adapters, said.get("manage", False))))
    return found
