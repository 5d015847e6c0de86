"""Ids to text as they come: the text of decoding all, whole characters, stop strings."""

from __future__ import annotations

from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest

pytest.importorskip("tokenizers")

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from pylora.errors import ConfigError, WrongTypeError
from pylora.generation.text import TextStream, stop_strings
from pylora.text.tokenizer import Tokenizer


def byte_level() -> Tokenizer:
    """Every byte is a token; two merges; two special tokens, which have no text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate([*alphabet, "he", "Ġhe"])}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [("h", "e"), ("Ġ", "he")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(backend, bos_id=258, eos_ids=[259])


def sentencepiece() -> Tokenizer:
    """As Llama 2's: spaces are "▁", unknown characters are bytes, the first space is not shown."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    words += ["▁", "a", "b", ".", "▁a", "▁ab", "▁▁", "\n"]
    vocab = [(w, -float(i)) for i, w in enumerate(words)]
    backend = tokenizers.Tokenizer(models.Unigram(vocab, 0, byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(backend, bos_id=1, eos_ids=[2])


TOKENIZERS = {"byte level": byte_level(), "sentencepiece": sentencepiece()}


def streamed(k: Tokenizer, prompt: list[int], answer: list[int], stop: Any = ()) -> list[str]:
    stream = TextStream(k, prompt, stop)
    pieces = [stream.push(token) for token in answer]
    pieces.append(stream.finish())
    assert stream.text == "".join(pieces) and stream.ids == answer[: len(stream.ids)]
    return pieces


@pytest.mark.parametrize("name", TOKENIZERS)
@hypothesis.given(st.data())
def test_the_pieces_are_decode_all_minus_decode_prompt(name: str, data: st.DataObject) -> None:
    k = TOKENIZERS[name]
    ids = st.lists(st.integers(0, k.vocab_size - 1), max_size=30)
    texts = st.text("aeh b.é中👻\n", max_size=12).map(k.encode)
    prompt, answer = data.draw(texts), data.draw(ids | texts)
    before, whole = k.decode(prompt), k.decode(prompt + answer)
    if name == "sentencepiece":
        # Its decoder gives up a whole run of bytes for one that is wrong, also the characters
        # before it, which a stream has given out by then.
        hypothesis.assume("\ufffd" not in whole)
    assert "".join(streamed(k, prompt, answer)) == whole[len(before) :]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_long_prompt_gives_the_same_as_a_short_one(name: str) -> None:
    k = TOKENIZERS[name]
    prompt = k.encode("a b. " * 60 + "é")
    answer = k.encode(" ab 👻 a")
    whole = k.decode(prompt + answer)[len(k.decode(prompt)) :]
    assert "".join(streamed(k, prompt, answer)) == whole


def test_a_space_between_prompt_and_answer_is_kept() -> None:
    k = TOKENIZERS["sentencepiece"]
    a = k._backend.token_to_id("▁a")
    assert streamed(k, [1, a], [a, a]) == [" a", " a", ""]
    assert k.decode([a]) == "a", "decoding it apart would lose the space"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_character_waits_for_all_its_bytes(name: str) -> None:
    k = TOKENIZERS[name]
    ghost = k.encode("👻")[-4:]
    pieces = streamed(k, k.encode("a"), ghost)
    assert pieces == ["", "", "", "👻", ""]
    assert streamed(k, k.encode("a"), ghost[:3])[:3] == ["", "", ""]
    assert set(streamed(k, k.encode("a"), ghost[:3])[3]) == {"\ufffd"}


def test_special_tokens_have_no_text() -> None:
    k = TOKENIZERS["byte level"]
    assert "".join(streamed(k, [258], [258, *k.encode("he"), 259])) == "he"


# ---- stop strings ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "stop", "given"),
    [
        ("abc. b", ["."], "abc"),
        ("abc", ["x"], "abc"),
        ("ab ab ab", ["ab"], ""),
        ("aaab", ["aab"], "a"),
        ("ababac", ["abac"], "ab"),
        ("he said", ["said", "he"], ""),
        ("a</b", ["</s>", "</b>"], "a</b"),
        ("é👻é", ["👻"], "é"),
        ("one\n\ntwo", ["\n\n"], "one"),
    ],
)
def test_an_answer_ends_before_its_stop_string(text: str, stop: list[str], given: str) -> None:
    k = TOKENIZERS["byte level"]
    stream = TextStream(k, [258], stop)
    got = ""
    for token in k.encode(text):
        got += stream.push(token)
        assert given.startswith(got), "nothing is given out that has to be taken back"
        if stream.stopped:
            break
    assert got + stream.finish() == given == stream.text
    assert stream.stopped == (given != text)
    assert stream.push(5) == "" if stream.stopped else True


@hypothesis.given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1), max_size=3))
def test_stop_strings_cut_where_the_first_one_begins(text: str, stop: list[str]) -> None:
    k = TOKENIZERS["byte level"]
    stream = TextStream(k, [], stop)
    for token in k.encode(text):
        stream.push(token)
    stream.finish()
    # The first to be complete ends the answer; of those complete at once, the earliest begun.
    ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    assert stream.text == (text[: min(ends)[1]] if ends else text)


def test_what_a_stop_may_be() -> None:
    assert stop_strings(None) == () and stop_strings("a") == ("a",)
    assert stop_strings(["a", "b"]) == ("a", "b")
    with pytest.raises(ConfigError, match="empty text"):
        stop_strings(["a", ""])
    for bad in (3, [1], b"a", {"a"}):
        with pytest.raises(WrongTypeError, match="stop takes a text or a list of texts"):
            stop_strings(bad)  # type: ignore[arg-type]
