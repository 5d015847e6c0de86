"""What PyTorch + PEFT does for each job of bench/gpu.py, with the choices that suit it.

bfloat16 base and adapters, sdpa attention (flash), fused AdamW, logits of one position where one
token is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gpu_shapes as shapes
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
Job = Callable[[], Any]


class _One(torch.nn.Module):
    def __init__(self, width: int, dtype: Any) -> None:
        super().__init__()
        self.lin = torch.nn.Linear(width, width, bias=False, dtype=dtype, device=DEVICE)

    def forward(self, x: Any) -> Any:
        return self.lin(x)


class Engine:
    def __init__(self, compiled: bool) -> None:
        self.compiled = compiled

    def versions(self) -> dict[str, str]:
        import peft
        import transformers

        return {m.__name__: m.__version__ for m in (torch, peft, transformers)}

    def _maybe(self, module: Any) -> Any:
        return torch.compile(module) if self.compiled else module

    # ---- one linear ---------------------------------------------------------------------------

    def _layer(self, width: int, rank: int, dtype: Any) -> Any:
        torch.manual_seed(0)
        config = LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules=["lin"], init_lora_weights=False
        )
        model = get_peft_model(_One(width, dtype), config, autocast_adapter_dtype=False)
        return model.to(DEVICE, dtype)

    def linear(self, width: int, rank: int, tokens: int, backward: bool) -> Job:
        dtype = torch.bfloat16
        layer = self._layer(width, rank, dtype).base_model.model.lin
        run = self._maybe(layer)
        x = torch.randn(tokens, width, dtype=dtype, device=DEVICE)
        if not backward:

            def forward() -> None:
                with torch.no_grad():
                    run(x)

            return forward
        x.requires_grad_(True)
        dy = torch.randn(tokens, width, dtype=dtype, device=DEVICE)
        parameters = [x, *(p for p in layer.parameters() if p.requires_grad)]

        def both() -> None:
            for p in parameters:
                p.grad = None
            run(x).backward(dy)

        return both

    def merge(self, part: str, width: int, rank: int, precision: str) -> Job:
        layer = self._layer(width, rank, DTYPES[precision]).base_model.model.lin
        name = "default"

        def run() -> None:  # what merge() and unmerge() add in place, without their bookkeeping
            with torch.no_grad():
                delta = layer.get_delta_weight(name)
                weight = layer.base_layer.weight.data
                if part == "merge":
                    weight += delta
                else:
                    weight -= delta

        return run

    # ---- the model ----------------------------------------------------------------------------

    def _model(self, layers: int, adapters: int = 1) -> Any:
        torch.manual_seed(0)
        config = LlamaConfig(**{**shapes.GEOMETRY, "num_hidden_layers": layers},
                             head_dim=shapes.HEAD_DIM)  # fmt: skip
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device(DEVICE):
                base = LlamaForCausalLM._from_config(config, attn_implementation="sdpa")
        finally:
            torch.set_default_dtype(before)
        lora = LoraConfig(
            r=shapes.RANK, lora_alpha=2 * shapes.RANK, target_modules=shapes.TARGETS,
            init_lora_weights=False, task_type="CAUSAL_LM",
        )  # fmt: skip
        model = get_peft_model(base, lora, adapter_name="a0", autocast_adapter_dtype=False)
        for i in range(1, adapters):
            model.add_adapter(f"a{i}", lora)
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.data = (p.data * 0.1).to(DEVICE, torch.bfloat16)
        return model

    def step(self, batch: int, length: int, recompute: bool) -> Job:
        model = self._model(shapes.GEOMETRY["num_hidden_layers"])
        model.config.use_cache = False
        model.train()
        if recompute:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        run = self._maybe(model)
        parameters = [p for p in model.parameters() if p.requires_grad]
        fused = DEVICE == "cuda"
        optimizer = torch.optim.AdamW(parameters, lr=shapes.LEARNING_RATE, fused=fused)
        ids = torch.randint(0, shapes.GEOMETRY["vocab_size"], (batch, length), device=DEVICE)

        def once() -> None:
            run(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return once

    def decode(self, rows: int, prompt: int, layers: int, adapters: int) -> Job:
        model = self._model(layers, adapters).eval()
        ids = torch.randint(0, shapes.GEOMETRY["vocab_size"], (rows, prompt), device=DEVICE)
        names = {"adapter_names": [f"a{i % adapters}" for i in range(rows)]} if adapters > 1 else {}
        with torch.no_grad():
            out = model(input_ids=ids, use_cache=True, logits_to_keep=1, **names)
        cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)

        def once() -> None:
            with torch.no_grad():
                out = model(input_ids=token, past_key_values=cache, use_cache=True, **names)
                out.logits[:, -1:].argmax(-1)
                cache.crop(-1)  # so that each sample does the same work

        return once
