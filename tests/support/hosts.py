"""Two hosts for MPI that are two network namespaces of this one, joined by a cable of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_LOGIN = """#!/bin/sh
# As ssh: [-x] HOST COMMAND...
[ "$1" = -x ] && shift
case $1 in {first}) space={a};; *) space={b};; esac
shift
exec ip netns exec $space sh -c "$*"
"""


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)


def possible() -> bool:
    """Whether this process may make network namespaces (it is root, and no container forbids)."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        return False
    name = f"pl{os.getpid()}t"
    try:
        _ip("netns", "add", name)
        _ip("netns", "del", name)
    except (subprocess.SubprocessError, OSError):
        return False
    return True


class Hosts:
    """Their addresses, and the words before `-n N COMMAND` that start MPICH's processes there."""

    def __init__(self, a: str, b: str, login: Path) -> None:
        self.a, self.b = a, b
        self.addresses = ("10.77.0.1", "10.77.0.2")
        login.write_text(_LOGIN.format(first=self.addresses[0], a=a, b=b))
        login.chmod(0o755)
        self.login = login

    def launch(self, mpiexec: str) -> list[str]:
        """By TCP alone: on one machine MPI would find the memory that the two share."""
        env = {"MPIR_CVAR_NOLOCAL": "1", "MPIR_CVAR_CH4_NETMOD": "ofi", "FI_PROVIDER": "tcp",
               "FI_TCP_IFACE": "cable"}  # fmt: skip
        words = ["ip", "netns", "exec", self.a, mpiexec, "-launcher", "ssh"]
        words += ["-launcher-exec", str(self.login), "-hosts", ",".join(self.addresses)]
        return words + [w for name, value in env.items() for w in ("-genv", name, value)]

    def sent(self) -> int:
        """Bytes that the first host has sent over the cable."""
        text = subprocess.run(
            ["ip", "-n", self.a, "-s", "link", "show", "cable"], capture_output=True, text=True
        ).stdout.splitlines()
        after = next(i for i, line in enumerate(text) if line.strip().startswith("TX:"))
        return int(text[after + 1].split()[0])


@contextmanager
def two_hosts(folder: Path) -> Iterator[Hosts]:
    a, b = (f"pl{os.getpid()}{end}" for end in "ab")
    _ip("netns", "add", a)
    _ip("netns", "add", b)
    try:
        for space in (a, b):  # an IPv6 address cannot be bound in its first second or two
            off = "echo 1 > /proc/sys/net/ipv6/conf/default/disable_ipv6"
            _ip("netns", "exec", space, "sh", "-c", f"{off} 2>/dev/null || true")
        _ip("link", "add", "cable", "netns", a, "type", "veth", "peer", "name", "cable", "netns", b)
        hosts = Hosts(a, b, folder / "login")
        for space, address in zip((a, b), hosts.addresses, strict=True):
            _ip("-n", space, "addr", "add", f"{address}/24", "dev", "cable")
            _ip("-n", space, "link", "set", "cable", "up")
            _ip("-n", space, "link", "set", "lo", "up")
        yield hosts
    finally:
        for space in (a, b):
            subprocess.run(["ip", "netns", "del", space], capture_output=True)
