"""Golden vectors of compositions: an adapter file in use, a block with LoRA, a training run.

Their bounds are those of perturbed.py. `block` is statement A-1 of the specification written out,
with every intermediate by its name; `train` is the run that a port repeats.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from pylora.adapters.adapter import Adapter, LoraConfig
from pylora.adapters.plan import resolve
from pylora.conformance.vectors.cases import Case
from pylora.conformance.vectors.ops import angles, draw, wide
from pylora.conformance.vectors.perturbed import expect_all
from pylora.model.config import LlamaConfig, ModuleSpec
from pylora.model.linear import DropKey
from pylora.model.llama import Llama
from pylora.ops.protocol import Backend
from pylora.reference import IGNORE, Reference
from pylora.training.schedule import learning_rate
from pylora.types import AdamW, Array, Attn, LoRA, Seqs


def cases() -> list[Case]:
    """All cases of this file."""
    return [
        _embed("embed", LoraConfig(r=4, lora_alpha=6, target_modules=("q_proj",))),
        _embed(
            "embed-rslora",
            LoraConfig(r=3, lora_alpha=5, target_modules=("q_proj",), use_rslora=True),
        ),
        _block(),
        _training(),
    ]


# ---- an adapter file in use --------------------------------------------------------------------


def _embed(name: str, config: LoraConfig) -> Case:
    """A PEFT directory with one module: load, forward, one training step, merge, unmerge."""
    path, d, k, m = "model.layers.0.self_attn.q_proj", 6, 10, 4
    spec = ("K-1", "K-2", "S-1", "F-1", "B-1", "O-3", "M-1", "M-3")
    case = Case(name, "embed", spec, {"path": path, "lr": 0.01, "step": 1})
    modules = {path: ModuleSpec("linear", d, k)}
    adapter = Adapter.init(resolve(config, modules), config, seed=5)
    A, B = adapter[path].A, adapter[path].B
    B[...] = draw(f"{name}/B", B.shape, 0.5)
    with TemporaryDirectory() as folder:
        adapter.save(Path(folder) / "adapter")
        files = (Path(folder) / "adapter").iterdir()
        case.files["adapter"] = {f.name: f.read_bytes() for f in sorted(files)}
    case.inputs |= {"x": draw(f"{name}/x", (m, k)), "W": draw(f"{name}/W", (d, k), k**-0.5)}
    case.inputs |= {"dy": draw(f"{name}/dy", (m, d))}
    x, W, dy = (wide(a) for a in case.inputs.values())
    scale = adapter[path].scale

    def compute(ops: Backend) -> dict[str, Array]:
        lora = LoRA(wide(A), wide(B), scale)
        y, h = ops.lora_forward(x, W, lora=lora)
        dx, dA, dB = ops.lora_backward(dy, x, h, W, lora)
        out = {"h": h, "y": y, "dx": dx, "dA": dA, "dB": dB}
        for name, p, grad in (("A", lora.A, dA), ("B", lora.B, dB)):
            moments = np.zeros_like(p), np.zeros_like(p)
            ops.adamw_step(p, grad, *moments, AdamW(lr=0.01, step=1))
            out[f"new_{name}"] = p
        return out

    expect_all(case, compute)
    merged, _ = Reference().merge(case.inputs["W"], LoRA(A, B, scale))  # of the file's adapter
    case.exact("merged", merged)
    return case


# ---- one block ---------------------------------------------------------------------------------

BLOCK = LlamaConfig.tiny(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=20,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    max_position_embeddings=32,
)
_LENGTHS = (6, 3)


def block(
    ops: Backend,
    config: LlamaConfig,
    weights: Mapping[str, Array],
    adapter: Mapping[str, LoRA],
    x: Array,
    dy: Array,
    lengths: tuple[int, ...],
) -> dict[str, Array]:
    """A whole block forward and backward, every intermediate by name; weights without the prefix
    "model.layers.0." (A-1 of the specification, written out)."""
    seqs, D, eps = Seqs.of(lengths), config.head_dim, config.rms_norm_eps
    attn = Attn(config.num_attention_heads, config.num_key_value_heads, D, D**-0.5)
    cos, sin = (t.astype(x.dtype) for t in angles(D, np.arange(max(lengths)), config.rope_theta))
    position = np.concatenate([np.arange(n) for n in lengths]).astype(np.int64)
    w1, w2 = weights["input_layernorm.weight"], weights["post_attention_layernorm.weight"]
    v: dict[str, Array] = {}
    W = {name: ops.pack(weights[f"{name}.weight"]) for name in adapter}
    heads, ffn = "self_attn.", "mlp."

    def forward(module: str, x: Array, residual: Array | None = None) -> Array:
        y, v[f"{module}.h"] = ops.lora_forward(
            x, W[module], lora=adapter[module], residual=residual
        )
        return y

    def backward(module: str, dy: Array, x: Array, add: Array | None = None) -> Array:
        dx, v[f"{module}.dA"], v[f"{module}.dB"] = ops.lora_backward(
            dy, x, v[f"{module}.h"], W[module], adapter[module], add=add
        )
        return dx

    v["normed1"], v["rstd1"] = ops.rms_norm_forward(x, w1, eps)
    v["q"] = ops.rope(forward(heads + "q_proj", v["normed1"]), cos, sin, position, D)
    v["k"] = ops.rope(forward(heads + "k_proj", v["normed1"]), cos, sin, position, D)
    v["v"] = forward(heads + "v_proj", v["normed1"])
    v["o"], v["lse"] = ops.attention_forward(v["q"], v["k"], v["v"], seqs, attn)
    v["mid"] = forward(heads + "o_proj", v["o"], residual=x)
    v["normed2"], v["rstd2"] = ops.rms_norm_forward(v["mid"], w2, eps)
    v["gate"], v["up"] = (
        forward(ffn + "gate_proj", v["normed2"]),
        forward(ffn + "up_proj", v["normed2"]),
    )
    v["act"] = ops.swiglu_forward(v["gate"], v["up"])
    v["y"] = forward(ffn + "down_proj", v["act"], residual=v["mid"])

    v["dact"] = backward(ffn + "down_proj", dy, v["act"])
    v["dgate"], v["dup"] = ops.swiglu_backward(v["dact"], v["gate"], v["up"])
    dn = backward(ffn + "up_proj", v["dup"], v["normed2"])
    v["dnormed2"] = backward(ffn + "gate_proj", v["dgate"], v["normed2"], add=dn)
    v["dmid"], _ = ops.rms_norm_backward(v["dnormed2"], v["mid"], w2, v["rstd2"], add=dy.copy())
    v["do"] = backward(heads + "o_proj", v["dmid"], v["o"])
    v["dq"], v["dk"], v["dv"] = ops.attention_backward(
        v["do"], v["q"], v["k"], v["v"], v["o"], v["lse"], seqs, attn
    )
    dn = backward(heads + "v_proj", v["dv"], v["normed1"])
    dk = ops.rope(v["dk"], cos, sin, position, D, inverse=True)
    dn = backward(heads + "k_proj", dk, v["normed1"], add=dn)
    dq = ops.rope(v["dq"], cos, sin, position, D, inverse=True)
    v["dnormed1"] = backward(heads + "q_proj", dq, v["normed1"], add=dn)
    v["dx"], _ = ops.rms_norm_backward(v["dnormed1"], x, w1, v["rstd1"], add=v["dmid"].copy())
    return v


def block_parts(inputs: Mapping[str, Array], scale: float) -> tuple[Any, Any]:
    """(weights, adapter) of the case's inputs."""
    weights = {name: a for name, a in inputs.items() if name.endswith(".weight")}
    paths = [name[: -len(".A")] for name in inputs if name.endswith(".A")]
    return weights, {p: LoRA(inputs[f"{p}.A"], inputs[f"{p}.B"], scale) for p in paths}


