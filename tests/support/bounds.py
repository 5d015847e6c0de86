"""The tolerances of the tests are those of the conformance kit: one place derives them all."""

from __future__ import annotations

from typing import Any

import numpy as np

from pylora.conformance.bounds.features import *  # noqa: F403
from pylora.conformance.bounds.ops import *  # noqa: F403
from pylora.conformance.bounds.ops import assert_within


def close(got: Any, want: Any, relative: float, what: str) -> None:
    scale = float(np.abs(want).max())
    assert scale > 0 or not np.abs(got).max(), f"{what}: expected nothing but zeros"
    assert_within(np.asarray(got), np.asarray(want), relative * scale, what)
