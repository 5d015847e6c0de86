"""Makes hypothesis's examples a function of the law, the seed and the number of examples alone.

Now and then hypothesis draws a constant that stands in the source of a module that is loaded, so
that what is drawn would hang on what the process has imported, the implementation's own modules
included, and every process would spend seconds on reading sources. While the kit runs there are no
such constants: the ones that hypothesis always has (powers of two, 0.5, odd texts) stay. There is
no setting for that; where a version of hypothesis keeps them elsewhere, nothing is changed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pylora.extras import need

_GATHER, _CACHE = "_get_local_constants", "CONSTANTS_CACHE"
_LOCK = threading.RLock()
_inside = 0  # how many blocks are open, in all threads
_before: dict[str, Any] = {}


@contextmanager
def nothing_gathered() -> Iterator[None]:
    """While the block runs hypothesis knows no constants of the modules that are loaded."""
    global _inside
    providers = need("hypothesis.internal.conjecture.providers")
    if not hasattr(providers, _GATHER) or not hasattr(providers, _CACHE):
        yield
        return
    with _LOCK:
        _inside += 1
        if _inside == 1:
            _before.update({name: getattr(providers, name) for name in (_GATHER, _CACHE)})
            none = need("hypothesis.internal.constants_ast").Constants()
            setattr(providers, _GATHER, lambda: none)
            # What each draw may be is remembered there, with constants of the modules.
            setattr(providers, _CACHE, type(_before[_CACHE])(1024))
    try:
        yield
    finally:
        with _LOCK:
            _inside -= 1
            if not _inside:
                for name, value in _before.items():
                    setattr(providers, name, value)
