"""The benchmark's own arithmetic, and that its programs run. No test here judges a speed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
sys.path.insert(0, str(BENCH))

import bars
import contenders
import moe_decode
import records
import report
import setting
import work
from accuracy_logits import compare
from accuracy_train import chosen

import pylora
from pylora.numbers.quantize import dequantize

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the benchmark reads /proc")


def record(case: str, name: str, seconds: float, part: str = "", **key: Any) -> dict[str, Any]:
    engine, precision = name.split(",")[0].split(" ")
    return {
        "case": case,
        "contender": name,
        "engine": {"pylora": "pylora", "PEFT": "peft", "llama.cpp": "llama"}[engine],
        "precision": precision,
        "variant": name.partition(", ")[2],
        "part": part,
        "key": key,
        "seconds": [seconds * 0.5, seconds, seconds * 3],
        "peak_rss_bytes": 10,
        "life_peak_rss_bytes": 20 if engine == "pylora" else 80,
    }


def ceiling(best: float, unit: str = "GFLOP/s") -> dict[str, Any]:
    return {"unit": unit, "samples": [best], "best": best}


def document(*some: dict[str, Any]) -> dict[str, Any]:
    return {
        "ceilings": {
            "fp32 FMA": ceiling(200),
            "bf16 dot": ceiling(400),
            "memory read": ceiling(30, "GB/s"),
            "memory change in place": ceiling(40, "GB/s"),
        },
        "records": list(some),
    }


def row_of(what: str, peer: str, doc: dict[str, Any]) -> bars.Row:
    return next(r for r in bars.judge(doc) if r.bar.what == what and r.bar.peer == peer)


def test_a_step_has_the_operations_that_the_page_says() -> None:
    assert work.weights() == 134_479_872  # SmolLM2-135M without its norms
    assert work.adapter_numbers(8) == 921_600
    assert 5.6e8 < work.step_flops(256) < 5.9e8
    # Twice the length: twice the attention and nothing else.
    more = work.step_flops(512) - work.step_flops(256)
    assert more == pytest.approx(3 * work.attention_flops(256))


def test_ratios_are_of_medians_and_point_the_right_way() -> None:
    key = {"batch": 4, "length": 256}
    doc = document(
        record("step", "pylora bf16", 1.0, **key),
        record("step", "PEFT bf16", 4.0, **key),
        record("step", "PEFT bf16, tuned", 2.0, **key),
    )
    fast = row_of("training step, bf16", "PEFT bf16", doc)
    assert (fast.value, fast.met) == (4.0, True)
    slow = row_of("training step, bf16", "PEFT bf16, tuned", doc)
    assert (slow.value, slow.met) == (2.0, False)
    memory = row_of("peak memory of the bf16 step", "PEFT bf16", doc)
    assert (memory.value, memory.met) == (0.25, True)
    assert row_of("training step, bf16", "PEFT bf16, compiled", doc).met is None


def test_the_other_kinds_of_bar() -> None:
    of = {"adapters": 100, "prompt": 64, "new": 8}
    doc = document(
        record("resident", "pylora bf16", 1.3, "32 distinct", **of),
        record("resident", "pylora bf16", 1.0, "32 one", **of),
        record("resident", "pylora bf16", 2e-6, "switch", **of),
        record("merge", "pylora fp32", 2 * 4096**2 * 4 / 20e9, "merge", d=4096),
    )
    own = row_of("32 distinct adapters against one", "32 one", doc)
    assert (own.value, own.met) == (1.3, False)
    switch = row_of("switching, 100 resident", "PEFT bf16", doc)
    assert (switch.value, switch.met) == (2e-6, True)
    what = "merge 4096², fp32: share of changing memory in place"
    share = row_of(what, "memory change in place", doc)
    assert share.value == pytest.approx(0.5)
    assert share.met is False


def test_bars_for_amx_are_judged_where_there_is_amx() -> None:
    doc = document()
    assert not any(r.bar.amx for r in bars.judge(doc))
    doc["ceilings"]["AMX bf16"] = ceiling(4000)
    assert sum(r.bar.amx for r in bars.judge(doc)) == 2


def test_a_share_is_of_the_longer_of_the_two_least_times() -> None:
    doc = document()
    step = record("step", "pylora bf16", 1024 * work.step_flops(256) / 200e9, batch=4, length=256)
    value, limit = records.share(step, doc["ceilings"])
    assert (value, limit) == (pytest.approx(0.5), "bf16 dot")
    bytes_ = work.decode_bytes("fp32") + 4 * work.adapter_numbers()
    decode = record("generate", "pylora fp32", 8 * bytes_ / 15e9, "decode", prompt=64, new=8)
    value, limit = records.share(decode, doc["ceilings"])
    assert (value, limit) == (pytest.approx(0.5), "memory read")


def test_tables_replace_what_is_between_their_markers_and_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- x -->\nold\n<!-- end of x -->\nafter\n", encoding="utf-8")
    report.write_between(page, "x", "new")
    assert page.read_text() == "before\n<!-- x -->\nnew\n<!-- end of x -->\nafter\n"
    with pytest.raises(SystemExit, match="no place"):
        report.write_between(page, "y", "new")


def test_the_page_has_a_place_for_both_tables() -> None:
    text = report.PAGE.read_text(encoding="utf-8")
    for name in ("measured: bench/report.py", "accuracy: bench/report.py"):
        assert f"<!-- {name} -->" in text and f"<!-- end of {name} -->" in text


def test_equal_logits_have_no_divergence_and_a_shift_is_none() -> None:
    want = np.random.default_rng(0).standard_normal((4, 50))
    same = compare(want + 3.0, want)  # a constant changes no distribution
    assert abs(same["kl_max"]) < 1e-12
    assert same["rms"] < 1e-12
    assert same["top1"] == 1.0
    other = compare(np.log(np.array([[0.4, 0.6]])), np.log(np.array([[0.8, 0.2]])))
    assert other["kl_mean"] == pytest.approx(0.8 * np.log(2) - 0.2 * np.log(3))
    assert other["top1"] == 0.0


def test_the_geometries_are_those_models() -> None:
    numbers = {
        name: pylora.LlamaConfig.from_hf(shape).num_parameters
        for name, shape in setting.GEOMETRIES.items()
    }
    assert numbers == {  # transformers' own count of each
        "smollm2-135m": 134_515_008,
        "gemma3-270m": 268_098_176,
        "qwen2.5-0.5b": 494_032_768,
    }
    assert moe_decode.config(48).num_parameters == 30_532_122_624  # Qwen3-30B-A3B


def test_a_token_reads_the_experts_that_it_chose() -> None:
    """Of Qwen3-30B-A3B the 3.3e9 parameters that its name counts, but for the embedding."""
    total, read = moe_decode.packed_bytes(moe_decode.config(48))
    routers = 48 * 128 * 2048
    assert total == pytest.approx((30_532_122_624 - routers) * 20 / 32 + 4 * routers, rel=1e-4)
    active = 8 * 48 * 3 * 768 * 2048 + 48 * 2 * (4096 + 512) * 2048 + 151936 * 2048
    assert read == pytest.approx(active * 20 / 32 + 4 * routers, rel=1e-3)
    assert 1 <= moe_decode.layers_that_fit() <= 48


def test_the_random_experts_are_blocks_of_a_usable_size() -> None:
    c = moe_decode.config(1)
    weights = moe_decode.Weights(c)
    W = weights("model.layers.0.mlp.experts.5.down_proj.weight")
    assert (W.kind, W.shape, W.rows.shape) == ("q4_1", (2048, 768), (2048, 480))
    values = dequantize(W)
    assert 0.5 < np.sqrt(768) * values.std() < 2 and abs(values.mean()) < values.std() / 10


def test_a_page_of_logits_has_each_text_and_old_files_one() -> None:
    logits = compare(np.ones((2, 3)), np.eye(3)[:2])
    old = {k: v for k, v in logits.items() if k not in ("max", "mean")}
    head = {"machine": {"processor": "p", "isa": "i"}, "date": "d", "commit": "c", "command": "x"}
    head |= {"seconds": 60, "cases": {}}
    some = {"tokens": 2, "contenders": {"pylora fp32": logits}}
    page = report.accuracy_page(
        head
        | {"model": "m.gguf", "logits": {"English": some, "code": some}}
        | {"loss": {"pylora fp32": [2.0, 1.0]}, "answers": {"pylora fp32": [0.5, 0.75]}}
    )
    assert "m.gguf on 2 tokens of English" in page and "2 tokens of code" in page
    assert "| largest | mean |" in page and "50%, 75%" in page
    page = report.accuracy_page(head | {"logits": some | {"contenders": {"pylora fp32": old}}})
    assert "2 tokens of English" in page and "largest |" not in page.split("KL, largest")[1]


def test_every_contender_trains_on_the_same_batches() -> None:
    examples = [range(n % 7 + 1) for n in range(30)]
    first = chosen(examples, 9)
    assert first == chosen(examples, 9)
    assert len(first) == 9
    assert sorted(len(e) for step in first[:4] for e in step) == sorted(map(len, examples))


def test_a_contender_that_fails_is_reported_and_the_others_go_on() -> None:
    said: list[str] = []
    some = [contenders.Contender("pylora", "fp32"), contenders.Contender("peft", "fp32")]
    with contenders.Team(
        {"pylora": sys.executable, "peft": "/nonexistent/python"}, 1, said.append
    ) as team:
        key = {"d": 64, "tokens": 3, "backward": False}
        good, bad = team.measure("linear", "linear", some, key, reps=2)
        (wrong,) = team.measure("linear", "no such job", some[:1], key, reps=2)
    assert len(good["seconds"]) == 2 and min(good["seconds"]) > 0
    assert good["peak_rss_bytes"] > 1e6
    assert "nonexistent" in bad["error"] and "KeyError" in wrong["error"]
    assert any("PEFT fp32 failed" in line for line in said)


def test_a_run_writes_results_from_which_table_and_pictures_are_made(tmp_path: Path) -> None:
    out = tmp_path / "speed.json"
    command = [sys.executable, str(BENCH / "run.py"), "--tiny", "--without", "peft", "llama"]
    cases = ["step", "generate", "linear", "merge"]
    done = subprocess.run(
        [*command, "--precisions", "fp32", "--only", *cases, "--out", str(out)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "merge 4096², fp32: share" in done.stdout  # a row of the table
    doc = json.loads(out.read_text(encoding="utf-8"))
    assert [case["error"] for case in doc["cases"].values()] == [None] * len(cases)
    assert {r["case"] for r in doc["records"] if "seconds" in r} == set(cases)
    assert "**Run with --tiny" in report.setting(doc)
    pytest.importorskip("matplotlib")
    import figures

    drawn = figures.draw(doc, figures.SPEED, tmp_path)
    assert {p.name for p in drawn} >= {"speed.png", "memory.png"}
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in drawn)
