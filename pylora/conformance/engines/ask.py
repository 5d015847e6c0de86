"""Asks an engine for log-probabilities, in whichever of the usual ways it understands.

Engines differ: some give those of the prompt's tokens (`echo`, vLLM's `prompt_logprobs`), some only
those of the likeliest next tokens; some take token ids, some text alone. The ways are tried in
order of how much they tell. Nothing is judged here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pylora.conformance.engines.http import EngineError, Http, Refusal

Body = Mapping[str, Any]
_TOP = 5  # OpenAI's limit, which engines keep


@dataclass(frozen=True)
class Prompt:
    """A text and its ids."""

    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Got:
    """What an engine said about a prompt: log-probabilities of its tokens but the first, by place;
    and of next tokens, by id."""

    prompt: Mapping[int, float]
    next: Mapping[int, float]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.next)


class Unreadable(EngineError):
    """The engine answered, and no log-probabilities are in it."""


@dataclass(frozen=True)
class Way:
    """One way to ask: where, with what beside the target, and whether the prompt's tokens come."""

    name: str
    path: str
    body: Callable[[Prompt], dict[str, Any]]
    read: Callable[[Any, Prompt, Names], Got]

    def ask(self, http: Http, target: Body, prompt: Prompt, names: Names) -> Got:
        """EngineError or Refusal as in http.py; Unreadable where no numbers come."""
        answer = http.post(self.path, {**self.body(prompt), **target})
        try:
            got = self.read(answer, prompt, names)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            raise Unreadable(f"{self.path} gives no log-probabilities to `{self.name}`") from None
        if not len(got):
            raise Unreadable(f"{self.path} gives no log-probabilities to `{self.name}`")
        return got


class Names:
    """The texts of tokens, for engines that name a token by its text."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = texts
        self.ids = {t: i for i, t in enumerate(texts) if texts.count(t) == 1}

    def find(self, token: Any, number: Any = None) -> int | None:
        """The id of a token named by text, by number, or as "token_id:7"; None if unknown."""
        for given in (number, token):
            if isinstance(given, int) and not isinstance(given, bool):
                return given if 0 <= given < len(self.texts) else None
        if isinstance(token, str) and token.startswith("token_id:"):
            return self.find(int(token.removeprefix("token_id:")))
        return self.ids.get(token) if isinstance(token, str) else None


def _value(x: Any) -> float:
    number = float(x)
    # An engine may say "none at all" by -inf or by its least number.
    return max(number, -1e4) if not math.isnan(number) else number


def _top(entry: Any, names: Names) -> dict[int, float]:
    """{id: log-probability} of one place, from a dict by text or a list of objects."""
    items: list[tuple[Any, Any, Any]]
    if isinstance(entry, dict):
        items = [
            (t, None, v.get("logprob") if isinstance(v, dict) else v) for t, v in entry.items()
        ]
    else:
        items = [(e.get("token"), e.get("id"), e["logprob"]) for e in entry]
    found = {}
    for token, number, value in items:
        at = names.find(token, number)
        if at is not None:
            found[at] = _value(value)
    return found


def _choice(answer: Any) -> Any:
    return answer["choices"][0]


def _read_echo(answer: Any, prompt: Prompt, names: Names) -> Got:
    """OpenAI's `echo`: lists over the prompt's tokens, then over the new ones."""
    logs, n = _choice(answer)["logprobs"], len(prompt.ids)
    values, tops = logs["token_logprobs"], logs.get("top_logprobs") or []
    shown = [names.find(t) for t in logs.get("tokens") or []]
    if len(values) not in (n, n + 1) or any(a not in (None, b) for a, b in zip(shown, prompt.ids)):
        raise Unreadable(
            f"the engine cuts the prompt into other tokens ({len(values)} numbers for {n} tokens): "
            "is a token put in front of it?"
        )
    said = {i: _value(v) for i, v in enumerate(values[:n]) if i and v is not None}
    if len(said) < n - 1:
        raise Unreadable("`echo` without the log-probabilities of the prompt's tokens")
    then = _top(tops[n], names) if len(values) > n and len(tops) > n and tops[n] else {}
    return Got(said, then)


def _read_prompt_logprobs(answer: Any, prompt: Prompt, names: Names) -> Got:
    """vLLM's `prompt_logprobs`: for each token of the prompt an object by id."""
    choice = _choice(answer)
    found = choice.get("prompt_logprobs") or answer["prompt_logprobs"]
    if len(found) != len(prompt.ids):
        raise Unreadable("the engine cuts the prompt into other tokens")
    said = {i: _value(found[i][str(t)]["logprob"]) for i, t in enumerate(prompt.ids) if i}
    return Got(said, _read_next(answer, prompt, names).next)


