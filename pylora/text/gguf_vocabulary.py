"""A tokenizer from GGUF metadata: byte-level BPE ("gpt2") and SentencePiece BPE ("llama").

The metadata give vocabulary, merges or scores, and the name of the pre-tokenizer; what that name
means is llama.cpp's definition (src/llama-vocab.cpp), or the tokenizer.json of the model that it
is named after where the two differ in writing only. A name that is not listed here is refused:
a wrong pre-tokenizer gives wrong ids without any error.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pylora.errors import FileFormatError, UnsupportedError
from pylora.extras import need
from pylora.text.tokenizer import Tokenizer, guarded

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_SPLITS: dict[str, tuple[str, ...]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    "gpt-2": (_GPT2,),
    "llama-bpe": (rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}",),
    "qwen2": (rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}",),
    "smollm": (r"\p{N}", _GPT2),
}
_ALIASES = {
    "gpt2": "gpt-2",
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "deepseek-r1-qwen": "qwen2",
}
_CONTROL, _USER_DEFINED = 3, 4
_MERGEABLE = (1, 4)  # token types that merging may produce: normal and user-defined
_MAX_SPLITS = 1 << 28  # bound on the work of recovering merges from scores
_SPACE = "\u2581"
_KEY = "tokenizer.ggml."


def tokenizer_from_gguf(path: Path, metadata: dict[str, Any], vocab_size: int) -> Tokenizer:
    """The tokenizer that `metadata` of the file `path` describe, for a model of `vocab_size`.

    Raises FileFormatError for contradictions and UnsupportedError for kinds that are not read.
    """
    meta = _Metadata(path, metadata)
    tokens = meta.strings("tokens")
    if len(tokens) > vocab_size:
        raise FileFormatError(
            f"{path}: there are {len(tokens)} tokens, but the model has {vocab_size} embeddings"
        )
    if len(set(tokens)) != len(tokens):
        raise FileFormatError(f"{path}: {_KEY}tokens names a token twice")
    types = meta.numbers("token_type", len(tokens))
    kind = meta.get("model", str, None)
    if kind == "gpt2":
        backend, pre = _byte_level(meta, tokens)
        adds_bos = pre == "llama-bpe"
        bos, eos = meta.token("bos_token_id", tokens), meta.token("eos_token_id", tokens)
    elif kind == "llama":
        backend, adds_bos = _sentencepiece(meta, tokens, types), True
        bos, eos = meta.token("bos_token_id", tokens, 1), meta.token("eos_token_id", tokens, 2)
    else:
        raise UnsupportedError(
            f"{path}: tokenizers of the kind {str(kind)[:40]!r} are not supported, only gpt2 "
            "(byte-level BPE) and llama (SentencePiece); give a Hugging Face directory instead"
        )
    _add_special(path, backend, tokens, types)
    ids = {
        "bos_token": bos,
        "eos_token": eos,
        "unk_token": meta.token("unknown_token_id", tokens),
        "pad_token": meta.token("padding_token_id", tokens),
    }
    ends = [eos, meta.token("eot_token_id", tokens), meta.token("eom_token_id", tokens)]
    template = metadata.get("tokenizer.chat_template")
    return Tokenizer(
        backend,
        bos_id=bos,
        eos_ids=[i for i in ends if i is not None],
        add_bos=bool(meta.get("add_bos_token", bool, adds_bos)),
        chat_template=template if isinstance(template, str) else None,
        special_tokens={name: tokens[i] for name, i in ids.items() if i is not None},
    )


class _Metadata:
    """The tokenizer's metadata, each value checked for its type."""

    def __init__(self, path: Path, metadata: dict[str, Any]) -> None:
        self.path, self._metadata = path, metadata

    def get(self, key: str, kind: type, default: Any) -> Any:
        value = self._metadata.get(_KEY + key, default)
        if value is not None and type(value) is not kind:
            raise FileFormatError(f"{self.path}: {_KEY}{key} must be one {kind.__name__}")
        return value

    def strings(self, key: str) -> list[str]:
        value = self.get(key, list, None)
        if not value:
            raise FileFormatError(f"{self.path}: the metadata lack {_KEY}{key}")
        return list(value)

    def numbers(self, key: str, length: int) -> np.ndarray[Any, Any] | None:
        value = self.get(key, np.ndarray, None)
        if value is not None and len(value) != length:
            raise FileFormatError(
                f"{self.path}: {_KEY}{key} has {len(value)} entries for {length} tokens"
            )
        return np.asarray(value) if value is not None else None

    def token(self, key: str, tokens: list[str], default: int | None = None) -> int | None:
        """A token id. A default counts only if the vocabulary has it."""
        index = self.get(key, int, None)
        if index is None:
            return default if default is not None and default < len(tokens) else None
        if not 0 <= index < len(tokens):
            raise FileFormatError(
                f"{self.path}: {_KEY}{key} is {index}, but there are {len(tokens)} tokens"
            )
        return int(index)


