"""Adapters that began with a part of the base's weights, against PEFT: read, converted, made here.

PEFT loads an unconverted PiSSA or OLoRA adapter by taking the same part from the base again; what
it then computes, pylora computes on the base as it is. What PEFT converts is a plain adapter.
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_hf

from pylora.adapters.adapter import Adapter, parameters
from pylora.adapters.loraconfig import LoraConfig
from pylora.errors import ConfigError, PlanError, UnsupportedError
from pylora.formats import open_checkpoint
from pylora.merging.merge import merge_checkpoint
from pylora.model.config import LlamaConfig
from pylora.model.llama import Llama
from pylora.training.beginnings import begin
from pylora.training.config import TrainConfig
from pylora.training.examples import Example
from pylora.training.train import train

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

SIZES = {**tiny_hf.SIZES, "pad_token_id": None}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "pissa": ("Llama", {"r": 3, "lora_alpha": 7}),
    "pissa, rslora, patterns": (
        "Qwen2",
        {
            "r": 4,
            "lora_alpha": 6,
            "use_rslora": True,
            "rank_pattern": {"q_proj": 2},
            "alpha_pattern": {"down_proj": 3},
        },
    ),
    "olora": ("Mistral", {"r": 3, "lora_alpha": 7}),
    "olora of Qwen3": ("Qwen3", {"r": 2, "lora_alpha": 2, "rank_pattern": {"o_proj": 4}}),
}
TARGETS = ["q_proj", "o_proj", "down_proj", "up_proj"]
IDS = np.array([3, 17, 40, 8, 1, 22, 9, 30, 5])


def base_of(kind: str, where: Path) -> Any:
    torch.manual_seed(7)
    model = getattr(transformers, f"{kind}ForCausalLM")(
        getattr(transformers, f"{kind}Config")(**SIZES, tie_word_embeddings=False)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
            if parameter.ndim > 1:
                parameter.mul_(3)
    model.float().eval().save_pretrained(where)
    return model


def logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        found: np.ndarray = model(torch.from_numpy(IDS)[None]).logits[0].numpy()
    return found


def close(got: Any, want: np.ndarray, scale: float = 1.0) -> None:
    np.testing.assert_allclose(
        np.asarray(got), want, rtol=0, atol=4e-5 * scale * float(np.abs(want).max())
    )


def conditioning(base: Any, ranks: dict[str, int]) -> float:
    """How much a principal part of a weight moves where the weight does: by Davis and Kahan, the
    largest singular value over the gap behind the part. PEFT decomposes in float32."""
    worst = 0.0
    for path, r in ranks.items():
        S = np.linalg.svd(base.get_parameter(f"{path}.weight").detach().numpy(), compute_uv=False)
        worst = max(worst, float(S[0] / (S[r - 1] - S[r])))
    return worst


def config_of(name: str) -> Any:
    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=TARGETS,
        init_lora_weights=name.split(",")[0].split(" ")[0],
        **CASES[name][1],
    )


@pytest.mark.parametrize("name", CASES)
def test_read_converted_and_made_it_is_what_peft_computes(name: str, tmp_path: Path) -> None:
    kind, settings = CASES[name]
    base = base_of(kind, tmp_path / "base")
    before = logits(base)
    model = peft.get_peft_model(copy.deepcopy(base), config_of(name)).eval()
    close(logits(model), before)
    begun = {
        n.split(".lora_A")[0].removeprefix("base_model.model."): (
            p.detach().numpy().copy(),
            model.get_parameter(n.replace("lora_A", "lora_B")).detach().numpy().copy(),
        )
        for n, p in model.named_parameters()
        if "lora_A" in n
    }
    # What it began with, as PEFT's documentation says to keep it.
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = config_of(name).init_lora_weights
    ids = torch.from_numpy(IDS)[None]
    model(ids, labels=ids).loss.backward()
    grads = {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_" in n:
                p.add_(0.2 * torch.randn_like(p))
    trained = logits(model)
    model.save_pretrained(tmp_path / "raw")
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "raw").eval()
    close(logits(loaded), trained)
    off = 1 + conditioning(base, {path: A.shape[0] for path, (A, _) in begun.items()}) / 20
    places = [tmp_path / "raw"]
    if "rslora" not in name:  # PEFT converts no patterns with rslora
        model.save_pretrained(
            tmp_path / "plain",
            path_initial_model_for_weight_conversion=str(tmp_path / "initial"),
        )
        places.append(tmp_path / "plain")
    with open_checkpoint(tmp_path / "base") as checkpoint:
        llama = Llama.from_checkpoint(checkpoint)
        for place in places:
            adapter = Adapter.load(place, checkpoint.config, base=checkpoint.load)
            assert adapter.config.init_lora_weights is True
            llama.attach(adapter)
            close(llama.forward(IDS)[0], trained, off if place.name == "raw" else 1)
        with pytest.raises(PlanError, match="base=checkpoint.load"):
            Adapter.load(tmp_path / "raw", checkpoint.config)
        made = begin(
            name.split(",")[0].split(" ")[0],
            LoraConfig(target_modules=TARGETS, **settings),
            llama,
            checkpoint.load,
        )
        for path, (A, B) in begun.items():
            r = made.held[path]
            assert A.shape[0] == r
            close(made[path].B[:, :r] @ made[path].A[:r], B @ A, off)
        llama.attach(made)
        close(llama.forward(IDS)[0], before)
        made.save(tmp_path / "made")
        close(
            logits(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "made")), before
        )
        _, found = llama.loss(IDS, np.append(IDS[1:], -100))
        assert found is not None
        for path, (A, B) in begun.items():  # B Bᵀ dA and dB Aᵀ A do not depend on signs
            r, at = made.held[path], f"base_model.model.{path}.lora_"
            dA, dB = found[path].A[:r], found[path].B[:, :r]
            close(made[path].B[:, :r] @ dA, B @ grads[f"{at}A.default.weight"], 5 * off)
            close(dB @ made[path].A[:r], grads[f"{at}B.default.weight"] @ A, 5 * off)
    merge_checkpoint(tmp_path / "base", tmp_path / "raw", tmp_path / "merged")
    with open_checkpoint(tmp_path / "merged") as merged:
        close(Llama.from_checkpoint(merged).forward(IDS)[0], trained, off)


def tiny(**more: Any) -> LlamaConfig:
    return LlamaConfig.tiny(**more)


def test_what_is_held_stays_and_the_run_is_resumed_bit_for_bit(tmp_path: Path) -> None:
    config = tiny()
    llama = Llama.random(config, 3)
    weights = {path: np.array(llama.ops.unpack(m.W)) for path, m in llama.modules.items()}
    base = lambda name: weights[name.removesuffix(".weight")]
    rng = np.random.default_rng(0)
    examples = [Example(ids, ids.copy()) for ids in rng.integers(0, config.vocab_size, (4, 7))]
    how = TrainConfig(steps=4, batch_size=2, weight_decay=0.3, learning_rate=1e-2, save_every=2)

    def fresh() -> Adapter:
        settings = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"])
        return begin("pissa", settings, llama, base)

    start, adapter = fresh(), fresh()
    train(llama, adapter, examples, how, tmp_path / "run")
    for path, n in adapter.held.items():
        assert np.array_equal(adapter[path].A[n:], start[path].A[n:])
        assert np.array_equal(adapter[path].B[:, n:], start[path].B[:, n:])
        assert not np.array_equal(adapter[path].A[:n], start[path].A[:n])
    whole = parameters(adapter)
    shutil.rmtree(tmp_path / "run" / "checkpoint-000004")
    again = fresh()
    train(llama, again, examples, how, tmp_path / "run", resume=True)
    assert all(np.array_equal(whole[key], array) for key, array in parameters(again).items())


def test_loftq_is_what_peft_fits_to_the_quantized_base() -> None:
    from peft.utils.loftq_utils import _low_rank_decomposition

    config = tiny(hidden_size=64, intermediate_size=96, head_dim=16)
    exact = Llama.random(config, 3)
    llama = Llama.random(config, 3, precision="int4")
    weights = {path: np.array(exact.ops.unpack(m.W)) for path, m in exact.modules.items()}
    base = lambda name: weights[name.removesuffix(".weight")]
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    adapter = begin("loftq", settings, llama, base)
    for path, low in adapter.items():
        rest = weights[path] - llama.ops.unpack(llama.modules[path].W)
        theirs = _low_rank_decomposition(torch.from_numpy(rest), 4)
        close(low.scale * (low.B @ low.A), (theirs["L"] @ theirs["R"]).numpy(), 5)
        assert np.linalg.norm(rest - low.scale * (low.B @ low.A)) < 0.95 * np.linalg.norm(rest)
    with pytest.raises(ConfigError, match="int4"):
        begin("loftq", settings, exact, base)


def test_eva_has_the_directions_that_peft_finds(tmp_path: Path) -> None:
    base = base_of("Llama", tmp_path / "base")
    settings = peft.LoraConfig(
        r=3, target_modules=TARGETS, init_lora_weights="eva", task_type="CAUSAL_LM",
        eva_config=peft.EvaConfig(rho=1.0, tau=0.0, use_label_mask=False),
    )  # fmt: skip
    model = peft.get_peft_model(base, settings).eval()
    ids = torch.randint(0, 43, (1, 60))
    found = peft.get_eva_state_dict(
        model, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}] * 2,
        show_progress_bar=False,
    )  # fmt: skip
    with open_checkpoint(tmp_path / "base") as checkpoint:
        llama = Llama.from_checkpoint(checkpoint)
        row = ids[0].numpy()
        config = LoraConfig(r=3, target_modules=TARGETS)
        adapter = begin("eva", config, llama, checkpoint.load, [Example(row, row)])
    for name, A in found.items():
        own = adapter[name.removeprefix("base_model.model.")].A
        # The span: PEFT's low-rank decomposition is of random numbers.
        overlap = np.linalg.svd(own @ A.numpy().T, compute_uv=False)
        assert overlap.min() > 0.99, (name, overlap)
        close(own @ own.T, np.eye(3))
    assert all(not low.B.any() for low in adapter.values())


def test_what_cannot_begin_so_is_refused() -> None:
    llama = Llama.random(tiny(tie_word_embeddings=True), 3)
    base = lambda name: np.zeros(llama.config.tensors()[name], np.float32)
    head = LoraConfig(r=2, target_modules=["lm_head"])
    with pytest.raises(UnsupportedError, match="tied"):
        begin("pissa", head, llama, base)
    with pytest.raises(UnsupportedError, match="embed_tokens"):
        begin("olora", LoraConfig(r=2, target_modules=["embed_tokens"]), llama, base)
    with pytest.raises(ConfigError, match="dropout"):
        begin("pissa", LoraConfig(target_modules=["q_proj"], lora_dropout=0.1), llama, base)
    with pytest.raises(PlanError, match="of rank 999"):
        begin("pissa", LoraConfig(r=999, target_modules=["q_proj"]), llama, base)
    with pytest.raises(ConfigError, match="not known"):
        begin("corda", LoraConfig(target_modules=["q_proj"]), llama, base)
    with pytest.raises(ConfigError, match="tokens"):
        begin("eva", LoraConfig(target_modules=["q_proj"]), llama, base)


@pytest.mark.parametrize("how", ["corda", "lora_ga"])
def test_what_took_from_the_base_by_data_is_read_with_its_first_values(
    how: str, tmp_path: Path
) -> None:
    """PEFT's model before it is saved computes what the adapter does here on the unchanged base."""
    base = base_of("Llama", tmp_path / "base")
    before, ids = logits(base), torch.from_numpy(IDS)[None]
    fields: dict[str, Any] = {"r": 3, "lora_alpha": 7, "target_modules": TARGETS}
    work = copy.deepcopy(base)
    if how == "corda":
        from peft.tuners.lora.config import CordaConfig
        from peft.tuners.lora.corda import preprocess_corda

        config = peft.LoraConfig(
            **fields, task_type="CAUSAL_LM", init_lora_weights=how,
            corda_config=CordaConfig(corda_method="kpm"),
        )  # fmt: skip
        many = torch.arange(3 * 40).reshape(3, 40) * 7 % int(SIZES["vocab_size"])
        preprocess_corda(work, config, run_model=lambda: [work(one[None]) for one in many])
    else:
        from peft import LoraGAConfig, preprocess_loraga

        config = peft.LoraConfig(
            **fields, task_type="CAUSAL_LM", init_lora_weights=how, lora_ga_config=LoraGAConfig()
        )
        preprocess_loraga(work, config, lambda: work(ids, labels=ids).loss.backward())
    model = peft.get_peft_model(work, config).eval()
    close(logits(model), before, 20)  # CorDA inverts a covariance
    rest = logits(model)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / f"{how}_init")
    model.peft_config["default"].init_lora_weights = how
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "trained")
    want = logits(model)
    assert abs(want - rest).max() > 100 * abs(rest - before).max()
    with open_checkpoint(tmp_path / "base") as checkpoint:
        read = Adapter.load(tmp_path / "trained", checkpoint.config, base=checkpoint.load)
        llama = Llama.from_checkpoint(checkpoint)
        llama.attach(read)
        close(llama.forward(IDS)[0], want, 20)
        assert read.config.r == 6 and read.config.init_lora_weights is True
        # Within the adapter's folder it counts, too; two are not clear; without it the error says.
        (tmp_path / f"{how}_init").rename(tmp_path / "trained" / f"{how}_init")
        again = Adapter.load(tmp_path / "trained", checkpoint.config, base=checkpoint.load)
        assert again.digest() == read.digest()
        shutil.copytree(tmp_path / "trained" / f"{how}_init", tmp_path / f"{how}_init")
        with pytest.raises(PlanError, match="both look like the adapter before training"):
            Adapter.load(tmp_path / "trained", checkpoint.config, base=checkpoint.load)
        for folder in (tmp_path / "trained", tmp_path):
            shutil.rmtree(folder / f"{how}_init")
        with pytest.raises(UnsupportedError, match=f"as {how}_init; or, in PEFT"):
            Adapter.load(tmp_path / "trained", checkpoint.config, base=checkpoint.load)
