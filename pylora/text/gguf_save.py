"""A Hugging Face tokenizer as GGUF metadata: byte-level BPE ("gpt2") and SentencePiece ("llama").

GGUF names the rule that cuts a text before anything is merged, and does not hold it. So each rule
that has a name is tried, those first whose expressions tokenizer.json has: the one is taken that
gives the tokenizer's own ids for texts on which the rules differ. Where none does, the tokenizer
is refused: another rule would give wrong ids without any error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pylora.errors import FileFormatError, PyloraError, UnsupportedError
from pylora.files.bounded import read_json
from pylora.text import gguf_pre
from pylora.text.gguf_special import CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from pylora.text.gguf_vocabulary import tokenizer_from_gguf
from pylora.text.spm import SPACE
from pylora.text.tokenizer import Tokenizer, tokenizer_from_directory

_KEY = "tokenizer.ggml."
_LIMIT = 256 << 20  # bytes of tokenizer.json
_BYTE, _BYTE_TYPE = re.compile(r"<0x[0-9A-F]{2}>"), 6
_PROBES = (
    "Hello, world! It's 3 o'clock; they'll say I'VE we'Re DON'T.",
    "1234567890 12 3.14159 1,000,000 2024-11-30 a1b22c333d4444",
    "   leading, trailing   \n\n\tTabs\t and\r\nlines\n \n  x\n",
    "def f(x):\n    return {k: v for k, v in x.items()}  # comment\n\n\n",
    "C'est l'été à Zürich; Ελληνικά, Русский язык, עברית, العربية، हिन्दी",
    "你好，世界。日本語のテキスト 한국어 텍스트 ไทย",
    "emoji 😀👍🏽🧑‍💻 and — “quotes” … №5 ½ x² ﬁ",
    "CamelCaseWords HTTPServer snake_case kebab-case ALLCAPS iPhone15Pro",
    "!?!... ((([[[{{{ <<<>>> $$$ ^^^ ~~~ ```code``` \\\\ // ## @@ && ||",
    "http://example.com/a?b=c&d=e#f user@example.org 192.168.0.1",
    "a  b   c    d     e\u00a0f\u2003g\u3000h",
)  # fmt: skip


def tokenizer_metadata(directory: Path, vocab_size: int) -> dict[str, Any]:
    """The tokenizer.* keys of a GGUF file for the tokenizer in a Hugging Face directory.

    Raises FileFormatError for a damaged one and UnsupportedError for one that llama.cpp has no kind
    or no rule for.
    """
    own = tokenizer_from_directory(directory)
    content = read_json(directory / "tokenizer.json", limit=_LIMIT)
    model = content.get("model")
    if not isinstance(model, dict) or model.get("type") not in (None, "BPE"):
        raise UnsupportedError(
            f"{directory / 'tokenizer.json'}: the tokenizer is of the kind "
            f"{str(model.get('type') if isinstance(model, dict) else model)[:40]!r}; only BPE can "
            "be written as GGUF"
        )
    names = own._backend.get_vocab(with_added_tokens=True)
    if max(names.values(), default=-1) >= vocab_size:
        raise FileFormatError(
            f"{directory}: the tokenizer has ids up to {max(names.values())}, and the model "
            f"{vocab_size} embeddings"
        )
    tokens, types = _tokens(own, vocab_size, bool(model.get("byte_fallback")))
    common = {_KEY + "tokens": tokens, _KEY + "token_type": types, **_special(own, names)}
    merges = _merges(directory, model)
    if model.get("byte_fallback"):
        made = _sentencepiece(content, tokens, merges)
        if _same(own, common | made, vocab_size):
            return _ordered(common | made)
        raise UnsupportedError(
            f"{directory}: llama.cpp's SentencePiece would cut texts otherwise than this tokenizer "
            "does, so it cannot be written as GGUF; convert the base with llama.cpp's "
            "convert_hf_to_gguf.py, and merge into that file"
        )
    joined = [f"{a} {b}" for a, b in merges]
    for name in _rules(content):
        made = {_KEY + "model": "gpt2", _KEY + "pre": name, _KEY + "merges": joined}
        if _same(own, common | made, vocab_size):
            return _ordered(common | made)
    raise UnsupportedError(
        f"{directory}: llama.cpp has no name for the rule by which this tokenizer cuts texts, so "
        "it cannot be written as GGUF; convert the base with llama.cpp's convert_hf_to_gguf.py, "
        "and merge into that file"
    )


def _ordered(metadata: Mapping[str, Any]) -> dict[str, Any]:
    first = [_KEY + key for key in ("model", "pre")]
    return dict(sorted(metadata.items(), key=lambda item: item[0] not in first))


def _tokens(own: Tokenizer, size: int, falls_back: bool) -> tuple[list[str], Any]:
    backend = own._backend
    added = backend.get_added_tokens_decoder()
    tokens, types = [f"[PAD{i}]" for i in range(size)], np.full(size, UNUSED, np.int32)
    unknown = own.special_tokens.get("unk_token")
    for token, i in backend.get_vocab(with_added_tokens=True).items():
        tokens[i], types[i] = token, NORMAL
        if i in added:
            types[i] = CONTROL if added[i].special else USER_DEFINED
        elif falls_back and _BYTE.fullmatch(token):
            types[i] = _BYTE_TYPE
        if token == unknown and falls_back:
            types[i] = UNKNOWN
    return tokens, types


def _special(own: Tokenizer, names: Mapping[str, int]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    if own.bos_id is not None:
        out[_KEY + "bos_token_id"] = own.bos_id
    for key, i in zip(("eos_token_id", "eot_token_id"), own.eos_ids):
        out[_KEY + key] = i
    for key, name in (("unknown_token_id", "unk_token"), ("padding_token_id", "pad_token")):
        if (token := own.special_tokens.get(name)) and token in names:
            out[_KEY + key] = names[token]
    out[_KEY + "add_bos_token"] = bool(own.add_bos)
    if own.chat_template is not None:
        out["tokenizer.chat_template"] = own.chat_template
    return out


def _merges(directory: Path, model: Mapping[str, Any]) -> list[tuple[str, str]]:
    out: list[tuple[str, str]] = []
    given = model.get("merges")
    for merge in given if isinstance(given, list) else []:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        good = isinstance(pair, list) and len(pair) == 2 and all(isinstance(p, str) for p in pair)
        if not good or any(not part or " " in part for part in pair):
            raise FileFormatError(f"{directory / 'tokenizer.json'}: {merge!r:.80} is no merge")
        out.append((pair[0], pair[1]))
    if not out:
        raise UnsupportedError(f"{directory / 'tokenizer.json'}: there are no merges")
    return out


def _sentencepiece(
    content: Mapping[str, Any], tokens: list[str], merges: list[tuple[str, str]]
) -> dict[str, Any]:
    """Scores by which joining gives what merging does: the earlier a merge, the higher."""
    place = {token: i for i, token in enumerate(tokens)}
    scores = np.full(len(tokens), -1e6, np.float32)
    for rank, (a, b) in reversed(list(enumerate(merges))):
        if a + b in place:
            scores[place[a + b]] = -rank
    prefix = any(
        part.get("type") == "Prepend" and part.get("prepend") == SPACE
        or part.get("type") == "Metaspace" and part.get("prepend_scheme", "always") != "never"
        for part in _parts(content)
    )  # fmt: skip
    return {
        _KEY + "model": "llama",
        _KEY + "pre": "default",
        _KEY + "scores": scores,
        _KEY + "add_space_prefix": prefix,
    }


def _parts(content: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The steps of the normalizer and of what cuts texts, however nested."""
    waiting = [content.get("normalizer"), content.get("pre_tokenizer")]
    while waiting:
        part = waiting.pop(0)
        if isinstance(part, dict):
            yield part
            for inner in ("normalizers", "pretokenizers"):
                nested = part.get(inner)
                waiting += nested if isinstance(nested, list) else []


