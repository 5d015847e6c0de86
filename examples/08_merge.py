"""Merge an adapter into its base for zero overhead, and take it out again bit for bit.

    python examples/08_merge.py

A merged model is an ordinary Hugging Face directory: it runs at the speed of the base model, in any
program. A small file beside the weights keeps what rounding lost, so that `unmerge` restores the
base exactly. Here with a tiny random model in bfloat16; the command line does it with any model:

    pylora merge MODEL ADAPTER OUT        pylora unmerge OUT BASE
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np

from pylora import (
    Adapter,
    Llama,
    LlamaConfig,
    LoraConfig,
    PyloraError,
    merge_checkpoint,
    open_checkpoint,
    resolve,
    unmerge_checkpoint,
)
from pylora.formats import narrow
from pylora.formats.safetensors import Bf16, save
from pylora.model.llama import random_weights

CONFIG = LlamaConfig.tiny(hidden_size=64, intermediate_size=128, head_dim=16)
IDS = np.arange(20)


def write_base(folder: Path) -> None:
    """A tiny random model as a Hugging Face directory, bfloat16."""
    folder.mkdir()
    settings = CONFIG.to_hf() | {"torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    weights = random_weights(CONFIG)
    tensors = {name: Bf16(narrow(weights(name), "bf16")) for name in CONFIG.tensors()}
    save(folder / "model.safetensors", tensors)


def logits(folder: Path, adapter: Path | None = None) -> np.ndarray:
    with open_checkpoint(folder) as checkpoint:
        model = Llama.from_checkpoint(checkpoint)
    if adapter is not None:
        model.attach(Adapter.load(adapter, model.config.modules()))
    return model.forward(IDS)[0]


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        base, adapter, merged, again = (
            Path(name) / part for part in ("base", "adapter", "merged", "again")
        )
        write_base(base)
        lora = LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)
        made = Adapter.init(resolve(lora, CONFIG.modules()), lora, seed=3)
        for module in made.values():
            module.B[...] *= 0.1  # a delta of the size that training gives
        made.save(adapter)

        report = merge_checkpoint(base, adapter, merged)
        elements = sum(m.shape[0] * m.shape[1] for m in report.modules)
        print(f"merged {len(report.modules)} modules: {sorted(p.name for p in merged.iterdir())}")
        print(
            f"kept aside: {report.positions} of {elements} elements "
            f"({100 * report.positions / elements:.1f} %)"
        )

        # The merged model has no adapter left to compute; its weights are rounded to bfloat16.
        plain, adapted, in_one = logits(base), logits(base, adapter), logits(merged)
        effect, error = np.abs(adapted - plain).max(), np.abs(in_one - adapted).max()
        print(f"the adapter moves the logits by {effect:.3f}; merging by another {error:.3f}")
        assert error < 0.1 * effect

        unmerge_checkpoint(merged, again)
        with open_checkpoint(base) as before, open_checkpoint(again) as after:
            assert before.names() == after.names()
            for tensor in before.names():
                assert before.raw(tensor)[0].tobytes() == after.raw(tensor)[0].tobytes()
        assert np.array_equal(logits(again), plain)
        print("unmerged: every tensor is the base's, bit for bit")

        # A merged weight that was changed since is noticed: no wrong base is ever written.
        weights = merged / "model.safetensors"
        damaged = bytearray(weights.read_bytes())
        damaged[-1] ^= 1
        weights.write_bytes(damaged)
        try:
            unmerge_checkpoint(merged, Path(name) / "never")
        except PyloraError as error_seen:
            print(f"one bit changed: {str(error_seen).split(': ', 1)[1][:60]}...")
        else:
            raise AssertionError("a changed weight was not noticed")
        assert not (Path(name) / "never").exists()


if __name__ == "__main__":
    main()
