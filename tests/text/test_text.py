"""Tokenizers and chat templates: from GGUF metadata, from tokenizer.json, hostile templates."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from small_models import CONFIG, add_tokenizer, write_gguf
from tokenizer_samples import WHERE, K, byte_level, sentencepiece

from pylora.errors import DataError, FileFormatError, PyloraError, UnsupportedError
from pylora.formats import open_checkpoint
from pylora.text.chat import render_chat
from pylora.text.gguf_vocabulary import tokenizer_from_gguf
from pylora.text.tokenizer import Tokenizer, tokenizer_from_directory

USER = [{"role": "user", "content": "hi"}]


def pieces(k: Tokenizer, text: str) -> list[str]:
    return [k._backend.id_to_token(i) for i in k.encode(text)]


@pytest.fixture(
    params=["default", "gpt-2", "llama-bpe", "qwen2", "smollm", "tekken", "deepseek-v3"]
)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return tokenizer_from_gguf(WHERE, byte_level(request.param), 300)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.text(
    "he11o <|>i\n", max_size=40
)


@hypothesis.given(TEXT)
@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_decoding_undoes_encoding(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_pre_tokenizers_split_as_defined() -> None:
    text = "hello 11111"
    merged = {
        "smollm": ["hell", "o", "Ġ", "1", "1", "1", "1", "1"],
        "gpt-2": ["hell", "o", "Ġ", "11", "11", "1"],
        "llama-bpe": ["hell", "o", "Ġ", "11", "1", "11"],
        "qwen2": ["hell", "o", "Ġ", "1", "1", "1", "1", "1"],
        "default": ["hell", "o", "Ġ", "11", "1", "11"],
    }
    for pre, expected in merged.items():
        k = tokenizer_from_gguf(WHERE, byte_level(pre), 300)
        assert pieces(k, text) == expected, pre


def test_special_and_user_defined_tokens_are_never_cut(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<|im_start|>he<think>he<|im_end|>")
    assert ids == [0, tokenizer.encode("he")[0], 2, tokenizer.encode("he")[0], 1]
    assert tokenizer.decode(ids) == "he<think>he"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|im_start|>he<think>he<|im_end|>"


def test_bos_is_added_where_asked_and_once() -> None:
    k = tokenizer_from_gguf(WHERE, byte_level(add_bos_token=True), 300)
    assert k.add_bos and k.bos_id == 0 and k.eos_ids == (1,)
    assert k.encode("he", bos=k.add_bos) == [0, *k.encode("he")]
    assert k.encode("<|im_start|>he", bos=True) == k.encode("<|im_start|>he")
    assert not tokenizer_from_gguf(WHERE, byte_level(), 300).add_bos
    assert tokenizer_from_gguf(WHERE, byte_level("llama-bpe"), 300).add_bos
    assert not tokenizer_from_gguf(WHERE, byte_level(bos_token_id=None), 300).encode("", bos=True)


def test_wrong_input_is_a_sentence(tokenizer: Tokenizer) -> None:
    for bad in ([-1], [10**9], [0, tokenizer.padded_size], [1.5], ["x"], [None], [2**70]):
        with pytest.raises(DataError, match=r"ids\["):
            tokenizer.decode(bad)
    with pytest.raises(DataError, match="position 1"):
        tokenizer.encode("a\ud800")
    with pytest.raises(DataError, match="bytes"):
        tokenizer.encode(b"a")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="no chat template"):
        tokenizer.apply_chat(USER)
    assert tokenizer.decode(np.array(tokenizer.encode("hell"))) == "hell"


BAD_METADATA: dict[str, tuple[dict[str, Any], str]] = {
    "no model": ({"model": None}, "kind"),
    "unknown model": ({"model": "t5"}, "'t5'"),
    "unknown pre": ({"pre": "klingon"}, "'klingon'"),
    "pre is a number": ({"pre": 3}, "pre must be"),
    "no tokens": ({"tokens": None}, "lack tokenizer.ggml.tokens"),
    "tokens are numbers": ({"tokens": np.zeros(3)}, "tokens"),
    "no merges": ({"merges": None}, "merges"),
    "a merge of one": ({"merges": ["he"]}, "'he'"),
    "a merge of strangers": ({"merges": ["h zz"]}, "do not fit"),
    "too few types": ({"token_type": np.zeros(3, np.int32)}, "3 entries"),
    "eos is text": ({"eos_token_id": "1"}, "eos_token_id"),
    "llama without scores": ({"model": "llama"}, "scores"),
}


@pytest.mark.parametrize("case", BAD_METADATA)
def test_bad_metadata_is_named(case: str) -> None:
    over, message = BAD_METADATA[case]
    with pytest.raises(PyloraError, match=message) as caught:
        tokenizer_from_gguf(WHERE, byte_level(**over), 300)
    assert isinstance(caught.value, (FileFormatError, UnsupportedError))
    assert "m.gguf" in str(caught.value)


def test_more_tokens_than_embeddings() -> None:
    with pytest.raises(FileFormatError, match="embeddings"):
        tokenizer_from_gguf(WHERE, byte_level(), 10)


def greedy(metadata: dict[str, Any], text: str) -> list[str]:
    """SentencePiece by its definition: join the best-scoring neighbours, leftmost first."""
    tokens = metadata[K + "tokens"]
    scores = dict(zip(tokens, metadata[K + "scores"].tolist()))
    usable = {t for t, kind in zip(tokens, metadata[K + "token_type"]) if kind == 1}
    parts = list("▁" + text.replace(" ", "▁")) if text else []
    while True:
        pairs = [
            (-scores[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in usable
        ]
        if not pairs:
            break
        i = min(pairs)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return [
        q for p in parts for q in ([p] if p in usable else [f"<0x{b:02X}>" for b in p.encode()])
    ]


@hypothesis.given(st.text("helo é∃", max_size=12))
def test_sentencepiece_by_its_definition(text: str) -> None:
    metadata = sentencepiece()
    k = tokenizer_from_gguf(WHERE, metadata, 300)
    assert k.add_bos and (k.bos_id, k.eos_ids) == (1, (2,))
    assert pieces(k, text) == greedy(metadata, text)
    assert k.decode(k.encode(text)) == text


def test_sentencepiece_without_the_space_before() -> None:
    k = tokenizer_from_gguf(WHERE, sentencepiece(add_space_prefix=False), 300)
    assert pieces(k, "hello") == ["hell", "o"] and k.decode(k.encode(" he")) == " he"


def test_tokens_too_long_to_cut_are_refused() -> None:
    tokens = ["<unk>", "<s>", "</s>", "a" * 20_000]
    over = {"tokens": tokens, "scores": np.zeros(4, np.float32), "token_type": None}
    with pytest.raises(FileFormatError, match="long"):
        tokenizer_from_gguf(WHERE, sentencepiece(**over), 300)


def test_a_gguf_file_gives_its_tokenizer_and_template(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{{ bos_token ~ m.role }}\n{{ m.content ~ eos_token }}{% endfor %}"
    )
    write_gguf(tmp_path / "m.gguf", more=lambda w: add_tokenizer(w, template=template))
    k = open_checkpoint(tmp_path / "m.gguf").tokenizer()
    assert k.apply_chat(USER) == "<|im_start|>user\nhi<|im_end|>"
    assert k.encode(k.apply_chat(USER))[0] == 0


def write_directory(path: Path, **settings: Any) -> Path:
    k = tokenizer_from_gguf(WHERE, byte_level(), 300)
    k._backend.enable_truncation(3)
    k._backend.enable_padding(length=8)
    k._backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


def test_a_directory_gives_its_tokenizer(tmp_path: Path) -> None:
    write_directory(
        tmp_path,
        bos_token={"content": "<|im_start|>", "lstrip": False},
        eos_token="<|im_end|>",
        chat_template=[{"name": "other", "template": "x"}, {"name": "default", "template": "y"}],
    )
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 1, 99999]}')
    k = tokenizer_from_directory(tmp_path)
    assert (k.bos_id, k.eos_ids, k.add_bos) == (0, (1, 2), False)
    assert len(k.encode("hello hello")) > 3  # a stored truncation is not applied
    assert k.apply_chat(USER) == "y"
    (tmp_path / "chat_template.jinja").write_text("z{{ bos_token }}")
    assert tokenizer_from_directory(tmp_path).apply_chat(USER) == "z<|im_start|>"


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"model": {"type": "BPE"}}', "\x00"])
def test_a_broken_tokenizer_json_is_named(tmp_path: Path, content: str) -> None:
    with pytest.raises(FileFormatError, match=r"no tokenizer\.json"):
        tokenizer_from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(FileFormatError, match=r"tokenizer\.json"):
        tokenizer_from_directory(tmp_path)


# ---- chat templates ---------------------------------------------------------------------------


def test_what_templates_use_works() -> None:
    template = """{%- set ns = namespace(n=0) -%}
    {%- for m in messages if m.role != 'system' -%}
        {%- set ns.n = ns.n + 1 -%}
        {{ '<' + m['role'] ~ ns.n ~ '>' }}{{ m.content | trim }}{{ loop.last }}
        {%- if loop.first %}{% continue %}{% endif -%}
    {%- endfor -%}
    {% generation %}{{ messages[-1].content.split('h')[1].upper() }}{% endgeneration %}
    {{- messages | map(attribute='role') | join('+') }}{{ {'a': 'é<'} | tojson }}
    {%- if add_generation_prompt %}!{% endif %}{{ 'x y'.replace(' ', '_') }}{{ '%'*3 }}
    {%- if strftime_now is defined %}{{ strftime_now('%Y') }}{% endif %}"""
    text = render_chat(template, [*USER, *USER], add_generation_prompt=True)
    assert text == '<user1>hiFalse<user2>hiTrueIuser+user{"a": "é<"}!x_y%%%2024'
    assert render_chat(template, USER, now=datetime(2021, 6, 17)).endswith("%%%2021")


def test_text_is_made_as_jinja_makes_it() -> None:
    template = (
        "{{ 'a\\n' | indent(2, first=true) }}|{{ 'a\\n\\nb' | indent(2) }}"
        "|{{ 'a\\nb' | indent('>') }}"
        "|{% for x in ['a-b'] %}{{ x.replace('-', '+') }}{{ '/'.join([x, x]) }}{% endfor %}"
        "|{{ '{}-{x}{{'.format(1, x='y') }}"
    )
    assert render_chat(template, USER) == "  a\n|a\n\n  b|a\n>b|a+ba-b/a-b|1-y{"


def test_the_messages_are_not_changed() -> None:
    messages = [{"role": "user", "content": "hi", "extra": [1]}]
    with pytest.raises(DataError):
        render_chat("{{ messages[0].update({'role': 'x'}) }}", messages)
    with pytest.raises(DataError):
        render_chat("{{ messages[0].extra.append(2) }}", messages)
    assert messages == [{"role": "user", "content": "hi", "extra": [1]}]


DOUBLING = (
    "{% set ns = namespace(x=X) %}{% for i in range(90) %}{% set ns.x = OP %}{% endfor %}{{ ns.x }}"
)
HOSTILE = {
    "refuses": ("{{ raise_exception('only one turn') }}", "only one turn"),
    "syntax": ("a\n{% if %}", "line 2"),
    "undefined": ("{{ a.b }}", "'a' is undefined"),
    "a wide date": ("{{ strftime_now('%999999999Y') }}", "strftime_now"),
    "a long date": ("{{ strftime_now('%Y' * 1000) }}", "strftime_now"),
    "include": ("{% include '/etc/passwd' %}", "loader"),
    "internals": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    "globals": ("{{ raise_exception.__globals__.x }}", "unsafe"),
    "loops": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "steps",
    ),
    "recursion": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
    "branching": (
        "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(60) }}",
        "steps",
    ),
    "times": ("{{ 'a' * 9999999999 }}", "entries"),
    "list times": ("{{ [1] * 9999999999 }}", "entries"),
    "power": ("{{ 9 ** 9 ** 9 }}", "powers"),
    "percent": ("{{ '%9999999999d' % 1 }}", "%"),
    "format": ("{{ '{:9999999999}'.format(1) }}", "format"),
    "format twice": ("{{ ('{0}' * 99999).format('a' * 99999) }}", "characters"),
    "format inside": ("{{ '{0.__class__}'.format(1) }}", "format"),
    "format a map": ("{{ '{x!r:9}'.format_map({'x': 1}) }}", "format"),
    "center": ("{{ 'a'.center(9999999999) }}", "unsafe"),
    "center filter": ("{{ 'a' | center(9999999999) }}", "center"),
    "indent": ("{{ 'a' | indent(9999999999) }}", "indent"),
    "replace": ("{{ ('a' * 999999).replace('a', 'b' * 999999) }}", "characters"),
    "join": ("{{ ('a' * 999999).join('b' * 999999) }}", "steps"),
    "add": (DOUBLING.replace("X", "'aa'").replace("OP", "ns.x + ns.x"), "steps"),
    "concat": (DOUBLING.replace("X", "'aa'").replace("OP", "ns.x ~ ns.x"), "steps"),
    "nested": (DOUBLING.replace("X", "[1]").replace("OP", "[ns.x, ns.x]"), "steps"),
    "block": (
        "{% set a %}{% for i in range(99999) %}{{ 'a' * 99999 }}{% endfor %}{% endset %}",
        "steps",
    ),
    "giant": ("x" * (1 << 21), "characters"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_template_is_stopped(case: str) -> None:
    template, message = HOSTILE[case]
    with pytest.raises(DataError, match=message):
        render_chat(template, USER)


@pytest.mark.parametrize("messages", [[3], [{}], [{"role": 3}], ["hi"]])
def test_messages_that_are_none(messages: list[Any]) -> None:
    with pytest.raises(DataError, match=r"messages\[0\]"):
        render_chat("x", messages)


def test_the_vocabulary_of_the_small_model_fits_it() -> None:
    assert len(byte_level()[K + "tokens"]) <= CONFIG.vocab_size
