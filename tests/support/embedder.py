"""What an embedder does with NumPy, cffi and safetensors alone: layers, an adapter, training on
token ids, generation of ids; and what the rest then says. A program: CI runs it in an environment
that `pip install --no-deps` made, the tests in a process where the other packages are hidden."""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from pathlib import Path

OTHERS = ("tokenizers", "jinja2", "typer", "rich", "matplotlib", "gguf", "hypothesis", "ml_dtypes")
if "--hide" in sys.argv:
    sys.modules.update(dict.fromkeys(OTHERS))
else:
    assert not [name for name in OTHERS if importlib.util.find_spec(name)], "not the bare install"

import numpy as np

from pylora import Adapter, Llama, LlamaConfig, LoRA, LoraConfig, LoRALinear, backends, resolve
from pylora.commands.cli import main
from pylora.errors import MissingExtraError
from pylora.extras import need
from pylora.generation.generate import generate
from pylora.training.examples import Example
from pylora.training.train import TrainConfig, train

assert "c" in backends.available(), "the C core is part of the wheel"
ones = np.ones((4, 4), np.float32)
layer = LoRALinear("w", ones, ops=backends.get())
layer.lora = LoRA(ones[:2], ones[:, :2], 2.0)
assert (layer.forward(ones)[0] == 4 + 2 * 2 * 4).all()

config = LlamaConfig.tiny()
model = Llama.random(config, seed=0)
lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
adapter = Adapter.init(resolve(lora, config.modules()), lora, seed=0)
data = [Example.of([n, n + 1, n + 2, n + 3], [False, True, True, True]) for n in range(20)]
result = train(model, adapter, data, TrainConfig(steps=60, batch_size=20, learning_rate=1e-2))
assert result.losses[-1] < 0.5 * result.losses[0], result.losses[-1]

with tempfile.TemporaryDirectory() as folder:
    adapter.save(Path(folder) / "adapter")
    again = Adapter.load(Path(folder) / "adapter", config.modules())
    assert again.digest() == adapter.digest()

model.attach(adapter)
assert len(generate(model, [[3, 4, 5], [1]], max_new_tokens=4, eos_ids=())[1]) == 4

try:
    need("tokenizers")
except MissingExtraError as error:
    assert "pip install pylora-engine" in str(error), error
else:
    raise AssertionError("tokenizers should be missing here")
assert main(["info"]) == 1, "the command needs typer, and says so"
print("embedder: all is well")
