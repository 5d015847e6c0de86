"""Letting go of the memory of a mapped file that has been read and is not needed for now.

Pages of a mapped file count as a process's memory from when they are read. They are the file's:
given back, they come from it again when somebody looks.
"""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np


def let_go(array: np.ndarray) -> None:
    """Gives back the pages that lie wholly in a contiguous view of a read-only mapped file. Any
    other array is left alone, and so are all where the system has no such call."""
    owner: Any = array
    while isinstance(owner, np.ndarray):
        owner = owner.base
    advice = getattr(mmap, "MADV_DONTNEED", None)
    if advice is None or not isinstance(owner, mmap.mmap) or not array.flags.c_contiguous:
        return
    whole = np.frombuffer(owner, np.uint8)
    if whole.flags.writeable or array.nbytes == 0:
        return  # what is written there is perhaps nowhere else
    start = whole.__array_interface__["data"][0]
    first = array.__array_interface__["data"][0] - start
    begin = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (first + array.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > begin:
        owner.madvise(advice, begin, end - begin)
