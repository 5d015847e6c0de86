"""Parity with PEFT and transformers: logits, loss, gradients, files in both directions, merging.

Random tiny Llama, Mistral, Qwen2 and Qwen3 made by transformers, adapters made by PEFT with every
array random (B included), compared in float32. Each case is built once and run on every backend.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bounds
import numpy as np
import pytest

from pylora.adapters import peft as ours
from pylora.adapters.adapter import Adapter, parameters
from pylora.adapters.loraconfig import LoraConfig
from pylora.adapters.plan import resolve
from pylora.formats import open_checkpoint
from pylora.merging.merge import merge_checkpoint, unmerge_checkpoint
from pylora.model.config import LlamaConfig
from pylora.model.llama import Llama
from pylora.types import Seqs

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore"),  # PEFT warns about tied weights and saved embeddings
]

SIZES: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "attn_implementation": "eager",
}
KINDS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": 5},
    "Qwen2": {},
    "Qwen3": {"head_dim": 12},
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
SETTINGS: dict[str, dict[str, Any]] = {
    "patterns": {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ATTENTION,
        "rank_pattern": {"layers.0.self_attn.q_proj": 2, "q_proj": 5, "v_proj": 6},
        "alpha_pattern": {r"model\.layers\.1\..*(q|o)_proj": 3, "k_proj": 9},
    },
    "rslora": {
        "r": 5,
        "lora_alpha": 7,
        "use_rslora": True,
        "target_modules": ["gate_proj", "up_proj", "down_proj"],
        "rank_pattern": {"down_proj": 3},
    },
    "all-linear": {"r": 3, "target_modules": "all-linear", "exclude_modules": ["1.mlp.up_proj"]},
    "embeddings": {"r": 3, "target_modules": ["embed_tokens", "lm_head", "v_proj"]},
    "one layer": {"r": 2, "target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    "lora_bias": {"target_modules": r".*self_attn\.(q|v)_proj", "lora_bias": True},
    "lora_only": {"target_modules": ["q_proj", "down_proj"], "bias": "lora_only"},
    "bias all": {"target_modules": ["v_proj"], "bias": "all", "lora_bias": True},
}
CASES = [
    *[("Llama", name, False) for name in SETTINGS],
    ("Llama", "embeddings", True),
    *[(kind, name, True) for kind in ("Mistral", "Qwen3") for name in ("patterns", "all-linear")],
    *[("Qwen2", name, True) for name in ("rslora", "lora_bias", "lora_only", "bias all")],
]
LENGTHS = (11, 11)


@dataclass
class Case:
    """A base model and an adapter on disk, and what PEFT computes with them."""

    kind: str
    settings: dict[str, Any]
    tied: bool
    base: Path
    adapter: Path
    model: Any  # the PeftModel
    ids: np.ndarray
    logits: np.ndarray
    loss: float
    grads: dict[str, np.ndarray]  # by the keys that PEFT saves


@pytest.fixture(scope="module", params=CASES, ids=lambda c: f"{c[0]}-{c[1]}-{'tied' * c[2]}")
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    kind, name, tied = request.param
    where = tmp_path_factory.mktemp("parity")
    torch.manual_seed(CASES.index(request.param))
    config = getattr(transformers, f"{kind}Config")(
        **SIZES, **KINDS[kind], tie_word_embeddings=tied
    )
    base = getattr(transformers, f"{kind}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.ndim == 1:  # norms and biases, which start as ones and zeros
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.mul_(6)  # transformers starts at 0.02, where nothing would be seen
    base.save_pretrained(where / "base")
    model = peft.get_peft_model(base, peft.LoraConfig(**SETTINGS[name])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(where / "adapter")
    ids = torch.randint(0, config.vocab_size, (len(LENGTHS), LENGTHS[0]))
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    grads = {
        n.replace(".default", ""): p.grad.numpy()
        for n, p in model.named_parameters()
        if p.grad is not None and p.requires_grad
    }
    logits = out.logits.detach().numpy().reshape(-1, config.vocab_size)
    return Case(
        kind,
        SETTINGS[name],
        tied,
        where / "base",
        where / "adapter",
        model,
        ids.numpy(),
        logits,
        float(out.loss),
        grads,
    )


def tolerance(c: LlamaConfig) -> float:
    """Relative to the largest value: two computations (hence twice) of a chain of sums this long,
    and three passes of it for a gradient (forward, and backward through two factors)."""
    attention = 3 * c.hidden_size + c.head_dim + max(LENGTHS) + c.q_size
    layer = attention + 4 * c.hidden_size + c.intermediate_size
    return 2 * 3 * bounds.chain_random(c.num_hidden_layers * layer + 2 * c.hidden_size)


def load(case: Case, ops: Any = None) -> tuple[Llama, Adapter]:
    with open_checkpoint(case.base) as checkpoint:
        model = Llama.from_checkpoint(checkpoint, backend=ops)
        modules = checkpoint.config.modules()
        adapter = Adapter.load(case.adapter, modules, base=checkpoint.load)
    model.attach(adapter)
    return model, adapter


def transformers_logits(model: Any, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(ids)).logits
    return np.asarray(logits.numpy().reshape(ids.size, -1))


def test_logits_loss_and_gradients(case: Case, ops: Any) -> None:
    model, adapter = load(case, ops)
    limit, seqs = tolerance(model.config), Seqs.of(LENGTHS)
    ids = case.ids.reshape(-1)
    logits, _ = model.forward(ids, seqs)
    bounds.close(ops.to_numpy(logits), case.logits, limit, "logits")
    labels = np.full(case.ids.shape, -100)
    labels[:, :-1] = case.ids[:, 1:]
    nll, grads = model.loss(ids, labels.reshape(-1), seqs)
    bounds.close(nll.sum() / (labels >= 0).sum(), case.loss, limit, "loss")
    assert grads is not None
    names = ours.tensor_names(adapter.plan)
    # Where rank 0 stands for "only the bias", PEFT has no A and B.
    assert set(case.grads) == set(names)
    for key, (path, field, _) in names.items():
        bounds.close(ops.to_numpy(getattr(grads[path], field)), case.grads[key], limit, key)


def test_the_plan_is_pefts(case: Case) -> None:
    _, adapter = load(case)
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in case.model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert {e.path for e in adapter.plan} == set(layers)
    for e in adapter.plan:
        layer = layers[e.path]
        assert (e.r, e.alpha) == (layer.r["default"], layer.lora_alpha["default"])
        assert e.scale == layer.scaling["default"]


def test_peft_loads_what_we_save(case: Case, tmp_path: Path) -> None:
    _, adapter = load(case)
    adapter.save(tmp_path / "saved")
    base = transformers.AutoModelForCausalLM.from_pretrained(case.base, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "saved").eval()
    before, after = case.model.state_dict(), model.state_dict()
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert torch.equal(tensor, after[key]), key
    with open_checkpoint(case.base) as checkpoint:  # the same bits, but another attention kernel
        limit = tolerance(checkpoint.config)
    bounds.close(transformers_logits(model, case.ids), case.logits, limit, "loaded by PEFT")


def test_merged_directory_in_transformers(case: Case, tmp_path: Path) -> None:
    if case.settings.get("lora_bias") and case.kind != "Qwen2":
        pytest.skip("these modules have no bias that a bias of B could be merged into")
    merge_checkpoint(case.base, case.adapter, tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    got = transformers_logits(merged, case.ids)
    with open_checkpoint(tmp_path / "merged") as checkpoint:
        limit = tolerance(checkpoint.config)
        untied = checkpoint.config.tie_word_embeddings != case.tied
        again = Llama.from_checkpoint(checkpoint)
    bounds.close(got, case.logits, limit, "merged against PEFT's adapter")
    logits, _ = again.forward(case.ids.reshape(-1), Seqs.of(LENGTHS))
    bounds.close(again.ops.to_numpy(logits), case.logits, limit, "merged in pylora")
    if not untied:
        base = transformers.AutoModelForCausalLM.from_pretrained(case.base, dtype=torch.float32)
        theirs = peft.PeftModel.from_pretrained(base, case.adapter).merge_and_unload()
        bounds.close(
            got, transformers_logits(theirs, case.ids), limit, "merged against merge_and_unload"
        )
    unmerge_checkpoint(tmp_path / "merged", tmp_path / "back")
    with open_checkpoint(case.base) as a, open_checkpoint(tmp_path / "back") as b:
        assert a.names() == b.names()
        assert a.config == b.config
        for name in a.names():
            assert a.raw(name)[0].tobytes() == b.raw(name)[0].tobytes(), name


@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_initial_values_have_pefts_distribution(init: bool | str) -> None:
    """The bounds (uniform) and deviations of PEFT's own initialisation, module by module."""
    torch.manual_seed(0)
    sizes = SIZES | {"vocab_size": 500, "hidden_size": 64}
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    fields: dict[str, Any] = {
        "r": 16,
        "target_modules": ["q_proj", "down_proj", "embed_tokens"],
        "init_lora_weights": init,
    }
    state = peft.get_peft_model(base, peft.LoraConfig(**fields)).state_dict()
    config = LoraConfig(**fields)
    modules = LlamaConfig.from_hf(base.config.to_dict()).modules()
    for key, array in parameters(Adapter.init(resolve(config, modules), config)).items():
        stem = key.removesuffix(".weight")
        theirs = state[f"{stem}.default" + ".weight" * key.endswith(".weight")].numpy()
        assert array.shape == theirs.shape
        # Either has its deviation within 5 standard errors of the common one, sqrt(1 / 2n) each.
        assert abs(array.std() - theirs.std()) <= 10 * theirs.std() / np.sqrt(2 * array.size), key
        if isinstance(init, bool) and "embedding" not in key:  # uniform: bounded
            assert abs(array).max() <= 1.01 * abs(theirs).max()
