"""Every operation of the golden vectors, carried out by a backend and pylora's own layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from pylora.adapters.adapter import Adapter, LoraConfig
from pylora.adapters.plan import resolve
from pylora.conformance.vectors import model as vector_model
from pylora.conformance.vectors.cases import Case
from pylora.model.config import LlamaConfig, ModuleSpec
from pylora.model.embedding import Embedding
from pylora.model.rope import Rope
from pylora.numbers import random
from pylora.ops.mixture import choose_backward, routed
from pylora.training.config import TrainConfig
from pylora.training.optimizer import Optimizer
from pylora.types import AdamW, Attn, Drop, LoRA, Residue, Seqs

Outputs = dict[str, Any]
RUNNERS: dict[str, Callable[[Any, Case], Outputs]] = {}


def runner(function: Callable[[Any, Case], Outputs]) -> Callable[[Any, Case], Outputs]:
    RUNNERS[function.__name__] = function
    return function


def names(prefix: str, *values: Any) -> Outputs:
    return dict(zip(prefix.split(), values, strict=True))


def drop_of(p: dict[str, Any]) -> Drop | None:
    if "p" not in p:
        return None
    stream = random.stream("dropout", p["path"], str(p["step"]))
    return Drop(p["p"], int(p["seed"]), stream, p["row0"])


@runner
def lora(ops: Any, case: Case) -> Outputs:
    i, p, drop = case.inputs, case.params, drop_of(case.params)
    W, adapter = ops.pack(i["W"]), LoRA(i["A"], i["B"], p["scale"])
    y, h = ops.lora_forward(i["x"], W, i.get("bias"), adapter, drop)
    dx, dA, dB = ops.lora_backward(i["dy"], i["x"], h, W, adapter, drop)
    g, _, _ = ops.lora_backward(i["dy"], None, None, ops.pack(i["B"]))
    out = names("h y g dx dA dB", h, y, g, dx, dA, dB)
    if "bias_B" in i:  # in a model the layer does this
        out["y"] = y + np.float32(p["scale"]) * i["bias_B"]
        out["dbias_B"] = np.float32(p["scale"]) * i["dy"].sum(axis=0)
    return out


@runner
def lora16(ops: Any, case: Case) -> Outputs:
    i, p = {name: _widened(a, case.params["dtype"]) for name, a in case.inputs.items()}, case.params
    y, h = ops.lora_forward(i["x"], ops.pack(i["W"]), None, LoRA(i["A"], i["B"], p["scale"]))
    return names("h y", h, y)


def _widened(bits: Any, dtype: str) -> Any:
    if dtype == "f16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << 16).view(np.float32)


def loras(case: Case) -> list[LoRA]:
    i = case.inputs
    return [LoRA(i[f"A.{n}"], i[f"B.{n}"], s) for n, s in enumerate(case.params["scales"])]


@runner
def rows(ops: Any, case: Case) -> Outputs:
    i, at = case.inputs, case.params["rows"]
    W, adapter = ops.pack(i["W"]), LoRA(i["A"], i["B"], case.params["scale"])
    y, h = ops.lora_forward(i["x"], W, lora=adapter)
    dx, _, _ = ops.lora_backward(i["dy"], i["x"], h, W, adapter)
    finite = np.isfinite(y).all(axis=1).astype(np.uint8)
    return names("y dx finite", y[at], dx[at], finite)


@runner
def stacked(ops: Any, case: Case) -> Outputs:
    """By `Adapter.stack`'s way, X-2: one adapter of all A's and scaled B's."""
    i, each = case.inputs, loras(case)
    A = np.concatenate([lora.A for lora in each])
    B = np.concatenate([np.float32(lora.scale) * lora.B for lora in each], axis=1)
    W, whole = ops.pack(i["W"]), LoRA(A, B, 1.0)
    y, h = ops.lora_forward(i["x"], W, lora=whole)
    dx, dA, dB = ops.lora_backward(i["dy"], i["x"], h, W, whole)
    out, at = names("y dx", y, dx), 0
    for n, lora in enumerate(each):  # of the stacked ones, dA has the scale in it and dB has not
        rows = slice(at, at := at + lora.rank)
        out |= {f"dA.{n}": dA[rows], f"dB.{n}": np.float32(lora.scale) * dB[:, rows]}
    return out


