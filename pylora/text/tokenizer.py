"""Tokenizer: text to token ids and back, and conversations to text.

A thin face on the `tokenizers` library (extra "text"), made from a Hugging Face directory's
tokenizer.json here, or from GGUF metadata in gguf_vocabulary.py. It checks what goes in and turns
the library's failures into sentences; it trains no tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from pylora.errors import DataError, FileFormatError, expect
from pylora.extras import need
from pylora.files.bounded import read_json, read_text
from pylora.text.chat import render_chat

MAX_TOKENIZER = 256 << 20  # bytes of tokenizer.json
MAX_SMALL = 16 << 20  # bytes of the other files
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")

T = TypeVar("T")


class Tokenizer:
    """Text to ids and back.

    Attributes:
        bos_id: the token that starts a sequence, or None
        eos_ids: the tokens that end a sequence or a turn, the usual one first
        add_bos: whether the model wants `bos_id` at the start of every sequence
        vocab_size: ids are below this
        chat_template: Jinja source, or None
    """

    def __init__(
        self,
        backend: Any,
        *,
        bos_id: int | None = None,
        eos_ids: Iterable[int] = (),
        add_bos: bool = False,
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        """backend: a tokenizers.Tokenizer. special_tokens: {"bos_token": "<s>", ...} for chat."""
        self._backend = backend
        self.bos_id = bos_id
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys(eos_ids))
        self.add_bos = add_bos and bos_id is not None
        self.chat_template = chat_template
        self.special_tokens = dict(special_tokens or {})
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)

    def __repr__(self) -> str:
        chat = "a chat template" if self.chat_template else "no chat template"
        ends = ", ".join(map(str, self.eos_ids)) or "none"
        begin = f"{self.bos_id}{'' if self.add_bos else ' (not added)'}"
        return f"Tokenizer({self.vocab_size} tokens, bos {begin}, eos {ends}, {chat})"

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        """Token ids of `text`; the names of special tokens in it become those tokens.

        Nothing is added, so that pieces of a sequence can be encoded apart. With `bos`, the
        sequence starts with `bos_id` (once, if the text starts with it already): pass
        `bos=tokenizer.add_bos` where a whole sequence begins. Characters that the vocabulary has
        neither tokens nor bytes for (SmolLM2: some control characters) are left out, as the
        model's own tokenizer does. Raises DataError.
        """
        expect("text", text, "encode")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"the text has half of a surrogate pair at position {error.start}, "
                "which is not a character; decode the input as UTF-8"
            ) from error
        encoding = guarded(
            lambda: self._backend.encode(text, add_special_tokens=False),
            DataError,
            "the text cannot be encoded",
        )
        ids: list[int] = list(encoding.ids)
        if bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids; bytes that are not whole UTF-8 characters become U+FFFD.

        Raises DataError naming an id that is no token.
        """
        expect("ids", ids, "decode")
        checked: list[int] = []
        for i, token in enumerate(ids):
            number = int(token) if hasattr(token, "__index__") else -1
            if not 0 <= number < self.vocab_size or self._backend.id_to_token(number) is None:
                raise DataError(
                    f"ids[{i}] is {token!r:.40}, which is no token of this tokenizer "
                    f"(it has ids 0 to {self.vocab_size - 1})"
                )
            checked.append(number)
        text = guarded(
            lambda: self._backend.decode(checked, skip_special_tokens=skip_special_tokens),
            DataError,
            "the ids cannot be decoded",
        )
        return str(text)

    def apply_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = False,
        *,
        now: datetime | None = None,
    ) -> str:
        """The text of [{"role": ..., "content": ...}, ...] by the model's chat template.

        add_generation_prompt: end with what opens the assistant's turn. now: the date that
        templates may show; see `render_chat`. Raises DataError, also if there is no template.
        """
        expect("messages", messages, "apply_chat")
        if self.chat_template is None:
            raise DataError(
                "this model has no chat template; use plain text, or prompt and completion, instead"
            )
        return render_chat(
            self.chat_template,
            messages,
            add_generation_prompt=add_generation_prompt,
            special_tokens=self.special_tokens,
            now=now,
        )


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
    """The tokenizer of a Hugging Face directory: tokenizer.json, with what tokenizer_config.json,
    generation_config.json, config.json and chat_template.jinja say if they are there.

    Raises FileFormatError naming the file.
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
    backend.no_truncation()
    backend.no_padding()
    settings, generation, model = (
        read_json(directory / name, limit=MAX_SMALL) if (directory / name).is_file() else {}
        for name in ("tokenizer_config.json", "generation_config.json", "config.json")
    )
    names = {key: name for key in _SPECIAL if (name := _content(settings.get(key))) is not None}
    ids = {key: backend.token_to_id(name) for key, name in names.items()}
    eos = [ids.get("eos_token"), *_as_list(generation.get("eos_token_id"))]
    eos += _as_list(model.get("eos_token_id"))
    bos = ids.get("bos_token")
    added = guarded(lambda: backend.encode("").ids, FileFormatError, f"{file}: not a tokenizer")
    wants = settings.get("add_bos_token")
    return Tokenizer(
        backend,
        bos_id=bos,
        eos_ids=[i for i in eos if type(i) is int and backend.id_to_token(i) is not None],
        add_bos=wants if isinstance(wants, bool) else bos is not None and added[:1] == [bos],
        chat_template=_chat_template(directory, settings),
        special_tokens=names,
    )


def _content(token: Any) -> str | None:
    """A special token is written as a string or as an object with its content."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _chat_template(directory: Path, settings: Mapping[str, Any]) -> str | None:
    file = directory / "chat_template.jinja"
    if file.is_file():
        return read_text(file, limit=MAX_SMALL)
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = next(
            (
                t.get("template")
                for t in template
                if isinstance(t, dict) and t.get("name") == "default"
            ),
            None,
        )
    return template if isinstance(template, str) else None