def _byte_level(meta: _Metadata, tokens: list[str]) -> tuple[Any, str]:
    library = need("tokenizers")
    pre = meta.get("pre", str, "default")
    pre = _ALIASES.get(pre, pre)
    if pre not in _SPLITS:
        raise UnsupportedError(
            f"{meta.path}: the pre-tokenizer {pre[:40]!r} is not supported, only "
            f"{', '.join(sorted([*_SPLITS, *_ALIASES]))}; give a Hugging Face directory instead"
        )
    merges: list[tuple[str, str]] = []
    for merge in meta.strings("merges"):
        left, gap, right = merge.partition(" ")
        if not (left and gap and right):
            raise FileFormatError(f"{meta.path}: {_KEY}merges has {merge[:80]!r}, not a pair")
        merges.append((left, right))
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = guarded(
        lambda: library.Tokenizer(
            library.models.BPE(vocabulary, merges, ignore_merges=pre == "llama-bpe")
        ),
        FileFormatError,
        f"{meta.path}: vocabulary and merges do not fit",
    )
    pieces = library.pre_tokenizers
    splits = [pieces.Split(library.Regex(regex), "isolated") for regex in _SPLITS[pre]]
    level = pieces.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pieces.Sequence([*splits, level])
    backend.decoder = library.decoders.ByteLevel()
    if pre == "qwen2":
        backend.normalizer = library.normalizers.NFC()  # as in Qwen's own tokenizer.json
    return backend, pre


def _sentencepiece(meta: _Metadata, tokens: list[str], types: np.ndarray[Any, Any] | None) -> Any:
    library = need("tokenizers")
    scores = meta.numbers("scores", len(tokens))
    if scores is None:
        raise FileFormatError(f"{meta.path}: the metadata lack {_KEY}scores")
    unknown = meta.token("unknown_token_id", tokens, 0)
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = _merges(meta.path, tokens, scores, types)
    backend = guarded(
        lambda: library.Tokenizer(
            library.models.BPE(
                vocabulary,
                merges,
                unk_token=None if unknown is None else tokens[unknown],
                fuse_unk=True,
                byte_fallback=True,
            )
        ),
        FileFormatError,
        f"{meta.path}: vocabulary and scores do not fit",
    )
    prefix = meta.get("add_space_prefix", bool, True)
    normalizers, decoders = library.normalizers, library.decoders
    steps = [normalizers.Prepend(_SPACE)] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    undo = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*undo, decoders.Strip(" ", 1, 0)] if prefix else undo)
    return backend


def _merges(
    path: Path,
    tokens: list[str],
    scores: np.ndarray[Any, Any],
    types: np.ndarray[Any, Any] | None,
) -> list[tuple[str, str]]:
    """Merges from scores: SentencePiece joins the neighbours whose union scores best, so every
    way of cutting a token into two tokens is a merge, ranked by the token's score."""
    if sum(len(token) ** 2 for token in tokens) > _MAX_SPLITS:
        raise FileFormatError(f"{path}: the tokens are implausibly long")
    usable = np.ones(len(tokens), bool) if types is None else np.isin(types, _MERGEABLE)
    vocabulary = {token for token, use in zip(tokens, usable) if use}
    order = np.argsort(-np.nan_to_num(scores.astype(np.float64)), kind="stable")
    return [
        (token[:cut], token[cut:])
        for i in order
        if usable[i]
        for token in (tokens[i],)
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]


def _add_special(
    path: Path, backend: Any, tokens: list[str], types: np.ndarray[Any, Any] | None
) -> None:
    """Registers control and user-defined tokens, so that their names are never cut up."""
    if types is None:
        return
    added = need("tokenizers").AddedToken
    for kind, add in ((_CONTROL, backend.add_special_tokens), (_USER_DEFINED, backend.add_tokens)):
        special = kind == _CONTROL
        named = [tokens[i] for i in np.flatnonzero(types == kind) if tokens[i]]
        add([added(name, special=special, normalized=False) for name in named])
    if backend.get_vocab_size(with_added_tokens=True) != len(tokens):
        raise FileFormatError(f"{path}: a special token is not in the vocabulary")
