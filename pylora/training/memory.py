"""How much memory this process has held, where the system says so."""

from __future__ import annotations

import sys


def peak_rss_bytes() -> int | None:
    """The most memory this process has held; None where the system does not say (Windows)."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024
