"""From a body that was read to requests of the engine: templates, tokens, limits, who may what.

All of it runs beside the event loop, in a thread. What the body says of adapters, forms and
lengths is decided here, once for every endpoint; nothing is computed.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pylora.errors import DataError
from pylora.generation.sampling import Sampling
from pylora.generation.text import stop_strings
from pylora.serving.request import Request
from pylora.web.fields import shown
from pylora.web.grammars import Form, Grammars, form_of
from pylora.web.problem import malformed
from pylora.web.tools import Style, must_call, style_of

if TYPE_CHECKING:
    from pylora.text.tokenizer import Tokenizer
    from pylora.web.house import House
    from pylora.web.keys import Key

_ROLES = ("system", "developer", "user", "assistant", "tool")
# What a message may have beside role, content and tool_calls, whether or not the template shows it.
_TEXTS = ("name", "tool_call_id", "refusal", "reasoning_content", "reasoning", "thinking")
_NOT_OF_MESSAGES = {
    "function_call": "is OpenAI's old name; use `tool_calls`",
    "audio": "pylora runs text models, and hears no sound",
}
_DEFAULT_COMPLETION = 16  # OpenAI's for /v1/completions


@dataclass(frozen=True)
class Prompt:
    """A prompt: its ids, and its text for `echo`."""

    ids: list[int]
    text: str


@dataclass(frozen=True)
class Asked:
    """A body, ready for the engine: `n` requests for each prompt, one prompt behind the other."""

    model: str  # the name that the answer gives
    requests: list[Request]
    prompts: list[Prompt]
    tokenizer: Tokenizer
    grammars: Grammars
    seed: int
    n: int = 1
    stop: tuple[str, ...] = ()
    stream: bool = False
    usage: bool = False  # wanted in the stream
    logs: bool = False
    top: int = 0
    echo: bool = False
    by_id: bool = False
    style: Style | None = None
    adapters: tuple[tuple[str, float], ...] = field(default=())


def chat(house: House, who: Key, body: Mapping[str, Any]) -> Asked:
    """Of a body of /v1/chat/completions. Raises Problem, and what templates raise (DataError)."""
    model, adapters = house.shelf.chosen(who, body)
    tokenizer, grammars = house.words(adapters)
    top = body.get("top_logprobs", 0)
    logs = body.get("logprobs", False)
    if top and not logs:
        raise malformed("top_logprobs needs logprobs: true", "top_logprobs")
    choice = body.get("tool_choice", "auto" if body.get("tools") else "none")
    tools = body.get("tools") if choice != "none" else None
    prompt = rendered(tokenizer, body, tools)
    template = tokenizer.tool_template or tokenizer.chat_template or ""
    style = style_of(template) if tools else None
    form = form_of(body)
    called = must_call(style, tools or (), choice)
    if form is not None and called is not None:
        raise malformed(
            f"{form.param} and tool_choice each say what the answer must look like; give one",
            "tool_choice",
        )
    if "max_tokens" in body and "max_completion_tokens" in body:
        raise malformed(
            "max_tokens is OpenAI's old name of max_completion_tokens; give one of them",
            "max_tokens",
        )
    most = body.get("max_completion_tokens", body.get("max_tokens"))
    return _asked(
        house, who, body, model, adapters, tokenizer, grammars, [prompt], most,
        form=form or called, logs=logs, top=top, style=style,
    )  # fmt: skip


def completion(house: House, who: Key, body: Mapping[str, Any]) -> Asked:
    """Of a body of /v1/completions."""
    model, adapters = house.shelf.chosen(who, body)
    tokenizer, grammars = house.words(adapters)
    if body.get("best_of", body.get("n", 1)) != body.get("n", 1):
        raise malformed("best_of is not done here: it must be n, or left out", "best_of")
    if body.get("suffix"):
        raise malformed(
            "suffix: text is not filled in between two others here; write the marks of the model's "
            "own format into the prompt",
            "suffix",
        )
    most = body.get("max_tokens", _DEFAULT_COMPLETION)
    top = body.get("logprobs")
    return _asked(
        house, who, body, model, adapters, tokenizer, grammars,
        prompts_of(house, tokenizer, body["prompt"], "prompt"), most,
        form=form_of(body), logs=top is not None, top=top or 0, echo=body.get("echo", False),
    )  # fmt: skip


def llama_completion(house: House, who: Key, body: Mapping[str, Any]) -> Asked:
    """Of a body of llama.cpp's /completion."""
    model, adapters = house.shelf.chosen(who, body)
    tokenizer, grammars = house.words(adapters)
    prompts = prompts_of(house, tokenizer, body["prompt"], "prompt")
    if len(prompts) != 1:
        raise malformed("prompt: /completion takes one prompt at a time", "prompt")
    most = body.get("n_predict", -1)
    top = body.get("n_probs", 0)
    return _asked(
        house, who, body, model, adapters, tokenizer, grammars, prompts, None if most < 0 else most,
        form=form_of(body), logs=top > 0, top=top,
    )  # fmt: skip


