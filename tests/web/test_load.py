"""tools/serve_load.py for a few seconds: no answer but the one that its request gets alone."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

for package in ("starlette", "uvicorn", "llguidance", "prometheus_client"):
    pytest.importorskip(package)

TOOL = Path(__file__).resolve().parents[2] / "tools" / "serve_load.py"


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_many_clients_and_adapters_with_swaps(tmp_path: Path) -> None:
    main = runpy.run_path(str(TOOL))["main"]
    args = ["--seconds", "4", "--clients", "16", "--adapters", "8", "--requests", "48"]
    args += ["--tokens", "8", "--growth", "1", "--out", str(tmp_path / "found.json")]
    code = main(args)
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert code == 0, found
    assert found["answers"] > 50 and found["swaps"] > 1 and found["exit_code"] == 0
