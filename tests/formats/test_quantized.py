"""Quantized Hugging Face directories: every way is read exactly, and each way in which one is wrong
is an error that names the tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from quantized_models import KINDS, SMALL, write_quantized, write_safetensors

import pylora
from pylora.errors import FileFormatError, PyloraError, UnsupportedError
from pylora.formats import open_checkpoint
from pylora.formats.safetensors import SafeTensors

UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_is_the_definitions(tmp_path: Path, kind: str) -> None:
    expected = write_quantized(tmp_path, kind)
    with open_checkpoint(tmp_path) as model:
        assert model.config == SMALL and list(model.names()) == list(expected)
        assert any("is quantized" in note for note in model.notes)
        for name, values in expected.items():
            assert model.shape(name) == values.shape
            assert np.array_equal(model.load(name).view(np.uint32), values.view(np.uint32)), name
            assert model.dtype(name) in ("f32", "f16", "bf16")
        assert model.form(f"{UP}.weight") not in ("f32", "f16", "bf16")
        assert model.form("model.norm.weight") == "bf16"
        assert "quantization_config" not in model.settings
