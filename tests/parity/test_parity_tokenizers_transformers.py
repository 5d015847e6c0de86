"""Tokenizers and chat templates against transformers': directories, and the real model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from conversation_samples import CHATML, OPENING, REWRITING, TALKS
from small_models import REAL, byte_alphabet
from tokenizer_peers import MODELS, drawn, texts
from tokenizer_samples import WHERE, byte_level
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from pylora.formats import open_checkpoint
from pylora.formats.gguf_header import read_header
from pylora.text.gguf_vocabulary import tokenizer_from_gguf
from pylora.text.tokenizer import Tokenizer, tokenizer_from_directory

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity
USER = [{"role": "user", "content": "hi"}]
SPECIAL = ("<|im_start|>", "<|im_end|>", "<think>", "<tool>", "<s>")


def directory(path: Path, backend: Any, **settings: Any) -> Path:
    backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **settings})
    )
    return path


def unigram() -> Any:
    backend = Backend(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=900, unk_token="<unk>", show_progress=False,
                                      special_tokens=["<unk>", "<s>"])  # fmt: skip
    latin = ("".join(c for c in text if c < "\u0250") for text in texts(3, 2000))
    backend.train_from_iterator(latin, trainer)
    backend.decoder = decoders.Metaspace()
    return backend


def byte_bpe(start: bool) -> Any:
    backend = tokenizer_from_gguf(WHERE, byte_level("qwen2"), 300)._backend
    if start:
        backend.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A",
            pair="<|im_start|> $A $B",
            special_tokens=[("<|im_start|>", 0)],
        )
    return backend


CASES = {
    "unigram": (unigram, {"bos_token": "<s>", "unk_token": "<unk>"}),
    "byte BPE": (lambda: byte_bpe(False), {"eos_token": "<|im_end|>", "add_bos_token": True}),
    "with a start": (lambda: byte_bpe(True), {"bos_token": "<|im_start|>", "add_bos_token": False}),
    "with added tokens": (
        lambda: byte_bpe(False),
        {
            "added_tokens_decoder": {
                "265": {"content": "<tool>", "lstrip": True, "rstrip": True, "special": False},
                "2": {"content": "<think>", "special": True, "lstrip": True},
            },
            "extra_special_tokens": ["<s>"],
            "pad_token": {"__type": "AddedToken", "content": "[PAD]", "lstrip": True},
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_directories(tmp_path: Path, case: str) -> None:
    make, settings = CASES[case]
    path = directory(tmp_path, make(), **settings)
    ours = tokenizer_from_directory(path)
    theirs = transformers.AutoTokenizer.from_pretrained(path)

    @hypothesis.given(drawn([*SPECIAL, "[PAD]"]))
    @hypothesis.settings(max_examples=200, deadline=None)
    def check(text: str) -> None:
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    check()
    assert ours.encode("he", bos=ours.add_bos) == theirs("he")["input_ids"]
    named = {
        key: value for key, value in theirs.special_tokens_map.items() if isinstance(value, str)
    }
    assert {key: str(ours.special_tokens.get(key)) for key in named} == named


@pytest.mark.slow
@pytest.mark.parametrize("model", ["smollm2", "qwen2.5-coder"])
def test_what_is_written_for_a_gguf_is_read_alike(tmp_path: Path, model: str) -> None:
    if not MODELS[model].is_file():
        pytest.skip(f"no {MODELS[model]}; tools/tokenizer_parity.py --fetch gets it")
    metadata = read_header(MODELS[model]).metadata
    gguf = tokenizer_from_gguf(WHERE, metadata, 1 << 20)
    theirs = transformers.AutoTokenizer.from_pretrained(directory(tmp_path, gguf.backend_to_save()))
    for text in texts(15, 300, SPECIAL):
        assert gguf.encode(text) == theirs.encode(text, add_special_tokens=False), text


def test_templates_render_alike() -> None:
    for template in (CHATML, REWRITING, OPENING):
        ours = tokenizer_from_gguf(WHERE, byte_level() | {"tokenizer.chat_template": template}, 300)
        theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=ours._backend)
        for talk in TALKS:
            for prompt in (False, True):
                expected = theirs.apply_chat_template(
                    talk, chat_template=template, add_generation_prompt=prompt, tokenize=False
                )
                assert ours.apply_chat(talk, prompt) == expected


SAMPLES = [
    "",
    "Hello, world!",
    "∃Ψ ⇒ ∃x: ¬(a ∧ b) ∀y",
    "∃Ψ⇒",
    "  leading and trailing  ",
    "tabs\tand\nnew\r\nlines\n\n\n   x",
    "1234567890 3.14159 2024-01-01 ½ ² Ⅷ ٣٤",
    "a1b22c333d4444",
    "don't won't I'LL we've it's THEY'RE",
    "日本語のテキスト 中文 한국어 ไทย हिन्दी العربية עברית",
    "👩‍👩‍👧‍👦 🏳️‍🌈 é e\u0301 \u200b\u00a0\ufeff",
    "def f(x):\n    return x ** 2  # comment\n",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|> <|im_start|>",
    "<|im_start|<|im_end|>|>",
    "<repo_name>a<file_sep>b <empty_output>",
    "\x00\x01\x7f\x80 \U0010ffff",
    "a" * 300,
    " " * 50 + "x" + "\n" * 20,
    "CamelCaseAndUPPERlower_snake-kebab/path\\win",
    "https://example.org/?q=1&r=%20#frag",
]


@pytest.fixture(scope="module")
def real() -> tuple[Tokenizer, Any]:
    if not REAL.is_file():
        pytest.skip(f"no {REAL}; set PYLORA_TEST_GGUF")
    theirs = transformers.AutoTokenizer.from_pretrained(REAL.parent, gguf_file=REAL.name)
    return open_checkpoint(REAL).tokenizer(), theirs


def test_the_real_tokenizer_against_transformers(real: tuple[Tokenizer, Any]) -> None:
    """transformers does not know the pre-tokenizer "smollm" and falls back to GPT-2's, which keeps
    a space together with a numeric character behind it. The vocabulary has no such token for the
    digits 0 to 9, but it has for "½"; there the model's own tokenizer.json (Digits, then
    ByteLevel) decides, which transformers reads for the original model. Bytes that the vocabulary
    lacks are left out before merging by transformers, afterwards by llama.cpp and so here.
    """
    ours, theirs = real
    alphabet = dict(zip(map(chr, range(256)), byte_alphabet()))
    lacking = {c for c in map(chr, range(128)) if alphabet[c] not in theirs.get_vocab()}
    assert 0 < len(lacking) < 32 and all(ord(c) < 32 or ord(c) == 127 for c in lacking)
    rng = np.random.default_rng(1)
    random = ["".join(map(chr, rng.integers(1, 0xD7FF, 30))) for _ in range(300)]
    random += ["".join(map(chr, rng.integers(1, 128, 40))) for _ in range(300)]
    fallback = theirs.backend_tokenizer.pre_tokenizer
    original = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    for text in ("".join(c for c in t if c not in lacking) for t in SAMPLES + random):
        theirs.backend_tokenizer.pre_tokenizer = original
        expected = theirs.encode(text, add_special_tokens=False)
        theirs.backend_tokenizer.pre_tokenizer = fallback
        if not any(c.isnumeric() and not c.isascii() for c in text):
            assert theirs.encode(text, add_special_tokens=False) == expected, text
        assert ours.encode(text) == expected, text
        assert ours.decode(expected, skip_special_tokens=False) == theirs.decode(expected)
        assert ours.decode(expected) == theirs.decode(expected, skip_special_tokens=True)
    assert ours.bos_id == theirs.bos_token_id and ours.eos_ids[0] == theirs.eos_token_id


def test_the_real_chat_template_against_transformers(real: tuple[Tokenizer, Any]) -> None:
    ours, theirs = real
    system = {"role": "system", "content": "You translate."}
    turns = [*USER, {"role": "assistant", "content": " é\n"}, *USER]
    for messages in (USER, turns, [system, *turns]):
        for prompt in (False, True):
            expected = theirs.apply_chat_template(
                messages, add_generation_prompt=prompt, tokenize=False
            )
            assert ours.apply_chat(messages, prompt) == expected
