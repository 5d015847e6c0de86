"""Whole weights trained here and by PEFT: the same beginnings, steps of AdamW, files and logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_hf

from pylora.adapters.adapter import Adapter
from pylora.adapters.peft import read_config
from pylora.adapters.plan import resolve
from pylora.adapters.whole import fresh_whole
from pylora.formats import open_checkpoint
from pylora.formats.safetensors import SafeTensors
from pylora.model.llama import Llama
from pylora.training.config import TrainConfig
from pylora.training.examples import Example
from pylora.training.train import train

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

IDS = np.arange(14) * 11 % 43
STEPS, RATE = 3, 3e-3
SIZES = {**tiny_hf.SIZES, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
CASES: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "tables and norms": ("Llama", False, {"modules_to_save": ["lm_head", "embed_tokens", "norm"]}),
    "of tied": ("Qwen2", True, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "a layer": ("Qwen2", False, {"modules_to_save": ["layers.1"]}),
    "stays tied": (
        "Llama", True, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "rows of tied": (
        "Qwen3", True, {"trainable_token_indices": [3, 14, 40], "modules_to_save": ["norm"]},
    ),
    "rows of both": (
        "Mistral", False, {"trainable_token_indices": {"embed_tokens": [3], "lm_head": [14, 2]}},
    ),
}  # fmt: skip


@pytest.fixture(params=CASES)
def made(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Path]:
    """PEFT's fresh model; base and adapter are in the folder."""
    kind, tied, settings = CASES[request.param]
    torch.manual_seed(list(CASES).index(request.param))
    config = getattr(transformers, f"{kind}Config")(**SIZES, tie_word_embeddings=tied)
    base = getattr(transformers, f"{kind}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    base.save_pretrained(tmp_path / "base")
    lora = peft.LoraConfig(
        r=2, task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], **settings
    )
    model = peft.get_peft_model(base, lora).eval()
    model.save_pretrained(tmp_path / "fresh")
    return model, tmp_path


def tensors(where: Path) -> dict[str, np.ndarray]:
    with SafeTensors(where / "adapter_model.safetensors") as file:
        return {key: np.array(file.load(key)) for key in file.tensors}


def logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        out: np.ndarray = model(torch.tensor(IDS)[None]).logits[0].numpy()
    return out


def test_a_fresh_adapter_is_pefts(made: tuple[Any, Path]) -> None:
    _, where = made
    config = read_config(where / "fresh")
    with open_checkpoint(where / "base") as checkpoint:
        plan = resolve(config, checkpoint.config.modules())
        whole = fresh_whole(config, checkpoint.config, checkpoint.load)
        mine = Adapter.init(plan, config, whole=whole)
        theirs = Adapter.load(where / "fresh", checkpoint.config, base=checkpoint.load)
    assert mine.whole is not None and theirs.whole is not None
    for name in ("rows", "vocab", "tied", "was_tied", "twin", "turned"):
        assert getattr(mine.whole, name) == getattr(theirs.whole, name), name
    assert list(mine.beside) == list(theirs.beside)
    mine.save(where / "mine")
    got, want = tensors(where / "mine"), tensors(where / "fresh")
    # Of a tied table PEFT writes the head's rows once more.
    rows = "base_model.model.lm_head.token_adapter.trainable_tokens_delta"
    again = {rows} if mine.whole.rows and "lm_head.weight" not in mine.beside else set()
    assert set(got) == set(want) - again
    for key, array in got.items():
        assert key.endswith("lora_A.weight") or np.array_equal(array, want[key]), key


def test_steps_files_and_logits_are_pefts(made: tuple[Any, Path]) -> None:
    model, where = made
    example = Example.of(IDS.tolist(), [False] + [True] * (IDS.size - 1), "made")
    settings = TrainConfig(
        learning_rate=RATE, steps=STEPS, schedule="constant", max_grad_norm=None,
        weight_decay=0.01, batch_size=1,
    )  # fmt: skip
    with open_checkpoint(where / "base") as checkpoint:
        llama = Llama.from_checkpoint(checkpoint)
        adapter = Adapter.load(where / "fresh", checkpoint.config, base=checkpoint.load)
        losses = train(llama, adapter, [example], settings, where / "run").losses
    rest = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for _, p in rest if p.ndim == 1], "weight_decay": 0.0},
        {"params": [p for _, p in rest if p.ndim > 1]},
    ]
    adamw = torch.optim.AdamW(groups, lr=RATE, weight_decay=0.01)
    batch = torch.tensor(IDS)[None]
    for loss in losses:
        adamw.zero_grad()
        out = model(batch, labels=batch).loss
        assert abs(float(out) - loss) < 2e-5
        out.backward()
        adamw.step()
    model.save_pretrained(where / "theirs")
    got, want = tensors(where / "run" / "adapter"), tensors(where / "theirs")
    began = tensors(where / "fresh")
    for key in got:
        off = abs(got[key] - want[key])
        # Of steps of 3e-3 each; AdamW makes much of a gradient that is about its rounding.
        assert np.quantile(off, 0.9) < 1e-5 and off.max() < 3e-4, (key, off.max())
        assert abs(want[key] - began[key]).max() > RATE, f"{key} was not trained"
    base = transformers.AutoModelForCausalLM.from_pretrained(
        where / "base", attn_implementation="eager"
    )
    loaded = peft.PeftModel.from_pretrained(base, where / "run" / "adapter").eval()
    mine, _ = llama.forward(IDS)
    assert abs(logits(loaded) - mine).max() < 2e-5 * abs(mine).max()
    assert abs(logits(model) - mine).max() < 1e-2