def _block() -> Case:
    config, r, scale, prefix = BLOCK, 3, 2.0, "model.layers.0."
    params: dict[str, Any] = {
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 4,
        "eps": config.rms_norm_eps,
        "scale": scale,
    }
    params |= {"rope_theta": config.rope_theta, "rope_layout": "half", "lengths": list(_LENGTHS)}
    case = Case("block", "block", tuple(f"A-{i}" for i in range(1, 8)), params)
    for name, shape in config.tensors().items():
        if name.startswith(prefix):
            case.inputs[name[len(prefix) :]] = _weight(name, shape)
    for path, spec in config.modules().items():
        if path.startswith(prefix):
            case.inputs[f"{path[len(prefix) :]}.A"] = draw(f"block/{path}/A", (r, spec.k), 0.25)
            case.inputs[f"{path[len(prefix) :]}.B"] = draw(f"block/{path}/B", (spec.d, r), 0.3)
    m = sum(_LENGTHS)
    case.inputs |= {"x": draw("block/x", (m, 16)), "dy": draw("block/dy", (m, 16))}
    inputs = {name: wide(a) for name, a in case.inputs.items()}
    weights, adapter = block_parts(inputs, scale)
    expect_all(
        case,
        lambda ops: block(ops, config, weights, adapter, inputs["x"], inputs["dy"], _LENGTHS),
    )
    return case


