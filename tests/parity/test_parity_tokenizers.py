"""Tokenizers against llama.cpp's own: every pre-tokenizer by name, both kinds, three real models.

A few hundred texts each; tools/tokenizer_parity.py is the same with as many as one likes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
from tokenizer_peers import (
    MODELS,
    K,
    LlamaCpp,
    drawn,
    texts,
    trained_bpe,
    trained_scores,
    write_vocabulary,
)
from tokenizer_samples import byte_level

from pylora.formats.gguf_header import read_header
from pylora.text import gguf_pre
from pylora.text.gguf_vocabulary import tokenizer_from_gguf
from pylora.text.tokenizer import Tokenizer

pytestmark = pytest.mark.parity
SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<think>", "<start_of_turn>")
OURS_ALONE = {"gpt2"}  # an older spelling, which llama.cpp no longer reads


@functools.cache
def vocabulary() -> dict[str, Any]:
    return trained_bpe(None)


def both(path: Path, metadata: dict[str, Any]) -> tuple[Tokenizer, LlamaCpp]:
    peer = LlamaCpp(write_vocabulary(path / "v.gguf", metadata))
    return tokenizer_from_gguf(path, metadata, peer.size), peer


def agree(ours: Tokenizer, peer: LlamaCpp, text: str) -> None:
    ids = peer.encode(text)
    assert ours.encode(text) == ids, text
    assert ours.decode(ids, skip_special_tokens=False).encode() == peer.decode(ids, True), text


@pytest.mark.parametrize("pre", [None, *sorted(set(gguf_pre.NAMES) - OURS_ALONE)])
def test_every_pre_tokenizer(tmp_path: Path, pre: str | None) -> None:
    metadata = vocabulary() | ({} if pre is None else {K + "pre": pre})
    ours, peer = both(tmp_path, metadata)
    for text in texts(11, 120, SPECIAL):
        assert ours.encode(text) == peer.encode(text), text
    assert set(ours.eos_ids) == peer.ends()
    start = peer.encode("he", special=True)
    assert ours.encode("he", bos=ours.add_bos) == start
    peer.close()


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "gpt-4o"])
def test_drawn_texts(tmp_path: Path, pre: str) -> None:
    ours, peer = both(tmp_path, vocabulary() | {K + "pre": pre})

    @hypothesis.given(drawn(SPECIAL))
    @hypothesis.settings(max_examples=100, deadline=None)
    def check(text: str) -> None:
        agree(ours, peer, text)

    check()
    peer.close()


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("ties", [False, True])
def test_sentencepiece(tmp_path: Path, prefix: bool, ties: bool) -> None:
    ours, peer = both(tmp_path, trained_scores(ties=ties) | {K + "add_space_prefix": prefix})

    @hypothesis.given(drawn(SPECIAL))
    @hypothesis.settings(max_examples=100, deadline=None)
    def check(text: str) -> None:
        assert ours.encode(text) == peer.encode(text), text

    check()
    for text in texts(12, 300, SPECIAL):
        assert ours.encode(text) == peer.encode(text), text
    assert set(ours.eos_ids) == peer.ends()
    assert ours.encode("he", bos=ours.add_bos) == peer.encode("he", special=True)
    peer.close()


ODD = {
    "an end typed as text": {"tokens": ["<|eot_id|>", "<|eom_id|>"], "types": [1, 1]},
    "an end of another format": {"tokens": ["<end_of_turn>", "</s>"], "types": [4, 3]},
    "of code": {"tokens": ["<|fim_pad|>", "<|file_sep|>", "<|fim_prefix|>"], "types": [1, 1, 1]},
    "gpt-oss": {
        "tokens": ["<|return|>", "<|call|>", "<|end|>", "<|channel|>"],
        "types": [3, 3, 3, 3],
    },
    "gemma 4": {"tokens": ["<|tool_response>", "</s>", "<turn|>"], "types": [3, 3, 3]},
    "unknown": {"tokens": ["<unk>", "[UNK]"], "types": [2, 3]},
    "unused": {"tokens": ["[PAD1]", "<unused1>"], "types": [5, 3]},
    "empty": {"tokens": [""], "types": [1]},
    "out of range": {"padding_token_id": 4294967295, "unknown_token_id": 70000},
    "starts": {"add_bos_token": True, "eot_token_id": 2},
    "a start of its own": {"add_bos_token": True, "bos_token_id": 5},
}


@pytest.mark.parametrize("case", ODD)
def test_special_tokens(tmp_path: Path, case: str) -> None:
    over = dict(ODD[case])
    more, types = over.pop("tokens", []), over.pop("types", [])
    metadata = byte_level("qwen2", **over)
    metadata[K + "tokens"] += more
    metadata[K + "token_type"] = np.concatenate(
        [metadata[K + "token_type"], np.array(types, np.int32)]
    )
    ours, peer = both(tmp_path, metadata)
    assert set(ours.eos_ids) == peer.ends()
    for text in texts(13, 100, [*SPECIAL, *filter(None, more)]):
        assert ours.encode(text) == peer.encode(text), text
    assert ours.encode("he", bos=ours.add_bos) == peer.encode("he", special=True)
    for i in range(peer.size - len(more), peer.size):
        if metadata[K + "tokens"][i]:  # llama.cpp invents a name for an empty token
            assert ours.decode([i]).encode() == peer.decode([i])
    peer.close()


@pytest.fixture(params=sorted(MODELS))
def real(request: pytest.FixtureRequest) -> Iterator[tuple[Tokenizer, LlamaCpp]]:
    path = MODELS[request.param]
    if not path.is_file():
        pytest.skip(f"no {path}; tools/tokenizer_parity.py --fetch gets it")
    metadata = read_header(path).metadata
    peer = LlamaCpp(path)
    yield tokenizer_from_gguf(path, metadata, peer.size), peer
    peer.close()


@pytest.mark.slow
def test_real_models(real: tuple[Tokenizer, LlamaCpp]) -> None:
    ours, peer = real
    assert set(ours.eos_ids) == peer.ends()
    for text in texts(14, 400, [*SPECIAL, "<|endoftext|>", "<end_of_turn>", "<h1>", "<repo_name>"]):
        ids = peer.encode(text)
        assert ours.encode(text) == ids, text
        assert ours.encode(text, bos=ours.add_bos)[:1] == peer.encode(text, special=True)[:1]