def prompts_of(
    house: House, tokenizer: Tokenizer, given: Sequence[str | list[int]], where: str
) -> list[Prompt]:
    """Texts or ids as prompts. Problem for one that is empty or has an id that is no token."""
    prompts = []
    for i, one in enumerate(given):
        place = where if len(given) == 1 else f"{where}[{i}]"
        if isinstance(one, str):
            ids = tokenizer.encode(one, bos=tokenizer.add_bos)
            if not ids and tokenizer.bos_id is None:
                raise malformed(
                    f"{place} is empty, and the model has no token to begin with", where
                )
            prompts.append(Prompt(ids or [tokenizer.bos_id or 0], one))
            continue
        size = house.vocabulary
        odd = next((t for t in one if t >= size), None)
        if odd is not None:
            raise malformed(f"{place} has {odd}; the model has the tokens 0 to {size - 1}", where)
        text = tokenizer.decode([t for t in one if t < tokenizer.padded_size])
        prompts.append(Prompt(one, text))
    return prompts


def rendered(tokenizer: Tokenizer, body: Mapping[str, Any], tools: Sequence[Any] | None) -> Prompt:
    """A conversation as a prompt. Problem, or the template's DataError."""
    template = tokenizer.chat_template or ""
    messages = [_message(m, i, template) for i, m in enumerate(body["messages"])]
    goes_on = body.get("continue_final_message", False)
    opens = body.get("add_generation_prompt", not goes_on)
    if goes_on and opens:
        raise malformed(
            "continue_final_message goes on with the last message; add_generation_prompt begins a "
            "new one: give one of them",
            "add_generation_prompt",
        )
    text = tokenizer.apply_chat(
        messages,
        add_generation_prompt=opens,
        tools=tools or None,
        documents=body.get("documents") or None,
        arguments=body.get("chat_template_kwargs"),
    )
    if goes_on:
        last = messages[-1].get("content")
        last = last.strip() if isinstance(last, str) else ""
        end = text.rfind(last) if last else -1
        if end < 0:
            raise malformed(
                "continue_final_message: the chat template does not show the last message as it "
                "is, so it cannot be gone on with",
                "continue_final_message",
            )
        text = text[: end + len(last)]
    ids = tokenizer.encode_chat(text)
    if not ids:
        raise malformed("the chat template makes nothing of these messages", "messages")
    return Prompt(ids, text)


def _message(message: Mapping[str, Any], i: int, template: str) -> Mapping[str, Any]:
    role = message.get("role")
    if role not in _ROLES:
        raise malformed(
            f"messages[{i}].role must be one of {', '.join(_ROLES)}, got {str(role)[:40]!r}",
            f"messages[{i}].role",
        )
    for name, value in message.items():
        if name in ("role", "content") or value is None:
            continue
        where = f"messages[{i}].{name[:60]}"
        if name in _NOT_OF_MESSAGES:
            raise malformed(f"{where}: {_NOT_OF_MESSAGES[name]}", where)
        if name in _TEXTS and not isinstance(value, str):
            raise malformed(f"{where} must be a text, got {shown(value)}", where)
        if (
            name not in _TEXTS
            and name != "tool_calls"
            and not re.search(rf"\b{re.escape(name)}\b", template)
        ):
            raise malformed(
                f"{where}: a message has no such field, and the model's chat template knows none; "
                "take it out",
                where,
            )  # fmt: skip
    if role == "developer" and "developer" not in template:  # OpenAI's newer name
        return {**message, "role": "system"}
    return message