def _rules(content: Mapping[str, Any]) -> list[str]:
    """Names of rules, one for each that differs, the likeliest first."""
    written = set()
    for part in _parts(content):
        pattern = part.get("pattern")
        if isinstance(pattern, dict) and isinstance(pattern.get("Regex"), str):
            written.add(pattern["Regex"])
        if part.get("type") == "ByteLevel" and part.get("use_regex", True):
            written.add("ByteLevel")
        if part.get("type") == "Digits":
            written.add(r"\p{N}")
    whole = bool(content["model"].get("ignore_merges"))
    gpt2 = gguf_pre.find("gpt-2")
    plain = set(gpt2.splits) if gpt2 is not None else set()

    def unlike(name: str) -> int:
        rule = gguf_pre.find(name)
        if rule is None:
            return len(written) + 9
        splits = {"ByteLevel" if s in plain else s for s in rule.splits}
        return 2 * len(splits ^ written) + (rule.whole != whole)

    return sorted((name for name in gguf_pre.RULES if name != "default"), key=unlike)


def _same(own: Tokenizer, metadata: dict[str, Any], vocab_size: int) -> bool:
    """Whether a file with these metadata gives the tokenizer's ids."""
    try:
        made = tokenizer_from_gguf(Path("the tokenizer to write"), metadata, vocab_size)
    except PyloraError:
        return False
    return all(made.encode(text) == own.encode(text) for text in _PROBES)
