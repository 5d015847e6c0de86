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
from setting import ALL_LINEAR, ALPHA, LEARNING_RATE, RANK, TARGETS, geometry
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


def base(precision: str, model: str | None = None) -> Any:
    torch.manual_seed(0)
    shape = geometry(model)
    config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    made = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    # With a frozen head and a slice of the last positions as input, torch's product would copy the
    # whole head once for each sequence of the batch; a contiguous input spares it that.
    made.lm_head.register_forward_pre_hook(lambda module, args: (args[0].contiguous(),))
    return made.to(DTYPES[precision])


def random_ids(rows: int, length: int, model: str | None = None) -> Any:
    return torch.randint(0, int(geometry(model)["vocab_size"]), (rows, length))


def lora_config(rank: int, targets: tuple[str, ...] = TARGETS, **more: Any) -> Any:
    return LoraConfig(
        r=rank,
        lora_alpha=ALPHA,
        target_modules=list(targets),
        lora_dropout=0.0,
        init_lora_weights=False,
        **more,
    )


def in_its_dtype(model: Any, fp32_adapters: bool = False) -> None:
    """Adapters of a size that training gives them, in the model's dtype unless said."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.mul_(0.1)
                if not fp32_adapters:
                    p.data = p.data.to(model.dtype)


def with_adapters(model: Any, n: int = 1, rank: int = RANK, fp32_adapters: bool = False) -> Any:
    """The model with adapters a0 ... a(n-1), not zero, a0 active."""
    config = lora_config(rank, task_type="CAUSAL_LM")
    model = get_peft_model(model, config, adapter_name="a0", autocast_adapter_dtype=fp32_adapters)
    for i in range(1, n):
        model.add_adapter(f"a{i}", config)
    in_its_dtype(model, fp32_adapters)
    return model


def step(
    precision: str,
    batch: int,
    length: int,
    rank: int = RANK,
    recompute: bool = False,
    compiled: bool = False,
    fp32_adapters: bool = False,
    model: str | None = None,
) -> Job:
    """A training step."""
    peft = with_adapters(base(precision, model), 1, rank, fp32_adapters)
    peft.config.use_cache = False
    peft.train()
    if recompute:
        peft.enable_input_require_grads()
        peft.gradient_checkpointing_enable()
    called = torch.compile(peft) if compiled else peft
    parameters = [p for p in peft.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)
    ids = random_ids(batch, length, model)

    def run() -> None:
        called(input_ids=ids, labels=ids).loss.backward()
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


def generate(precision: str, prompt: int, new: int, model: str | None = None) -> Job:
    peft = with_adapters(base(precision, model)).eval()
    ids = random_ids(1, prompt, model)
    return Job(lambda: decode(peft, ids, new))


def adapter_cost(
    precision: str, ranks: list[int], prompt: int, new: int, model: str | None = None
) -> Job:
    """Without an adapter (rank 0) and with one of each rank on all linear modules, in turn."""
    peft = base(precision, model)
    for rank in ranks:
        config = lora_config(rank, ALL_LINEAR)
        if rank == ranks[0]:
            peft = get_peft_model(peft, config, f"r{rank}", autocast_adapter_dtype=False)
        else:
            peft.add_adapter(f"r{rank}", config)
    in_its_dtype(peft)
    peft.eval()
    ids = random_ids(1, prompt, model)

    def run() -> dict[str, float]:
        with peft.disable_adapter():
            parts = {f"0 {part}": s for part, s in decode(peft, ids, new).items()}
        for rank in ranks:
            peft.set_adapter(f"r{rank}")
            parts |= {f"{rank} {part}": s for part, s in decode(peft, ids, new).items()}
        return parts

    return Job(run)


def probe(precision: str, d: int, k: int, rows: int) -> Job:
    """A product of rows, forward and for dx, and one of a row, the quickest of some: what says
    whether PyTorch has a kernel for this dtype on this machine, before a whole step is tried. On
    one thread, which does not wait for another that a busy machine has not let go on; the seconds
    are those of all threads if they shared the work without loss."""
    W = torch.randn(d, k).to(DTYPES[precision])
    x = torch.randn(rows, k).to(DTYPES[precision])
    dy = torch.randn(rows, d).to(DTYPES[precision])

    def run() -> dict[str, float]:
        tries: list[tuple[float, float]] = []
        until, threads = time.perf_counter() + 0.3, torch.get_num_threads()
        torch.set_num_threads(1)
        with torch.no_grad():
            while not tries or time.perf_counter() < until:
                began = time.perf_counter()
                torch.nn.functional.linear(x, W)
                dy @ W
                middle = time.perf_counter()
                torch.nn.functional.linear(x[:1], W)
                tries.append((middle - began, time.perf_counter() - middle))
        torch.set_num_threads(threads)
        rows, row = (min(times) / threads for times in zip(*tries))
        return {"rows": rows, "row": row}

    return Job(run)


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
            ids = random_ids(rows, prompt)
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
    config = lora_config(rank, ("lin",))
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
    "probe": probe,
    "step": step,
    "generate": generate,
    "adapter_cost": adapter_cost,
    "resident": resident,
    "linear": linear,
    "merge": merge,
}
