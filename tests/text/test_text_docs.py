"""docs/text.md says what the code does: its lists are read and compared."""

from __future__ import annotations

import re
from pathlib import Path

from pylora.text import gguf_pre
from pylora.text.ends import ENDS
from pylora.text.gguf_vocabulary import _id_keys

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "text.md").read_text(encoding="utf-8")


def test_every_pre_tokenizer_is_listed() -> None:
    listed = TEXT.split("<!-- pre -->")[1].split("<!-- /pre -->")[0].replace("\n", " ")
    assert [name.strip() for name in listed.split(",")] == list(gguf_pre.NAMES)


def test_every_end_is_listed() -> None:
    listed = TEXT.split("the file types it as text:")[1].split(".\n(")[0]
    assert set(re.findall(r"`([^`]+)`", listed)) == ENDS


def test_every_id_of_the_metadata_is_listed() -> None:
    rows = [line for line in TEXT.splitlines() if line.startswith("| `") and "_token_id" in line]
    listed = {name for row in rows for name in re.findall(r"`(\w+_token_id)`", row)}
    assert listed == set(_id_keys())
