"""How much memory this process holds and has held, and how much more it may, where that is said."""

from __future__ import annotations

import os
import sys
from pathlib import Path

_V1 = "memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"
_NO_LIMIT = 2.0**60  # version 1 writes a number as large as this


def peak_rss_bytes() -> int | None:
    """The most memory this process has held; None where the system does not say (Windows)."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024


def held_bytes() -> int | None:
    """The memory this process holds now; None where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return peak_rss_bytes()


def free_bytes() -> float:
    """How much more this process may hold: what the machine has available, or less where a cgroup
    (a container, a Slurm job) limits it; infinity where nothing is said."""
    free = float("inf")
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(float(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        if "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", {}):
            free = float(os.sysconf("SC_AVPHYS_PAGES")) * os.sysconf("SC_PAGE_SIZE")
    return min(free, cgroup_bytes(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")))


def cgroup_bytes(root: Path, mine: Path) -> float:
    """What the process's cgroups leave it, of version 2 or 1: the least of its own and those above
    it. What the system holds of files for a group, and would give up, counts as free."""
    here = root
    try:
        for line in mine.read_text().splitlines():
            number, _, path = line.split(":", 2)
            if number == "0":
                here = root / path.lstrip("/")
    except (OSError, ValueError):
        pass
    free = float("inf")
    for group in (here, *here.parents):
        free = min(free, _left(group / "memory.max", group / "memory.current", group))
        if group == root:
            break
    limit, usage = (root / name for name in _V1)
    return min(free, _left(limit, usage, root / "memory"))


def _left(limit: Path, usage: Path, group: Path) -> float:
    try:
        most, used = float(limit.read_text()), float(usage.read_text())
    except (OSError, ValueError):  # no such group, or "max"
        return float("inf")
    if most >= _NO_LIMIT:
        return float("inf")
    try:
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used -= float(stat.get("inactive_file", 0))
    except (OSError, ValueError):
        pass
    return max(0.0, most - used)
