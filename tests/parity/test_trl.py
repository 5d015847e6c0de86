"""Parity with TRL: its own trainers' losses and gradients of A and B, on a tiny Llama of PEFT.

TRL's trainer is given a batch of the same tokens and its compute_loss is run, forward and backward;
nothing of it is copied here. Float32 on both sides.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from preferences import preferences, verdicts

from pylora.adapters.adapter import Adapter
from pylora.formats import open_checkpoint
from pylora.model.llama import Llama
from pylora.training.objectives.answers import Answer, Preference, Verdict
from pylora.training.objectives.choose import choose

trl = pytest.importorskip("trl")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
datasets = pytest.importorskip("datasets")

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

VOCAB = 67
TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama and an adapter of it with every array random, as PEFT saves them."""
    folder = tmp_path_factory.mktemp("trl")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder / "base")
    lora = peft.LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, lora)
    for name, p in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.3)
    adapted.save_pretrained(folder / "adapter")
    return folder


def tokenizer() -> Any:
    """Numbers are words, so that a data set can be tokenized; the batches are made of ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {str(i): i for i in range(VOCAB - 1)} | {"<end>": VOCAB - 1}
    inner = Tokenizer(models.WordLevel(words, unk_token="0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<end>", pad_token="<end>"
    )


def ids(answer: Answer) -> tuple[list[int], list[int]]:
    """Prompt and answer of an Answer."""
    tokens = [*answer.ids.tolist(), int(answer.targets[-1])]
    return tokens[: -answer.count], tokens[-answer.count :]


def of_trl(kind: Any, config: Any, base: Path, out: Path, columns: Any, **settings: Any) -> Any:
    """A trainer of TRL, with the adapter of `base`; `columns` is a data set that it accepts."""
    model = transformers.LlamaForCausalLM.from_pretrained(base / "base", torch_dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, base / "adapter", is_trainable=True)
    args = config(
        output_dir=str(out), use_cpu=True, bf16=False, report_to=[], max_length=None,
        gradient_checkpointing=False, per_device_train_batch_size=8, **settings,
    )  # fmt: skip
    return kind(
        model=model,
        args=args,
        train_dataset=datasets.Dataset.from_dict(columns),
        processing_class=tokenizer(),
    )


PAIRS = {"prompt": ["1 2"] * 2, "chosen": ["3"] * 2, "rejected": ["4"] * 2}
JUDGED = {"prompt": ["1 2", "3"], "completion": ["3", "5 6"], "label": [True, False]}


def compared(trainer: Any, batch: Any, base: Path, objective: Any, items: Any, ops: Any) -> None:
    """Loss and gradients of both. The adapter's own reference is the model without it."""
    trainer.model.train()
    # A trainer that keeps an adapter as its reference compares with that; here it is the base.
    for name in [n for n in trainer.model.peft_config if n != "default"]:
        trainer.model.delete_adapter(name)
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    want = {
        name.replace(".default.", "."): p.grad.numpy()
        for name, p in trainer.model.named_parameters()
        if p.grad is not None
    }
    with open_checkpoint(base / "base") as checkpoint:
        model = Llama.from_checkpoint(checkpoint, backend=ops)
    adapter = Adapter.load(base / "adapter", model.config)
    model.attach(adapter)
    objective.prepare(model, items, None)
    if objective.name == "kto":
        assert objective.of_step(model, items) > 0, "z is clipped: nothing of it is compared"
    half = len(items) // 2
    micros = (tuple(range(half)), tuple(range(half, len(items))))
    got, _, grads = objective.gradients(model, items, micros, None, False)
    assert got == pytest.approx(float(loss.detach()), rel=2e-6)
    assert want
    for path, grad in grads.items():
        for field in "AB":
            expected = want.pop(f"base_model.model.{path}.lora_{field}.weight")
            scale = np.abs(expected).max()
            assert scale > 0
            np.testing.assert_allclose(getattr(grad, field), expected, atol=2e-5 * scale, rtol=0)
    assert not want, f"TRL has gradients that pylora has not: {list(want)[:3]}"


def pair_batch(trainer: Any, items: list[Preference]) -> Any:
    rows = []
    for item in items:
        (prompt, chosen), (_, rejected) = ids(item.chosen), ids(item.rejected)
        rows.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
    return trainer.data_collator(rows)


@pytest.mark.parametrize(
    "name, theirs, ours",
    [
        ("dpo", {"loss_type": "sigmoid", "beta": 0.3}, {"beta": 0.3}),
        ("ipo", {"loss_type": "ipo", "beta": 0.2}, {"beta": 0.2}),
    ],
)
def test_against_the_dpo_trainer(
    name: str, theirs: Any, ours: Any, base: Path, tmp_path: Path, ops: Any
) -> None:
    trainer = of_trl(trl.DPOTrainer, trl.DPOConfig, base, tmp_path, PAIRS, **theirs)
    items = preferences(vocab=VOCAB)
    compared(trainer, pair_batch(trainer, items), base, choose(name, **ours), items, ops)


