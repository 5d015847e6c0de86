"""mlx-lm's side of travel.py, in the interpreter that has it.

    python engine_mlx.py run MODEL ADAPTER|none IDS.npy LOGITS.npy
    python engine_mlx.py train MODEL ADAPTER IDS.npy

`train` makes an adapter by mlx-lm's own functions and saves it as its command line does.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_adapters, load_model, save_config

LAYERS, STEPS = 4, 3
KEYS = ["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"]


def run(model: str, adapter: str, ids: str, logits: str) -> None:
    net, _ = load_model(Path(model))
    if adapter != "none":
        net = load_adapters(net, adapter)
    net.eval()
    out = net(mx.array(np.load(ids))[None])[0]
    np.save(logits, np.array(out.astype(mx.float32)))


def train(model: str, adapter: str, ids: str) -> None:
    net, _ = load_model(Path(model))
    settings = {"rank": 6, "scale": 20.0, "dropout": 0.0, "keys": KEYS}
    net.freeze()
    linear_to_lora_layers(net, LAYERS, settings)
    tokens = mx.array(np.load(ids))[None]

    def loss(m: Any) -> Any:
        return nn.losses.cross_entropy(m(tokens[:, :-1]), tokens[:, 1:]).mean()

    step, gradient = optimizers.Adam(1e-3), nn.value_and_grad(net, loss)
    for _ in range(STEPS):
        step.update(net, gradient(net)[1])
        mx.eval(net.parameters())
    out = Path(adapter)
    out.mkdir(exist_ok=True)
    trained = dict(tree_flatten(net.trainable_parameters()))
    mx.save_safetensors(str(out / "adapters.safetensors"), trained)
    said = {"fine_tune_type": "lora", "num_layers": LAYERS, "lora_parameters": settings}
    save_config({**said, "model": model}, out / "adapter_config.json")


if __name__ == "__main__":
    mx.set_default_device(mx.cpu)
    {"run": run, "train": train}[sys.argv[1]](*sys.argv[2:])
