"""A tokenizer from GGUF metadata: byte-level BPE ("gpt2") and SentencePiece BPE ("llama").

The ids are those that llama.cpp gives (src/llama-vocab.cpp): gguf_pre.py cuts texts for BPE, spm.py
joins by scores, gguf_special.py finds special tokens. Kinds that are not read are refused by name,
and so are pre-tokenizers that gguf_pre.py does not know.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pylora.errors import FileFormatError, UnsupportedError
from pylora.extras import need
from pylora.text import gguf_pre
from pylora.text.gguf_special import (
    CONTROL,
    KEYS,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Specials,
    find_specials,
)
from pylora.text.partition import Partition, Special
from pylora.text.spm import SPACE, SentencePiece
from pylora.text.tokenizer import Tokenizer, guarded

_OTHER_KINDS = {"bert": "WordPiece", "t5": "Unigram", "rwkv": "RWKV", "gemma4": "Gemma 4's BPE"}
_MAX_SPLITS = 1 << 28  # bound on the work that long tokens make
_KEY = "tokenizer.ggml."


def tokenizer_from_gguf(path: Path, metadata: dict[str, Any], vocab_size: int) -> Tokenizer:
    """The tokenizer that `metadata` of the file `path` describe, for a model of `vocab_size`.

    Raises FileFormatError for contradictions and UnsupportedError for kinds that are not read.
    """
    meta = _Metadata(path, metadata)
    kind = meta.get("model", str, None)
    if kind not in ("gpt2", "llama"):
        what = f" ({_OTHER_KINDS[kind]})" if kind in _OTHER_KINDS else ""
        raise UnsupportedError(
            f"{path}: tokenizers of the kind {str(kind)[:40]!r}{what} are not supported, only gpt2 "
            "(byte-level BPE) and llama (SentencePiece); give a Hugging Face directory instead"
        )
    tokens = meta.strings("tokens")
    if len(tokens) > vocab_size:
        raise FileFormatError(
            f"{path}: there are {len(tokens)} tokens, but the model has {vocab_size} embeddings"
        )
    if sum(len(token) ** 2 for token in tokens) > _MAX_SPLITS:
        raise FileFormatError(f"{path}: the tokens are implausibly long")
    types = meta.numbers("token_type", len(tokens))
    given = {key: i for key in _id_keys() if (i := meta.get(key, int, None)) is not None}
    template = metadata.get("tokenizer.chat_template")
    specials = find_specials(
        given,
        {"bos": 1, "eos": 2, "unk": 0} if kind == "llama" else {},
        tokens,
        np.full(len(tokens), NORMAL) if types is None else types.astype(np.int64),
        template if isinstance(template, str) else "",
    )
    names = {token: i for i, token in enumerate(tokens) if token}
    hidden = {i: tokens[i] for i in range(len(tokens)) if names.get(tokens[i]) != i}
    if kind == "gpt2":  # what has no text here has none in llama.cpp
        hidden |= {int(i): "" for i in np.flatnonzero(specials.types == UNUSED)}
    partition = Partition(_matched(specials, tokens, str(metadata.get("general.name", ""))))
    if kind == "gpt2":
        pre = _pre(meta, specials)
        backend = _byte_level(meta, names, pre)
        encode, adds_bos, save = (
            _byte_encoder(meta, names, pre, backend, partition),
            pre.adds_bos,
            None,
        )
    else:
        scores = _scores(meta, tokens)
        prefix = meta.get("add_space_prefix", bool, True)
        backend = _sentencepiece(names, [], specials, prefix)
        unknown = specials.ids.get("unk")
        encode = SentencePiece(names, scores.tolist(), unknown, prefix, partition)
        adds_bos = True
        save = lambda: _registered(
            path,
            _sentencepiece(names, _merges(names, scores), specials, prefix),
            tokens,
            specials,
        )
    if len(hidden) > np.count_nonzero(specials.types == UNUSED):
        specials.notes.append("some tokens are empty or occur twice; the last of a name counts")
    _registered(path, backend, tokens, specials)
    shown = ("bos", "eos", "unk", "sep", "pad", "mask")
    named = {f"{w}_token": tokens[specials.ids[w]] for w in shown if w in specials.ids}
    tools = metadata.get("tokenizer.chat_template.tool_use")
    if meta.get("add_eos_token", bool, False):
        specials.notes.append(
            "add_eos_token asks for an end token behind every text; a prompt gets none, since it "
            "is to be continued"
        )
    return Tokenizer(
        backend,
        bos_id=specials.ids.get("bos"),
        eos_ids=specials.ends,
        add_bos=bool(meta.get("add_bos_token", bool, adds_bos)),
        bos_in_chat=True,
        chat_template=template if isinstance(template, str) else None,
        tool_template=tools if isinstance(tools, str) else None,
        special_tokens={"bos_token": "", "eos_token": ""} | named,
        padded_size=vocab_size,
        hidden=hidden,
        encode=encode,
        save=save,
        notes=[f"{path}: {note}" for note in specials.notes],
    )


def _id_keys() -> list[str]:
    return [*KEYS.values(), "prefix_token_id", "suffix_token_id", "middle_token_id"]


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
        """One number a token. More than there are tokens are passed over, as in llama.cpp."""
        value = self.get(key, np.ndarray, None)
        if value is not None and len(value) < length:
            raise FileFormatError(
                f"{self.path}: {_KEY}{key} has {len(value)} entries for {length} tokens"
            )
        return np.asarray(value)[:length] if value is not None else None


def _matched(specials: Specials, tokens: list[str], model: str) -> list[Special]:
    """The tokens that are found in a text as they are written."""
    chosen = np.flatnonzero(np.isin(specials.types, (CONTROL, USER_DEFINED, UNKNOWN)))
    phi3 = any(name in model.lower() for name in ("phi-3", "phi3"))  # whose tokens eat spaces
    keep = ("<unk>", "<s>", "<|endoftext|>")
    return [Special(tokens[i], int(i), phi3 and tokens[i] not in keep) for i in chosen]


def _pre(meta: _Metadata, specials: Specials) -> gguf_pre.Pre:
    name = meta.get("pre", str, "")
    pre = gguf_pre.find(name)
    if pre is None:
        raise UnsupportedError(
            f"{meta.path}: the pre-tokenizer {name[:40]!r} is not supported, only "
            f"{', '.join(gguf_pre.NAMES)}; give a Hugging Face directory instead"
        )
    if not name:
        specials.notes.append(
            "the file does not say how texts are cut before they are merged (tokenizer.ggml.pre); "
            "it is done as by llama.cpp's default, which splits numbers and marks otherwise than "
            "most models were trained with: convert the model anew"
        )
    return pre


def _byte_level(meta: _Metadata, names: dict[str, int], pre: gguf_pre.Pre) -> Any:
    library = need("tokenizers")
    merges: dict[tuple[str, str], None] = {}  # the first of two equal ones counts
    for merge in meta.strings("merges"):
        at = merge.find(" ", 1)
        if at < 0 or at + 1 == len(merge):
            raise FileFormatError(f"{meta.path}: {_KEY}merges has {merge[:80]!r}, not a pair")
        merges.setdefault((merge[:at], merge[at + 1 :]))
    backend = guarded(
        lambda: library.Tokenizer(library.models.BPE(names, list(merges), ignore_merges=pre.whole)),
        FileFormatError,
        f"{meta.path}: vocabulary and merges do not fit",
    )
    pieces = library.pre_tokenizers
    splits = [pieces.Split(library.Regex(regex), "isolated") for regex in pre.splits]
    level = pieces.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pieces.Sequence([*splits, level])
    backend.decoder = library.decoders.ByteLevel()
    return backend


def _byte_encoder(
    meta: _Metadata, names: dict[str, int], pre: gguf_pre.Pre, backend: Any, partition: Partition
) -> Any:
    """Encodes the texts between special tokens by `backend`.

    The library leaves out bytes that the vocabulary lacks before it merges, llama.cpp afterwards:
    those on both sides stay apart. So such bytes get an id for the while, beyond all others.
    """
    alphabet = need("tokenizers").pre_tokenizers.ByteLevel.alphabet()
    lacking = sorted(byte for byte in alphabet if byte not in names)
    top = 1 + max(names.values(), default=-1)
    if lacking:
        extended = names | {byte: top + i for i, byte in enumerate(lacking)}
        backend = _byte_level(meta, extended, pre)

    def encode(text: str) -> tuple[list[int], list[tuple[int, int]]]:
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        for begin, end, special in partition.cut(text):
            if special is not None:
                ids.append(special)
                spans.append((begin, end))
                continue
            encoding = backend.encode(text[begin:end], add_special_tokens=False)
            for i, (a, b) in zip(encoding.ids, encoding.offsets):
                if i < top:
                    ids.append(i)
                    spans.append((begin + a, begin + b))
        return ids, spans

    return encode


def _scores(meta: _Metadata, tokens: list[str]) -> np.ndarray[Any, Any]:
    scores = meta.numbers("scores", len(tokens))
    if scores is None:
        raise FileFormatError(f"{meta.path}: the metadata lack {_KEY}scores")
    numbers: np.ndarray[Any, Any] = np.nan_to_num(
        scores.astype(np.float64), nan=-np.inf, posinf=np.inf, neginf=-np.inf
    )
    return numbers


def _sentencepiece(
    names: dict[str, int], merges: list[tuple[str, str]], specials: Specials, prefix: bool
) -> Any:
    library = need("tokenizers")
    by_id = {i: name for name, i in names.items()}
    backend = library.Tokenizer(
        library.models.BPE(
            names,
            merges,
            unk_token=by_id.get(specials.ids.get("unk", -1)),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    normalizers, decoders = library.normalizers, library.decoders
    steps = [normalizers.Prepend(SPACE)] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    undo = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*undo, decoders.Strip(" ", 1, 0)] if prefix else undo)
    return backend


def _merges(names: dict[str, int], scores: np.ndarray[Any, Any]) -> list[tuple[str, str]]:
    """Merges from scores, for a tokenizer.json: every way of cutting a token into two tokens is a
    merge, ranked by the token's score. What tokenizer.json can say comes as near as this."""
    by_id = {i: name for name, i in names.items()}
    order = [by_id[int(i)] for i in np.argsort(-scores, kind="stable") if int(i) in by_id]
    return [
        (name[:cut], name[cut:])
        for name in order
        for cut in range(1, len(name))
        if name[:cut] in names and name[cut:] in names
    ]


def _registered(path: Path, backend: Any, tokens: list[str], specials: Specials) -> Any:
    """`backend` with special tokens added: those that decoding leaves out, and the others."""
    added = need("tokenizers").AddedToken
    size = backend.get_vocab_size(with_added_tokens=True)
    for kinds, special in (((CONTROL, UNKNOWN), True), ((USER_DEFINED,), False)):
        chosen = [tokens[i] for i in np.flatnonzero(np.isin(specials.types, kinds)) if tokens[i]]
        add = backend.add_special_tokens if special else backend.add_tokens
        add([added(name, special=special, normalized=False) for name in dict.fromkeys(chosen)])
    if backend.get_vocab_size(with_added_tokens=True) != size:
        raise FileFormatError(f"{path}: a special token is not in the vocabulary")
    return backend
