"""Pictures: PNGs that appear whole, of any numbers; and sparklines."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from pylora.adapters.inspect import inspect
from pylora.display.plots import adapter_picture, loss_curve, sparkline
from pylora.errors import ConfigError
from pylora.types import LoRA

PNG = b"\x89PNG\r\n\x1a\n"


def lora(rng: np.random.Generator, d: int, k: int, r: int, scale: float = 2.0) -> LoRA:
    A, B = (rng.standard_normal(shape).astype(np.float32) for shape in ((r, k), (d, r)))
    return LoRA(A, B, scale)


def test_pictures(tmp_path: Path, rng: np.random.Generator) -> None:
    pytest.importorskip("matplotlib")
    paths = [f"model.layers.{i}.self_attn.{n}" for i in range(3) for n in ("q_proj", "v_proj")]
    stats = inspect({path: lora(rng, 6, 4, 2) for path in [*paths, "lm_head"]})
    adapter_picture(tmp_path / "sub" / "adapter.png", stats)
    adapter_picture(tmp_path / "zero.png", inspect({"m": lora(rng, 3, 3, 1, 0.0)}))
    loss_curve(tmp_path / "loss.png", [3.0, 2.0, 1.0, 0.0])
    bare = (tmp_path / "loss.png").read_bytes()
    seen = [(0, 3.5), (2, 2.5), (3, math.inf), (4, 1.0)]
    loss_curve(tmp_path / "loss.png", [3.0, 2.0, 1.0, 0.0], evaluations=seen)
    assert (tmp_path / "loss.png").read_bytes() != bare, "evaluations are drawn"
    made = sorted(tmp_path.rglob("*"))
    assert [p.name for p in made] == ["loss.png", "sub", "adapter.png", "zero.png"]
    assert all(p.read_bytes().startswith(PNG) for p in made if p.is_file())


def test_a_picture_under_another_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="loss.jpg: a picture is a PNG"):
        loss_curve(tmp_path / "loss.jpg", [1.0])
    assert not list(tmp_path.iterdir())


def test_sparkline() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([5, 5]) == "▁▁"
    assert sparkline([]) == ""
    assert sparkline([1, math.nan, 2]) == "▁ █"
    assert sparkline([math.inf]) == " "
    assert len(sparkline(list(range(1000)), width=40)) == 40
    assert sparkline([0, 0, 8, 8], width=2) == "▁█"
