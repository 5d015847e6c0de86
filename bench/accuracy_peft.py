"""PyTorch + PEFT's side of accuracy.py, in the interpreter that has them.

python accuracy_peft.py FOLDER ops|logits|llama|loss fp32|bf16 OUT.npz     (started by accuracy.py)
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

torch.set_num_threads(len(os.sched_getaffinity(0)))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RANK, HEADS, KV_HEADS, HEAD_DIM, EPS, SCALE = 8, 9, 3, 64, 1e-5, 2.0


def ops(folder: Path, dtype: Any) -> dict[str, Any]:
    """The operations of accuracy_ops.py as transformers and PEFT compute them."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

    with np.load(folder / "ops.npz") as file:
        arrays = dict(file)
    i = {n: torch.from_numpy(a) for n, a in arrays.items()}
    t = {n: a.to(dtype) if a.is_floating_point() else a for n, a in i.items()}
    out = {}

    x, A, B = (t[n].clone().requires_grad_(True) for n in ("x", "A", "B"))
    y = F.linear(x, t["W"]) + F.linear(F.linear(x, A), B) * SCALE
    y.backward(t["dy"])
    out |= {"y": y, "dx": x.grad, "dA": A.grad, "dB": B.grad}

    norm = LlamaRMSNorm(t["w"].numel(), EPS).to(dtype)
    norm.weight.data.copy_(t["w"])
    x = t["x"].clone().requires_grad_(True)
    y = norm(x)
    y.backward(t["dy"])
    out |= {"norm": y, "norm dx": x.grad}

    def heads(a: Any) -> Any:  # [rows, heads * D] -> [1, heads, rows, D]
        return a.reshape(a.shape[0], -1, HEAD_DIM).transpose(0, 1)[None]

    def rows(a: Any) -> Any:
        return a[0].transpose(0, 1).reshape(a.shape[2], -1)

    cos, sin = (torch.cat([t[n], t[n]], -1)[None] for n in ("cos", "sin"))
    rotated, _ = apply_rotary_pos_emb(heads(t["q"]), heads(t["k"]), cos, sin)
    out["rope"] = rows(rotated)

    q, k, v = (t[n].clone().requires_grad_(True) for n in ("q", "k", "v"))
    o = F.scaled_dot_product_attention(
        heads(q), heads(k), heads(v), is_causal=True, enable_gqa=True
    )
    rows(o).backward(t["do"])
    out |= {"o": rows(o), "dq": q.grad, "dk": k.grad, "dv": v.grad}

    gate, up = (t[n].clone().requires_grad_(True) for n in ("gate", "up"))
    y = F.silu(gate) * up
    y.backward(t["dswiglu"])
    out |= {"swiglu": y, "dgate": gate.grad, "dup": up.grad}

    logits = t["logits"].clone().requires_grad_(True)
    nll = F.cross_entropy(logits.float(), t["labels"], reduction="none")
    (nll * i["weight"]).sum().backward()
    return out | {"nll": nll, "dlogits": logits.grad}


def base(folder: Path, dtype: Any) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        str(folder / "model"), dtype=dtype, attn_implementation="sdpa"
    )
    assert model.dtype == dtype, model.dtype
    return model


def texts(folder: Path) -> dict[str, Any]:
    with np.load(folder / "logits.npz") as file:
        return dict(file)


def logits(folder: Path, dtype: Any) -> dict[str, Any]:
    model = base(folder, dtype).eval()
    with torch.no_grad():
        return {
            kind: model(input_ids=torch.from_numpy(ids)[None]).logits[0]
            for kind, ids in texts(folder).items()
        }


def llama(folder: Path, dtype: Any) -> dict[str, Any]:
    """llama.cpp on the file itself, with its own products of quantized numbers."""
    import llama_cpp

    out, path = {}, (folder / "gguf.txt").read_text()
    for kind, ids in texts(folder).items():
        model = llama_cpp.Llama(
            path, n_ctx=len(ids), n_batch=len(ids), logits_all=True, n_gpu_layers=0, verbose=False
        )
        model.eval(ids.tolist())
        out[kind] = torch.from_numpy(np.array(model.scores[: len(ids)]))
        model.close()
    return out


def loss(folder: Path, dtype: Any) -> dict[str, Any]:
    """The fine-tune; the adapter is float32 in every precision, as PEFT has it and pylora too."""
    from peft import PeftModel

    task = json.loads((folder / "loss.json").read_text())
    model = PeftModel.from_pretrained(
        base(folder, dtype), str(folder / "adapter"), is_trainable=True
    )
    model.config.use_cache = False
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1.0, weight_decay=0.0, eps=1e-8)
    losses = []
    for batch, rate in zip(task["batches"], task["rates"]):
        longest = max(len(ids) for ids, _ in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.int64)
        labels = torch.full((len(batch), longest), -100)
        mask = torch.zeros(len(batch), longest, dtype=torch.int64)
        for row, (some, wanted) in enumerate(batch):
            ids[row, : len(some)] = torch.tensor(some)
            labels[row, : len(some)] = torch.tensor(wanted)
            mask[row, : len(some)] = 1
        out = model(input_ids=ids, attention_mask=mask).logits.float()
        value = F.cross_entropy(out.flatten(0, 1), labels.flatten(), ignore_index=-100)
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, task["max_grad_norm"])
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(value.detach()))
    model.save_pretrained(str(folder / f"trained-{task['label']}"))
    return {"loss": torch.tensor(losses, dtype=torch.float64)}


def main() -> None:
    folder, job, precision, out = sys.argv[1:]
    torch.manual_seed(0)
    results = {"ops": ops, "logits": logits, "llama": llama, "loss": loss}[job](
        Path(folder), DTYPES[precision]
    )
    arrays = {
        n: a.detach().to(torch.float64 if a.dtype == torch.float64 else torch.float32).numpy()
        for n, a in results.items()
    }
    np.savez(out, **arrays)


if __name__ == "__main__":
    main()