def _weight(name: str, shape: tuple[int, ...]) -> Array:
    if len(shape) == 1:
        return (draw(f"weights/{name}", shape, 0.1) + np.float32(1)).astype(np.float32)
    return draw(f"weights/{name}", shape, shape[1] ** -0.5)


# ---- a training run ----------------------------------------------------------------------------

STEPS = 20


def train(
    model: Llama, adapter: Mapping[str, LoRA], ids: Array, labels: Array, lr: Array, params: Any
) -> dict[str, Array]:
    """The losses of the run; the adapter's arrays are trained in place. `ids`, `labels` [20, m]."""
    model.attach(adapter)
    moments: dict[tuple[str, str], tuple[Array, Array]] = {}
    losses = []
    for step in range(1, STEPS + 1):
        key = DropKey(int(params["seed"]), step)
        seqs = Seqs.of(params["lengths"])
        nll, grads = model.loss(ids[step - 1], labels[step - 1], seqs, drop=key)
        assert grads is not None
        losses.append(float(nll.astype(np.float64).sum() / (labels[step - 1] != IGNORE).sum()))
        o = AdamW(
            lr=float(lr[step - 1]),
            step=step,
            weight_decay=params["weight_decay"],
            eps=params["eps"],
        )
        for path, lora in adapter.items():
            for name in ("A", "B"):
                p = getattr(lora, name)
                m, v = moments.setdefault((path, name), (np.zeros_like(p), np.zeros_like(p)))
                model.ops.adamw_step(p, getattr(grads[path], name), m, v, o)
    out = {"loss": np.array(losses)}
    for path, lora in adapter.items():
        out |= {f"new.{path}.A": lora.A, f"new.{path}.B": lora.B}
    return out


def training_model(
    inputs: Mapping[str, Array], params: Mapping[str, Any], dtype: Any, ops: Backend
) -> tuple[Llama, dict[str, LoRA]]:
    """The model and the adapter of the case's inputs, in `dtype` on a backend."""
    scale, p = params["alpha"] / params["r"], params["dropout"]
    arrays = {name: a.astype(dtype) for name, a in inputs.items() if a.dtype == np.float32}
    paths = [name[: -len(".A")] for name in inputs if name.endswith(".A")]
    adapter = {
        path: LoRA(arrays[f"{path}.A"].copy(), arrays[f"{path}.B"].copy(), scale, p)
        for path in paths
    }
    model = Llama(LlamaConfig(**params["config"]), lambda name: arrays[name], backend=ops)
    return model, adapter


def _training() -> Case:
    from dataclasses import asdict

    lengths, m = (5, 4), 9
    config = asdict(BLOCK) | {"eos_token_ids": []}
    spec = ("I-1", "I-2", "D-5", "D-7", "A-1", "O-1", "O-2", "O-3", "O-5")
    params: dict[str, Any] = {"config": config, "r": 2, "alpha": 4.0, "dropout": 0.1}
    params |= {"seed": "3", "lengths": list(lengths), "weight_decay": 0.01, "steps": STEPS}
    # With the usual eps AdamW would hide a constant factor of all gradients.
    params |= {"beta1": 0.9, "beta2": 0.999, "eps": 1e-3}
    case = Case("training", "training", spec, params)
    for name, shape in BLOCK.tensors().items():
        case.inputs[name] = _weight(name, shape)
    peft = LoraConfig(r=2, lora_alpha=4, lora_dropout=0.1, target_modules="all-linear")
    adapter = Adapter.init(resolve(peft, BLOCK.modules()), peft, seed=3)
    for path, lora in adapter.items():
        case.inputs |= {f"{path}.A": lora.A, f"{path}.B": lora.B}
    ids = Reference().philox(9, 9, 0, 2 * m).reshape(2, m).astype(np.int64) % BLOCK.vocab_size
    ids[0, 2], ids[1, 4] = 0, 1  # tokens like any other
    labels = np.roll(ids, -1, axis=1)
    labels[:, [4, 8]] = IGNORE  # the last token of each sequence
    labels[0, 0], labels[1, [1, 2, 3, 6]] = IGNORE, IGNORE  # the weight 1/n must change (O-1)
    turn = np.arange(STEPS) % 2
    case.inputs |= {"ids": ids[turn], "labels": labels[turn]}
    rates = [learning_rate(s, STEPS, peak=0.03, warmup_steps=3) for s in range(1, STEPS + 1)]
    case.inputs["lr"] = np.array(rates)

    def compute(ops: Backend) -> dict[str, Array]:
        model, fresh = training_model(case.inputs, params, np.float64, ops)
        return train(
            model, fresh, case.inputs["ids"], case.inputs["labels"], case.inputs["lr"], params
        )

    expect_all(case, compute)
    return case
