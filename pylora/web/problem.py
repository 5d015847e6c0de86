"""What a client is told when a request cannot be answered: a status, and OpenAI's error object.

The sentence says what was wrong and what to do. Nothing of this process (paths, traces) is in it
beyond what the client itself sent or is allowed to see.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pylora.errors import BackendError, PyloraError

INVALID = "invalid_request_error"


class Problem(PyloraError):
    """Ends a request with a status and OpenAI's error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str = INVALID,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """`param`: the field that is wrong; `code`: OpenAI's short name of what happened."""
        super().__init__(message)
        self.status, self.param, self.code, self.kind = status, param, code, kind
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """{"error": {"message", "type", "param", "code"}}."""
        said = {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}
        return {"error": said}


def malformed(message: str, param: str | None = None) -> Problem:
    """400: a field is missing, of another type or out of range."""
    return Problem(400, message, param=param)


def unknown_model(name: str, there: list[str]) -> Problem:
    """404, as OpenAI answers for a model that does not exist or that the key must not use."""
    listed = ", ".join(there[:5]) + (f" and {len(there) - 5} more" if len(there) > 5 else "")
    return Problem(
        404,
        f"there is no model {name[:200]!r} here for you; there are {listed or 'none'} "
        "(GET /v1/models lists them)",
        param="model",
        code="model_not_found",
    )


def busy(message: str, after: float) -> Problem:
    """429 with Retry-After, in whole seconds from 1 on."""
    seconds = max(1, -int(-after // 1))
    return Problem(
        429,
        message,
        code="rate_limit_exceeded",
        kind="rate_limit_error",
        headers={"Retry-After": str(seconds)},
    )


def closing() -> Problem:
    """503: the server is ending; whoever balances load sends the request to another."""
    return Problem(
        503,
        "the server is shutting down; send the request again, to another server if there is one",
        code="shutting_down",
        kind="server_error",
        headers={"Retry-After": "1", "Connection": "close"},
    )


def of(error: Exception) -> Problem:
    """Any error as a Problem: what pylora says of bad input is a 400, the rest is ours."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, PyloraError) and not isinstance(error, BackendError):
        return malformed(str(error))
    if isinstance(error, MemoryError):
        return Problem(
            503,
            "there is not enough memory for this request",
            code="no_memory",
            kind="server_error",
        )
    return Problem(
        500,
        "the server failed on this request; its log says how",
        code="internal_error",
        kind="server_error",
    )
