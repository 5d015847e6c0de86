"""DoRA against PEFT's on random tiny models: logits, gradients of A, B and the magnitudes, dropout
with the same mask, steps of training, merged weights, and files in both directions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pylora.adapters.adapter import Adapter, parameters
from pylora.adapters.loraconfig import LoraConfig
from pylora.adapters.plan import resolve
from pylora.formats import open_checkpoint
from pylora.merging.merge import merge_checkpoint, unmerge_checkpoint
from pylora.model.llama import Llama
from pylora.training.config import TrainConfig
from pylora.training.optimizer import Optimizer, gradients, trainable

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

IDS = np.arange(14) * 11 % 61
LABELS = np.append(IDS[1:], -100)
SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "attn_implementation": "eager",
}
PATTERNS = {
    "target_modules": ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"],
    "rank_pattern": {"layers.0.self_attn.q_proj": 2},
    "alpha_pattern": {"down_proj": 5},
}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "Llama": ("Llama", {}, PATTERNS),
    "Mistral": ("Mistral", {"sliding_window": 5}, {"target_modules": "all-linear"}),
    "Qwen2": ("Qwen2", {}, {**PATTERNS, "use_rslora": True, "bias": "lora_only"}),
    "Qwen3": ("Qwen3", {"head_dim": 12}, {**PATTERNS, "r": 7}),
    "outside": ("Llama", {}, {"target_modules": ["embed_tokens", "lm_head", "up_proj"]}),
}


def theirs(case: str, where: Path) -> Any:
    """A model of transformers with PEFT's DoRA, every array random; both are in `where`."""
    kind, more, settings = CASES[case]
    torch.manual_seed(7)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **more})
    base = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for name, p in base.named_parameters():
        if name.endswith(".bias"):  # transformers starts them at zero
            torch.nn.init.normal_(p, std=0.1)
    base.save_pretrained(where / "base")
    fields = {"r": 4, "lora_alpha": 6, "use_dora": True, "init_lora_weights": False, **settings}
    model = peft.get_peft_model(base, peft.LoraConfig(**fields))
    for name, p in model.named_parameters():
        if "magnitude" in name:
            p.data *= 0.7 + 0.6 * torch.rand_like(p)
        elif "embedding" in name:
            p.data *= 0.1
    model.save_pretrained(where / "adapter")
    return model


def ours(where: Path, backend: Any) -> tuple[Llama, Adapter]:
    with open_checkpoint(where / "base") as checkpoint:
        llama = Llama.from_checkpoint(checkpoint, backend)
        adapter = Adapter.load(where / "adapter", checkpoint.config, base=checkpoint.load)
    llama.attach(adapter)
    return llama, adapter


