"""Tokenizers of Hugging Face directories as GGUF metadata: the same ids, or a sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizer_samples import WHERE, K, byte_level, sentencepiece

from pylora.errors import FileFormatError, UnsupportedError
from pylora.text.gguf_save import tokenizer_metadata
from pylora.text.gguf_vocabulary import tokenizer_from_gguf

TEXTS = ("hello 11 he ll", " hello  hell\n", "h e l <|im_end|>", "<think>hell</think>  1111")


def directory(tmp_path: Path, metadata: dict[str, Any], change: Any = lambda content: None) -> Path:
    """A Hugging Face directory with the tokenizer that these metadata say."""
    made = tokenizer_from_gguf(WHERE, metadata, len(metadata[K + "tokens"]))
    content = json.loads(made.backend_to_save().to_str())
    change(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    names = {name: token for name, token in made.special_tokens.items() if token}
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({**names, "chat_template": "{{ messages }}"})
    )
    return tmp_path


CASES = {
    "sentencepiece": (sentencepiece(), "default"),
    "sentencepiece, no space before": (sentencepiece(add_space_prefix=False), "default"),
    **{name: (byte_level(name), name) for name in ("smollm", "llama-bpe", "qwen2", "gpt-4o")},
}


@pytest.mark.parametrize("name", CASES)
def test_a_tokenizer_becomes_metadata_that_give_its_ids(name: str, tmp_path: Path) -> None:
    metadata, rule = CASES[name]
    size = len(metadata[K + "tokens"])
    made = tokenizer_metadata(directory(tmp_path, metadata), size + 3)
    assert made[K + "pre"] == rule and made[K + "model"] == metadata[K + "model"]
    assert made["tokenizer.chat_template"] == "{{ messages }}"
    assert made[K + "tokens"][:size] == metadata[K + "tokens"]
    assert made[K + "tokens"][size:] == [f"[PAD{i}]" for i in range(size, size + 3)]
    assert list(made[K + "token_type"][size:]) == [5, 5, 5]
    one = tokenizer_from_gguf(WHERE, metadata, size)
    two = tokenizer_from_gguf(WHERE, made, size + 3)
    for text in TEXTS:
        assert one.encode(text) == two.encode(text)
    assert (one.bos_id, one.eos_ids) == (two.bos_id, two.eos_ids)


def test_a_rule_that_llama_cpp_has_not_is_refused(tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        split = {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated",
                 "invert": False}  # fmt: skip
        level = content["pre_tokenizer"]["pretokenizers"][-1]
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, level]}

    there = directory(tmp_path, byte_level(), change)
    with pytest.raises(UnsupportedError, match="no name for the rule.*convert_hf_to_gguf.py"):
        tokenizer_metadata(there, 400)


def test_more_ids_than_embeddings_and_other_kinds_are_refused(tmp_path: Path) -> None:
    there = directory(tmp_path, byte_level())
    with pytest.raises(FileFormatError, match="and the model 100 embeddings"):
        tokenizer_metadata(there, 100)
    with pytest.raises(FileFormatError, match="no tokenizer.json"):
        tokenizer_metadata(tmp_path / "nowhere", 100)

    def change(content: dict[str, Any]) -> None:
        content["model"] = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
        content["added_tokens"] = []

    (tmp_path / "other").mkdir()
    with pytest.raises(UnsupportedError, match="'WordLevel'; only BPE"):
        tokenizer_metadata(directory(tmp_path / "other", byte_level(), change), 400)
