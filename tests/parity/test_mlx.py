"""Adapters that were made here, in mlx-lm: the logits that pylora has, of every family it has.

mlx-lm is asked in an interpreter of its own, which PYLORA_MLX_PYTHON names (.ci/nightly makes one):
its versions of other packages are not those of the tests.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

for package in ("hypothesis", "torch", "transformers", "gguf", "llama_cpp"):
    pytest.importorskip(package)
from family_cases import their_model
from travellers import draw, rules

from pylora.adapters.convert import read_adapter, write_adapter
from pylora.formats import open_checkpoint
from pylora.model.llama import Llama

PYTHON = os.environ.get("PYLORA_MLX_PYTHON")
ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.parity,
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="PYLORA_MLX_PYTHON names no interpreter with mlx-lm"),
    pytest.mark.filterwarnings("ignore"),
]
_OTHER: dict[str, Any] = runpy.run_path(str(Path(__file__).with_name("test_travel.py")))


# What mlx-lm runs as transformers does, of the shapes here; of the others it has its own opinion of
# the base model, or cannot load it.
RUNS = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "olmoe", "gemma3_text",
        "phi3", "olmo2", "gpt2", "gpt_neox", "starcoder2", "stablelm", "smollm3",
        "granite")  # fmt: skip
# What mlx-lm takes for granted of a family.
SHAPES: dict[str, dict[str, Any]] = {"gpt_neox": {"intermediate_size": 256}}
# What it asks for and transformers leaves out.
SETTINGS: dict[str, dict[str, Any]] = {"gpt2": {"n_ctx": 64}}


def ask(job: str, *arguments: Path | str) -> str:
    """What went wrong; "" for nothing."""
    program = [str(PYTHON), str(ROOT / "bench" / "engine_mlx.py"), job, *map(str, arguments)]
    done = subprocess.run(program, capture_output=True, text=True)
    return done.stderr[-1500:] if done.returncode else ""


@pytest.mark.parametrize("kind", _OTHER["FAMILIES"])
def test_an_adapter_that_was_made_here_is_the_same_in_mlx_lm(kind: str, tmp_path: Path) -> None:
    case = _OTHER["CASES"][_OTHER["FAMILIES"][kind]]
    model = their_model(kind, case | SHAPES.get(kind, {}))
    folder, adapter, ids, out = (tmp_path / n for n in ("model", "mlx", "ids.npy", "out.npy"))
    # mlx-lm knows GPT-2's tensors by the names in its first files, those of the model without head
    (model.transformer if kind == "gpt2" else model).save_pretrained(folder)
    with open_checkpoint(folder) as checkpoint:
        config = checkpoint.config
    # transformers 5 writes settings that mlx-lm does not know by their new names
    said = config.to_hf() | {"torch_dtype": "float32"} | SETTINGS.get(kind, {})
    (folder / "config.json").write_text(json.dumps(said))
    np.save(ids, _OTHER["IDS"])
    failed = ask("run", folder, "none", ids, out)
    if not failed:
        with open_checkpoint(folder) as checkpoint:
            plain = np.asarray(Llama.from_checkpoint(checkpoint).forward(_OTHER["IDS"])[0])
        off = np.abs(np.load(out) - plain).max() / np.abs(plain).max()
        failed = "" if off < 1e-3 else f"its base is {off:.2g} off"
    if failed:
        assert kind not in RUNS, failed
        pytest.skip(f"mlx-lm does not run this base: {failed.splitlines()[-1]}")
    settings = rules(config)
    was = draw(config, settings["experts" if config.experts else "rslora, ranks and alphas"], 1)
    write_adapter(adapter, was, config, "mlx")
    assert not ask("run", folder, adapter, ids, out)
    _OTHER["agree"](folder, was, np.load(out).astype(np.float64), True)
    assert read_adapter(adapter, config).digest() == was.digest()


def test_one_that_mlx_lm_trained_is_read(tmp_path: Path) -> None:
    model = their_model("llama", {**_OTHER["CASES"]["llama"], "num_hidden_layers": 6})
    folder, adapter, ids, out = (tmp_path / n for n in ("model", "mlx", "ids.npy", "out.npy"))
    model.save_pretrained(folder)
    np.save(ids, _OTHER["IDS"])
    assert not ask("train", folder, adapter, ids)
    assert not ask("run", folder, adapter, ids, out)
    with open_checkpoint(folder) as checkpoint:
        got = read_adapter(adapter, checkpoint)
    assert got.config.r == 6 and got.config.layers_to_transform == (2, 3, 4, 5)
    assert {e.scale for e in got.plan} == {20.0}
    _OTHER["agree"](folder, got, np.load(out).astype(np.float64), True)
