"""Runs a command that a user gave: an engine that is started anew, a converter. Nothing is left.

A template's words may hold {base}, {adapter}, {port}, {in}, {out}, {loras}; what stands in [ ] is
left out where there is no adapter. No shell is involved unless the template calls one. Each process
has a session of its own, so that what it started ends with it, and an empty current folder.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from pylora.conformance.engines.http import EngineError, Http, Refusal
from pylora.errors import ConfigError

_LINES = 3  # of a log that are shown


def words(template: str, values: Mapping[str, str | list[str] | None]) -> list[str]:
    """The command line of a template. ConfigError for a name that has no value.

    A list stands for several words and must be a word of its own; where a value is None, the part
    in [ ] that holds it is left out.
    """
    try:
        parts = shlex.split(template)
    except ValueError as error:
        raise ConfigError(f"the command {template!r}: {error}") from None
    out: list[str] = []
    group: list[str] | None = None
    for part in parts:
        if part.startswith("["):
            group, part = [], part[1:]
        closes = group is not None and part.endswith("]")
        part = part[:-1] if closes else part
        (out if group is None else group).append(part)
        if closes and group is not None:
            if not any(
                value is None and f"{{{n}}}" in w for w in group for n, value in values.items()
            ):
                out += group
            group = None
    if group is not None:
        raise ConfigError(f"the command {template!r}: a [ without its ]")
    filled: list[str] = []
    for word in out:
        name = word.strip("{}")
        value = values.get(name) if word == f"{{{name}}}" else None
        if isinstance(value, list):
            filled += value
            continue
        for name, value in values.items():
            if f"{{{name}}}" in word:
                if not isinstance(value, str):
                    raise ConfigError(f"the command {template!r}: there is no {{{name}}} here")
                word = word.replace(f"{{{name}}}", value)
        filled.append(word)
    if not filled:
        raise ConfigError("the command is empty")
    return filled


def free_port() -> int:
    """A port that nobody listens on at the moment."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Process:
    """A command that runs in a session of its own, with its output in a file."""

    def __init__(self, command: list[str], folder: Path) -> None:
        """Starts it. ConfigError where there is no such program."""
        self.command, self.folder = command, folder
        self.log: IO[Any] = tempfile.TemporaryFile()
        try:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=self.log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            self.log.close()
            raise ConfigError(f"{command[0]} cannot be started: {error.strerror}") from None

    def tail(self) -> str:
        """The last lines that it printed."""
        self.log.seek(0, os.SEEK_END)
        self.log.seek(max(0, self.log.tell() - 4000))
        text = self.log.read().decode("utf-8", errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return " / ".join(lines[-_LINES:])[-500:]

    def wait(self, seconds: float) -> int | None:
        """Its exit code, or None where it has not ended in time."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def stop(self) -> None:
        """Ends it, and all that it started; by force where it does not go."""
        for number, seconds in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
            try:
                os.killpg(self.process.pid, number)
            except (ProcessLookupError, PermissionError):
                break
            if self.wait(seconds) is not None and number == signal.SIGKILL:
                break
        self.log.close()


class Server:
    """An engine that is started by a command, one at a time; or one that is there already."""

    def __init__(
        self, url: str | None, template: str | None, key: str | None, timeout: float, start: float
    ) -> None:
        """`start`: how many seconds a command may take until it answers."""
        if (url is None) == (template is None):
            raise ConfigError("give either the address of an engine or the command that starts one")
        self.template, self.key, self.timeout, self.patience = template, key, timeout, start
        self.http = None if url is None else Http.of(url, key, timeout)
        self.process: Process | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="pylora-engine-")
        self._running: tuple[str, ...] | None = None

    @property
    def folder(self) -> Path:
        """The current folder of the engine, if it is started by a command."""
        return Path(self._folder.name)

    def up(self, base: str, adapter: str | None = None, loras: list[str] | None = None) -> Http:
        """The address of the engine with this base and adapter, which answers.

        Refusal where it ends before it answers; EngineError where it does not answer in time.
        """
        if self.template is None:
            assert self.http is not None
            return self.http
        wanted = (base, adapter or "", *(loras or ()))
        alive = self.process is not None and self.process.wait(0) is None
        if self._running == wanted and alive and self.http is not None:
            return self.http
        self.stop()
        port = free_port()
        flags = [word for path in loras or () for word in ("--lora", path)]
        values = {"base": base, "adapter": adapter, "port": str(port), "loras": flags}
        self.process = Process(words(self.template, values), self.folder)
        self.http = Http.of(f"http://127.0.0.1:{port}/v1", self.key, self.timeout)
        self._wait(self.process, port)
        self._running = wanted
        return self.http

    def _wait(self, process: Process, port: int) -> None:
        end = time.monotonic() + self.patience
        probe = Http.of(f"http://127.0.0.1:{port}/v1", self.key, min(5.0, self.timeout))
        while time.monotonic() < end:
            code = process.wait(0.1)
            if code is not None:
                text = process.tail()
                self.stop()
                raise Refusal(0, f"{_ended(code)}: {text}" if text else _ended(code))
            for path in ("/health", "/v1/models"):
                try:
                    probe.get(path)
                    return
                except Refusal as refusal:
                    if refusal.status in (401, 403):
                        raise
                except EngineError:
                    break
        text = process.tail()
        self.stop()
        raise EngineError(
            f"{process.command[0]} answers nothing within {self.patience:g} s: {text}"
        )

    def ended(self) -> str:
        """How the engine that was started here ended, as the end of a sentence; "" if it runs."""
        code = None if self.process is None else self.process.wait(1.0)
        return "" if code is None else f"; {_ended(code)}"

    def stop(self) -> None:
        """Ends the engine, if it was started here."""
        if self.process is not None:
            self.process.stop()
        self.process, self._running = None, None

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()
        self._folder.cleanup()


def _ended(code: int) -> str:
    if code >= 0:
        return f"the command ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = str(-code)
    return f"the command CRASHED ({name})"
