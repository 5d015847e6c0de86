"""Text in, text out: prompts to ids, ids to text as it comes. What `Model.generate` and `chat` run.

Settings have transformers' names. Nothing here holds state.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pylora.errors import ConfigError, DataError, WrongDataError, describe, kind_of
from pylora.generation.generate import stream
from pylora.generation.prompt_cache import PromptCache
from pylora.generation.sampling import Sampling, whole_number
from pylora.generation.text import TextStream, stop_strings

if TYPE_CHECKING:
    from pylora.adapters.pool import AdapterPool
    from pylora.model.llama import Llama
    from pylora.text.tokenizer import Tokenizer

DEFAULT_NEW_TOKENS = 512

Message = Mapping[str, Any]
Conversation = Sequence[Message]


# What the settings are called elsewhere: OpenAI, mlx-lm, vLLM, llama.cpp, transformers.
_FOREIGN = {
    "max_tokens": "max_new_tokens",
    "n_predict": "max_new_tokens",
    "max_length": "max_new_tokens",
    "temp": "temperature",
    "do_sample": "temperature (0: greedy)",
    "stop_strings": "stop",
    "stop_sequences": "stop",
    "repeat_penalty": "repetition_penalty",
    "random_seed": "seed",
    "system_prompt": "system",
    "chat_template_kwargs": "template_args",
    "adapter_name": "adapter",
    "adapter_names": "adapter",
    "lora_request": "adapter",
}
_SETTINGS = (
    "max_new_tokens temperature top_p top_k min_p repetition_penalty seed stop stream adapter "
    "batch_size"
).split()
_OF_CHAT = ("system", "tools", "documents", "template_args")


def known_settings(verb: str, others: Mapping[str, Any]) -> None:
    """ConfigError for a setting that does not exist, with the one that may be meant."""
    known = [*_SETTINGS, *(_OF_CHAT if verb == "chat" else ())]
    for name in others:
        meant = _FOREIGN.get(name) or next(iter(difflib.get_close_matches(name, known, 1)), "")
        if meant in _OF_CHAT and verb != "chat":
            meant = ""
        hint = f"did you mean {meant}?" if meant else f"there are {', '.join(known)}"
        raise ConfigError(f"{verb} has no setting {name!r}; {hint}")


def prompts_of(prompt: Any) -> tuple[list[str], bool]:
    """(the texts, whether one was given rather than a list). WrongDataError for what is no text."""
    if isinstance(prompt, str):
        return [prompt], True
    if isinstance(prompt, (list, tuple)) and all(isinstance(p, str) for p in prompt):
        return list(prompt), False
    advice = {
        "ids": "token ids go to the part: pylora.generation.generate.generate(model.llama, [ids], "
        "...); or decode them: model.tokenizer.decode(ids)",
        "lists of ids": "token ids go to the part: pylora.generation.generate.generate(model.llama,"
        " prompts, ...)",
        "path": "read the file first: Path(path).read_text()",
        "text": "decode the bytes first: data.decode()",
        "dict": "messages go to chat: model.chat([message])",
        "list": "messages go to chat: model.chat(messages)",
    }.get(kind_of(prompt), "")
    raise WrongDataError(
        f"generate takes a text or a list of texts, got {describe(prompt)}{advice and '; '}{advice}"
    )


def conversations_of(messages: Any, system: str | None) -> tuple[list[list[Message]], bool]:
    """(the conversations, whether one was given). A text is one user's message; a list of texts is
    as many conversations; a list of {"role", "content"} is one; a list of such lists many."""
    first: list[Message] = []
    if system is not None:
        if not isinstance(system, str):
            raise WrongDataError(f"system takes a text, got {describe(system)}")
        first = [{"role": "system", "content": system}]

    def user(text: str) -> list[Message]:
        return [*first, {"role": "user", "content": text}]

    if isinstance(messages, str):
        return [user(messages)], True
    if isinstance(messages, Mapping):
        return [[*first, messages]], True
    if isinstance(messages, (list, tuple)):
        if messages and all(isinstance(m, str) for m in messages):
            return [user(m) for m in messages], False
        if messages and all(isinstance(m, Mapping) for m in messages):
            return [[*first, *messages]], True
        if messages and all(
            isinstance(c, (list, tuple)) and c and all(isinstance(m, Mapping) for m in c)
            for c in messages
        ):
            return [[*first, *c] for c in messages], False
        if not messages:
            raise DataError("chat got no message; give a text or [{'role': ..., 'content': ...}]")
    ids = kind_of(messages) in ("ids", "lists of ids")
    advice = "; decode them: model.tokenizer.decode(ids)" if ids else ""
    raise WrongDataError(
        "chat takes a text, a list of messages {'role': ..., 'content': ...}, or a list of either "
        f"for many conversations at once, got {describe(messages)}{advice}"
    )


def begin(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a prompt; of an empty one the token that a sequence starts with."""
    ids = tokenizer.encode(text, bos=tokenizer.add_bos)
    if ids:
        return ids
    if tokenizer.bos_id is None:
        raise DataError("the prompt is empty, and the model has no token to begin with")
    return [tokenizer.bos_id]


def pieces(
    pool: AdapterPool,
    prompts: Sequence[list[int]],
    streams: Sequence[TextStream],
    *,
    max_new_tokens: int | None,
    sampling: Sampling,
    seed: int,
    batch_size: int,
    names: Sequence[str | None],
    cache: PromptCache | None,
) -> Iterator[tuple[int, str]]:
    """(number of the prompt, new text), as it comes. Wrong settings are raised at once."""
    latest: dict[int, str] = {}

    def stop(row: int, token: int) -> bool:
        latest[row] = streams[row].push(token)
        return streams[row].stopped or streams[row].ended

    tokens = stream(
        pool.model,
        prompts,
        _most(pool.model, prompts, max_new_tokens),
        sampling=sampling,
        seed=seed,
        eos_ids=(),  # each prompt's tokenizer has its own: TextStream knows them
        batch_size=batch_size,
        stop=stop,
        pool=pool,
        adapters=names,
        cache=cache,
    )

    def run() -> Iterator[tuple[int, str]]:
        for row, token in tokens:
            text = streams[row].finish() if token is None else latest.pop(row)
            if text:
                yield row, text

    return run()


def text_streams(
    tokenizers: Sequence[Tokenizer], prompts: Sequence[list[int]], stop: str | Sequence[str] | None
) -> list[TextStream]:
    """One for each prompt, by the tokenizer of each."""
    stops = stop_strings(stop)
    return [
        TextStream(k, ids, stops, k.eos_ids) for k, ids in zip(tokenizers, prompts, strict=True)
    ]


def _most(model: Llama, prompts: Sequence[list[int]], asked: int | None) -> int:
    """max_new_tokens; without one, DEFAULT_NEW_TOKENS or as many as the longest prompt leaves."""
    if asked is not None:
        whole_number("max_new_tokens", asked, 0)
        return asked
    room = model.config.max_position_embeddings - max(map(len, prompts), default=0)
    return max(1, min(DEFAULT_NEW_TOKENS, room))
