"""`pylora check` passes what is right and fails each thing that is made wrong on purpose."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("gguf")  # small_models makes both kinds of file

from small_models import write_gguf, write_hf

from pylora import backends
from pylora.adapters.adapter import Adapter
from pylora.adapters.loraconfig import LoraConfig
from pylora.adapters.plan import resolve
from pylora.backends.numpy import NumpyBackend
from pylora.check.check import check, check_model
from pylora.check.report import Finding, Report
from pylora.check.rounding import Exact, Rounded
from pylora.check.sample import bytes_needed, default_adapter, part_of, sample
from pylora.errors import ConfigError, DataError, FileFormatError, PlanError
from pylora.formats import open_checkpoint
from pylora.model import decoder
from pylora.model.attention import Attention
from pylora.model.config import LlamaConfig
from pylora.model.linear import LoRALinear
from pylora.model.llama import random_weights

CONFIG = LlamaConfig.tiny(num_hidden_layers=3)


def write_model(folder: Path, config: LlamaConfig = CONFIG, dtype: str = "f32") -> Path:
    weights = random_weights(config)
    write_hf(folder, config, dtype, tensors={name: weights(name) for name in config.tensors()})
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def verdicts(report: Report) -> dict[str, str]:
    return {f.check: f.verdict for f in report.findings}


def failed(report: Report) -> set[str]:
    return {name for name, verdict in verdicts(report).items() if verdict == "FAIL"}


def random_adapter(config: LlamaConfig, **settings: Any) -> Adapter:
    lora = LoraConfig(**({"r": 3, "lora_alpha": 5, "init_lora_weights": False} | settings))
    adapter = Adapter.init(resolve(lora, config.modules()), lora, 1)
    for module in adapter.values():
        module.B[...] *= np.float32(0.25)
    return adapter


# ---- what is right ---------------------------------------------------------------------------


def test_everything_holds_on_every_backend(model: Path, ops: Any) -> None:
    report = check_model(model, seed=3, backend=ops)
    assert report.ok and set(verdicts(report).values()) == {"pass"}
    assert "whole model" in report.scope and report.backend == ops.name
    assert len(report.modules) == 12


@pytest.mark.parametrize(
    ("config", "dtype", "settings"),
    [
        (CONFIG, "bf16", {"target_modules": "all-linear", "use_rslora": True}),
        (CONFIG, "f16", {"target_modules": ("embed_tokens", "down_proj")}),
        (
            LlamaConfig.tiny(model_type="qwen2", attention_bias=True, tie_word_embeddings=False),
            "f32",
            {"target_modules": ("q_proj", "lm_head", "up_proj"), "rank_pattern": {"q_proj": 30}},
        ),
        (
            LlamaConfig.tiny(model_type="qwen3", qk_norm=True),
            "f32",
            {"target_modules": ("k_proj",)},
        ),
    ],
    ids=["rslora-bf16", "embedding-f16", "biases-and-head", "qk-norm"],
)
def test_kinds_of_models_and_adapters(
    tmp_path: Path, config: LlamaConfig, dtype: str, settings: dict[str, Any]
) -> None:
    write_model(tmp_path / "model", config, dtype)
    random_adapter(config, **settings).save(tmp_path / "adapter")
    report = check_model(tmp_path / "model", tmp_path / "adapter", tokens=16)
    assert not failed(report), report.findings
    assert {m["dtype"] for m in report.modules} == {dtype}


def test_biases_of_an_adapter(tmp_path: Path) -> None:
    config = LlamaConfig.tiny(model_type="qwen2", attention_bias=True)
    write_model(tmp_path, config)
    lora = LoraConfig(
        r=2,
        target_modules=("q_proj", "v_proj"),
        bias="all",
        lora_bias=True,
        init_lora_weights=False,
    )
    with open_checkpoint(tmp_path) as checkpoint:
        plan = resolve(lora, config.modules())
        adapter = Adapter.init(plan, lora, 0, base=checkpoint.load)
        report = check(checkpoint, adapter, sample(config, 12, 0))
    assert not failed(report), report.findings


def test_a_gguf_file(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", kind="Q8_0")
    assert check_model(tmp_path / "m.gguf", tokens=8).ok


def test_an_adapter_that_changes_nothing_is_a_warning(model: Path, tmp_path: Path) -> None:
    random_adapter(CONFIG, init_lora_weights=True, target_modules=("q_proj",)).save(tmp_path / "a")
    report = check_model(model, tmp_path / "a")
    assert report.ok and verdicts(report)["size of the delta"] == "warning"


def test_a_delta_larger_than_its_weight_is_a_warning(model: Path, tmp_path: Path) -> None:
    random_adapter(CONFIG, lora_alpha=300, target_modules=("q_proj",)).save(tmp_path / "a")
    assert verdicts(check_model(model, tmp_path / "a"))["size of the delta"] == "warning"


# ---- less memory than float64 needs ----------------------------------------------------------

# What the top layer needs, and a little more.
MEMORY = 1.01 / 0.7 * bytes_needed(dataclasses.replace(CONFIG, num_hidden_layers=1), whole=False)


def test_the_top_layers_where_memory_is_short(model: Path) -> None:
    with open_checkpoint(model) as checkpoint:
        adapter = default_adapter(CONFIG, 0)
        sizes = [part_of(checkpoint, adapter, m) for m in (1e9, MEMORY, 1e3)]
    assert [None if p is None else p.first for p in sizes] == [0, 2, None]
    part = sizes[1]
    assert part is not None and part.config.num_hidden_layers == 1
    assert part.whole("model.layers.0.mlp.up_proj") == "model.layers.2.mlp.up_proj"
    assert part.own("model.layers.1.mlp.up_proj") is None and part.own("lm_head") == "lm_head"
    report = check_model(model, memory=MEMORY)
    assert report.ok and "top 1 of 3 layers" in report.scope


def test_float32_alone_where_not_even_a_layer_fits(model: Path) -> None:
    report = check_model(model, memory=1e3)
    assert report.ok and "not in float64" in report.scope
    found = verdicts(report)
    assert found["gradient"] == "pass" and found["merged logits"] == "not tested"


# ---- what is wrong ---------------------------------------------------------------------------


def break_backward(monkeypatch: pytest.MonkeyPatch, cls: type, change: Callable[..., Any]) -> None:
    right = cls.lora_backward  # type: ignore[attr-defined]

    def wrong(self: Any, *args: Any, **kwargs: Any) -> Any:
        return change(*right(self, *args, **kwargs))

    monkeypatch.setattr(cls, "lora_backward", wrong)


def a_little_more(dx: Any, dA: Any, dB: Any) -> Any:
    return dx, None if dA is None else dA * dA.dtype.type(1.01), dB


def b_a_little_more(dx: Any, dA: Any, dB: Any) -> Any:
    return dx, dA, None if dB is None else dB * dB.dtype.type(1.01)


def dx_a_little_more(dx: Any, dA: Any, dB: Any) -> Any:
    return None if dx is None else dx * dx.dtype.type(1.01), dA, dB


@pytest.mark.parametrize("change", [a_little_more, b_a_little_more, dx_a_little_more])
def test_a_wrong_backward_of_the_backend(
    model: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[..., Any]
) -> None:
    class Broken(NumpyBackend):
        pass

    break_backward(monkeypatch, Broken, change)
    assert failed(check_model(model, backend=Broken())) == {"gradients in float32"}


def test_a_wrong_backward_of_everything(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_backward(monkeypatch, NumpyBackend, a_little_more)
    assert "gradient of A" in failed(check_model(model, backend="numpy"))
    monkeypatch.undo()
    break_backward(monkeypatch, NumpyBackend, b_a_little_more)
    assert "gradient of B" in failed(check_model(model, backend="numpy"))
    assert failed(check_model(model, backend="numpy", memory=1e3)) == {"gradient"}


def test_a_layer_that_forgets_a_gradient(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Attention.backward

    def forgets(self: Attention, dy: Any, cache: Any, grads: Any, **kwargs: Any) -> Any:
        dx = right(self, dy, cache, grads, **kwargs)
        _, _, v_proj = self.inputs
        if "layers.1" in v_proj.path:
            grads[v_proj.path].B[...] = 0
        return dx

    monkeypatch.setattr(Attention, "backward", forgets)
    assert failed(check_model(model)) == {"gradient of B"}


def test_a_merge_with_another_scale(model: Path) -> None:
    class Broken(NumpyBackend):
        def merge(self, W: Any, lora: Any, dtype: str = "f32") -> Any:
            return super().merge(W, dataclasses.replace(lora, scale=lora.scale * 1.01), dtype)

        def unmerge(self, merged: Any, lora: Any, residue: Any, dtype: str = "f32") -> Any:
            lora = dataclasses.replace(lora, scale=lora.scale * 1.01)
            return super().unmerge(merged, lora, residue, dtype)

    assert failed(check_model(model, backend=Broken())) == {"merge", "merged logits"}


def test_a_merge_of_another_orientation(model: Path) -> None:
    class Broken(NumpyBackend):
        def lora_forward(
            self, x: Any, W: Any, bias: Any = None, lora: Any = None, *more: Any
        ) -> Any:
            if lora is not None:  # the adapter's path, not the merge, is off
                lora = dataclasses.replace(lora, scale=lora.scale * 1.001)
            return super().lora_forward(x, W, bias, lora, *more)

    assert "merged logits" in failed(check_model(model, backend=Broken()))


def test_an_unmerge_that_drifts(model: Path) -> None:
    class Broken(NumpyBackend):
        def unmerge(self, merged: Any, lora: Any, residue: Any, dtype: str = "f32") -> Any:
            return self._narrow(self._wide(merged, dtype) - self._delta(lora), dtype)

    assert failed(check_model(model, backend=Broken())) == {"unmerge"}


def test_an_adapter_with_a_wrong_scale(model: Path) -> None:
    adapter = default_adapter(CONFIG, 0)
    path = "model.layers.1.self_attn.k_proj"
    wrong = dict(adapter) | {path: dataclasses.replace(adapter[path], scale=16.0)}  # alpha, not /r
    with open_checkpoint(model) as checkpoint:
        odd = Adapter(adapter.config, adapter.plan, wrong)
        report = check(checkpoint, odd, sample(CONFIG, 12, 0))
    assert failed(report) >= {"scale", "merge"}
    assert path in next(f.text for f in report.findings if f.check == "scale")


def test_an_adapter_with_nan(model: Path) -> None:
    adapter = default_adapter(CONFIG, 0)
    adapter["model.layers.1.self_attn.o_proj"].A[0, 0] = np.nan
    with open_checkpoint(model) as checkpoint:
        report = check(checkpoint, adapter, sample(CONFIG, 12, 0))
    assert failed(report) >= {"finite adapter", "finite logits", "merge", "gradients in float32"}
    json.dumps(report.to_dict(), allow_nan=False)


def test_rows_that_see_their_neighbours(model: Path) -> None:
    class Broken(NumpyBackend):
        def _rows(self, x: Any, M: Any) -> Any:
            return super()._rows(x, M) + x.dtype.type(1e-6) * x.sum()

    assert failed(check_model(model, backend=Broken())) >= {"rows", "rows, decode"}


def test_a_fresh_adapter_that_changes_bits(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = LoRALinear.forward

    def wrong(self: LoRALinear, x: Any, **kwargs: Any) -> Any:
        y, cache = right(self, x, **kwargs)
        return (np.nextafter(y, np.float32(9)) if self.lora is not None else y), cache

    step = decoder.Batch.forward

    def wrong_step(self: decoder.Batch, ids: Any) -> Any:
        y, adapted = step(self, ids), self.step.adapters[0] is not None
        return np.nextafter(y, np.float32(9)) if adapted else y

    monkeypatch.setattr(LoRALinear, "forward", wrong)
    monkeypatch.setattr(decoder.Batch, "forward", wrong_step)
    report = check_model(model)
    assert failed(report) >= {"zero-init", "zero-init, decode"}
    assert verdicts(report)["detach"] == "pass"


# ---- the parts -------------------------------------------------------------------------------


def test_the_error_of_a_sum_is_what_random_order_says() -> None:
    rng = np.random.default_rng(0)
    x, M = rng.standard_normal((40, 300)), rng.standard_normal((300, 50))
    off = Rounded(0)._rows(x, M) - Exact()._rows(x, M)
    want = 2.0**-24 * np.sqrt((301 / 6 + 1) * ((x * x) @ (M * M)) + 301 / 3 * (x @ M) ** 2)
    assert 0.9 < np.sqrt((off**2).mean() / (want**2).mean()) < 1.1


def test_nan_never_passes() -> None:
    assert Finding.of("x", float("nan"), 1, "").verdict == "FAIL"
    assert Finding.of("x", 0, float("nan"), "").verdict == "FAIL"
    assert Finding.of("x", 1, float("inf"), "").verdict == "FAIL"
    assert Finding.of("x", 1, 1, "").verdict == "pass"


def test_the_same_seed_gives_the_same_report(model: Path) -> None:
    first, second = check_model(model, seed=5), check_model(model, seed=5)
    assert first.to_dict() == second.to_dict()
    assert first.to_dict() != check_model(model, seed=6).to_dict()


# ---- what people give ------------------------------------------------------------------------


def test_bad_input_is_named(model: Path, tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="no such file or directory"):
        check_model(model, tmp_path / "none")
    with pytest.raises(FileFormatError):
        check_model(tmp_path / "none")
    random_adapter(
        LlamaConfig.tiny(hidden_size=28, num_hidden_layers=3), target_modules=("v_proj",)
    ).save(tmp_path / "other")
    with pytest.raises(PlanError, match="its hidden size is 28, the model.s 24"):
        check_model(model, tmp_path / "other")
    for tokens in (0, 7, 100_000):
        with pytest.raises(ConfigError, match="tokens"):
            check_model(model, tokens=tokens)
    with pytest.raises(ConfigError, match="seed"):
        check_model(model, seed=-1)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("typer")
    pytest.importorskip("tokenizers")
    from tiny_model import write_tiny_model

    from pylora.commands import cli

    folder = write_tiny_model(tmp_path / "model")
    data, out = tmp_path / "data.jsonl", tmp_path / "report.json"
    data.write_text('{"prompt": "truth exists.", "completion": " so it does, and so on"}\n' * 4)
    args = ["check", str(folder), "--data", str(data), "--json", str(out), "--tokens", "12"]
    assert cli.main(args) == 0
    printed = capsys.readouterr().out
    report = json.loads(out.read_text())
    assert report["ok"] and "everything holds" in printed
    assert all(f["check"] in printed for f in report["findings"])

    data.write_text("")
    assert cli.main(["check", str(folder), "--data", str(data)]) == 1
    said = capsys.readouterr().err
    assert "data.jsonl" in said and len(said.strip().splitlines()) == 1
    assert cli.main(["check", str(folder), "--adapter", str(tmp_path / "none")]) == 1
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_the_command_fails_with_the_check(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("typer")
    from pylora.commands import cli

    cls: Any = type(backends.get())
    right = cls.linear_backward

    def wrong(*args: Any, **kwargs: Any) -> Any:
        dx, grads = right(*args, **kwargs)
        return dx, [a_little_more(None, dA, dB)[1:] for dA, dB in grads]

    monkeypatch.setattr(cls, "linear_backward", wrong)
    assert cli.main(["check", str(model)]) == 1
    assert "FAIL" in capsys.readouterr().out


def test_an_empty_file_of_data(model: Path, tmp_path: Path) -> None:
    class Tokenizer:
        eos_ids, add_bos = (1,), False

    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="empty.jsonl"):
        sample(CONFIG, 12, 0, tmp_path / "empty.jsonl", Tokenizer())  # type: ignore[arg-type]
