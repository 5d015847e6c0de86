"""Small files: what is too large, or no JSON object, is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from pylora.errors import FileFormatError
from pylora.files.bounded import read_json


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000, b"9" * 5000, b'{"a": ' + b" " * 200]
)
def test_json_that_is_no_object_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(FileFormatError, match=r"config\.json"):
        read_json(tmp_path / "config.json", limit=150_000)
    with pytest.raises(FileFormatError, match="missing"):
        read_json(tmp_path / "missing.json", limit=10)


def test_json_beyond_the_limit_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": 1}')
    assert read_json(tmp_path / "a.json", limit=8) == {"a": 1}
    with pytest.raises(FileFormatError, match="8 bytes"):
        read_json(tmp_path / "a.json", limit=7)
