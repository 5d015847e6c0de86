"""The tables of docs/files.md (kinds of tensor, fields of an adapter) say what the code does."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import gguf
import numpy as np
import pytest

from pylora.adapters.loraconfig import LoraConfig
from pylora.errors import UnsupportedError
from pylora.formats.gguf import dequantize

TEXT = (Path(__file__).parents[2] / "docs" / "files.md").read_text(encoding="utf-8")


def rows(before: str) -> list[list[str]]:
    """The cells of the table that begins with these words."""
    table = TEXT[TEXT.index(before) :].split("\n\n", 1)[0]
    return [[c.strip() for c in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_the_kinds_of_tensor_are_those_that_can_be_read() -> None:
    said = {k for cells in rows("| kinds of GGUF tensor") for k in re.findall("`(.*?)`", cells[0])}
    readable = {"F32", "F16", "BF16"}
    for kind in gguf.GGMLQuantizationType:
        width = gguf.GGML_QUANT_SIZES[kind][1]
        try:
            dequantize(np.zeros((1, width), np.uint8), kind.name.lower(), "here")
        except UnsupportedError:
            continue
        readable.add(kind.name)
    assert said == readable


FIELDS = [
    (name, what)
    for names, what in rows("| field | |\n|---|---|\n| `r`")
    for name in re.findall("`(.*?)`", names)
]
EMPTY = ({}, [], None, False, 0)


@pytest.mark.parametrize(("name", "what"), FIELDS)
def test_a_field_of_an_adapter_is_what_the_table_says(name: str, what: str) -> None:
    base = {"target_modules": ["q_proj"]}
    if what.startswith("carried out"):
        assert name in {f.name for f in dataclasses.fields(LoraConfig)}
    elif what.startswith("refused by name"):
        with pytest.raises(UnsupportedError, match=name):
            LoraConfig.from_dict({**base, name: {"a": 1}})
    elif what.startswith("passed over"):
        same = LoraConfig.from_dict({**base, name: {"a": 1}})
        assert same == LoraConfig.from_dict(base)


def test_every_field_that_the_code_knows_is_in_the_table() -> None:
    from pylora.adapters import loraconfig

    said = {name for name, _ in FIELDS}
    known = set(LoraConfig().to_dict()) | set(loraconfig._REFUSED) | set(loraconfig._INERT)
    assert known - said == {"task_type", "base_model_name_or_path", "peft_type"}
