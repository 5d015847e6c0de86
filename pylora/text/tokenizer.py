"""Tokenizer: text to token ids and back, and conversations to text.

A thin face on the `tokenizers` library, made from a Hugging Face directory here, or from GGUF
metadata in gguf_vocabulary.py. It checks what goes in and turns the library's failures into
sentences; it trains no tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from pylora.errors import DataError, FileFormatError, UnsupportedError, expect, wrong_type
from pylora.extras import need
from pylora.files.bounded import read_json, read_text
from pylora.text.chat import Rendered, render_marked
from pylora.text.conversation import Conversation, conversation
from pylora.text.declared import add_declared
from pylora.text.ends import ending

MAX_TOKENIZER = 256 << 20  # bytes of tokenizer.json
MAX_SMALL = 16 << 20  # bytes of the other files
_BESIDE = (
    "tokenizer_config.json", "generation_config.json", "config.json", "special_tokens_map.json",
    "added_tokens.json",
)  # fmt: skip
_ANCHORS = (
    "\n",
    ".",
    "a",
    "0",
    "-",
)  # what a continuation is put behind; see `encode_continuation`

T = TypeVar("T")
Spans = list[tuple[int, int]]  # of characters: begin, end


class Tokenizer:
    """Text to ids and back.

    Attributes:
        bos_id: the token that starts a sequence, or None
        start_ids: what stands before every sequence where add_bos: bos_id, for a few models more
        eos_ids: the tokens that end a sequence or a turn, the usual one first
        add_bos: whether the model wants `bos_id` at the start of every sequence
        bos_in_chat: whether a rendered conversation gets it, too (else its template says so)
        vocab_size: ids of tokens are below this
        padded_size: rows of the model's embedding, at least vocab_size: a model can choose an id
            that is no token, and such an id stands for no text
        chat_template: Jinja source, or None
        tool_template: the one for conversations with tools, or None: the same
        arguments: variables of the template, for every conversation
        notes: what was odd in the files, in sentences
    """

    def __init__(
        self,
        backend: Any,
        *,
        bos_id: int | None = None,
        start_ids: Iterable[int] = (),
        eos_ids: Iterable[int] = (),
        add_bos: bool = False,
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
        tool_template: str | None = None,
        bos_in_chat: bool = False,
        padded_size: int = 0,
        hidden: Mapping[int, str] | None = None,
        encode: Callable[[str], tuple[list[int], Spans]] | None = None,
        save: Callable[[], Any] | None = None,
        notes: Iterable[str] = (),
    ) -> None:
        """backend: a tokenizers.Tokenizer, which decodes. special_tokens: {"bos_token": "<s>", ...}
        for chat. hidden: ids that the backend does not have or that have no text, and the token
        that each stands for ("": none). encode: what encodes where the backend does not. save: the
        backend that comes nearest to it."""
        self._backend = backend
        self._encode, self._save = encode, save
        self.bos_id = bos_id
        self.start_ids = tuple(start_ids) or (() if bos_id is None else (bos_id,))
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys(eos_ids))
        self.add_bos = add_bos and bos_id is not None
        self.bos_in_chat = bos_in_chat and self.add_bos
        self.chat_template, self.tool_template = chat_template, tool_template
        self.special_tokens = dict(special_tokens or {})
        self.arguments: dict[str, Any] = {}
        self.notes = tuple(notes)
        known = backend.get_vocab(with_added_tokens=True)
        self._hidden = {i: known.get(token) for i, token in (hidden or {}).items()}
        self.vocab_size = 1 + max([*known.values(), *self._hidden], default=-1)
        self.padded_size = max(padded_size, self.vocab_size)

    def __repr__(self) -> str:
        chat = "a chat template" if self.chat_template else "no chat template"
        ends = ", ".join(map(str, self.eos_ids)) or "none"
        begin = f"{self.bos_id}{'' if self.add_bos else ' (not added)'}"
        return f"Tokenizer({self.vocab_size} tokens, bos {begin}, eos {ends}, {chat})"

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        """Token ids of `text`; the names of special tokens in it become those tokens.

        With `bos`, the sequence starts with `start_ids` (once, if the text starts with it already):
        pass `bos=tokenizer.add_bos` where a whole sequence begins. Otherwise nothing is added but
        what the tokenizer's own rules put before every text (SentencePiece: a space), so text that
        follows other text is not for this function but for `encode_pair` or `encode_continuation`.
        Characters that the vocabulary has neither tokens nor bytes for (SmolLM2: some control
        characters) are left out, as the model's own tokenizer does. Raises DataError.
        """
        expect("text", text, "encode")
        return self.encode_spans(text, bos=bos)[0]

    def encode_spans(self, text: str, *, bos: bool = False) -> tuple[list[int], Spans]:
        """`encode`, and the characters (begin, end) of `text` that each token stands for."""
        expect("text", text, "encode")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"the text has half of a surrogate pair at position {error.start}, "
                "which is not a character; decode the input as UTF-8"
            ) from error
        ids, spans = guarded(lambda: self._split(text), DataError, "the text cannot be encoded")
        start = list(self.start_ids) if bos else []
        if ids[: len(start)] != start:
            ids, spans = start + ids, [(0, 0)] * len(start) + spans
        return ids, spans

    def _split(self, text: str) -> tuple[list[int], Spans]:
        if self._encode is not None:
            return self._encode(text)
        encoding = self._backend.encode(text, add_special_tokens=False)
        return list(encoding.ids), list(encoding.offsets)

    def backend_to_save(self) -> Any:
        """A copy as a tokenizers.Tokenizer, to be written as tokenizer.json."""
        backend = self._backend if self._save is None else self._save()
        return need("tokenizers").Tokenizer.from_str(backend.to_str())

    def encode_continuation(self, text: str) -> list[int]:
        """Token ids of `text` as it stands behind other text: without the space that SentencePiece
        puts before a text. It is encoded behind a character that does not join with it."""
        for anchor in _ANCHORS:
            ids, spans = self.encode_spans(anchor + text)
            first = next((i for i, (_, end) in enumerate(spans) if end > len(anchor)), len(ids))
            if first == len(ids) or spans[first][0] >= len(anchor):
                return ids[first:]
        return self.encode(text)

    def encode_pair(self, prompt: str, rest: str, *, bos: bool = False) -> tuple[list[int], int]:
        """Ids of `prompt` with `rest` behind it, and how many of them are the prompt's.

        The prompt's are those that generation starts from. They are the beginning of the whole
        text's ids wherever no token reaches over the border; where one does, `rest` is encoded as
        a continuation.
        """
        before = self.encode(prompt, bos=bos)
        whole = self.encode(prompt + rest, bos=bos)
        if whole[: len(before)] != before:
            whole = before + self.encode_continuation(rest)
        return whole, len(before)

    def encode_chat(self, text: str) -> list[int]:
        """Ids of a rendered conversation, with the start token where a server adds one."""
        return self.encode(text, bos=self.bos_in_chat)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids; bytes that are not whole UTF-8 characters become U+FFFD.

        Ids below `padded_size` that are no token stand for no text, as in transformers and
        llama.cpp: a model can choose them. Raises DataError naming an id that no model has.
        """
        expect("ids", ids, "decode")
        checked: list[int] = []
        for i, token in enumerate(ids):
            number = int(token) if hasattr(token, "__index__") else -1
            if not 0 <= number < self.padded_size:
                raise DataError(
                    f"ids[{i}] is {token!r:.40}, which is no token of this tokenizer "
                    f"(it has ids 0 to {self.padded_size - 1})"
                )
            if (known := self._hidden.get(number, number)) is not None:
                checked.append(known)
        text = guarded(
            lambda: self._backend.decode(checked, skip_special_tokens=skip_special_tokens),
            DataError,
            "the ids cannot be decoded",
        )
        return str(text)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = False,
        *,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
        arguments: Mapping[str, Any] | None = None,
        now: datetime | None = None,
    ) -> Rendered:
        """[{"role": ..., "content": ...}, ...] by the model's chat template; see `render_marked`.

        add_generation_prompt: end with what opens the assistant's turn. arguments: variables of the
        template, over those in `self.arguments`. Raises DataError, also if there is no template.
        """
        expect("messages", messages, "apply_chat")
        if not isinstance(arguments, (Mapping, type(None))):
            wrong_type("template_args", "a dict of the template's variables", arguments)
        template = self.tool_template if tools and self.tool_template else self.chat_template
        if template is None:
            raise DataError(
                "this model has no chat template; use plain text, or prompt and completion, instead"
            )
        return render_marked(
            template,
            messages,
            add_generation_prompt=add_generation_prompt,
            special_tokens=self.special_tokens,
            tools=tools,
            documents=documents,
            arguments=self.arguments | dict(arguments or {}),
            now=now,
        )

    def apply_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = False,
        **options: Any,
    ) -> str:
        """The text of `render`, which says what the options are."""
        return self.render(messages, add_generation_prompt, **options).text

    def conversation(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        trained: Sequence[bool] | None = None,
        **options: Any,
    ) -> Conversation:
        """The examples that a conversation gives: ids, and which of them are to be learnt.

        trained: for each message, whether it is; None: the assistant's are. options: tools,
        documents, arguments, now, as in `render`. See conversation.py.
        """
        return conversation(self, messages, trained=trained, **options)