def _read_next(answer: Any, prompt: Prompt, names: Names) -> Got:
    """The likeliest next tokens, in the old form (objects by text) or the new (`content`)."""
    logs = _choice(answer)["logprobs"]
    if logs.get("content"):
        first = logs["content"][0]
        return Got({}, _top(first.get("top_logprobs") or [first], names))
    return Got({}, _top(logs["top_logprobs"][0], names))


def _read_llama_server(answer: Any, prompt: Prompt, names: Names) -> Got:
    return Got({}, _top(answer["completion_probabilities"][0]["top_logprobs"], names))


def _completion(ids: bool, **more: Any) -> Callable[[Prompt], dict[str, Any]]:
    def body(prompt: Prompt) -> dict[str, Any]:
        given = list(prompt.ids) if ids else prompt.text
        return {"prompt": given, "max_tokens": 1, "temperature": 0, **more}

    return body


_OPENAI, _ECHO = "/v1/completions", {"echo": True, "logprobs": _TOP}
_NEW = {"logprobs": True, "top_logprobs": 10}
# In the order of how much they tell.
WAYS: tuple[Way, ...] = (
    Way("echo, ids", _OPENAI, _completion(True, **_ECHO), _read_echo),
    Way("echo, text", _OPENAI, _completion(False, **_ECHO), _read_echo),
    Way(
        "prompt_logprobs, ids",
        _OPENAI,
        _completion(True, prompt_logprobs=0, logprobs=_TOP),
        _read_prompt_logprobs,
    ),
    Way(
        "n_probs, ids",
        "/completion",
        lambda p: {"prompt": list(p.ids), "n_predict": 1, "n_probs": 20, "temperature": 0},
        _read_llama_server,
    ),
    Way("logprobs, ids", _OPENAI, _completion(True, logprobs=_TOP), _read_next),
    Way("logprobs, text", _OPENAI, _completion(False, logprobs=_TOP), _read_next),
    Way("top_logprobs, ids", _OPENAI, _completion(True, **_NEW), _read_next),
    Way("top_logprobs, text", _OPENAI, _completion(False, **_NEW), _read_next),
)


@dataclass(frozen=True)
class Asking:
    """The ways that an engine understands: `full` tells most, `quick` uses the engine's caches.
    `wrong`: ways that give other numbers than the ways that are right."""

    full: Way
    quick: Way
    names: Names
    wrong: tuple[str, ...] = ()

    def ask(self, http: Http, target: Body, prompt: Prompt) -> Got:
        """In the way that tells most."""
        return self.full.ask(http, target, prompt, self.names)

    def next(self, http: Http, target: Body, prompt: Prompt) -> Got:
        """The next token alone, as a client asks, so that caches of prefixes are used."""
        return self.quick.ask(http, target, prompt, self.names)


def probe(
    http: Http,
    target: Body,
    prompts: Sequence[Prompt],
    names: Names,
    off: Callable[[Got], float],
    allowed: float,
) -> Asking:
    """Tries the ways on the first prompt, and takes those whose numbers are right: `off` says how
    far they are from a right answer, of which `allowed` is allowed. Where none is, the first that
    gives numbers. EngineError where the engine is gone, or gives no numbers in any way."""
    reasons: list[str] = []
    right: list[tuple[Way, Got]] = []
    wrong: list[tuple[Way, float]] = []
    for way in WAYS:
        try:
            got = way.ask(http, target, prompts[0], names)
        except (Refusal, Unreadable) as error:
            reasons.append(f"{way.name}: {error}")
            continue
        far = off(got)
        if far > allowed:
            wrong.append((way, far))
            continue
        right.append((way, got))
        if not got.prompt:
            break
    if not right and not wrong:
        raise EngineError(f"{http} gives no log-probabilities in any way. " + "; ".join(reasons))
    said = tuple(f"`{way.name}` is wrong by {far:.2g} nats" for way, far in wrong)
    if not right:
        return Asking(wrong[0][0], wrong[0][0], names, said)
    quick = next((way for way, got in right if not got.prompt), right[0][0])
    return Asking(right[0][0], quick, names, said)
