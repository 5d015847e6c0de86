"""A run's figures to where people look at them: TensorBoard's files, Weights & Biases, Trackio.

A reporter is given what the log is given (log.py). TensorBoard's event files are written here, with
no package: records of TFRecord's form (length, checksum, bytes, checksum) that hold Event messages
of protocol buffers. The other two are extras, imported when they are asked for; their projects and
servers are set as they themselves say (WANDB_PROJECT, TRACKIO_SPACE_ID, ...). One that fails while
the run lasts is told of once, and the run goes on without it.
"""

from __future__ import annotations

import math
import os
import socket
import struct
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from pylora.errors import ConfigError, PyloraError
from pylora.extras import need

NAMES = ("tensorboard", "wandb", "trackio")
_PROJECT = "pylora"
_CRC = 0x82F63B78  # Castagnoli's polynomial, its bits reversed


class Reporter(Protocol):
    """Where figures go."""

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        """Those of a step, or of an evaluation after it."""

    def close(self) -> None:
        """Nothing more comes."""


def check_names(names: Iterable[str]) -> list[str]:
    """The reporters that `names` name, in order, each once; "none" names none. ConfigError for
    another, MissingExtraError where a package is not there."""
    found = [n.strip().lower() for text in names for n in text.split(",") if n.strip()]
    for name in found:
        if name not in (*NAMES, "none"):
            raise ConfigError(f"report_to is {name!r}; it must be one of {', '.join(NAMES)}")
        if name in ("wandb", "trackio"):
            need(name)
    return [name for name in dict.fromkeys(found) if name != "none"]


class Reports:
    """All reporters of a run."""

    def __init__(
        self, names: Iterable[str], out: Path, settings: Mapping[str, Any],
        note: Callable[[str], None],
    ) -> None:  # fmt: skip
        """`settings` are shown beside the run; `note` is told of one that failed."""
        self.note, self._all = note, {n: _opened(n, out, settings) for n in check_names(names)}

    def add(self, record: Mapping[str, Any]) -> None:
        """The numbers of a record of the log that has its step."""
        step = int(record["step"])
        figures = {
            name: float(value)
            for name, value in record.items()
            if name != "step" and type(value) in (int, float) and math.isfinite(value)
        }
        self._each(lambda one: one.add(step, figures))

    def __enter__(self) -> Reports:
        return self

    def __exit__(self, *exc: object) -> None:
        self._each(lambda one: one.close())

    def _each(self, work: Callable[[Reporter], None]) -> None:
        for name, one in list(self._all.items()):
            try:
                work(one)
            except Exception as error:  # theirs may be anything; the run is worth more
                del self._all[name]
                self.note(f"nothing more goes to {name}: {error or type(error).__name__}")


def _opened(name: str, out: Path, settings: Mapping[str, Any]) -> Reporter:
    try:
        if name == "tensorboard":
            return TensorBoard(out / "tensorboard")
        return _Service(need(name), out, settings)
    except PyloraError:
        raise
    except Exception as error:
        raise ConfigError(f"{name} could not be started: {error or type(error).__name__}") from None


class _Service:
    """wandb or trackio, which have the same functions."""

    def __init__(self, module: Any, out: Path, settings: Mapping[str, Any]) -> None:
        self.module = module
        given: dict[str, Any] = {"name": out.name, "config": dict(settings)}
        if module.__name__ == "wandb":
            given |= {"dir": str(out), "project": os.environ.get("WANDB_PROJECT", _PROJECT)}
        else:
            given |= {"project": os.environ.get("TRACKIO_PROJECT", _PROJECT)}
        module.init(**given)

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        self.module.log(dict(figures), step=step)

    def close(self) -> None:
        self.module.finish()


# ---- TensorBoard's files ------------------------------------------------------------------------


def _table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (_CRC if byte & 1 else 0)
        table.append(byte)
    return table


_BYTES = _table()


def crc32c(data: bytes) -> int:
    """The CRC of RFC 3720 (iSCSI)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _BYTES[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def _masked(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _varint(n: int) -> bytes:
    out = bytearray()
    while n > 0x7F:
        out.append(n & 0x7F | 0x80)
        n >>= 7
    return bytes([*out, n])


def _field(number: int, value: bytes) -> bytes:
    """A field of bytes: a text, or a message."""
    return _varint(number << 3 | 2) + _varint(len(value)) + value


class TensorBoard:
    """An events.out.tfevents file in a folder; a resumed run adds another one."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        self.path, self._begun = folder / f"{name}.pylora", False
        self._write(_field(3, b"brain.Event:2"))

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        if not self._begun:  # what an interrupted run wrote from this step on does not count
            self._write(_varint(2 << 3) + _varint(step) + _field(7, _varint(1 << 3) + _varint(1)))
            self._begun = True
        values = b""
        for name, value in figures.items():
            group = "eval" if name.startswith("eval_") else "train"
            tag = f"{group}/{name.removeprefix('eval_')}".encode()
            number = _varint(2 << 3 | 5) + struct.pack("<f", value)
            values += _field(1, _field(1, tag) + number)
        self._write(_varint(2 << 3) + _varint(step) + _field(5, values))

    def close(self) -> None:
        pass

    def _write(self, event: bytes) -> None:
        event = _varint(1 << 3 | 1) + struct.pack("<d", time.time()) + event
        length = struct.pack("<Q", len(event))
        with open(self.path, "ab") as file:
            file.write(length + _masked(length) + event + _masked(event))