def _asked(
    house: House,
    who: Key,
    body: Mapping[str, Any],
    model: str,
    adapters: tuple[tuple[str, float], ...],
    tokenizer: Tokenizer,
    grammars: Grammars,
    prompts: list[Prompt],
    most: int | None,
    *,
    form: Form | None,
    logs: bool,
    top: int,
    echo: bool = False,
    style: Style | None = None,
) -> Asked:
    """What all endpoints have in common."""
    n = body.get("n", 1)
    if len(prompts) * n > house.limits.answers:
        raise malformed(
            f"{len(prompts)} prompts with {n} answers each are more than the "
            f"{house.limits.answers} answers that one request may ask for", "n",
        )  # fmt: skip
    if form is not None and body.get("ignore_eos"):
        raise malformed(
            f"ignore_eos: an answer that must fit {form.param} ends where it does", "ignore_eos"
        )
    if body.get("stream_options") and not body.get("stream"):
        raise malformed("stream_options needs stream: true", "stream_options")
    seed = body.get("seed")
    seed = secrets.randbits(32) if seed is None else seed % (1 << 64)
    ends = set(body.get("stop_token_ids", ()))
    ends |= set() if body.get("ignore_eos") else set(tokenizer.eos_ids)
    seconds = body.get("timeout", house.limits.seconds)
    deadline = None if seconds is None else time.monotonic() + seconds
    sampling = _sampling(body, house.vocabulary)
    requests = [
        Request(
            prompt.ids,
            house.limits.tokens(len(prompt.ids), most),
            sampling,
            seed=seed,
            row=row,
            stop_ids=tuple(sorted(ends)),
            adapters=adapters,
            logprobs=top if logs else None,
            prompt_logprobs=echo and logs,
            mask=None if form is None else grammars.mask(form),
            deadline=deadline,
            key=who.name,
        )
        for prompt in prompts
        for row in range(n)
    ]
    try:
        stop = stop_strings(body.get("stop"))
    except DataError as error:
        raise malformed(str(error), "stop") from None
    return Asked(
        model,
        requests,
        prompts,
        tokenizer,
        grammars,
        seed,
        n=n,
        stop=stop,
        stream=body.get("stream", False),
        usage=body.get("stream_options", {}).get("include_usage", False),
        logs=logs,
        top=top,
        echo=echo,
        by_id=body.get("return_tokens_as_token_ids", False),
        style=style,
        adapters=adapters,
    )


def _sampling(body: Mapping[str, Any], vocabulary: int) -> Sampling:
    """OpenAI's defaults: temperature 1, no cut."""
    if "repetition_penalty" in body and "repeat_penalty" in body:
        raise malformed(
            "repeat_penalty is llama.cpp's name of repetition_penalty; give one", "repeat_penalty"
        )
    for token in body.get("logit_bias", {}):
        if token >= vocabulary:
            raise malformed(
                f"logit_bias names {token}; the model has the tokens 0 to {vocabulary - 1}",
                "logit_bias",
            )
    return Sampling(
        temperature=body.get("temperature", 1.0),
        top_k=max(0, body.get("top_k", 0)),
        top_p=body.get("top_p", 1.0),
        min_p=body.get("min_p", 0.0),
        repetition_penalty=body.get("repetition_penalty", body.get("repeat_penalty", 1.0)),
        presence_penalty=body.get("presence_penalty", 0.0),
        frequency_penalty=body.get("frequency_penalty", 0.0),
        logit_bias=body.get("logit_bias", {}),
    )