def guarded(call: Callable[[], T], kind: type[Exception], what: str) -> T:
    """`call()`, whose failures become `kind`. The library raises bare Exception, and a panic of
    its Rust code comes as an exception outside Exception, recognised by its name."""
    try:
        return call()
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise kind(f"{what}: {str(error)[:300]}") from error
        raise


def tokenizer_from_directory(directory: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face directory: tokenizer.json, with what the other files declare.

    The ids are those that transformers gives. Raises FileFormatError naming the file, and
    UnsupportedError for WordPiece, which no causal model has.
    """
    file = directory / "tokenizer.json"
    if not file.is_file():
        raise FileFormatError(
            f"{directory}: there is no tokenizer.json; save the tokenizer with transformers' "
            "AutoTokenizer(...).save_pretrained, which writes one"
        )
    text = read_text(file, limit=MAX_TOKENIZER)
    library = need("tokenizers")
    backend = guarded(
        lambda: library.Tokenizer.from_str(text), FileFormatError, f"{file}: not a tokenizer"
    )
    if isinstance(backend.model, library.models.WordPiece):
        raise UnsupportedError(
            f"{file}: the tokenizer is WordPiece, which forgets spaces and is not for models that "
            "write text; pylora reads BPE, Unigram and word vocabularies"
        )
    backend.no_truncation()
    backend.no_padding()
    settings, generation, model, special_map, added = (
        read_json(directory / name, limit=MAX_SMALL) if (directory / name).is_file() else {}
        for name in _BESIDE
    )
    names, notes = guarded(
        lambda: add_declared(backend, settings, special_map, added),
        FileFormatError,
        f"{directory}: the special tokens cannot be added",
    )
    before, after = guarded(lambda: _around(backend), FileFormatError, f"{file}: not a tokenizer")
    bos = backend.token_to_id(names["bos_token"]) if "bos_token" in names else None
    if before and before[0] != bos:
        bos = before[0]
        names["bos_token"] = backend.id_to_token(bos)
    if isinstance(wants := settings.get("add_bos_token"), bool) and wants != bool(before):
        notes.append(
            f"tokenizer_config.json says add_bos_token {str(wants).lower()}, but tokenizer.json "
            f"{'adds a' if before else 'adds no'} start token; tokenizer.json counts, as in "
            "transformers"
        )
    if after:
        notes.append(
            "tokenizer.json puts an end token behind every text; a prompt gets none, since it is "
            "to be continued"
        )
    named = backend.token_to_id(names["eos_token"]) if "eos_token" in names else None
    stops = _as_list(generation.get("eos_token_id")) + _as_list(model.get("eos_token_id"))
    by_name = ending({t.content: i for i, t in backend.get_added_tokens_decoder().items()})
    eos = [
        i for i in (named, *stops) if type(i) is int and 0 <= i < 1 << 31 and backend.id_to_token(i)
    ]
    chosen = [i for i in _as_list(generation.get("eos_token_id")) if i in eos]
    if named is not None and chosen and named not in chosen:
        notes.append(
            f"tokenizer_config.json says that {names['eos_token']!r} ends a text, "
            f"generation_config.json {chosen}: any of them does"
        )
    for name, i in by_name.items():
        if eos and i not in eos:
            notes.append(f"text also ends at {name!r}, though no file says that it is an end")
    backend.post_processor = library.processors.Sequence([])  # it also trims what tokens stand for
    width = model.get("vocab_size")
    templates = _chat_templates(directory, settings)
    return Tokenizer(
        backend,
        bos_id=bos,
        start_ids=before,
        eos_ids=[*eos, *by_name.values()],
        add_bos=bool(before),
        chat_template=templates.get("default"),
        tool_template=templates.get("tool_use"),
        special_tokens=names,
        padded_size=width if type(width) is int and 0 < width < 1 << 31 else 0,
        notes=[f"{directory}: {note}" for note in notes],
    )


def _around(backend: Any) -> tuple[list[int], list[int]]:
    """What the post-processor puts before and behind a text."""
    plain, whole = (backend.encode("a", add_special_tokens=s).ids for s in (False, True))
    n = len(plain)
    at = next((i for i in range(len(whole) - n + 1) if whole[i : i + n] == plain), len(whole))
    return list(whole[:at]), list(whole[at + n :])


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def chat_templates(directory: Path) -> dict[str, str]:
    """The templates in a directory, from all the files that may have them, by name: "default"."""
    file = directory / "tokenizer_config.json"
    return _chat_templates(directory, read_json(file, limit=MAX_SMALL) if file.is_file() else {})


def _chat_templates(directory: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """The templates by name; a file of its own counts before an entry in tokenizer_config.json."""
    found: dict[str, str] = {}
    written = settings.get("chat_template")
    if isinstance(written, str):
        found["default"] = written
    entries = [
        (entry.get("name"), entry.get("template"))
        for entry in (written if isinstance(written, list) else ())
        if isinstance(entry, Mapping)
    ]
    entries += list(written.items()) if isinstance(written, Mapping) else []
    found |= {n: t for n, t in entries if isinstance(n, str) and isinstance(t, str)}
    legacy = directory / "chat_template.json"
    if not found and legacy.is_file():
        template = read_json(legacy, limit=MAX_SMALL).get("chat_template")
        found |= {"default": template} if isinstance(template, str) else {}
    more = directory / "additional_chat_templates" / "tool_use.jinja"
    for name, file in (("default", directory / "chat_template.jinja"), ("tool_use", more)):
        if file.is_file():
            found[name] = read_text(file, limit=MAX_SMALL)
    return found
