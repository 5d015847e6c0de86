"""The rate finder's picture is a picture."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from pylora.display.rates import rate_picture
from pylora.errors import ConfigError
from pylora.training.findrate import Found

pytest.importorskip("matplotlib")


@pytest.mark.parametrize("suggested", [3e-3, None])
def test_a_picture_is_drawn(suggested: float | None, tmp_path: Path) -> None:
    found = Found([1e-4, 1e-3, 1e-2], [2.0, 1.5, 1.0], [1.0, 0.8, 0.6], suggested, 1e-2)
    rate_picture(tmp_path / "r.png", found, chosen=1e-3)
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    rate_picture(tmp_path / "none.png", Found([], [], [], None, math.nan))
    with pytest.raises(ConfigError, match="a picture is a PNG"):
        rate_picture(tmp_path / "r.jpg", found)
