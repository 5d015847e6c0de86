"""The C core as a library for what tests compile with make: built once, whoever asks first."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def core_lib(make: str, cc: str) -> str:
    """`CORE_LIB=...` for csrc/core.mk: the library that PYLORA_CORE_LIB names (`make test` and CI
    name the one that the installed package is made of), else one that make keeps in build/."""
    given = os.environ.get("PYLORA_CORE_LIB")
    if given:
        assert Path(given).is_file(), f"PYLORA_CORE_LIB: there is no {given}"
        return f"CORE_LIB={given}"
    import fcntl  # POSIX has make

    folder = ROOT / "build" / "make" / "core"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:  # test processes run side by side
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = [make, "-s", f"-j{os.cpu_count() or 1}", "-C", str(ROOT / "examples" / "c")]
        subprocess.run([*command, "core", f"CC={cc}", f"CORE_BUILD={folder}"], check=True)
    return f"CORE_LIB={folder / 'libpylora.a'}"