@runner
def mixed(ops: Any, case: Case) -> Outputs:
    i, W = case.inputs, ops.pack(case.inputs["W"])
    y, _ = ops.lora_forward(i["x"], W)
    dx, _, _ = ops.lora_backward(i["dy"], None, None, W)
    out = names("y dx", y, dx)
    for n, lora in enumerate(loras(case)):
        own = i["rows"] == n
        x, dy = i["x"][own], i["dy"][own]
        y[own], h = ops.lora_forward(x, W, lora=lora)
        dx[own], out[f"dA.{n}"], out[f"dB.{n}"] = ops.lora_backward(dy, x, h, W, lora)
    return out


@runner
def embedding(ops: Any, case: Case) -> Outputs:
    i, grads = case.inputs, {}
    module = Embedding("model.embed_tokens", i["W"], ops=ops)
    module.lora = LoRA(i["A"], i["B"], case.params["scale"])
    y, cache = module.forward(i["ids"])
    module.backward(i["dy"], cache, grads)
    grad = grads["model.embed_tokens"]
    return names("y dA dB", y, grad.A, grad.B)


@runner
def dora(ops: Any, case: Case) -> Outputs:
    i, scale = case.inputs, case.params["scale"]
    adapter = LoRA(i["A"], i["B"], scale, magnitude=i["magnitude"])
    W = ops.pack(i["W"])
    adapter = replace(adapter, norm=ops.row_norms(W, adapter))
    y, h, v = ops.dora_forward(i["x"], W, i.get("bias"), adapter)
    dx, dA, dB, dm = ops.dora_backward(i["dy"], i["x"], h, v, W, adapter)
    merged, _ = ops.merge(i["W"], adapter)
    return names("n y dx dA dB dm merged", adapter.norm, y, dx, dA, dB, dm, merged)


@runner
def merge(ops: Any, case: Case) -> Outputs:
    i, dtype = case.inputs, case.params["dtype"]
    W = i["W"].view({"f32": np.float32, "f16": np.float16, "bf16": np.uint16}[dtype])
    adapter = LoRA(i["A"], i["B"], case.params["scale"])
    merged, residue = ops.merge(W, adapter, dtype)
    back = ops.unmerge(merged, adapter, residue, dtype)
    assert back.tobytes() == W.tobytes()
    return names("merged position bits", merged.view(i["W"].dtype), residue.position, residue.bits)


@runner
def unmerge(ops: Any, case: Case) -> Outputs:
    i, dtype = case.inputs, case.params["dtype"]
    merged = i["merged"].view({"f32": np.float32, "f16": np.float16, "bf16": np.uint16}[dtype])
    adapter = LoRA(i["A"], i["B"], case.params["scale"])
    W = ops.unmerge(merged, adapter, Residue(i["position"], i["bits"]), dtype)
    return {"W": W.view(i["merged"].dtype)}


@runner
def philox(ops: Any, case: Case) -> Outputs:
    seed, stream, first = (int(case.params[n]) for n in ("seed", "stream", "first"))
    return {"words": ops.philox(seed, stream, first, case.outputs["words"].value.size)}


@runner
def unit(ops: Any, case: Case) -> Outputs:
    stream = random.stream(case.params["name"])
    assert stream == int(case.params["stream"])
    words = ops.philox(int(case.params["seed"]), stream, 0, 16) >> 6
    return {"u": (words[::2] * 2.0**26 + words[1::2] + 0.5) * 2.0**-52}


@runner
def quantile(ops: Any, case: Case) -> Outputs:
    return {"z": random.normal_quantile(case.inputs["u"])}


@runner
def init(ops: Any, case: Case) -> Outputs:
    path, how = case.params["path"], case.params["method"]
    (r, k), d = case.outputs["A"].value.shape, len(case.outputs["B"].value)
    ways: dict[str, Any] = {"kaiming": True, "gaussian": "gaussian", "false": False}
    config = LoraConfig(
        r=r, target_modules=(path,), init_lora_weights=ways[how], lora_bias="bias" in case.outputs
    )
    plan = resolve(config, {path: ModuleSpec(case.params["kind"], d, k)})
    made = Adapter.init(plan, config, seed=int(case.params["seed"]))[path]
    return {"A": made.A, "B": made.B, "bias": made.bias}


