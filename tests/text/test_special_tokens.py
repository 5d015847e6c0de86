"""Special tokens, starts and ends of texts from every place that files have for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_models import byte_alphabet
from tokenizer_samples import WHERE, K, byte_level, sentencepiece
from tokenizers import AddedToken, models, processors
from tokenizers import Tokenizer as Backend

from pylora.errors import DataError, FileFormatError, UnsupportedError
from pylora.text import gguf_pre
from pylora.text.ends import ENDS, ending
from pylora.text.gguf_vocabulary import tokenizer_from_gguf
from pylora.text.tokenizer import Tokenizer, tokenizer_from_directory


def gguf(metadata: dict[str, Any], size: int = 320) -> Tokenizer:
    return tokenizer_from_gguf(WHERE, metadata, size)


def with_tokens(*more: str, kind: int = 1, **over: Any) -> tuple[dict[str, Any], int]:
    """byte_level with further tokens of one type, and the id of the first of them."""
    metadata = byte_level(**over)
    first = len(metadata[K + "tokens"])
    metadata[K + "tokens"] = [*metadata[K + "tokens"], *more]
    types = metadata[K + "token_type"]
    metadata[K + "token_type"] = np.concatenate([types, np.full(len(more), kind, np.int32)])
    return metadata, first


@pytest.mark.parametrize("name", sorted(ENDS - {"<|im_end|>"}))
def test_an_end_is_known_by_its_name_whatever_its_type(name: str) -> None:
    metadata, i = with_tokens(name)
    k = gguf(metadata)
    assert k.encode(f"a{name}b")[1] == i and len(k.encode(f"a{name}b")) == 3
    assert i in k.eos_ids and k.eos_ids[0] == 1
    assert any(repr(name) in note for note in k.notes)


def test_a_mark_of_files_of_code_is_one_token() -> None:
    metadata, i = with_tokens("<|fim_prefix|>", "<|fim_pad|>", "<|file_sep|>")
    k = gguf(metadata)
    assert k.encode("<|fim_prefix|><|fim_pad|><|file_sep|>") == [i, i + 1, i + 2]
    assert k.eos_ids == (1, i + 1, i + 2)


def test_the_end_of_a_message_within_a_turn_is_no_end() -> None:
    names = {"<|return|>": 5, "<|call|>": 4, "<|end|>": 3}
    assert ending(names) == {"<|call|>": 4, "<|return|>": 5}
    assert ending({"<|end|>": 3}) == {"<|end|>": 3}
    metadata, i = with_tokens("<|return|>", "<|call|>", "<|end|>", "<|channel|>")
    k = gguf(metadata)
    assert set(k.eos_ids) == {1, i, i + 1} and k.encode("<|end|><|channel|>") == [i + 2, i + 3]


@pytest.mark.parametrize("key", ["eos", "bos", "padding", "unknown", "eot", "fim_pad", "seperator"])
@pytest.mark.parametrize("index", [4294967295, 10**6, -1])
def test_an_id_out_of_range_is_passed_over_with_a_note(key: str, index: int) -> None:
    k = gguf(byte_level(**{f"{key}_token_id": index}))
    assert any(f"{key}_token_id is {index}" in note for note in k.notes)
    assert k.encode("he<|im_end|>")[-1] == 1 and 1 in k.eos_ids  # <|im_end|> by its name


def test_empty_tokens_and_tokens_that_occur_twice() -> None:
    metadata, i = with_tokens("", "he", "", "<think>", kind=1)
    k = gguf(metadata)
    assert k.encode("he") == [i + 1]  # the last of a name counts, as in llama.cpp
    first = metadata[K + "tokens"].index("he")
    assert k.decode([first, i, i + 1, i + 2]) == "hehe"
    assert any("twice" in note for note in k.notes)


def test_ids_without_a_token_have_no_text() -> None:
    k = gguf(byte_level(), 400)
    he = k.encode("he")
    assert k.decode([*he, 399, 350, *he]) == "hehe" and k.padded_size == 400
    with pytest.raises(DataError, match=r"ids\[0\] is 400"):
        k.decode([400])
    metadata, i = with_tokens("[PAD265]", kind=5)  # as converters fill up a vocabulary
    assert gguf(metadata).decode([i, *he]) == "he"


def test_an_unknown_token_is_matched_and_not_shown() -> None:
    metadata, i = with_tokens("<unk>", kind=2)
    assert gguf(metadata).encode("he<unk>")[-1] == i
    assert gguf(metadata).decode([i]) == ""


def test_a_marker_that_is_typed_as_text_is_noted() -> None:
    template = "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}"
    metadata, i = with_tokens("<|user|>")
    k = gguf(metadata | {"tokenizer.chat_template": template})
    assert len(k.encode("<|user|>")) > 1 and any("'<|user|>'" in note for note in k.notes)
    metadata, i = with_tokens("<|user|>", kind=4)
    k = gguf(metadata | {"tokenizer.chat_template": template})
    assert k.encode("<|user|>") == [i] and not k.notes


def test_a_file_that_names_no_pre_tokenizer() -> None:
    k = gguf(byte_level(None))
    assert any("tokenizer.ggml.pre" in note for note in k.notes)
    assert k.encode("he 11111 he") == gguf(byte_level("default")).encode("he 11111 he")
    assert k.encode("11111") != gguf(byte_level("gpt-2")).encode("11111")


@pytest.mark.parametrize("pre", gguf_pre.NAMES)
def test_every_pre_tokenizer_that_llama_cpp_has_by_name(pre: str) -> None:
    k = gguf(byte_level(pre))
    text = "Hello's  11111 x\r\n\n é世界 <a>\t!"
    assert k.decode(k.encode(text)) == text
    assert k.add_bos == (gguf_pre.find(pre).adds_bos)  # type: ignore[union-attr]


def test_bytes_that_the_vocabulary_lacks_keep_their_neighbours_apart() -> None:
    metadata = byte_level()
    tokens = metadata[K + "tokens"]
    tokens[tokens.index("x")] = "[none]"
    k = gguf(metadata)
    he, h, e = k.encode("he"), k.encode("h"), k.encode("e")
    assert k.encode("hxe") == h + e != he


def test_what_follows_a_token_of_phi_3_is_eaten() -> None:
    metadata = byte_level() | {"general.name": "Phi-3 mini"}
    assert gguf(metadata).encode("<|im_end|> \n he") == [1, *gguf(metadata).encode("he")]
    assert len(gguf(byte_level()).encode("<|im_end|> \n he")) > 2


@pytest.mark.parametrize("kind, name", [("bert", "WordPiece"), ("t5", "Unigram"), ("x", "'x'")])
def test_other_kinds_are_refused_by_name(kind: str, name: str) -> None:
    with pytest.raises(UnsupportedError, match=name):
        gguf(byte_level(model=kind))


def test_a_server_puts_the_start_before_a_chat_where_the_file_says_so() -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    talk = [{"role": "user", "content": "he"}, {"role": "assistant", "content": "he"}]
    for start in ("", "{{ bos_token }}"):  # once, whether the template has it or not
        over = {"tokenizer.chat_template": start + template}
        k = gguf(byte_level(add_bos_token=True) | over)
        assert k.encode_chat(k.apply_chat(talk))[:2] == [0, k.encode("he")[0]]
        assert k.conversation(talk).pieces[0].ids[:2] == [0, k.encode("he")[0]]
    k = gguf(byte_level(add_bos_token=False) | over)
    assert k.encode_chat("he") == k.encode("he")
    assert gguf(byte_level(bos_token_id=None) | over).apply_chat(talk) == "hehe"


def test_scores_that_are_equal_join_leftmost_first() -> None:
    tokens = ["<unk>", "<s>", "</s>", "▁", "a", "aa", "aaa"]
    over = {"tokens": tokens, "scores": np.array([0, 0, 0, -1, -2, 5, 5], np.float32)}
    over |= {"token_type": np.array([2, 3, 3, 1, 1, 1, 1], np.int32), "add_space_prefix": False}
    k = gguf(sentencepiece(**over))
    assert [tokens[i] for i in k.encode("aaaaa")] == ["aaa", "aa"]
    assert [tokens[i] for i in k.encode("b a")] == ["<unk>", "▁", "a"]
    assert k.encode_spans("aa a")[1] == [(0, 2), (2, 3), (3, 4)]


def test_a_prompt_and_what_follows_are_one_text() -> None:
    k = gguf(sentencepiece())
    ids, n = k.encode_pair("hello", " hello", bos=True)
    assert ids == [k.bos_id, *k.encode("hello hello")] and n == 2
    ids, n = k.encode_pair("he", "llo")  # generation starts from "he" and cannot take it back
    assert ids[:n] == k.encode("he") and k.decode(ids) == "hello"
    assert k.encode_continuation("hello") == k.encode("xhello")[-2:]  # without a space before
    assert k.encode_continuation(" hello") == k.encode("hello")
    assert k.encode_continuation("") == []


# ---- Hugging Face directories --------------------------------------------------------------------


def directory(path: Path, backend: Backend | None = None, **files: Any) -> Path:
    if backend is None:
        backend = gguf(byte_level())._backend
    backend.save(str(path / "tokenizer.json"))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def load(path: Path) -> Tokenizer:
    return tokenizer_from_directory(path)


def test_added_tokens_decoder_adds_and_changes(tmp_path: Path) -> None:
    more = {"266": {"content": "<tool>", "special": False}, "2": {"content": "<think>"}}
    more["2"]["special"] = True
    k = load(directory(tmp_path, tokenizer_config={"added_tokens_decoder": more}))
    size = len(byte_level()[K + "tokens"])
    assert k.encode("he<tool>")[-1] == size and k.decode([2, size]) == "<tool>"
    assert any("id 266" in note for note in k.notes) == (size != 266)


def test_older_files_count_where_there_is_no_decoder(tmp_path: Path) -> None:
    special = {"eos_token": {"content": "<end>"}, "additional_special_tokens": ["<extra>"]}
    size = len(byte_level()[K + "tokens"])
    files = {"special_tokens_map": special, "added_tokens": {"<end>": size, "<plain>": size + 1}}
    k = load(directory(tmp_path, tokenizer_config={"eos_token": "<|im_end|>"}, **files))
    assert k.eos_ids == (size, 1) and k.special_tokens["eos_token"] == "<end>"
    assert k.encode("<end><plain><extra>") == [size, size + 1, size + 2]
    assert k.decode([size, size + 1, size + 2]) == "<plain>"
    config = {"eos_token": "<|im_end|>", "added_tokens_decoder": {}}
    k = load(directory(tmp_path, tokenizer_config=config, **files))
    assert k.eos_ids == (1,) and len(k.encode("<end>")) > 1


def test_names_of_a_models_own(tmp_path: Path) -> None:
    config = {"image_token": "<image>", "extra_special_tokens": {"boi_token": "<boi>"}}
    k = load(directory(tmp_path, tokenizer_config=config))
    assert len(k.encode("<image><boi>")) == 2
    assert k.special_tokens == {"image_token": "<image>", "boi_token": "<boi>"}


def test_ends_from_every_file(tmp_path: Path) -> None:
    backend = gguf(byte_level())._backend
    backend.add_special_tokens([AddedToken("<|eot_id|>", special=True)])
    files = {"generation_config": {"eos_token_id": [2, 5]}, "config": {"eos_token_id": 6}}
    k = load(directory(tmp_path, backend, tokenizer_config={"eos_token": "<think>"}, **files))
    turn = backend.token_to_id("<|eot_id|>")
    assert k.eos_ids == (2, 5, 6, 1, turn)
    assert any("'<|eot_id|>'" in note for note in k.notes)
    files["generation_config"] = {"eos_token_id": 5}
    k = load(directory(tmp_path, backend, tokenizer_config={"eos_token": "<think>"}, **files))
    assert any("'<think>' ends a text, generation_config.json [5]" in note for note in k.notes)


@pytest.mark.parametrize("says", [None, True, False])
@pytest.mark.parametrize("adds", [True, False])
def test_the_post_processor_decides_about_the_start(
    tmp_path: Path, says: bool | None, adds: bool
) -> None:
    backend = gguf(byte_level())._backend
    if adds:
        backend.post_processor = processors.TemplateProcessing(
            single="<|im_start|> <think> $A <|im_end|>",
            pair="$A $B",
            special_tokens=[("<|im_start|>", 0), ("<think>", 2), ("<|im_end|>", 1)],
        )
    config = {} if says is None else {"add_bos_token": says}
    k = load(directory(tmp_path, backend, tokenizer_config=config))
    assert k.add_bos == adds and k.bos_id == (0 if adds else None)
    assert k.encode("he", bos=k.add_bos) == [0, 2] * adds + k.encode("he")
    assert any("add_bos_token" in n for n in k.notes) == (says is not None and says != adds)
    assert any("end token behind every text" in n for n in k.notes) == adds


def test_ids_of_a_wider_model(tmp_path: Path) -> None:
    k = load(directory(tmp_path, config={"vocab_size": 512}))
    assert k.decode([500, *k.encode("he"), 511]) == "he"
    with pytest.raises(DataError):
        k.decode([512])


def test_wordpiece_is_refused_and_unigram_works(tmp_path: Path) -> None:
    backend = Backend(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    with pytest.raises(UnsupportedError, match="WordPiece"):
        load(directory(tmp_path, backend))
    backend = Backend(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("ab", -1.5), ("b", -2.0)], 0))
    assert load(directory(tmp_path, backend)).encode("abab") == [2, 2]


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": {"added_tokens_decoder": {"x": 3, "-1": {"content": 7}, "3": None}}},
        {"tokenizer_config": {"added_tokens_decoder": [], "eos_token": 7, "bos_token": ""}},
        {"tokenizer_config": {"extra_special_tokens": [3, {"content": 4}, None]}},
        {"added_tokens": {"<a>": "x", "": 3, "<b>": None}, "special_tokens_map": {"x": [1]}},
        {"generation_config": {"eos_token_id": [True, -5, "a", None, 2**70, 10**9]}},
        {"config": {"vocab_size": -3, "eos_token_id": {}}},
        {"config": {"vocab_size": 2**80}},
        {"tokenizer_config": {"chat_template": {"default": 3, "x": None}}},
        {"tokenizer_config": {"chat_template": [3, {"name": []}]}},
    ],
)
def test_odd_values_stop_nothing(tmp_path: Path, files: dict[str, Any]) -> None:
    k = load(directory(tmp_path, **files))
    assert k.decode(k.encode("hell")) == "hell" and k.chat_template is None


def test_templates_by_name(tmp_path: Path) -> None:
    written = [
        {"name": "default", "template": "d"},
        {"name": "tool_use", "template": "t{{ tools }}"},
    ]
    k = load(directory(tmp_path, tokenizer_config={"chat_template": written}))
    user = [{"role": "user", "content": "a"}]
    assert k.apply_chat(user) == "d" and k.apply_chat(user, tools=[1]) == "t[1]"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert load(tmp_path).apply_chat(user) == "file"
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "chat_template.json").write_text('{"chat_template": "legacy"}')
    assert load(tmp_path).apply_chat(user) == "legacy"


def test_types_that_metadata_must_have() -> None:
    for key, value in {"add_bos_token": 1, "pre": 3, "eos_token_id": "1", "scores": [1]}.items():
        kind = "llama" if key == "scores" else "gpt2"
        with pytest.raises(FileFormatError, match=key):
            gguf(byte_level(**{"model": kind, key: value}))


def test_the_alphabet_is_whole() -> None:
    assert len(set(byte_alphabet())) == 256
