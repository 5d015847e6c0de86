"""The tolerances of the tests are those of the conformance kit: one place derives them all."""

from __future__ import annotations

from pylora.conformance.bounds_ops import *  # noqa: F403