@runner
def dropout(ops: Any, case: Case) -> Outputs:
    y = ops.dropout(case.inputs["x"], drop_of(case.params))
    return {"y": y, "kept": (y != 0).astype(np.uint8)}


@runner
def rms_norm(ops: Any, case: Case) -> Outputs:
    i = case.inputs
    y, rstd = ops.rms_norm_forward(i["x"], i["w"], case.params["eps"])
    return {"y": y, "rstd": rstd, "dx": ops.rms_norm_backward(i["dy"], i["x"], i["w"], rstd)[0]}


@runner
def rope(ops: Any, case: Case) -> Outputs:
    i, D, layout = case.inputs, case.params["head_dim"], case.params["layout"]

    def turn(inverse: bool) -> Any:
        return ops.rope(i["x"], i["cos"], i["sin"], i["position"], D, layout, inverse)

    return {"y": turn(False), "inverse": turn(True)}


@runner
def rope_tables(ops: Any, case: Case) -> Outputs:
    p, position = case.params, case.inputs["position"]
    length, trained = p.get("length", int(position.max()) + 1), p.get("trained", 1 << 18)
    named = ("head_dim", "theta", "length", "trained")
    scaling = {name: value for name, value in p.items() if name not in named}
    config = LlamaConfig.tiny(
        head_dim=p["head_dim"], rope_theta=p["theta"], max_position_embeddings=trained,
        rope_scaling=scaling or None,
    )  # fmt: skip
    # The last rows of one sequence, of which those at `position` are shown.
    seqs = Seqs.of([length])
    [turn] = Rope(config, np.float32, ops=ops).rotations(seqs, np.arange(length))
    rows = turn.position[position]
    return {"cos": turn.cos[rows], "sin": turn.sin[rows]}


@runner
def attention(ops: Any, case: Case) -> Outputs:
    i, p = case.inputs, case.params
    shape = (p["heads"], p["kv_heads"], p["head_dim"])
    attn = Attn(*shape, p["scale"], p["window"], p.get("softcap", 0.0))
    seqs = Seqs.of(p["lengths"])
    o, lse = ops.attention_forward(i["q"], i["k"], i["v"], seqs, attn)
    grads = ops.attention_backward(i["do"], i["q"], i["k"], i["v"], o, lse, seqs, attn)
    return names("o lse dq dk dv", o, lse, *grads)


@runner
def swiglu(ops: Any, case: Case) -> Outputs:
    i = case.inputs
    dgate, dup = ops.swiglu_backward(i["dy"], i["gate"], i["up"])
    return {"y": ops.swiglu_forward(i["gate"], i["up"]), "dgate": dgate, "dup": dup}


@runner
def layer_norm(ops: Any, case: Case) -> Outputs:
    i = case.inputs
    y, rstd = ops.layer_norm_forward(i["x"], i["w"], i.get("b"), case.params["eps"])
    return {"y": y, "rstd": rstd, "dx": ops.layer_norm_backward(i["dy"], i["x"], i["w"], rstd)}


@runner
def activation(ops: Any, case: Case) -> Outputs:
    i, kind = case.inputs, case.params["kind"]
    dx, dup = ops.activation_backward(i["dy"], i["x"], i.get("up"), kind)
    return {"y": ops.activation_forward(i["x"], i.get("up"), kind), "dx": dx, "dup": dup}


@runner
def soft_cap(ops: Any, case: Case) -> Outputs:
    settings = case.params["multiplier"], case.params["cap"]
    y = ops.soft_cap_forward(case.inputs["x"], *settings)
    return {"y": y, "dx": ops.soft_cap_backward(case.inputs["dy"], y, *settings)}


@runner
def choose(ops: Any, case: Case) -> Outputs:
    p = case.params
    found = ops.choose(case.inputs["logits"], p["top_k"], p["normalize"])
    arrays = (ops.to_numpy(a) for a in (found.probabilities, found.chosen, found.weights))
    choice = routed(*arrays)
    d = choose_backward(case.inputs["dw"], choice, p["normalize"], np)
    out = names("probabilities weights dlogits", choice.probabilities, choice.weights, d)
    return out | {"chosen": choice.chosen}


