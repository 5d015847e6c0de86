"""A small client for HTTP and JSON: every failure is an exception with a sentence, none is a hang.

Only what a test needs: one request a connection, a time limit for each step, a limit of size. It
follows no redirects and knows no proxies.
"""

from __future__ import annotations

import http.client
import json
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from pylora.errors import ConfigError, PyloraError

_LARGEST = 64 << 20  # bytes of an answer


class EngineError(PyloraError, RuntimeError):
    """The engine is gone, answers nothing in time, or answers what nobody can read."""


class Refusal(EngineError):
    """The engine refused what it was asked, and says so."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"HTTP {status}: {text}" if status else text)
        self.status = status


@dataclass(frozen=True)
class Http:
    """An engine's address. `root` is without the /v1 at its end."""

    scheme: str
    host: str
    port: int
    prefix: str
    key: str | None = None
    timeout: float = 60.0

    @classmethod
    def of(cls, url: str, key: str | None = None, timeout: float = 60.0) -> Http:
        """From an address like http://127.0.0.1:8000/v1. ConfigError for one that is none."""
        try:
            parts = urlsplit(url)
            port = parts.port or {"http": 80, "https": 443}[parts.scheme]
        except (ValueError, KeyError):
            raise ConfigError(f"{url!r} is no address like http://127.0.0.1:8000/v1") from None
        if not parts.hostname or parts.query or parts.fragment:
            raise ConfigError(f"{url!r} is no address like http://127.0.0.1:8000/v1")
        prefix = parts.path.rstrip("/").removesuffix("/v1")
        return cls(parts.scheme, parts.hostname, port, prefix, key, timeout)

    def __str__(self) -> str:
        return f"{self.scheme}://{self.host}:{self.port}{self.prefix}"

    def get(self, path: str) -> Any:
        """The JSON at a path."""
        return self._request("GET", path, None)

    def post(self, path: str, body: Any) -> Any:
        """The JSON that the engine answers to a JSON body."""
        return self._request("POST", path, body)

    def _request(self, method: str, path: str, body: Any) -> Any:
        what = f"{method} {self}{path}"
        headers = {"Accept": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        data = None
        if body is not None:
            data = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
        kind = http.client.HTTPSConnection if self.scheme == "https" else http.client.HTTPConnection
        link = kind(self.host, self.port, timeout=self.timeout)
        try:
            link.request(method, self.prefix + path, data, headers)
            response = link.getresponse()
            raw = response.read(_LARGEST + 1)
        except TimeoutError:
            raise EngineError(f"{what}: no answer within {self.timeout:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            raise EngineError(f"{what}: {_said(error)}") from None
        finally:
            link.close()
        if len(raw) > _LARGEST:
            raise EngineError(f"{what}: the answer is larger than {_LARGEST >> 20} MiB")
        text = raw.decode("utf-8", errors="replace")
        if response.status >= 400:
            raise Refusal(response.status, _message(text))
        if response.status >= 300:
            raise EngineError(f"{what}: redirected to {response.headers.get('Location')}")
        try:
            return json.loads(text) if text.strip() else {}
        except (ValueError, RecursionError):
            # vLLM answers the loading of adapters with a sentence, not with JSON.
            return {"text": text[:500]}


def _said(error: BaseException) -> str:
    if isinstance(error, ConnectionRefusedError):
        return "nothing listens there"
    return str(error) or type(error).__name__


def _message(text: str) -> str:
    """The sentence in an error's body, whichever of the usual forms it has."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return " ".join(text.split())[:300]
    for key in ("error", "detail", "message"):
        if isinstance(found, dict) and found.get(key):
            found = found[key]
    return " ".join((found if isinstance(found, str) else json.dumps(found)).split())[:300]
