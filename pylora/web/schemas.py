"""The bodies that clients send, as tables: OpenAI's fields, and those of vLLM and llama.cpp.

A table is what checks a body and what /openapi.json shows. Numbers have OpenAI's ranges where
those make sense for any model, and otherwise the widest that mean something.
"""

from __future__ import annotations

from typing import Any

from pylora.serving.request import MOST_LOGPROBS
from pylora.web.fields import (
    Field,
    Record,
    anything,
    either,
    flag,
    list_of,
    mapping,
    number,
    shown,
    text,
    whole,
)
from pylora.web.problem import malformed

MOST_STOPS = 16
MOST_CHOICES = 128
MOST_PROMPTS = 256
_LONG = 1 << 31

name = text(least=1, most=512)
_seconds = number(0, 86400, above=True, takes="a number of seconds above 0, at most 86400")
_weight = number(-1000, 1000, takes="a number from -1000 to 1000; 1 is as it was trained")

WEIGHTED = Record("an adapter", {"name": name, "weight": _weight}, needs=("name",))
SCALED = Record("an adapter", {"id": whole(0, _LONG), "scale": _weight}, needs=("id", "scale"))
_stop = either(
    text(least=1, most=1000),
    list_of(text(least=1, most=1000), most=MOST_STOPS),
    takes=f"a text or a list of at most {MOST_STOPS} texts, none empty",
)
_tokens = list_of(whole(0, _LONG, takes="a token's id"), least=1, takes="a list of token ids")


def _token(key: str, where: str) -> int:
    if not key.isascii() or not key.isdigit() or len(key) > 10:
        raise malformed(f"{where} names a token by its id, got {shown(key)}", where)
    return int(key)


_bias = mapping(
    _token,
    number(-100, 100),
    most=1024,
    takes='an object of at most 1024 tokens, such as {"1734": -100}',
)
STREAMING = Record(
    "stream_options", {"include_usage": flag()}, idle=frozenset({"include_obfuscation"})
)
_IDLE = frozenset(  # they say whose request it is, where it is billed, or how it is carried
    "user metadata store service_tier safety_identifier prompt_cache_key prompt_cache_retention "
    "prompt_cache_options".split()
)

_DRAWING: dict[str, Field] = {
    "temperature": number(0, 100),
    "top_p": number(0, 1, above=True),
    "top_k": whole(-1, _LONG, takes="a whole number; 0 or -1: all tokens"),
    "min_p": number(0, 1),
    "seed": whole(-(1 << 63), (1 << 64) - 1),
    "frequency_penalty": number(-2, 2),
    "presence_penalty": number(-2, 2),
    "repetition_penalty": number(0, 100, above=True),
    "repeat_penalty": number(0, 100, above=True),
    "logit_bias": _bias,
}
_SHARED: dict[str, Field] = {
    "model": name,
    "adapters": list_of(WEIGHTED.as_field(), most=64),
    "lora": list_of(SCALED.as_field(), most=1024),
    **_DRAWING,
    "n": whole(1, MOST_CHOICES),
    "stop": _stop,
    "stop_token_ids": list_of(whole(0, _LONG), most=1024),
    "ignore_eos": flag(),
    "max_tokens": whole(0, _LONG),
    "stream": flag(),
    "stream_options": STREAMING.as_field(),
    "timeout": _seconds,
    "return_tokens_as_token_ids": flag(),
}
_SCHEMA = either(anything(), flag(), takes="a JSON schema: an object, true or false")
_CHOICE = list_of(text(least=1), least=1, most=10000)
STRUCTURED = Record(
    "structured_outputs",
    {
        "json": either(_SCHEMA, text(least=1), takes="a JSON schema, or the text of one"),
        "regex": text(least=1),
        "choice": _CHOICE,
        "grammar": text(least=1),
        "json_object": flag(),
    },
    idle=frozenset({"disable_any_whitespace", "disable_fallback"}),
)
NAMED_SCHEMA = Record(
    "json_schema",
    {"name": text(least=1, most=64), "schema": _SCHEMA, "description": text(), "strict": flag()},
    needs=("schema",),
)
FORMAT = Record(
    "response_format",
    {
        "type": text(choices=("text", "json_object", "json_schema", "regex", "grammar")),
        "json_schema": NAMED_SCHEMA.as_field(),
        "schema": _SCHEMA,  # llama.cpp's place for it
        "regex": text(least=1),
        "grammar": text(least=1),
    },
    needs=("type",),
)
_BOUND: dict[str, Field] = {
    "response_format": FORMAT.as_field(),
    "structured_outputs": STRUCTURED.as_field(),
    "guided_json": either(_SCHEMA, text(least=1), takes="a JSON schema, or the text of one"),
    "guided_regex": text(least=1),
    "guided_choice": _CHOICE,
    "guided_grammar": text(least=1),
}
_NO_PROMPT_LOGPROBS = "ask for those of the prompt with `echo` and `logprobs` (/v1/completions)"

FUNCTION = Record(
    "a function",
    {
        "name": text(least=1, most=64),
        "description": text(),
        "parameters": anything("a JSON schema: an object"),
        "strict": flag(),
    },
    needs=("name",),
)
TOOL = Record(
    "a tool",
    {"type": text(choices=("function",)), "function": FUNCTION.as_field()},
    needs=("type", "function"),
)
NAMED_TOOL = Record(
    "tool_choice",
    {
        "type": text(choices=("function",)),
        "function": Record("function", {"name": text(least=1)}, needs=("name",)).as_field(),
    },
    needs=("type", "function"),
)
MESSAGE = anything("an object with 'role' and 'content'", {
    "type": "object",
    "properties": {"role": {"type": "string"}},
    "required": ["role"],
})  # fmt: skip

