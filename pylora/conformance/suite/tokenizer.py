"""The suite's tokenizer: bytes and a few merges, with the same ids in every file format.

Byte-level BPE with GPT-2's cutting of texts, which tokenizer.json and GGUF can both say and which
transformers, llama.cpp and MLX read. No token is added in front of a text.
"""

from __future__ import annotations

from typing import Any

_MERGES = ("t h", "h e", "i n", "th e", "Ġ t", "o n", "e r", "a n", "Ġ the", "r e", "Ġ a", "a t",
           "e n", "o r", "i s", "Ġ i", "Ġ o", "Ġ s", "n d", "Ġ w", "e s", "Ġ c", "in g", "e d",
           "Ġ m", "a l", "l l", "Ġ b", "o u")  # fmt: skip
END, START, UNUSED = "<|end|>", "<|start|>", "<|unused|>"


def alphabet() -> list[str]:
    """GPT-2's printable character for each of the 256 bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = iter(range(256, 512))
    return [chr(byte if byte in plain else next(rest)) for byte in range(256)]


def tokens() -> list[str]:
    """Every token, in the order of the ids: bytes, merges, special ones. 288 of them."""
    return [*alphabet(), *(m.replace(" ", "") for m in _MERGES), END, START, UNUSED]


SIZE = len(tokens())
END_ID, START_ID = SIZE - 3, SIZE - 2


def readable() -> list[bool]:
    """For each token whether it is visible ASCII or a space: what every engine can name as text."""
    visible = {chr(i) for i in range(33, 127)} | {"Ġ"}
    return [set(t) <= visible and not t.startswith("<|") for t in tokens()]


def texts() -> list[str]:
    """What each token is as text; bytes that are no character by themselves are U+FFFD."""
    to_byte = {c: i for i, c in enumerate(alphabet())}
    plain = tokens()[:-3]
    said = [bytes(to_byte[c] for c in t).decode("utf-8", errors="replace") for t in plain]
    return [*said, END, START, UNUSED]


def tokenizer_json() -> dict[str, Any]:
    """The content of tokenizer.json."""
    names = tokens()
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    special = [
        {"id": i, "content": names[i], **added, "special": True} for i in range(END_ID, SIZE)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {**level, "use_regex": True},
        "post_processor": None,
        "decoder": {**level, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {name: i for i, name in enumerate(names[:END_ID])},
            "merges": [m.split(" ") for m in _MERGES],
        },
    }


def settings_json() -> dict[str, Any]:
    """The content of tokenizer_config.json."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": START,
        "eos_token": END,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 256,
    }


def gguf_metadata() -> dict[str, Any]:
    """The tokenizer as GGUF's metadata."""
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens(),
        "tokenizer.ggml.token_type": [1] * END_ID + [3] * 3,
        "tokenizer.ggml.merges": list(_MERGES),
        "tokenizer.ggml.bos_token_id": START_ID,
        "tokenizer.ggml.eos_token_id": END_ID,
        "tokenizer.ggml.add_bos_token": False,
    }


def encode(text: str) -> list[int]:
    """The ids of an ASCII text of words between single spaces. ValueError for another."""
    if not text.isascii() or not all(w.isalpha() for w in text.split(" ")):
        raise ValueError("this encoder takes ASCII words between single spaces alone")
    order = {tuple(m.split(" ")): i for i, m in enumerate(_MERGES)}
    number = {name: i for i, name in enumerate(tokens())}
    out: list[int] = []
    for place, word in enumerate(text.split(" ")):
        parts = list(word if place == 0 else "Ġ" + word)
        while True:
            ranked = [(order[p], i) for i, p in enumerate(zip(parts, parts[1:])) if p in order]
            if not ranked:
                break
            _, i = min(ranked)
            parts[i : i + 2] = ["".join(parts[i : i + 2])]
        out += [number[part] for part in parts]
    return out
