"""Heads for classes and numbers: PEFT's AutoPeftModelForSequenceClassification loads what pylora
saves, and its loss and gradients are the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_model import write_tiny_model

from pylora.adapters.loraconfig import LoraConfig
from pylora.adapters.plan import resolve
from pylora.formats import open_checkpoint
from pylora.model.llama import Llama
from pylora.training.objectives.choose import choose
from pylora.training.objectives.headed import HeadedAdapter
from pylora.training.objectives.labelled import Labelled

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

CLASSES = ("a", "b", "c", "d")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("heads") / "base")


def ours(base: Path, classes: Any) -> tuple[Llama, HeadedAdapter]:
    with open_checkpoint(base) as checkpoint:
        model = Llama.from_checkpoint(checkpoint, backend="c")
    config = LoraConfig(
        r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"],
        base_model_name_or_path=str(base),
    )  # fmt: skip
    plan = resolve(config, model.config.modules())
    adapter = HeadedAdapter.fresh(plan, config, 0, model.config.hidden_size, classes)
    rng = np.random.default_rng(1)
    for lora in adapter.values():
        lora.B[...] = rng.normal(size=lora.B.shape) / 4
    model.attach(adapter)
    return model, adapter


@pytest.mark.parametrize("name", ["classify", "regress"])
def test_peft_loads_the_head_and_learns_the_same(name: str, base: Path, tmp_path: Path) -> None:
    classes = CLASSES if name == "classify" else ()
    model, adapter = ours(base, classes)
    adapter.save(tmp_path / "made")
    theirs = peft.AutoPeftModelForSequenceClassification.from_pretrained(
        tmp_path / "made", num_labels=max(1, len(classes)), is_trainable=True
    )
    rng, vocab = np.random.default_rng(2), model.config.vocab_size
    items = [
        Labelled(rng.integers(3, vocab, n), float(label), f"made:{n}")
        for n, label in ((4, 2), (4, 0), (4, 3), (4, 1))
    ]
    batch = torch.tensor(np.stack([item.ids for item in items]))
    kind = torch.long if name == "classify" else torch.float32
    labels = torch.tensor([item.label for item in items]).to(kind)
    theirs.config.pad_token_id = theirs.base_model.model.config.pad_token_id = 0
    out = theirs(batch, labels=labels)
    got = adapter.predict(model, [item.ids for item in items])
    np.testing.assert_allclose(got, out.logits.detach().numpy(), atol=2e-5)
    out.loss.backward()
    loss, rows, grads = choose(name).gradients(model, items, ((0, 1, 2), (3,)), None, False)
    assert loss == pytest.approx(float(out.loss.detach()), rel=1e-5) and rows == 16
    want = {n: p.grad.numpy() for n, p in theirs.named_parameters() if p.grad is not None}
    (score,) = [n for n in want if "score" in n]
    np.testing.assert_allclose(grads["score"].weight, want.pop(score), atol=2e-5)
    for path, grad in grads.items():
        for field in () if path == "score" else "AB":
            expected = want.pop(f"base_model.model.{path}.lora_{field}.default.weight")
            scale = np.abs(expected).max()
            np.testing.assert_allclose(getattr(grad, field), expected, atol=1e-4 * scale, rtol=0)
    assert not want


def test_a_head_that_peft_saved_is_read(base: Path, tmp_path: Path) -> None:
    model, adapter = ours(base, CLASSES)
    adapter.save(tmp_path / "made")
    theirs = peft.AutoPeftModelForSequenceClassification.from_pretrained(
        tmp_path / "made", num_labels=len(CLASSES)
    )
    theirs.save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert saved["task_type"] == "SEQ_CLS"
    again = HeadedAdapter.load(tmp_path / "again", model.config)
    assert again.score.tobytes() == adapter.score.tobytes()
    assert again.classes == ("0", "1", "2", "3")
    model.attach(again)
    ids = [[5, 6, 7], [8, 9]]
    scores = again.predict(model, ids)
    model.attach(adapter)
    assert scores.tobytes() == adapter.predict(model, ids).tobytes()
