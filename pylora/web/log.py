"""One line for each request, as JSON or as text; never what was said, nor a key.

Lines go to the logger "pylora.http"; `configure` sends it, and uvicorn's, to standard error.
"""

from __future__ import annotations

import json
import logging
import secrets
import sys
import time
from dataclasses import dataclass, field
from typing import Any

logger = logging.getLogger("pylora.http")
_LONGEST = 500  # characters of an error


@dataclass
class Note:
    """What is remembered of a request for its line."""

    method: str
    path: str
    client: str = ""
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    key: str = ""
    adapter: str = ""
    status: int = 0
    prompt: int = 0
    completion: int = 0
    queued: float = 0.0
    first: float = 0.0
    error: str = ""
    began: float = field(default_factory=time.monotonic)

    def fields(self) -> dict[str, Any]:
        """What is not empty, times in milliseconds."""
        said = {
            "id": self.id, "client": self.client, "method": self.method, "path": self.path,
            "status": self.status, "key": self.key, "adapter": self.adapter,
            "prompt_tokens": self.prompt, "completion_tokens": self.completion,
            "queued_ms": round(1000 * self.queued, 1), "first_ms": round(1000 * self.first, 1),
            "ms": round(1000 * (time.monotonic() - self.began), 1), "error": self.error[:_LONGEST],
        }  # fmt: skip
        return {name: value for name, value in said.items() if value not in ("", 0, 0.0)}


def answered(note: Note) -> None:
    """Writes the line."""
    level = logging.ERROR if note.status >= 500 else logging.INFO
    if logger.isEnabledFor(level):
        logger.log(level, "request", extra={"fields": note.fields()})


def failure(note: Note, error: BaseException) -> None:
    """A fault of the server's own, with its traceback."""
    logger.error("request %s failed", note.id, exc_info=error)


class Lines(logging.Formatter):
    """One line a record: JSON objects, or words."""

    def __init__(self, as_json: bool) -> None:
        super().__init__()
        self._json = as_json

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        fields: dict[str, Any] = getattr(record, "fields", {})
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        when += f".{int(record.msecs):03}Z"
        trace = self.formatException(record.exc_info) if record.exc_info else ""
        if self._json:
            said = {"time": when, "level": record.levelname.lower(), "event": record.getMessage()}
            return json.dumps(said | fields | ({"trace": trace} if trace else {}), default=str)
        words = " ".join(f"{k}={_word(v)}" for k, v in fields.items())
        line = f"{when} {record.levelname.lower():7} {record.getMessage()} {words}".rstrip()
        return f"{line}\n{trace}" if trace else line


def _word(value: Any) -> str:
    """A value without the blanks and line breaks that would begin another."""
    text = str(value)
    return text if text.isprintable() and " " not in text and text else json.dumps(text)


def configure(level: str = "info", form: str = "text") -> None:
    """Sends the lines of pylora and uvicorn to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Lines(form == "json"))
    for name in ("pylora", "uvicorn", "uvicorn.error"):
        one = logging.getLogger(name)
        one.handlers[:] = [handler] if name != "uvicorn.error" else []
        one.propagate = name == "uvicorn.error"
        # uvicorn says that it begins and ends; so does pylora, in its own words.
        one.setLevel(level.upper() if name == "pylora" or level == "debug" else "WARNING")
