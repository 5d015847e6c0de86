"""The benchmark's own arithmetic, and that its programs run. No test here judges a speed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
sys.path.insert(0, str(BENCH))

import bars
import cases
import contenders
import gguf_files
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
        "engine": {label: key for key, label in contenders.LABELS.items()}[engine],
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


def row_of(what: str, doc: dict[str, Any], kind: str = "") -> bars.Row:
    found = [r for r in bars.judge(doc) if r.bar.what == what and kind in ("", r.bar.kind)]
    assert len(found) == 1, found
    return found[0]


def test_a_step_has_the_operations_that_the_page_says() -> None:
    assert work.weights() == 134_479_872  # SmolLM2-135M without its norms
    assert work.adapter_numbers(8) == 921_600
    assert 5.6e8 < work.step_flops(256) < 5.9e8
    # Twice the length: twice the attention and nothing else.
    more = work.step_flops(512) - work.step_flops(256)
    assert more == pytest.approx(3 * work.attention_flops(256))
    # Behind Gemma's window of 512 tokens, layers with one see no more of a longer text.
    windowed = [work.attention_flops(n, "gemma3-270m") / 4 / 1024 for n in (512, 512 * 2)]
    assert windowed == [18 * 256, 15 * (512 - 128) + 3 * 512]


def test_a_ratio_is_of_medians_to_the_best_setting_of_the_peer_which_is_named() -> None:
    key = {"batch": 4, "length": 256}
    doc = document(
        record("step", "pylora bf16", 1.0, **key),
        record("step", "PEFT bf16", 4.0, **key),
        record("step", "PEFT bf16, tuned", 2.0, **key),
        record("step", "PEFT fp32", 0.1, **key),
        record("step", "PEFT bf16, compiled", 0.1, **key, model="gemma3-270m"),
    )
    row = row_of("training step, bf16", doc)
    assert (row.value, row.met, row.rival) == (2.0, True, "PEFT bf16, tuned")
    assert "(PEFT bf16, tuned)" in row.peer
    memory = row_of("peak memory of the bf16 step", doc)
    assert (memory.value, memory.met) == (0.25, True)
    assert row_of("training step, fp32", doc).met is None
    # Where PyTorch has no kernel for bfloat16, its best is another dtype's.
    doc = document(
        record("step", "pylora bf16", 1.0, **key), record("step", "PEFT fp32", 1.1, **key)
    )
    row = row_of("training step, bf16", doc)
    assert (row.value, row.met, row.rival) == (1.1, False, "PEFT fp32")


def test_the_other_kinds_of_bar() -> None:
    of = {"adapters": 100, "prompt": 64, "new": 8}
    cost = {"ranks": [16], "prompt": 512, "new": 8}
    step = {"batch": 4, "length": 256}
    doc = document(
        record("resident", "pylora bf16", 1.3, "32 distinct", **of),
        record("resident", "pylora bf16", 1.0, "32 one", **of),
        record("resident", "pylora bf16", 2e-6, "switch", **of),
        record("merge", "pylora fp32", 2 * 4096**2 * 4 / 20e9, "merge", d=4096),
        record("step", "pylora fp32", 2.0, **step),
        record("step", "pylora int4", 1.0, **step),
        record("adapter-cost", "pylora bf16", 1.0, "0 decode", **cost),
        record("adapter-cost", "pylora bf16", 1.04, "16 decode", **cost),
        record("adapter-cost", "pylora bf16", 2.0, "0 prefill", **cost),
        record("adapter-cost", "pylora bf16", 2.2, "16 prefill", **cost),
    )
    own = row_of("32 distinct adapters against one, bf16", doc)
    assert (own.value, own.met) == (1.3, False)
    switch = row_of("switching, 100 resident", doc)
    assert (switch.value, switch.met) == (2e-6, True)
    share = row_of("merge 4096², fp32: share of changing memory in place", doc)
    assert share.value == pytest.approx(0.5)
    assert share.met is False
    base = row_of("training step, int4 base, beside our own fp32", doc)
    assert (base.value, base.met) == (2.0, True)
    for part, value, met in (("decode", 0.04, True), ("prefill", 0.1, False)):
        row = row_of(f"cost of an adapter, r = 16, all linear, {part}, bf16", doc)
        assert (row.value, row.met) == (pytest.approx(value), met)


def test_files_are_judged_by_kind_and_activations_in_8_bits_apart() -> None:
    key = {"model": "smollm2-135m", "prompt": 512, "new": 8, "file_bytes": 20, "read_bytes": 20}
    q4, k4 = key | {"kind": "Q4_0"}, key | {"kind": "Q4_K_M"}
    some = [
        record("gguf", "pylora int4", 1.0, "decode", **q4),
        record("gguf", "pylora int8", 0.8, "decode", **q4),
        record("gguf", "pylora int8a8", 0.5, "decode", **q4),
        record("gguf", "llama.cpp Q4_0", 1.2, "decode", **q4),
        record("gguf", "llama.cpp Q4_0, flash attention", 1.0, "decode", **q4),
        record("gguf", "ik_llama.cpp Q4_0", 0.6, "decode", **q4),
        record("gguf", "pylora int4", 1.0, "decode", **k4),
    ]
    doc = document(*some)
    rows = {(r.bar.what, r.bar.peer): r for r in bars.judge(doc) if r.bar.case == "gguf"}
    plain = rows["decode, smollm2-135m Q4_0", "llama"]
    assert (plain.own, plain.rival) == ("int8", "llama.cpp Q4_0, flash attention")
    assert (plain.value, plain.met) == (pytest.approx(1.25), False)
    eight = rows["decode, smollm2-135m Q4_0, activations in 8 bits", "ik"]
    assert (eight.own, eight.value, eight.met) == ("int8a8", pytest.approx(1.2), True)
    memory = rows["peak memory, generating, smollm2-135m Q4_K_M", ""]
    assert (memory.value, memory.met) == (1.0, True)


def test_bars_for_amx_are_judged_where_there_is_amx() -> None:
    doc = document()
    assert not any(bar.only == "AMX bf16" for bar in bars.bars(doc))
    doc["ceilings"]["AMX bf16"] = ceiling(4000)
    assert sum(bar.only == "AMX bf16" for bar in bars.bars(doc)) == 1


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
    total, read = moe_decode.packed_bytes(moe_decode.config(48), "q4_1")
    routers = 48 * 128 * 2048
    assert total == pytest.approx((30_532_122_624 - routers) * 20 / 32 + 4 * routers, rel=1e-4)
    active = 8 * 48 * 3 * 768 * 2048 + 48 * 2 * (4096 + 512) * 2048 + 151936 * 2048
    assert read == pytest.approx(active * 20 / 32 + 4 * routers, rel=1e-3)
    assert 1 <= moe_decode.layers_that_fit("q4_1") <= 48


def test_the_random_experts_are_blocks_of_a_usable_size() -> None:
    for kind, width in (("q4_1", 480), ("q4_0", 432)):
        weights = moe_decode.Weights(moe_decode.config(1), kind)
        W = weights("model.layers.0.mlp.experts.5.down_proj.weight")
        assert (W.kind, W.shape, W.rows.shape) == (kind, (2048, 768), (2048, width))
    assert weights.dtype("model.layers.0.mlp.gate.weight") == "f32"
    values = dequantize(W)
    assert 0.5 < np.sqrt(768) * values.std() < 2 and abs(values.mean()) < values.std() / 100


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
    assert any("PEFT fp32 left out" in line for line in said)


def test_repetitions_are_cut_to_the_time_and_slow_settings_leave() -> None:
    said: list[str] = []
    team = contenders.Team({"slow": "", "quick": ""}, 1, said.append)
    asked: list[str] = []

    def entry(variant: str, seconds: float) -> Any:
        c = contenders.Contender("peft", "fp32", variant)
        return contenders._Entry(c, samples=[{"seconds": {"": seconds}}])

    some = {e.contender.name: e for e in (entry("", 1.0), entry("tuned", 0.5), entry("x", 0.6))}
    team._drop(some)
    assert {n: bool(e.dropped) for n, e in some.items()} == {
        "PEFT fp32": True,
        "PEFT fp32, tuned": False,
        "PEFT fp32, x": False,
    }
    assert len(said) == 1 and "PEFT fp32, tuned is faster" in said[0]

    class Timed(contenders.Team):
        def _start(self, e: Any, ask: Any, key: Any) -> None:
            pass

        def _ask(self, e: Any, ask: Any, timeout: float) -> dict[str, Any]:
            asked.append(e.contender.name)
            time.sleep(0.05)
            sample = {"seconds": {"": 0.05}, "peak_rss_bytes": 1, "life_peak_rss_bytes": 1}
            return sample | {"info": {}, "versions": {}}

    two = [contenders.Contender("peft", "fp32"), contenders.Contender("peft", "bf16")]
    timed = Timed({"peft": ""}, 1, said.append, until=time.monotonic() + 0.8)
    found = timed.measure("step", "step", two, {}, reps=100)
    assert [len(r["seconds"]) for r in found] in ([n, n] for n in range(1, 8))
    timed = Timed({"peft": ""}, 1, said.append, until=time.monotonic() - 1)
    late = timed.measure("step", "step", two, {}, reps=100)
    assert all("no time was left" in r["error"] for r in late) and len(late) == 2


def test_a_dtype_without_a_kernel_is_left_out_and_named() -> None:
    rates = {"fp32": {"rows": 100e9, "row": 10e9}, "bf16": {"rows": 1e9, "row": 10e9}}
    o = cases.Options(rates=rates)
    some = [contenders.Contender(e, p) for e in ("pylora", "peft") for p in ("fp32", "bf16")]
    stay, out = cases.affordable(o, "step", some, {"batch": 4, "length": 256})
    assert [c.name for c in stay] == ["pylora fp32", "pylora bf16", "PEFT fp32"]
    assert "multiplies bf16 here at 1.0 GFLOP/s (fp32: 100): about 5" in out[0]["skipped"]
    # Small pieces of work end all the same.
    assert cases.affordable(o, "step", some, {"batch": 1, "length": 8})[0] == some
    doc = document(*out) | {"cases": {}}
    (line,) = report.left_out(doc)
    assert line.startswith("Left out: PEFT bf16 in step. PyTorch multiplies")


def test_old_results_say_which_file_they_compared(tmp_path: Path) -> None:
    old = record("gguf", "llama.cpp Q4_1", 1.0, "decode", prompt=512, new=64, file_bytes=20)
    path = tmp_path / "speed.json"
    path.write_text(json.dumps({"records": [old]}), encoding="utf-8")
    (new,) = records.read(path)["records"]
    assert (new["key"]["model"], new["key"]["kind"]) == ("smollm2-135m", "Q4_1")
    assert report.named(new) == "decode, smollm2-135m Q4_1 file, no adapter"
    # A file whose head is a tensor of its own: the embedding is not read for each token.
    r = new | {"key": new["key"] | {"read_bytes": 15}}
    assert (records.bytes_moved(new), records.bytes_moved(r)) == (64 * 20, 64 * 15)


def test_tiles_multiply_bytes_twice_for_16_bits_and_bfloat16_three_times_for_float32() -> None:
    doc = document()
    doc["ceilings"] |= {"AMX int8": ceiling(1000), "AMX bf16": ceiling(900)}
    of = {"prompt": 64, "new": 8}
    found = {
        name: records.ceiling_of(record("generate", name, 1.0, "prefill", **of), doc["ceilings"])
        for name in ("pylora int4", "pylora int4a8", "llama.cpp Q4_0", "pylora fp32x3")
    }
    assert found == {
        "pylora int4": ("AMX int8", 500e9),
        "pylora int4a8": ("AMX int8", 1000e9),
        "llama.cpp Q4_0": ("AMX int8", 1000e9),
        "pylora fp32x3": ("AMX bf16", 300e9),
    }
    step = record("step", "pylora int4", 1.0, batch=4, length=256)
    name, rate = records.ceiling_of(step, doc["ceilings"])
    assert (name, rate) == ("AMX int8, AMX bf16", pytest.approx(2 / (1 / 500e9 + 1 / 300e9)))


def test_a_page_says_what_an_adapter_costs_each() -> None:
    key = {"ranks": [8, 16], "prompt": 512, "new": 8}
    some = [
        record("adapter-cost", "pylora fp32", 1.0, "0 decode", **key),
        record("adapter-cost", "pylora fp32", 1.02, "8 decode", **key),
        record("adapter-cost", "llama.cpp Q4_0", 1.0, "0 decode", **key, kind="Q4_0"),
        record("adapter-cost", "llama.cpp Q4_0", 1.5, "8 decode", **key, kind="Q4_0"),
    ]
    head, *rows = report.adapter_rows(document(*some))
    assert head[-1] == "r = 8: time"
    assert rows == [
        ("decode", "pylora fp32", "8", "+2.0%"),
        ("decode, Q4_0 file", "llama.cpp Q4_0", "8", "+50.0%"),
    ]


def test_an_adapter_for_llama_cpp_has_every_linear_module(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    source = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(str(source), "llama")
    for name, shape in (
        ("token_embd", (8, 32)),
        ("blk.0.attn_q", (64, 32)),
        ("blk.0.ffn_norm", (32,)),
    ):
        writer.add_tensor(f"{name}.weight", np.zeros(shape, np.float32))
    writer.add_tensor("output.weight", np.zeros((8, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = gguf_files.File("smollm2-135m", "Q4_0", source)
    assert file.read_bytes() == source.stat().st_size - 8 * 32 * 4
    made = gguf_files.write_adapter(file, 4, tmp_path / "lora.gguf")
    found = {t.name: tuple(t.shape) for t in gguf.GGUFReader(str(made)).tensors}
    assert found == {  # ggml names the fastest axis first
        "blk.0.attn_q.weight.lora_a": (32, 4),
        "blk.0.attn_q.weight.lora_b": (4, 64),
    }


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
