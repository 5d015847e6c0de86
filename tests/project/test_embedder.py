"""Layers, adapters, training and generation on token ids need NumPy, cffi and safetensors alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parents[1] / "support" / "embedder.py"


def test_without_the_other_packages() -> None:
    done = subprocess.run(
        [sys.executable, str(PROGRAM), "--hide"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("embedder: all is well\n")