@runner
def cross_entropy(ops: Any, case: Case) -> Outputs:
    i = case.inputs
    nll, lse = ops.cross_entropy_forward(i["logits"], i["labels"])
    d = ops.cross_entropy_backward(i["logits"], i["labels"], lse, i["weight"])
    return names("nll lse dlogits", nll, lse, d)


@runner
def adamw(ops: Any, case: Case) -> Outputs:
    param, grad, m, v = (case.inputs[n].copy() for n in ("param", "grad", "m", "v"))
    ops.adamw_step(param, grad, m, v, AdamW(**case.params))
    return names("new_param new_m new_v", param, m, v)


@runner
def update(ops: Any, case: Case) -> Outputs:
    """By the trainer's own optimizer: its names say what is B, its shapes what decays."""
    i, p = case.inputs, case.params
    arrays = {"m.A": i["A"].copy(), "m.B": i["B"].copy(), "m.bias": i["bias"].copy()}
    config = TrainConfig(
        learning_rate=p["lr"], lora_plus_ratio=p["lora_plus_ratio"], weight_decay=p["weight_decay"],
        max_grad_norm=None,
    )  # fmt: skip
    grads = {name: i[f"d{name[2:]}"] for name in arrays}
    optimizer = Optimizer(ops, arrays, config)
    optimizer.update(grads, optimizer.norm(grads), p["step"], p["lr"])
    return {f"new_{name[2:]}": a for name, a in arrays.items()}


@runner
def clip(ops: Any, case: Case) -> Outputs:
    """By the trainer's own norm; its factor reaches AdamW as grad_scale, which m shows."""
    arrays = {name: a.copy() for name, a in case.inputs.items()}
    config = TrainConfig(max_grad_norm=case.params["limit"], beta1=0.0)
    optimizer = Optimizer(ops, arrays, config)
    norm = optimizer.norm(case.inputs)
    optimizer.update(case.inputs, norm, 1, 0.01)
    clipped = {f"new_{name}": m for name, m in optimizer.m.items()}
    return {"norm": np.array([norm]), **clipped}


@runner
def micro_batches(ops: Any, case: Case) -> Outputs:
    i, at, loss, parts = case.inputs, 0, 0.0, []
    counted = int((i["labels"] != case.params["ignore"]).sum())
    for n in case.params["parts"]:
        rows = slice(at, at := at + n)
        logits, labels = i["logits"][rows], i["labels"][rows]
        weight = np.full(n, 1 / counted, np.float32)
        nll, lse = ops.cross_entropy_forward(logits, labels)
        parts.append(ops.cross_entropy_backward(logits, labels, lse, weight))
        loss += float(nll.astype(np.float64).sum()) / counted
    return names("loss dlogits", np.array([loss]), np.concatenate(parts))


@runner
def embed(ops: Any, case: Case) -> Outputs:
    i, path = case.inputs, case.params["path"]
    (d, k), folder = i["W"].shape, case.files["adapter"]
    adapter = Adapter.load(folder, {path: ModuleSpec("linear", d, k)})[path]
    W = ops.pack(i["W"])
    merged, residue = ops.merge(i["W"], adapter)
    assert ops.unmerge(merged, adapter, residue).tobytes() == i["W"].tobytes()
    y, h = ops.lora_forward(i["x"], W, lora=adapter)
    dx, dA, dB = ops.lora_backward(i["dy"], i["x"], h, W, adapter)
    out = names("h y dx dA dB merged", h, y, dx, dA, dB, merged)
    for name, p, grad in (("A", adapter.A, dA), ("B", adapter.B, dB)):
        settings = AdamW(lr=case.params["lr"], step=case.params["step"])
        ops.adamw_step(p, np.ascontiguousarray(grad), np.zeros_like(p), np.zeros_like(p), settings)
        out[f"new_{name}"] = p
    return out


@runner
def block(ops: Any, case: Case) -> Outputs:
    weights, adapter = vector_model.block_parts(case.inputs, case.params["scale"])
    x, dy = case.inputs["x"], case.inputs["dy"]
    return vector_model.block(
        ops, vector_model.BLOCK, weights, adapter, x, dy, tuple(case.params["lengths"])
    )


@runner
def training(ops: Any, case: Case) -> Outputs:
    model, adapter = vector_model.training_model(case.inputs, case.params, np.float32, ops)
    i = case.inputs
    return vector_model.train(model, adapter, i["ids"], i["labels"], i["lr"], case.params)
