"""Adapters that were made here, in mlx-lm: the logits that pylora has, of every family it has.

mlx-lm is asked in an interpreter of its own, which PYLORA_MLX_PYTHON names (.ci/nightly makes one):
its versions of other packages are not those of the tests.
"""

from __future__ import annotations

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

PYTHON = os.environ.get("PYLORA_MLX_PYTHON")
ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.parity,
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="PYLORA_MLX_PYTHON names no interpreter with mlx-lm"),
    pytest.mark.filterwarnings("ignore"),
]
_OTHER: dict[str, Any] = runpy.run_path(str(Path(__file__).with_name("test_travel.py")))


def ask(job: str, *arguments: Path) -> None:
    program = [str(PYTHON), str(ROOT / "bench" / "engine_mlx.py"), job, *map(str, arguments)]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1500:]


@pytest.mark.parametrize("kind", _OTHER["FAMILIES"])
def test_an_adapter_that_was_made_here_is_the_same_in_mlx_lm(kind: str, tmp_path: Path) -> None:
    model = their_model(kind, _OTHER["CASES"][_OTHER["FAMILIES"][kind]])
    folder, adapter, ids, out = (tmp_path / n for n in ("model", "mlx", "ids.npy", "out.npy"))
    model.save_pretrained(folder)
    with open_checkpoint(folder) as checkpoint:
        config = checkpoint.config
    settings = rules(config)
    was = draw(config, settings["experts" if config.experts else "rslora, ranks and alphas"], 1)
    write_adapter(adapter, was, config, "mlx")
    np.save(ids, _OTHER["IDS"])
    ask("run", folder, adapter, ids, out)
    _OTHER["agree"](folder, was, np.load(out).astype(np.float64), True)
    assert read_adapter(adapter, config).digest() == was.digest()


def test_one_that_mlx_lm_trained_is_read(tmp_path: Path) -> None:
    model = their_model("llama", {**_OTHER["CASES"]["llama"], "num_hidden_layers": 6})
    folder, adapter, ids, out = (tmp_path / n for n in ("model", "mlx", "ids.npy", "out.npy"))
    model.save_pretrained(folder)
    np.save(ids, _OTHER["IDS"])
    ask("train", folder, adapter, ids)
    ask("run", folder, adapter, ids, out)
    with open_checkpoint(folder) as checkpoint:
        got = read_adapter(adapter, checkpoint)
    assert got.config.r == 6 and got.config.layers_to_transform == (2, 3, 4, 5)
    assert {e.scale for e in got.plan} == {20.0}
    _OTHER["agree"](folder, got, np.load(out).astype(np.float64), True)