def concatenated(items: list[Preference]) -> Any:
    """The batch of TRL's older trainers: each answer with its prompt, and labels."""
    batch: dict[str, Any] = {}
    for kind in ("chosen", "rejected"):
        pairs = [ids(getattr(item, kind)) for item in items]
        longest = max(len(p) + len(a) for p, a in pairs)
        for key, fill in (("input_ids", VOCAB - 1), ("attention_mask", 0), ("labels", -100)):
            rows = []
            for p, a in pairs:
                row = {
                    "input_ids": p + a,
                    "attention_mask": [1] * len(p + a),
                    "labels": [-100] * len(p) + a,
                }[key]
                rows.append(row + [fill] * (longest - len(row)))
            batch[f"{kind}_{key}"] = torch.tensor(rows)
    return batch


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_simpo_against_the_cpo_trainer(
    smoothing: float, base: Path, tmp_path: Path, ops: Any
) -> None:
    cpo = pytest.importorskip("trl.experimental.cpo")
    trainer = of_trl(
        cpo.CPOTrainer, cpo.CPOConfig, base, tmp_path, PAIRS,
        loss_type="simpo", cpo_alpha=0.0, beta=2.0, simpo_gamma=0.7, label_smoothing=smoothing,
    )  # fmt: skip
    items = preferences(vocab=VOCAB)
    objective = choose("simpo", beta=2.0, gamma=0.7, label_smoothing=smoothing)
    compared(trainer, concatenated(items), base, objective, items, ops)


def test_orpo(base: Path, tmp_path: Path, ops: Any) -> None:
    orpo = pytest.importorskip("trl.experimental.orpo")
    trainer = of_trl(orpo.ORPOTrainer, orpo.ORPOConfig, base, tmp_path, PAIRS, beta=0.4)
    items = preferences(vocab=VOCAB)
    compared(trainer, concatenated(items), base, choose("orpo", beta=0.4), items, ops)


def test_label_smoothing_of_dpo(ops: Any) -> None:
    """TRL's DPO has had it in other trainers' form since 1.0: CPO's loss of the same margin."""
    cpo = pytest.importorskip("trl.experimental.cpo")
    from types import SimpleNamespace

    from pylora.training.objectives.likelihood import preferred

    holder = SimpleNamespace(
        alpha=0.0, beta=0.3, loss_type="sigmoid", label_smoothing=0.15,
        accelerator=SimpleNamespace(device="cpu"),
    )  # fmt: skip
    margins = torch.linspace(-30, 30, 41, dtype=torch.float64, requires_grad=True)
    losses, _, _ = cpo.CPOTrainer.cpo_loss(holder, margins, torch.zeros(41, dtype=torch.float64))
    losses.sum().backward()
    assert margins.grad is not None
    for h, loss, slope in zip(margins.tolist(), losses.tolist(), margins.grad.tolist()):
        got = preferred(0.3 * h, 0.15)
        assert got[0] == pytest.approx(loss, rel=1e-12)
        assert 0.3 * got[1] == pytest.approx(slope, rel=1e-9, abs=1e-15)


def test_kto(base: Path, tmp_path: Path, ops: Any) -> None:
    trainer = of_trl(
        trl.KTOTrainer, trl.KTOConfig, base, tmp_path, JUDGED,
        beta=0.5, desirable_weight=1.3, undesirable_weight=0.6,
    )  # fmt: skip
    items: list[Verdict] = verdicts(vocab=VOCAB)
    rows = []
    for item in items:
        (prompt, completion), (_, other) = ids(item.answer), ids(item.other)
        rows.append(
            {
                "prompt_ids": prompt, "completion_ids": completion, "KL_completion_ids": other,
                "label": item.desirable,
            }
        )  # fmt: skip
    objective = choose("kto", beta=0.5, desirable_weight=1.3, undesirable_weight=0.6)
    compared(trainer, trainer.data_collator(rows), base, objective, items, ops)


@pytest.mark.parametrize("k", [1, 5])
def test_distillation_against_the_server_distillation_trainer(
    k: int, base: Path, tmp_path: Path, ops: Any
) -> None:
    """TRL's loss of a teacher's k likeliest tokens and the tail, with gradients of its logits."""
    server = pytest.importorskip("trl.experimental.server_distillation.server_distillation_trainer")
    from types import SimpleNamespace

    from pylora.training.objectives.soft import divergence

    kind = server.ServerDistillationTrainer
    holder = SimpleNamespace(
        loss_add_tail=True, _reduce_divergence_loss=kind._reduce_divergence_loss
    )
    torch.manual_seed(1)
    teacher = torch.log_softmax(torch.randn(1, 6, VOCAB, dtype=torch.float64) * 3, -1)
    logits = torch.randn(1, 6, VOCAB, dtype=torch.float64, requires_grad=True)
    values, ids = teacher.topk(k)
    loss = kind._compute_server_forward_kl_loss(
        holder,
        {"topk_logprobs": values, "topk_token_ids": ids},
        torch.log_softmax(logits, -1),
        torch.zeros(1, 6, dtype=torch.long),
    )
    loss.backward()
    log_q = torch.log_softmax(logits.detach(), -1)[0].numpy()
    found, want = 0.0, logits.grad[0].numpy() * 6
    for row in range(6):
        at = ids[0, row].numpy()
        kl, outer, inner = divergence(values[0, row].numpy(), log_q[row, at])
        got = np.exp(log_q[row]) * outer
        got[at] = inner
        np.testing.assert_allclose(got, want[row], rtol=1e-9, atol=1e-14)
        found += kl
    assert found / 6 == pytest.approx(float(loss.detach()), rel=1e-12)
