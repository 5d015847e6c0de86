"""What PyTorch + PEFT does for each job. Every choice here is the kinder one for it, and said.

sdpa attention, fused AdamW, adapters in the model's dtype (PEFT's default, float32 adapters, is a
variant of its own where it matters), logits of the last position only where one token is asked for.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from setting import ALPHA, GEOMETRY, LEARNING_RATE, RANK, TARGETS
from transformers import AutoConfig, AutoModelForCausalLM

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def versions() -> dict[str, str]:
    import peft
    import transformers

    return {m.__name__: m.__version__ for m in (torch, peft, transformers)}


class Job:
    """A callable with facts about itself."""

    def __init__(self, run: Callable[[], Any], **info: Any) -> None:
        self.run, self.info = run, info

    def __call__(self) -> Any:
        return self.run()


def base(precision: str) -> Any:
    torch.manual_seed(0)
    settings = {k: v for k, v in GEOMETRY.items() if k != "model_type"}
    config = AutoConfig.for_model(GEOMETRY["model_type"], **settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    # With a frozen head and a slice of the last positions as input, torch's product would copy the
    # whole head once for each sequence of the batch; a contiguous input spares it that.
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0].contiguous(),))
    return model.to(DTYPES[precision])


def with_adapters(model: Any, n: int = 1, rank: int = RANK, fp32_adapters: bool = False) -> Any:
    """The model with adapters a0 ... a(n-1), not zero, a0 active."""
    config = LoraConfig(
        r=rank,
        lora_alpha=ALPHA,
        target_modules=list(TARGETS),
        lora_dropout=0.0,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, config, adapter_name="a0", autocast_adapter_dtype=fp32_adapters)
    for i in range(1, n):
        model.add_adapter(f"a{i}", config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.mul_(0.1)
                if not fp32_adapters:
                    p.data = p.data.to(model.dtype)
    return model


def step(
    precision: str,
    batch: int,
    length: int,
    rank: int = RANK,
    recompute: bool = False,
    compiled: bool = False,
    fp32_adapters: bool = False,
) -> Job:
    """A training step."""
    peft = with_adapters(base(precision), 1, rank, fp32_adapters)
    peft.config.use_cache = False
    peft.train()
    if recompute:
        peft.enable_input_require_grads()
        peft.gradient_checkpointing_enable()
    model = torch.compile(peft) if compiled else peft
    parameters = [p for p in peft.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)
    ids = torch.randint(0, int(GEOMETRY["vocab_size"]), (batch, length))

    def run() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Job(run)


def decode(model: Any, ids: Any, new: int, **kw: Any) -> dict[str, float]:
    """Seconds to take in the prompt, and for `new` greedy tokens after the first."""
    with torch.no_grad():
        began = time.perf_counter()
        out = model(input_ids=ids, use_cache=True, logits_to_keep=1, **kw)
        token = out.logits[:, -1:].argmax(-1)
        middle = time.perf_counter()
        for _ in range(new):
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True, **kw)
            token = out.logits[:, -1:].argmax(-1)
        return {"prefill": middle - began, "decode": time.perf_counter() - middle}


def generate(precision: str, prompt: int, new: int) -> Job:
    model = with_adapters(base(precision)).eval()
    ids = torch.randint(0, int(GEOMETRY["vocab_size"]), (1, prompt))
    return Job(lambda: decode(model, ids, new))


def resident(precision: str, adapters: int, prompt: int, new: int) -> Job:
    """`adapters` resident: rows of distinct adapters and of one, and switching."""
    began = time.perf_counter()
    model = with_adapters(base(precision), adapters).eval()
    seconds = time.perf_counter() - began
    turn = {"at": 0}

    def run() -> dict[str, float]:
        parts = {}
        model.set_adapter("a0")
        for rows in (8, 32):
            ids = torch.randint(0, int(GEOMETRY["vocab_size"]), (rows, prompt))
            for what in ("distinct", "one"):
                names = [f"a{i % adapters}" for i in range(rows)]
                kw = {"adapter_names": names} if what == "distinct" else {}
                parts[f"{rows} {what}"] = decode(model, ids, new, **kw)["decode"]
        began = time.perf_counter()
        for _ in range(3):
            turn["at"] += 7
            model.set_adapter(f"a{turn['at'] % adapters}")
        parts["switch"] = (time.perf_counter() - began) / 3
        return parts

    return Job(run, adding_s=seconds)


class _One(torch.nn.Module):
    def __init__(self, d: int, k: int, dtype: Any) -> None:
        super().__init__()
        self.lin = torch.nn.Linear(k, d, bias=False, dtype=dtype)

    def forward(self, x: Any) -> Any:
        return self.lin(x)


def _layer(d: int, k: int, rank: int, dtype: Any, fp32_adapters: bool) -> tuple[Any, Any]:
    torch.manual_seed(0)
    config = LoraConfig(
        r=rank,
        lora_alpha=ALPHA,
        target_modules=["lin"],
        lora_dropout=0.0,
        init_lora_weights=False,
    )
    model = get_peft_model(_One(d, k, dtype), config, autocast_adapter_dtype=fp32_adapters)
    return model, model.base_model.model.lin


def linear(
    precision: str,
    d: int,
    tokens: int,
    backward: bool,
    rank: int = RANK,
    fp32_adapters: bool = False,
) -> Job:
    """One LoRA linear d x d, forward or forward and backward."""
    dtype = DTYPES[precision]
    _, layer = _layer(d, d, rank, dtype, fp32_adapters)
    x = torch.randn(tokens, d, dtype=dtype)
    if not backward:
        layer.eval()

        def forward() -> None:
            with torch.no_grad():
                layer(x)

        return Job(forward)
    x.requires_grad_(True)
    dy = torch.randn(tokens, d, dtype=dtype)
    layer.train()

    def both() -> None:
        x.grad = None
        for p in layer.parameters():
            p.grad = None
        layer(x).backward(dy)

    return Job(both)


def merge(precision: str, d: int, rank: int = RANK) -> Job:
    """Merging and taking out again, in place."""
    model, _ = _layer(d, d, rank, DTYPES[precision], False)

    def run() -> dict[str, float]:
        began = time.perf_counter()
        model.merge_adapter()
        middle = time.perf_counter()
        model.unmerge_adapter()
        return {"merge": middle - began, "unmerge": time.perf_counter() - middle}

    return Job(run)


JOBS: dict[str, Callable[..., Job]] = {
    "step": step,
    "generate": generate,
    "resident": resident,
    "linear": linear,
    "merge": merge,
}
