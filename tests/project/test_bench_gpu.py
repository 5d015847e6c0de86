"""bench/gpu.py: its arithmetic, and that it runs on small shapes. No test judges a speed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
sys.path.insert(0, str(BENCH))

import gpu_report
import gpu_shapes


def record(case: str, contender: str, seconds: float, **key: Any) -> dict[str, Any]:
    samples = [seconds * 3, seconds, seconds * 0.5]
    return {"case": case, "contender": contender, "key": key, "seconds": samples, "peak_bytes": 0}


def result(*records: dict[str, Any]) -> dict[str, Any]:
    return {
        "device": "GPU", "date": "2026-01-01", "versions": {}, "records": list(records),
        "left_out": [],
    }  # fmt: skip


def test_shares_are_of_the_ceilings_of_the_same_run() -> None:
    n = gpu_shapes.CEILING
    copy = record("ceiling", "device", 2.0 * 32 * n**2 / 2e12, what="copy")  # 2 TB/s
    key = {"width": 1024, "rank": 16, "precision": "fp32"}
    one = record("merge", "pylora", 2.0 * 4 * 1024**2 / 1e12, **key)  # 1 TB/s
    peer = record("merge", "PEFT", 8.0 * 4 * 1024**2 / 1e12, **key)
    text = gpu_report.table(result(copy, one, peer))
    assert "ceiling, copy: 2000 GB/s" in text
    assert "1000 GB/s, 50% of a copy" in text and "(4.00 ×)" in text


def test_a_contender_that_failed_is_named_with_its_reason() -> None:
    bad = {**record("step", "PEFT", 1.0, batch=1, length=8), "seconds": [], "failed": "no memory"}
    good = record("step", "pylora", 0.5, batch=1, length=8)
    text = gpu_report.table(result(good, bad))
    assert "PEFT failed: no memory" in text and "16 tokens/s" in text


def test_operations_of_a_step_are_those_of_llama_3_8b() -> None:
    weights = sum(d * k for d, k in gpu_shapes.modules(32))
    assert weights == 6_979_321_856  # the published 8.03 billion less embedding, head and norms
    tokens = 2048
    assert gpu_shapes.step_flops(1, tokens) == pytest.approx(
        tokens * (4 * (weights + 128256 * 4096) + 6 * 41_943_040 + 32 * 14 * 4096 * 1024)
    )


@pytest.mark.slow
def test_every_case_runs_on_small_shapes(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    command = [sys.executable, str(BENCH / "gpu.py"), "--tiny", "--backend", "numpy"]
    done = subprocess.run(
        [*command, "--no-compile", "--out", str(out)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(out.read_text(encoding="utf-8"))
    assert measured["left_out"] == []
    failed = [r for r in measured["records"] if not r["seconds"]]
    assert not failed, failed
    assert {r["case"] for r in measured["records"] if r["contender"] == "pylora"} == {
        "linear", "merge", "unmerge", "decode", "step",
    }  # fmt: skip


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(BENCH / "gpu.py"), "--out", str(tmp_path / "x.json")],
        capture_output=True, text=True, timeout=300, env={"CUDA_VISIBLE_DEVICES": "", "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 2 and "needs an NVIDIA GPU" in done.stderr
