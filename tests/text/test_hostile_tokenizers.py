"""Tokenizers' files with anything in them: a sentence or a tokenizer, never another exception."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
from tokenizer_samples import WHERE, K, byte_level, sentencepiece

from pylora.errors import PyloraError
from pylora.text.chat import render_chat
from pylora.text.gguf_special import KEYS
from pylora.text.gguf_vocabulary import tokenizer_from_gguf
from pylora.text.tokenizer import tokenizer_from_directory

WORDS = st.sampled_from(["", "a", "he", "<|im_end|>", "▁", "<0x0A>", "h e", " ", "é", "\0", "</s>"])
NUMBER = st.integers(-(2**40), 2**70) | st.integers(-2, 300)
METADATA = st.dictionaries(
    st.sampled_from(
        [*KEYS.values(), "model", "pre", "tokens", "scores", "token_type", "merges"]
        + ["add_bos_token", "add_eos_token", "add_space_prefix"]
    ),
    NUMBER
    | WORDS
    | st.booleans()
    | st.floats()
    | st.lists(WORDS, max_size=300)
    | st.lists(st.integers(-9, 9), max_size=300).map(lambda x: np.array(x, np.int32))
    | st.lists(st.floats(width=32), max_size=300).map(lambda x: np.array(x, np.float32)),
    max_size=4,
)


@hypothesis.given(st.booleans(), METADATA, WORDS, st.lists(st.integers(0, 319), max_size=5))
@hypothesis.settings(max_examples=300, deadline=None)
def test_any_metadata(bytes_: bool, over: dict[str, Any], text: str, ids: list[int]) -> None:
    metadata = (byte_level() if bytes_ else sentencepiece()) | {K + k: v for k, v in over.items()}
    try:
        k = tokenizer_from_gguf(WHERE, metadata, 320)
    except PyloraError as error:
        assert "m.gguf" in str(error)
        return
    assert all(0 <= i < k.vocab_size for i in k.encode(text, bos=k.add_bos))
    k.decode(ids)
    k.backend_to_save()


JSON = st.recursive(
    st.none() | st.booleans() | NUMBER | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=6,
)
FILES = {
    "tokenizer_config": "added_tokens_decoder bos_token eos_token extra_special_tokens "
    "chat_template additional_special_tokens add_bos_token image_token",
    "special_tokens_map": "bos_token eos_token pad_token extra_special_tokens",
    "added_tokens": "<a> <b>",
    "generation_config": "eos_token_id",
    "config": "eos_token_id vocab_size",
}
CONTENT = st.fixed_dictionaries(
    {},
    optional={
        name: st.dictionaries(st.sampled_from(keys.split()), JSON, max_size=3)
        for name, keys in FILES.items()
    },
)


@hypothesis.given(CONTENT)
@hypothesis.settings(max_examples=300, deadline=None)
def test_any_files_beside_the_tokenizer(content: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        tokenizer_from_gguf(WHERE, byte_level(), 300)._backend.save(str(path / "tokenizer.json"))
        for name, value in content.items():
            (path / f"{name}.json").write_text(json.dumps(value))
        try:
            k = tokenizer_from_directory(path)
        except PyloraError as error:
            assert folder in str(error)
            return
        assert k.decode(k.encode("hell"), skip_special_tokens=False) == "hell"


MESSAGES = st.lists(
    st.dictionaries(
        st.sampled_from(["role", "content", "tool_calls", "reasoning_content"]), JSON, max_size=4
    ),
    max_size=3,
)


@hypothesis.given(MESSAGES, JSON, JSON)
@hypothesis.settings(max_examples=300, deadline=None)
def test_any_messages(messages: list[dict[str, Any]], tools: Any, argument: Any) -> None:
    template = (
        "{{ tools | tojson }}{% for m in messages %}{{ m.role }}{{ m.content }}{{ m.tool_calls }}"
        "{{ x }}{% endfor %}"
    )
    try:
        text = render_chat(
            template,
            messages,
            tools=tools if isinstance(tools, list) else None,
            arguments={"x": argument},
        )
    except PyloraError:
        return
    assert isinstance(text, str)
