"""The demo on a tiny random model: the same path as on the real one, and honest figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

for package in ("typer", "rich", "tokenizers", "matplotlib"):
    pytest.importorskip(package)

from tiny_model import write_tiny_model

from pylora.commands import cli
from pylora.demo import demo
from pylora.demo.demo import SHORT, Settings, fastest_precision, run
from pylora.demo.fetch import GEMMA3, QWEN25, SMOLLM2, Weights
from pylora.demo.items import exact_match, expected, read_items, right, statement
from pylora.demo.show import show_answers
from pylora.errors import PyloraError
from pylora.formats import open_checkpoint
from pylora.model.llama import Llama

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KEYS = {
    "exact_match_before",
    "exact_match_after",
    "seconds",
    "tokens_per_second",
    "trainable_parameters",
    "total_parameters",
    "adapter_bytes",
    "peak_rss_bytes",
    "loss",
    "exact_match_validation",
    "validation_loss",
    "precision",
    "targets",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


def test_the_demo_writes_what_it_promises(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    args = ["demo", "--model", model, "--out", out, "--short", "--steps", 4]
    for _ in range(2):  # it can be run twice
        assert cli.main([str(arg) for arg in args]) == 0
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    said = [json.loads(line) for line in (out / "generations.jsonl").open(encoding="utf-8")]
    assert KEYS <= report.keys()
    assert len(report["loss"]) == 4
    with open_checkpoint(model) as checkpoint:
        config = checkpoint.config
        assert report["total_parameters"] == sum(
            checkpoint.load(n).size for n in checkpoint.names()
        )
        assert report["trainable_parameters"] == sum(
            8 * (spec.d + spec.k)
            for path, spec in config.modules().items()
            if path.rsplit(".", 1)[-1] in LINEAR
        )
    assert report["targets"] == sorted(LINEAR)
    assert report["precision"].startswith(fastest_precision(report["build"]))
    assert report["validation_items"] == SHORT.validation_items
    assert 0 <= report["exact_match_validation"] <= 1
    curve = report["validation_loss"]
    assert [step for step, _ in curve] == [0, 2, 4] and all(loss > 0 for _, loss in curve)
    assert report["first_statement_right"] is (said[0]["after"] == "∃Ψ")
    adapter = sum(p.stat().st_size for p in (out / "adapter").iterdir())
    assert report["adapter_bytes"] == adapter
    assert report["merge"]["modules_restored"] == 14
    for picture in ("loss.png", "adapter.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    assert len(said) == report["test_items"] == SHORT.test_items
    for when in ("before", "after"):
        assert exact_match(said, [item[when] for item in said]) == report[f"exact_match_{when}"]


def test_a_fixed_seed_gives_the_same_figures(model: Path, tmp_path: Path) -> None:
    settings = Settings(steps=2, test_items=4, seed=5)
    first, second = (
        run(tmp_path / name, model=model, settings=settings, judge=False) for name in "ab"
    )
    assert first["loss"] == second["loss"]
    weights = [(tmp_path / n / "adapter" / "adapter_model.safetensors").read_bytes() for n in "ab"]
    assert weights[0] == weights[1]


def test_a_demo_that_shows_nothing_fails_but_leaves_its_report(model: Path, tmp_path: Path) -> None:
    with pytest.raises(PyloraError, match="expected at least 95%"):
        run(tmp_path / "out", model=model, settings=Settings(steps=1, test_items=3))
    assert (tmp_path / "out" / "report.json").exists()


def test_training_does_not_leak_into_the_figures_before(model: Path, tmp_path: Path) -> None:
    """What is called "before" is what the base model says, adapter or not."""
    from pylora.demo.items import answers

    settings = Settings(steps=1, test_items=5, precision="fp32")
    run(tmp_path, model=model, settings=settings, judge=False)
    said = [json.loads(line) for line in (tmp_path / "generations.jsonl").open(encoding="utf-8")]
    with open_checkpoint(model) as checkpoint:
        base, tokenizer = Llama.from_checkpoint(checkpoint), checkpoint.tokenizer()
    assert answers(base, tokenizer, read_items("test", 5)) == [item["before"] for item in said]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Gemma", r"no model Gemma: .* smollm2, gemma, qwen; did you mean gemma\?"),
        ("llama", r"no model llama: give a GGUF file, a Hugging Face folder, or one of"),
        ("not/there.gguf", "no such file"),
    ],
)
def test_a_name_of_no_model_is_a_sentence(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(PyloraError, match=message):
        run(tmp_path, model=name)


def test_a_name_means_the_model_that_is_fetched(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of that name comes first; else what `fetch` gives for it."""
    asked = []

    def fetched(weights: Weights, **_: object) -> Path:
        asked.append(weights)
        return model

    monkeypatch.setattr(demo, "fetch", fetched)
    monkeypatch.chdir(tmp_path)
    settings = Settings(steps=1, test_items=2, validation_items=2)
    for name in ("gemma", "qwen", "smollm2"):
        run(tmp_path / "out", model=name, settings=settings, judge=False)
    assert asked == [GEMMA3, QWEN25, SMOLLM2]
    (tmp_path / "gemma").symlink_to(model)
    run(tmp_path / "out", model="gemma", settings=settings, judge=False)
    assert len(asked) == 3


def test_exact_match_gives_no_partial_credit() -> None:
    items = [{"prompt": "p", "completion": " ∃Ψ"}, {"prompt": "q", "completion": " Ψ⇒Δ"}]
    assert exact_match(items, ["∃Ψ", "Ψ⇒Δ"]) == 1
    assert exact_match(items, ["∃Ψ.", "ψ⇒Δ"]) == 0
    assert exact_match(items, ["∃Ψ", ""]) == 0.5


def test_the_first_items_are_the_ones_that_explain_the_notation() -> None:
    items = read_items("test")
    assert [statement(item) for item in items[:2]] == [
        "consciousness exists",
        "consciousness leads to change",
    ]
    assert len(items) == 150 == len({item["completion"] for item in items})


def test_a_miss_is_shown_as_a_miss_wherever_it_is() -> None:
    items = read_items("test")
    said = [expected(item) for item in items]
    said[0], said[97] = "Ψ∈Ψ", "?"
    shown = Recorded()
    show_answers(shown, items, [""] * len(items), said)  # type: ignore[arg-type]
    first, missed, shares = shown.tables
    assert first[0] == ("consciousness exists", "∃Ψ", "", "Ψ∈Ψ", "✗ wrong")
    assert [row[-1] for row in first[1:]] == ["✓ right"] * 9
    assert [row[0] for row in missed] == [statement(items[97])]
    assert shares == [("150 held-out statements", "0.0%", f"{148 / 150:.1%}")]
    assert not right(items[97], said[97])


class Recorded:
    """A screen that keeps the rows of its tables."""

    def __init__(self) -> None:
        self.tables: list[list[tuple[str, ...]]] = []

    def table(self, columns: object, rows: list[tuple[str, ...]], **_: object) -> None:
        self.tables.append(list(rows))


def test_the_precision_is_the_one_that_trains_fastest() -> None:
    assert fastest_precision({"backend": "c", "isa": "avx2"}) == "fp32"
    assert fastest_precision({"backend": "c", "isa": "avx512"}) == "fp32"
    assert fastest_precision({"backend": "c", "isa": "avx512bf16"}) == "bf16"
    assert fastest_precision({"backend": "numpy", "isa": "amx"}) == "fp32"
    assert fastest_precision({"backend": "cuda"}) == "bf16"
