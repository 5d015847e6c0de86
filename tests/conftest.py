"""What every test may ask for: the backends, a fixed random generator, hypothesis profiles.

A test that takes `ops` runs once on every backend. A backend that is not available is skipped,
unless PYLORA_TEST_BACKENDS names it (as `make test` does): then its absence is a failure.
"""

from __future__ import annotations

import os
from typing import Any

import hypothesis
import numpy as np
import pytest

from pylora import backends
from pylora.errors import BackendError

REQUIRED = tuple(filter(None, os.environ.get("PYLORA_TEST_BACKENDS", "").split(",")))
# Those of a GPU are tested where they are named: on a GPU, or else over a stand-in for CuPy.
ALL_BACKENDS = ("numpy", "c", *(name for name in ("cuda", "cupy") if name in REQUIRED))
if set(REQUIRED) & {"cuda", "cupy"}:
    import gpu

    gpu.prepare("cuda" in REQUIRED)
    if "numpy" not in REQUIRED and "c" not in REQUIRED:
        ALL_BACKENDS = tuple(name for name in ALL_BACKENDS if name in REQUIRED)

# No deadline: a shared machine is slow now and then, and time is no property of a result.
hypothesis.settings.register_profile("dev", deadline=None, max_examples=20)
hypothesis.settings.register_profile(
    "ci",
    deadline=None,
    max_examples=40,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile("few", deadline=None, max_examples=2)  # for slow tools
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.fixture(params=ALL_BACKENDS)
def ops(request: pytest.FixtureRequest) -> Any:
    """Each backend in turn. One of a GPU where the module says ON_GPU: the others compare bits of
    rows, which a GPU's backends do not promise (`ops.bitwise`), and think in NumPy's arrays; what
    they ask of whole models, backends/test_gpu.py asks of those."""
    if request.param in ("cuda", "cupy") and not getattr(request.module, "ON_GPU", False):
        pytest.skip(f"{request.param} is tested by ops/test_protocol.py and backends/test_gpu.py")
    try:
        return backends.get(request.param)
    except BackendError as error:
        if request.param in REQUIRED:
            raise
        pytest.skip(f"backend {request.param!r}: {error}")


@pytest.fixture
def rng() -> np.random.Generator:
    """NumPy's generator with a fixed seed, fresh for each test."""
    return np.random.default_rng(20210617)


def pytest_report_header() -> str:
    """Says which pylora is being tested: the installed package or the source tree."""
    import pylora

    return f"pylora: {os.path.dirname(pylora.__file__ or '?')}"