CHAT = Record(
    "a chat completion",
    {
        "messages": list_of(MESSAGE, least=1, most=10000, takes="a list of messages, at least one"),
        **_SHARED,
        "max_completion_tokens": whole(0, _LONG),
        "logprobs": flag(),
        "top_logprobs": whole(0, MOST_LOGPROBS),
        "tools": list_of(TOOL.as_field(), most=1024),
        "tool_choice": either(
            text(choices=("none", "auto", "required")),
            NAMED_TOOL.as_field(),
            takes="'none', 'auto', 'required', or {'type': 'function', 'function': {'name': …}}",
        ),
        "documents": list_of(anything(), most=10000),
        "chat_template_kwargs": anything("an object of the template's variables"),
        "add_generation_prompt": flag(),
        "continue_final_message": flag(),
        **_BOUND,
    },
    needs=("messages",),
    idle=_IDLE | {"parallel_tool_calls"},
    without={
        "functions": "is OpenAI's old name; use `tools`",
        "function_call": "is OpenAI's old name; use `tool_choice`",
        "audio": "pylora runs text models, and gives no sound",
        "modalities": "pylora runs text models; leave it out",
        "web_search_options": "this server searches nothing; leave it out",
        "moderation": "this server moderates nothing; leave it out",
        "reasoning_effort": "say it in the template's own variable: `chat_template_kwargs`",
        "verbosity": "this has no meaning for this model; leave it out",
        "prediction": "predicted outputs are not used here; leave it out",
        "prompt_logprobs": _NO_PROMPT_LOGPROBS,
    },
)
PROMPT = either(
    text(),
    _tokens,
    list_of(text(), least=1, most=MOST_PROMPTS),
    list_of(_tokens, least=1, most=MOST_PROMPTS),
    takes=f"a text, a list of token ids, or a list of at most {MOST_PROMPTS} of either",
)


def _prompt_fits(value: Any) -> bool:
    """Which of the four kinds a prompt is, is told by its first item alone; `read` checks all."""
    return isinstance(value, str) or (
        isinstance(value, list)
        and bool(value)
        and isinstance(value[0], (str, int, list))
        and not isinstance(value[0], bool)
    )


def _prompt_read(value: Any, where: str) -> Any:
    if isinstance(value, str):
        return [value]
    if isinstance(value[0], int):
        return [_tokens(value, where)]
    if len(value) > MOST_PROMPTS:
        raise malformed(f"{where} has {len(value)} prompts; {MOST_PROMPTS} are allowed", where)
    one = text() if isinstance(value[0], str) else _tokens
    return [one(v, f"{where}[{i}]") for i, v in enumerate(value)]


PROMPTS = Field(PROMPT.takes, _prompt_fits, PROMPT.schema, _prompt_read)

COMPLETION = Record(
    "a completion",
    {
        "prompt": PROMPTS,
        **_SHARED,
        "echo": flag(),
        "logprobs": whole(0, MOST_LOGPROBS),
        "best_of": whole(1, MOST_CHOICES),
        "suffix": text(),
        **_BOUND,
    },
    needs=("prompt",),
    idle=_IDLE,
    without={
        "prompt_logprobs": _NO_PROMPT_LOGPROBS,
        "use_beam_search": "there is no beam search here; leave it out",
    },
)
LLAMA_COMPLETION = Record(
    "a completion of llama.cpp's",
    {
        "prompt": PROMPTS,
        **{k: f for k, f in _SHARED.items() if k not in ("n", "max_tokens", "stream_options")},
        "n_predict": whole(-1, _LONG),
        "n_probs": whole(0, MOST_LOGPROBS),
        "json_schema": _SCHEMA,
        "grammar": text(),
    },
    needs=("prompt",),
    # What they ask for is always so here: prompts are cached, and answers do not depend on it.
    idle=frozenset({"cache_prompt", "id_slot", "post_sampling_probs", "return_tokens"}),
)
EMBEDDING = Record(
    "an embedding",
    {
        "input": PROMPTS,
        "model": name,
        "adapters": _SHARED["adapters"],
        "encoding_format": text(choices=("float", "base64")),
        "dimensions": whole(1, 1 << 20),
    },
    needs=("input",),
    idle=frozenset({"user"}),
)
TOKENIZE = Record(
    "a text to tokenize",
    {
        "model": name,
        "prompt": text(),
        "content": text(),  # llama.cpp's name for it
        "messages": CHAT.fields["messages"],
        "tools": CHAT.fields["tools"],
        "chat_template_kwargs": CHAT.fields["chat_template_kwargs"],
        "add_generation_prompt": flag(),
        "add_special_tokens": flag(),
        "add_special": flag(),  # llama.cpp's
        "return_token_strs": flag(),
        "with_pieces": flag(),  # llama.cpp's
    },
    idle=frozenset({"parse_special"}),  # the names of special tokens always become those tokens
)
DETOKENIZE = Record(
    "ids to make text of",
    {"model": name, "tokens": list_of(whole(0, _LONG), most=1 << 22)},
    needs=("tokens",),
)
LOAD = Record(
    "an adapter to load",
    {"lora_name": name, "lora_path": text(least=1, most=4096), "load_inplace": flag(),
     "pinned": flag()},
    needs=("lora_name", "lora_path"),
    idle=frozenset({"base_model_name"}),
)  # fmt: skip
UNLOAD = Record(
    "an adapter to unload", {"lora_name": name}, needs=("lora_name",),
    idle=frozenset({"lora_int_id"}),
)  # fmt: skip
SCALES = list_of(SCALED.as_field(), most=100000, takes="a list of {'id', 'scale'}")
