"""tools/readme_figures.py: every figure from a file, a peer at its fastest, losses shown."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "bench")]

import readme_figures
import records as bench_records
import report as bench_report


def record(contender: str, seconds: float, memory: float = 1e9) -> dict[str, Any]:
    engine, precision = contender.split(",")[0].split(" ")
    return {
        "case": "step",
        "part": "",
        "contender": contender,
        "engine": {"pylora": "pylora", "PEFT": "peft"}[engine],
        "precision": precision,
        "key": {"batch": 4, "length": 256},
        "seconds": [seconds],
        "life_peak_rss_bytes": memory,
    }


def document(*records: dict[str, Any]) -> dict[str, Any]:
    return {
        "machine": {"processor": "Toy", "cores": 2, "isa": "avx2"},
        "date": "a day",
        "versions": {"torch": "9", "python": "3"},
        "ceilings": {"memory read": {"best": 20.0, "unit": "GB/s"}},
        "records": list(records),
        "cases": {},
    }


def test_the_peer_is_the_one_in_its_fastest_setting_and_a_loss_is_called_one() -> None:
    doc = document(
        record("pylora fp32", 2.0),
        record("PEFT fp32", 3.0),
        record("PEFT fp32, tuned", 1.0),
        record("PEFT bf16", 0.1),
    )
    (row,) = readme_figures.of_samples(doc)
    assert row == (
        "training step, 4 × 256, fp32",
        "512 tokens/s",
        "1,024 tokens/s (PEFT fp32, tuned)",
        "**0.50 ×, slower**",
    )


def test_a_case_without_a_peer_is_left_out_and_memory_is_a_share() -> None:
    doc = document(record("pylora bf16", 1.0, 1e9), record("PEFT bf16, tuned", 2.0, 4e9))
    step, memory = readme_figures.of_samples(doc)
    assert step[3] == "2.00 ×"
    assert memory[1:] == ("1.00 GB", "4.00 GB (PEFT bf16, tuned)", "0.25 × the memory")
    assert readme_figures.of_samples(document(record("pylora bf16", 1.0))) == []


def test_files_have_every_peer_that_reads_them_and_costs_are_shown_beside_theirs() -> None:
    def of(case: str, contender: str, part: str, seconds: float, **key: Any) -> dict[str, Any]:
        label, precision = contender.split(" ")
        engine = {"pylora": "pylora", "llama.cpp": "llama", "ik_llama.cpp": "ik"}[label]
        out = record("pylora " + precision, seconds) | {"case": case, "part": part, "key": key}
        return out | {"contender": contender, "engine": engine}

    key = {"model": "qwen2.5-0.5b", "kind": "Q4_K_M", "prompt": 512, "new": 64}
    cost = {"ranks": [16], "prompt": 512, "new": 32}
    doc = document(
        of("gguf", "pylora int8", "decode", 2.0, **key),
        of("gguf", "pylora int4", "decode", 1.0, **key),
        of("gguf", "pylora int4a8", "decode", 0.1, **key),
        of("gguf", "llama.cpp Q4_K_M", "decode", 1.5, **key),
        of("gguf", "ik_llama.cpp Q4_K_M", "decode", 0.8, **key),
        of("adapter-cost", "pylora int4", "0 decode", 1.0, **cost),
        of("adapter-cost", "pylora int4", "16 decode", 1.5, **cost),
        of("adapter-cost", "llama.cpp Q4_0", "0 decode", 1.0, **cost, kind="Q4_0"),
        of("adapter-cost", "llama.cpp Q4_0", "16 decode", 1.25, **cost, kind="Q4_0"),
    )
    speed, adds = readme_figures.of_samples(doc)
    assert speed == (
        "decode, Qwen2.5-0.5B Q4_K_M file, int4",
        "64 tokens/s",
        "80 tokens/s (ik_llama.cpp Q4_K_M)",
        "**0.80 ×, slower**",
    )
    assert adds[1:] == ("+50% (int4)", "+25% (llama.cpp Q4_0)", "**not the least**")


COPIED = [
    path
    for path in sorted(bench_report.RESULTS.glob("compared-*.json"))
    if "records" not in json.loads(path.read_text(encoding="utf-8"))
]


@pytest.mark.parametrize("path", COPIED, ids=lambda path: path.stem)
def test_medians_that_were_copied_say_where_they_are_from(path: Path) -> None:
    doc = json.loads(path.read_text(encoding="utf-8"))
    assert len(doc["source"]) > 40
    rows = readme_figures.of_medians(doc)
    assert len(rows) == len(doc["rows"])
    for row, source in zip(rows, doc["rows"], strict=True):
        if source["peer"] is not None:
            assert ("slower" in row[3]) is (source["pylora"] < source["peer"])


def test_the_readme_has_the_tables_of_the_files_that_are_here() -> None:
    newest = bench_report.newest("speed-*.json")
    assert newest is not None
    paths = [newest, *sorted(bench_report.RESULTS.glob("compared-*.json"))]
    new = readme_figures.speed_tables([bench_records.read(p) for p in paths])
    begin, end = readme_figures.SPEED
    assert f"{begin}\n{new}\n{end}" in readme_figures.README.read_text(encoding="utf-8")


REPORT: dict[str, Any] = {
    "build": {"processor": "Toy", "num_threads": 2, "isa": "avx2"},
    "merge": {"residue_share": 0.01},
    "settings": {"steps": 3, "rank": 8, "seed": 0},
    "test_items": 150,
    "validation_items": 50,
    "exact_match_before": 0.0,
    "exact_match_after": 0.98,
    "exact_match_validation": 1.0,
    "seconds": 100.0,
    "training_tokens": 24000,
    "tokens_per_second": 150.0,
    "trainable_parameters": 1,
    "total_parameters": 100,
    "adapter_bytes": 1e6,
    "base_bytes": 1e9,
    "peak_rss_bytes": 1e9,
    "precision": "fp32",
    "targets": ["q_proj"],
    "load_before": 0.2,
    "first_statement_right": True,
}


def test_a_busy_machine_is_called_busy_and_its_seconds_are_left_out() -> None:
    report = REPORT
    quiet = readme_figures.demo([report])
    assert "0.0% → **98.0%**" in quiet and "24,000 tokens, 150 tokens/s" in quiet
    assert "100 s" in quiet and "left out" not in quiet
    busy = readme_figures.demo([{**report, "load_before": 9.0}])
    assert "left out" in busy and "150 tokens/s" not in busy and "100 s" not in busy


def test_a_wrong_first_statement_is_called_wrong_in_every_run() -> None:
    bad = {**REPORT, "first_statement_right": False, "settings": {"steps": 3, "rank": 8, "seed": 1}}
    text = readme_figures.demo([REPORT, bad])
    assert text.count("**wrong**") == 1
    assert "seed 1, fp32, kernels `avx2`" in text
