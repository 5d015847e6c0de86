"""uvicorn, with an end that waits for the engine: the port, the signals, the last answers."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from pylora.errors import ConfigError
from pylora.web import log, wire
from pylora.web.house import House
from pylora.web.problem import Problem

_TLS = frozenset(
    "ssl_keyfile ssl_certfile ssl_keyfile_password ssl_version ssl_cert_reqs ssl_ca_certs "
    "ssl_ciphers".split()
)
_SPARE = 5.0  # seconds in which what was handed back is still written


def bound(host: str, port: int, backlog: int) -> socket.socket:
    """A socket that listens there. ConfigError where that cannot be."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listening = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"{host!r} is no address of this machine: {error}") from None
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(backlog)
        listening.setblocking(False)
    except OSError as error:
        listening.close()
        raise ConfigError(
            f"port {port} of {host} cannot be had: {error.strerror or error}; name another "
            "(--port), or 0 for any that is free"
        ) from None
    return listening


def settings(app: Any, tls: Mapping[str, Any]) -> uvicorn.Config:
    """uvicorn's settings. ConfigError for TLS settings that it does not have or cannot use."""
    for name in tls:
        if name not in _TLS:
            raise ConfigError(
                f"there is no TLS setting {name!r}; there are {', '.join(sorted(_TLS))}"
            )
    given = {name: value for name, value in tls.items() if value is not None}
    if ("ssl_keyfile" in given) and "ssl_certfile" not in given:
        raise ConfigError("a key of TLS needs its certificate (ssl_certfile)")
    config = uvicorn.Config(
        app,
        http=Wire,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        ws="none",
        proxy_headers=False,
        timeout_keep_alive=75,
        **given,
    )
    try:
        config.load()
    except (OSError, ValueError) as error:  # ssl's errors are OSErrors
        raise ConfigError(f"the certificate or key of TLS cannot be used: {error}") from None
    return config


_PHRASES = {400: b"Bad Request", 413: b"Content Too Large", 431: b"Request Header Fields Too Large"}


class Wire(AutoHTTPProtocol):  # type: ignore[valid-type, misc]
    """uvicorn's HTTP, with OpenAI's error object for bytes that are no request."""

    def send_400_response(self, msg: str) -> None:
        """The answer to such bytes, behind which nothing on this connection can be understood."""
        error = sys.exc_info()[1]
        hint = getattr(error, "error_status_hint", 400)
        status = hint if hint in _PHRASES else 400
        reason = str(error or "").partition(":")[0]  # behind it come the bytes themselves
        why = f" ({reason})" if reason else ""
        said = f"this is no request of HTTP/1.1 that can be read{why}; the connection is closed"
        if status == 431:
            said = "the line or the headers of this request are too long; the connection is closed"
        cycle = getattr(self, "cycle", None)
        if cycle is None or not cycle.response_started or cycle.response_complete:
            body = wire.dumped(Problem(status, said, code="bad_http").body())
            head = b"HTTP/1.1 %d %s\r\n" % (status, _PHRASES[status])
            head += b"content-type: application/json\r\nconnection: close\r\n"
            head += b"content-length: %d\r\n\r\n" % len(body)
            self.transport.write(head + body)
        self.transport.close()


class Http(uvicorn.Server):
    """Ends in this order: no new requests; the engine finishes within `grace` seconds and hands
    the rest back; the last answers are written; the connections are closed."""

    def __init__(self, config: uvicorn.Config, house: House, grace: float) -> None:
        super().__init__(config)
        self.house, self.grace = house, grace
        self.began = threading.Event()
        self.running = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listens."""
        await super().startup(sockets)
        self.running = True
        self.began.set()

    def end(self) -> None:
        """Asks it to end, from any thread."""
        self.house.ending = True
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal ends it gracefully, the second at once."""
        if self.should_exit:
            self.grace = 0.0
            self.force_exit = True
        self.end()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are handled here, and are no error when all has ended well."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        wanted = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in wanted}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """The end."""
        self.house.ending = True
        stats = self.house.engine.stats()
        log.logger.info(
            "ending",
            extra={
                "fields": {"running": stats.running, "queued": stats.queued, "grace": self.grace}
            },
        )
        self.config.timeout_graceful_shutdown = int(self.grace + _SPARE)
        loop = asyncio.get_running_loop()
        closing = loop.run_in_executor(None, self._close_engine)
        await super().shutdown(sockets)
        await closing
        self.running = False

    def _close_engine(self) -> None:
        self.house.engine.close(finish=self.grace > 0, timeout=self.grace or None)
