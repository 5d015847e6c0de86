"""Numbers and arrays as Python text: exact, in their dtype, and with their layout in memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from pylora.types import Array


def literal(a: Array, imports: set[str]) -> str:
    """An expression for the numbers of an array; what it needs is added to `imports`."""
    if str(a.dtype) == "bfloat16":
        imports.add("import ml_dtypes")
        dtype = "ml_dtypes.bfloat16"
    elif a.dtype.kind == "f" and a.dtype.itemsize > 8:  # longdouble, which has no short literal
        a, dtype = a.astype(np.float64), "np.float64"
    else:
        dtype = f"np.{a.dtype}" if a.dtype != bool else "bool"
    if a.size == 0:
        return f"np.zeros({a.shape}, {dtype})"
    if a.size > 4 and _all_the_same(a):
        return f"np.full({a.shape}, {nested(a.flat[0])}, {dtype})"
    return f"np.array({nested(a)}, {dtype})"


def _all_the_same(a: Array) -> bool:
    """Whether one number fills it, sign of zero included."""
    same = bool((a == a.flat[0]).all())
    return same and (a.dtype.kind in "iub" or bool((np.signbit(a) == np.signbit(a.flat[0])).all()))


def nested(a: Any) -> str:
    """Lists of numbers in lists."""
    a = np.asarray(a)
    if a.ndim == 0:
        v = a.item() if a.dtype.kind in "iubc" else float(a)
        return number(v) if isinstance(v, float) else repr(v)
    return "[" + ", ".join(nested(np.asarray(row)) for row in a) + "]"


def number(v: float) -> str:
    """A float that Python reads back as itself."""
    if v != v:
        return "np.nan"
    if v in (float("inf"), float("-inf")):
        return "np.inf" if v > 0 else "-np.inf"
    return repr(float(v))


def layout(name: str, a: Array) -> list[str]:
    """Lines that give a C-contiguous literal the strides and the flag of `a`."""
    lines = []
    if a.ndim and any(s < 0 for s in a.strides):
        flip = ", ".join("::-1" if s < 0 else ":" for s in a.strides)
        lines.append(f"{name} = np.ascontiguousarray({name}[{flip}])[{flip}]")
    elif a.size and not a.flags.c_contiguous:
        if a.ndim == 2 and a.flags.f_contiguous:
            lines.append(f"{name} = np.asfortranarray({name})")
        elif a.ndim == 2 and a.strides[1] == a.itemsize:  # columns of a wider array
            wider = f"np.pad({name}, ((0, 0), (0, 3)), constant_values=np.nan)"
            wider = wider if a.dtype.kind not in "iub" else f"np.pad({name}, ((0, 0), (0, 3)))"
            lines.append(f"{name} = {wider}[:, :{a.shape[1]}]")
        else:
            step = ", ".join(["::2"] * a.ndim)
            grown = name
            for axis in range(a.ndim):
                grown = f"np.repeat({grown}, 2, axis={axis})"
            lines.append(f"{name} = {grown}[{step}]")
    if not a.flags.writeable:
        lines.append(f"{name}.flags.writeable = False")
    return lines
