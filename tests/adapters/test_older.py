"""Adapters under other names: of multimodal models, and of experts that were modules each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
from family_cases import VOCAB, quiet, their_model

from pylora.adapters.adapter import Adapter
from pylora.errors import PlanError, UnsupportedError
from pylora.formats import open_checkpoint
from pylora.formats.safetensors import save
from pylora.merging.merge import merge_checkpoint
from pylora.model.llama import Llama

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 20, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
IDS = np.arange(3, 25)


def write(folder: Path, shapes: dict[str, tuple[int, int]], config: dict[str, Any]) -> Path:
    """An adapter of random numbers with modules of these paths and sizes [outputs, inputs]."""
    folder.mkdir()
    rng, r = np.random.default_rng(3), config["r"]
    tensors = {}
    for path, (d, k) in shapes.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = rng.standard_normal((r, k)) * 0.3
        tensors[f"base_model.model.{path}.lora_B.weight"] = rng.standard_normal((d, r)) * 0.3
    save(
        folder / "adapter_model.safetensors",
        {name: a.astype(np.float32) for name, a in tensors.items()},
        {"format": "pt"},
    )
    whole = {"peft_type": "LORA", "task_type": "CAUSAL_LM", **config}
    (folder / "adapter_config.json").write_text(json.dumps(whole))
    return folder


def experts_of(kind: str, layers: int = 2) -> tuple[str, dict[str, tuple[int, int]]]:
    """The module that holds experts, and an expert's modules with their sizes."""
    if kind == "mixtral":
        return "block_sparse_moe.experts", {"w1": (20, 32), "w2": (32, 20), "w3": (20, 32)}
    return "mlp.experts", {"gate_proj": (12, 32), "up_proj": (12, 32), "down_proj": (32, 12)}


def theirs(directory: Path, adapter: Path) -> np.ndarray:
    """The logits of transformers and PEFT."""
    import peft
    import torch

    model = quiet().AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    adapted = peft.PeftModel.from_pretrained(model, adapter).eval()
    with torch.no_grad():
        return np.asarray(adapted(torch.tensor(IDS)[None]).logits[0].numpy())


def ours(directory: Path, adapter: Adapter | None) -> np.ndarray:
    net = Llama.from_checkpoint(open_checkpoint(directory), backend="c")
    if adapter is not None:
        net.attach(adapter)
    return np.asarray(net.forward(IDS)[0])


def close(got: np.ndarray, want: np.ndarray) -> None:
    assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_experts_that_were_modules(kind: str, rslora: bool, tmp_path: Path) -> None:
    """As PEFT converts them; saved again they are parameters, which PEFT reads; and they merge."""
    own = {"num_local_experts": 3} if kind == "mixtral" else {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "head_dim": 8,
    }  # fmt: skip
    their_model(kind, {**SIZES, **own}).save_pretrained(tmp_path / "model")
    at, each = experts_of(kind)
    shapes = {"model.layers.{}.self_attn.q_proj": (32, 32)}
    shapes |= {f"model.layers.{{}}.{at}.{e}.{name}": s for e in range(3 + (kind != "mixtral"))
               for name, s in each.items()}  # fmt: skip
    whole = {path.format(n): size for n in range(2) for path, size in shapes.items()}
    targets = ["q_proj", *each]
    config = {"r": 2, "lora_alpha": 6, "target_modules": targets, "use_rslora": rslora}
    old = write(tmp_path / "old", whole, config)
    modules = open_checkpoint(tmp_path / "model").config.modules()
    adapter = Adapter.load(old, modules)
    assert {e.kind for e in adapter.plan} == {"linear", "experts"}
    want = ours(tmp_path / "model", adapter)
    if not rslora:  # PEFT doubles alpha and rank, which with a root is another scale
        close(want, theirs(tmp_path / "model", old))
    assert np.abs(want - ours(tmp_path / "model", None)).max() > 0.1
    adapter.save(tmp_path / "new")
    close(theirs(tmp_path / "model", tmp_path / "new"), want)
    again = Adapter.load(tmp_path / "new", modules)
    assert again.digest() == adapter.digest()
    merge_checkpoint(tmp_path / "model", old, tmp_path / "merged")
    close(ours(tmp_path / "merged", None), want)


def test_some_experts_alone_and_what_a_parameter_cannot_have(tmp_path: Path) -> None:
    their_model("mixtral", {**SIZES, "num_local_experts": 3}).save_pretrained(tmp_path / "model")
    modules = open_checkpoint(tmp_path / "model").config.modules()
    path = "model.layers.1.block_sparse_moe.experts.{}.w2"
    config: dict[str, Any] = {"r": 2, "lora_alpha": 4, "target_modules": r".*layers\.1.*\.1\.w2"}
    adapter = Adapter.load(write(tmp_path / "one", {path.format(1): (32, 20)}, config), modules)
    [entry] = adapter.plan
    assert entry.path == "model.layers.1.mlp.experts.down_proj" and entry.scale == 2
    A = adapter[entry.path].A.reshape(3, 2, 20)
    assert A[1].all() and not A[0].any() and not A[2].any()
    both = {path.format(e): (32, 20) for e in range(3)}
    config = {"r": 2, "lora_alpha": 4, "target_modules": ["w2"], "layers_to_transform": [1],
              "alpha_pattern": {"experts.0.w2": 9}}  # fmt: skip
    with pytest.raises(UnsupportedError, match=r"layers\.1\.mlp\.experts\.down_proj.*differ"):
        Adapter.load(write(tmp_path / "other", both, config), modules)
    del config["alpha_pattern"]
    many = {path.format(e): (32, 20) for e in range(4)}
    with pytest.raises(PlanError, match=r"not expected .*experts\.3\.w2"):
        Adapter.load(write(tmp_path / "many", many, config), modules)


@pytest.mark.parametrize("part", ["model.language_model", "language_model.model"])
def test_an_adapter_that_names_the_language_model(part: str, tmp_path: Path) -> None:
    """target_modules may be a pattern for whole paths, of the whole model."""
    model = their_model("qwen2", SIZES)
    model.save_pretrained(tmp_path / "model")
    modules = open_checkpoint(tmp_path / "model").config.modules()
    names = {"q_proj": (32, 32), "v_proj": (16, 32)}
    shapes = {f"{part}.layers.{n}.self_attn.{name}": size for n in range(2)
              for name, size in names.items()}  # fmt: skip
    pattern = r"^(?!.*visual).*language_model.*layers\.\d+\.self_attn\.(?:q_proj|v_proj)$"
    config = {"r": 2, "lora_alpha": 4, "target_modules": pattern,
              "rank_pattern": {rf"{part}.layers.1.self_attn.q_proj": 2}}  # fmt: skip
    adapter = Adapter.load(write(tmp_path / "whole", shapes, config), modules)
    assert [e.path for e in adapter.plan] == [
        f"model.layers.{n}.self_attn.{name}" for n in range(2) for name in names
    ]
    plain = {path.replace(part, "model"): size for path, size in shapes.items()}
    config = {"r": 2, "lora_alpha": 4, "target_modules": list(names)}
    same = Adapter.load(write(tmp_path / "plain", plain, config), modules)
    assert adapter.digest() == same.digest()
    adapter.save(tmp_path / "again")
    assert Adapter.load(tmp_path / "again", modules).digest() == adapter.digest()
    close(theirs(tmp_path / "model", tmp_path / "again"), ours(tmp_path / "model", adapter))
