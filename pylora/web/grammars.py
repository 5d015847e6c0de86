"""What an answer must look like, as masks over the vocabulary: JSON schema, regex, grammar, choice.

llguidance does it: a grammar is compiled once, and a copy of it walks along with each answer. Here
are the ways in which clients say it, the texts of tokens (which llguidance knows byte by byte), and
its errors as sentences. Between a schema's parts an answer has at most one space, so that a model
that likes line breaks cannot write them for ever.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from pylora.extras import need
from pylora.web.problem import Problem, malformed

if TYPE_CHECKING:
    from pylora.text.tokenizer import Tokenizer

_KEPT = 64  # compiled grammars
MOST_GRAMMAR = 1 << 20  # characters
# Steps of work: what asks for more is refused, so that no form holds everybody up for long.
_LIMITS = {
    "initial_lexer_fuel": 300_000,
    "step_lexer_fuel": 100_000,
    "max_lexer_states": 30_000,
    "verbose_errors": False,
}
_SPACES = {"whitespace_flexible": True, "whitespace_pattern": r"\x20?"}


@dataclass(frozen=True)
class Form:
    """What an answer must look like. kind: json, regex, lark, gbnf or choice; `param`: the field
    that said so."""

    kind: str
    source: str
    param: str


def form_of(body: Mapping[str, Any]) -> Form | None:
    """The form that a body asks for, in any of the usual ways. Problem for two of them."""
    found: list[Form] = []

    def say(kind: str, source: Any, param: str) -> None:
        found.append(Form(kind, source if isinstance(source, str) else _compact(source), param))

    said = body.get("response_format", {})
    kind, where = said.get("type"), "response_format"
    if kind == "json_object":
        say("json", said.get("schema", {"type": "object"}), where)
    elif kind == "json_schema":
        if ("json_schema" in said) == ("schema" in said):
            raise malformed("response_format.json_schema is missing, or given twice", where)
        schema = said["schema"] if "schema" in said else said["json_schema"]["schema"]
        say("json", _checked(schema, where), where)
    elif kind in ("regex", "grammar"):
        if kind not in said:
            raise malformed(f"response_format.{kind} is missing", where)
        say(kind, said[kind], where)
    for key, value in body.get("structured_outputs", {}).items():
        if key == "json_object":
            if value:
                say("json", {"type": "object"}, f"structured_outputs.{key}")
        else:
            value = _checked(value, f"structured_outputs.{key}") if key == "json" else value
            say(key, value, f"structured_outputs.{key}")
    for key in ("json", "regex", "choice", "grammar"):
        if f"guided_{key}" in body:
            value = body[f"guided_{key}"]
            say(key, _checked(value, f"guided_{key}") if key == "json" else value, f"guided_{key}")
    if "json_schema" in body:  # llama.cpp's
        say("json", _checked(body["json_schema"], "json_schema"), "json_schema")
    if body.get("grammar"):
        say("grammar", body["grammar"], "grammar")
    if len(found) > 1:
        raise malformed(
            f"{' and '.join(f.param for f in found)} each say what the answer must look like; "
            "give one of them",
            found[1].param,
        )
    if found and len(found[0].source) > MOST_GRAMMAR:
        raise malformed(
            f"{found[0].param} is longer than {MOST_GRAMMAR} characters", found[0].param
        )
    return found[0] if found else None


def _checked(schema: Any, param: str) -> Any:
    """A schema that may come as text, as an object or a truth value."""
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError):
            raise malformed(f"{param} is no JSON", param) from None
        if not isinstance(schema, (dict, bool)):
            raise malformed(f"{param} must be a JSON schema: an object, true or false", param)
    if schema is False:
        raise malformed(f"{param} is false, which no answer fits", param)
    return {} if schema is True else schema


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


class Grammars:
    """The grammars of one tokenizer. Threads may share it."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """`vocab_size`: how many logits the model has."""
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self._lock = Lock()
        self._compiled: OrderedDict[Form, Any] = OrderedDict()

    @cached_property
    def vocabulary(self) -> Any:
        """The tokenizer as llguidance has it. Making it takes a moment, and holds Python's lock:
        a server does it before it listens."""
        library = need("llguidance")
        text = self.tokenizer.backend_to_save().to_str()
        ends = list(self.tokenizer.eos_ids) or None
        return library.LLTokenizer(text, n_vocab=self.vocab_size, eos_token=ends)

    def bytes_of(self, token: int) -> bytes:
        """The bytes that a token stands for; of a special one, its name's."""
        if token >= self.tokenizer.vocab_size:
            return b""
        found: bytes = self.vocabulary.decode_bytes([token])
        return found

    def mask(self, form: Form) -> Follows:
        """What follows one answer. Problem that names the field for what cannot be carried out."""
        if not self.tokenizer.eos_ids:
            raise malformed(
                f"{form.param}: this model has no token that ends a text, so no form can end",
                form.param,
            )
        with self._lock:
            compiled = self._compiled.get(form)
            if compiled is not None:
                self._compiled.move_to_end(form)
        if compiled is None:
            compiled = self._compile(form)
            with self._lock:
                self._compiled[form] = compiled
                while len(self._compiled) > _KEPT:
                    self._compiled.popitem(last=False)
        return Follows(compiled.deep_copy(), form, self.vocab_size)

    def _compile(self, form: Form) -> Any:
        library = need("llguidance")
        matcher = library.LLMatcher
        try:
            if form.kind == "json":
                grammar = matcher.grammar_from_json_schema(form.source, defaults=_SPACES)
            elif form.kind == "regex":
                grammar = matcher.grammar_from_regex(form.source)
            elif form.kind == "lark":
                grammar = matcher.grammar_from_lark(form.source)
            else:
                grammar = library.grammar_from(form.kind, form.source)
            limits = library.LLParserLimits(**_LIMITS)
            made = matcher(self.vocabulary, grammar, log_level=0, limits=limits)
        except (ValueError, RecursionError) as error:
            raise refused(form, str(error)) from None
        if not made.is_error():
            # The first mask costs most, and tells forms that no answer fits: not on the engine's
            # thread.
            made.compute_bitmask()
        if made.is_error():
            raise refused(form, made.get_error())
        return made


def refused(form: Form, said: str) -> Problem:
    """llguidance's words as a sentence, on one line, without its state."""
    lines = [line.strip() for line in said.partition("<state>")[0].splitlines() if line.strip()]
    words = " ".join(lines)[:300] or "this cannot be carried out"
    if words.startswith("NoExtension"):
        words = "no answer fits it"
    if "too many" in words or "fuel" in words or "TooComplex" in words:
        words = f"it is too complex ({words})"
    return malformed(f"{form.param}: {words}", form.param)


class Follows:
    """A mask of one answer: which tokens may come next. For the engine's thread alone."""

    def __init__(self, matcher: Any, form: Form, vocab_size: int) -> None:
        self._matcher, self._form = matcher, form
        self._words = np.zeros((vocab_size + 31) // 32, np.int32)
        self._seen = 0

    def allowed(self, answer: Sequence[int]) -> np.ndarray:
        """Bits, int32 [(vocab + 31) // 32]. Problem where llguidance gave up."""
        new = list(answer[self._seen :])
        if new:
            self._matcher.consume_tokens(new)
            self._seen += len(new)
        self._matcher.unsafe_compute_mask_ptr(self._words.ctypes.data, self._words.nbytes)
        if self._matcher.is_error():
            raise refused(self._form, self._matcher.get_error())
        return self._words