def named(model: Any) -> dict[str, Any]:
    """PEFT's parameters that are trained, by their keys in files."""
    out = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            key = name.replace(".default", "")
            out[key.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")] = p
    return out


def near(got: Any, want: Any, what: str) -> None:
    want = want.detach().numpy() if hasattr(want, "detach") else want
    off = abs(np.asarray(got, np.float64) - want).max()
    assert off <= 3e-5 * abs(want).max() + 1e-9, (what, off, abs(want).max())


@pytest.mark.parametrize("case", CASES)
def test_logits_gradients_and_steps_are_pefts(case: str, ops: Any, tmp_path: Path) -> None:
    model = theirs(case, tmp_path)
    llama, adapter = ours(tmp_path, ops)
    logits, _ = llama.forward(IDS)
    near(logits, model(torch.tensor(IDS)[None]).logits[0], "logits")
    alone = llama.decode(IDS, llama.kv_cache(1, 20), [IDS.size])
    assert not ops.bitwise or alone[0].tobytes() == logits[-1].tobytes()
    rest = named(model)
    mine = parameters(adapter)
    assert set(mine) == set(rest)
    settings = TrainConfig(
        learning_rate=3e-3, steps=3, schedule="constant", max_grad_norm=None, weight_decay=0.01
    )
    optimizer = Optimizer(ops, trainable(llama.placed), settings)
    groups = [
        {"params": [p for n, p in rest.items() if n.endswith(".bias")], "weight_decay": 0.0},
        {"params": [p for n, p in rest.items() if not n.endswith(".bias")]},
    ]
    adamw = torch.optim.AdamW(groups, lr=3e-3, weight_decay=0.01)
    batch = torch.tensor(IDS)[None]
    for step in range(1, 4):
        _, grads = llama.loss(IDS, LABELS)
        adamw.zero_grad()
        model(batch, labels=batch).loss.backward()
        found = gradients(grads or {}, optimizer.parameters)
        if step == 1:
            for name, p in rest.items():
                path, field = optimizer_name(adapter, name)
                near(found[f"{path}.{field}"], p.grad, f"gradient of {name}")
        optimizer.update(found, optimizer.norm(found), step, 3e-3)
        adamw.step()
    llama.collect()
    for name, p in rest.items():
        off = abs(mine[name] - p.detach().numpy())
        # Of steps of 3e-3 each; AdamW makes much of a gradient that is about its rounding.
        assert np.quantile(off, 0.9) < 1e-5 and off.max() < 3e-4, (name, off.max())


def optimizer_name(adapter: Adapter, key: str) -> tuple[str, str]:
    from pylora.adapters.peft import tensor_names

    path, field, _ = tensor_names(adapter.plan)[key]
    return path, field


@pytest.mark.parametrize("case", ["Llama", "Qwen2", "outside"])
def test_merged_weights_are_pefts_and_come_back(case: str, tmp_path: Path) -> None:
    model = theirs(case, tmp_path)
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    want = {n: p.numpy() for n, p in model.merge_and_unload().state_dict().items()}
    with open_checkpoint(tmp_path / "merged") as merged:
        for name in merged.names():
            near(merged.load(name), want[name], name)
    unmerge_checkpoint(tmp_path / "merged", tmp_path / "back")
    with open_checkpoint(tmp_path / "base") as base, open_checkpoint(tmp_path / "back") as back:
        for name in base.names():
            assert base.raw(name)[0].tobytes() == back.raw(name)[0].tobytes(), name


class Mask(torch.nn.Module):  # type: ignore[misc]
    """Dropout with a mask that is given."""

    def __init__(self, mask: np.ndarray) -> None:
        super().__init__()
        self.mask = torch.tensor(mask)

    def forward(self, x: Any) -> Any:
        return x * self.mask


def test_dropout_is_of_the_adapted_part_as_in_peft(ops: Any) -> None:
    """The base's product takes x as it is; what DoRA adds to it takes drop(x), W's part too."""
    from pylora.model.linear import DropKey, LoRALinear
    from pylora.types import LoRA

    torch.manual_seed(3)
    inner = torch.nn.Sequential(torch.nn.Linear(20, 12))
    fields = {"r": 4, "use_dora": True, "lora_dropout": 0.4, "init_lora_weights": False}
    model = peft.get_peft_model(inner, peft.LoraConfig(target_modules=["0"], **fields)).train()
    layer = model.base_model.model[0]
    layer.lora_magnitude_vector["default"].weight.data *= 0.7 + 0.6 * torch.rand(12)
    arrays = [layer.lora_A["default"].weight, layer.lora_B["default"].weight,
              layer.lora_magnitude_vector["default"].weight]  # fmt: skip
    A, B, m = (a.detach().numpy().copy() for a in arrays)
    W, bias = (p.detach().numpy().copy() for p in (layer.base_layer.weight, layer.base_layer.bias))
    mine = LoRALinear("0", W, bias, ops=ops)
    mine.lora = LoRA(*map(ops.place, (A, B)), 8 / 4, 0.4, magnitude=ops.place(m))
    key, x = DropKey(5, 1), np.random.default_rng(0).normal(size=(9, 20)).astype(np.float32)
    mask = ops.to_numpy(ops.dropout(ops.asarray(np.ones_like(x)), key.of("0", mine.lora)))
    assert 0 < (mask == 0).mean() < 1
    layer.lora_dropout["default"] = Mask(mask)
    X = torch.tensor(x, requires_grad=True)
    want = model(X)
    y, cache = mine.forward(ops.asarray(x), drop=key)
    near(ops.to_numpy(y), want, "y")
    dy = np.random.default_rng(1).normal(size=(9, 12)).astype(np.float32)
    (want * torch.tensor(dy)).sum().backward()
    grads: dict[str, Any] = {}
    dx = mine.backward(ops.asarray(dy), cache, grads)
    near(ops.to_numpy(dx), X.grad, "dx")
    for name, p in zip(("A", "B", "magnitude"), arrays, strict=True):
        near(ops.to_numpy(getattr(grads["0"], name)), p.grad, name)


def test_peft_loads_what_is_written_here_and_a_fresh_one_is_pefts(tmp_path: Path) -> None:
    model = theirs("Llama", tmp_path)
    settings = LoraConfig(r=3, target_modules=["k_proj", "up_proj"], use_dora=True)
    with open_checkpoint(tmp_path / "base") as checkpoint:
        plan = resolve(settings, checkpoint.config.modules())
        adapter = Adapter.init(plan, settings, 1, base=checkpoint.load)
    adapter.save(tmp_path / "mine")
    base = type(model.base_model.model).from_pretrained(tmp_path / "base")
    before = base(torch.tensor(IDS)[None]).logits.detach()
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path / "mine"), is_trainable=True)
    for name, p in named(loaded).items():
        assert p.detach().numpy().tobytes() == parameters(adapter)[name].tobytes(), name
    assert abs(loaded(torch.tensor(IDS)[None]).logits - before).max() < 1e-5
    fresh = peft.get_peft_model(
        base.unload() if hasattr(base, "unload") else loaded.unload(),
        peft.LoraConfig(r=3, target_modules=["k_proj", "up_proj"], use_dora=True),
    )
    for name, p in named(fresh).items():
        if "magnitude" in name:
            near(parameters(adapter)[name], p, name)
