"""PEFT directories, written and read, with settings that change from module to module.

    python examples/06_peft_in_and_out.py

Where torch, transformers and peft are installed, PEFT loads the directory that pylora wrote, and
both libraries' logits are compared. pylora itself needs none of them.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from pylora import Adapter, Llama, LlamaConfig, LoraConfig, resolve
from pylora.model.llama import random_weights

CONFIG = LlamaConfig.tiny(tie_word_embeddings=False)
IDS = np.array([3, 1, 4, 1, 5, 9, 2, 6])


def main() -> None:
    lora = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj", "down_proj"],
        rank_pattern={"down_proj": 2},
        alpha_pattern={"layers.0.self_attn.v_proj": 32},
        use_rslora=True,
        init_lora_weights=False,  # B is random, so that there is something to see
        base_model_name_or_path="tiny",
    )
    plan = resolve(lora, CONFIG.modules())
    print("module                               r  alpha  scale  (and the rules that gave them)")
    for e in plan:
        rules = f"{e.rule_r}; {e.rule_alpha}; {e.rule_scale}"
        print(f"{e.path:34} {e.r:3} {e.alpha:6g} {e.scale:6.3f}  {rules}")

    model = Llama.random(CONFIG)
    adapter = Adapter.init(plan, lora, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "adapter"
        adapter.save(out)
        settings = json.loads((out / "adapter_config.json").read_text(encoding="utf-8"))
        tensors = load_file(out / "adapter_model.safetensors")
        print(f"\n{sorted(p.name for p in out.iterdir())}; {len(tensors)} tensors, such as")
        key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
        print(f"  {key} {tensors[key].shape}")
        assert settings["rank_pattern"] == {"down_proj": 2} and settings["use_rslora"] is True

        again = Adapter.load(out, CONFIG.modules())
        assert again.digest() == adapter.digest()
        print("read back: the same bits")

        model.attach(again)
        logits, _ = model.forward(IDS)
        if all(map(importlib.util.find_spec, ("torch", "transformers", "peft"))):
            theirs = peft_logits(out)
            error = np.abs(logits - theirs).max() / np.abs(theirs).max()
            print(f"PEFT read it too: relative difference of the logits {error:.1e}")
            assert error < 1e-5
        else:
            print("torch, transformers and peft are not installed: not compared with PEFT")


def peft_logits(adapter: Path) -> np.ndarray:
    """The logits of PEFT on transformers' model with the same base weights."""
    import torch
    from peft import PeftModel
    from transformers import AutoConfig, LlamaForCausalLM

    settings = CONFIG.to_hf()
    base = LlamaForCausalLM(AutoConfig.for_model(settings.pop("model_type"), **settings))
    weights = random_weights(CONFIG)
    state = {name: torch.from_numpy(weights(name)) for name in CONFIG.tensors()}
    base.load_state_dict(state, strict=True)
    model = PeftModel.from_pretrained(base, adapter).eval()
    with torch.no_grad():
        return model(torch.from_numpy(IDS)[None]).logits[0].numpy()


if __name__ == "__main__":
    main()
