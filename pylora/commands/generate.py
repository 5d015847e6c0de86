"""`pylora generate`: continues one text, word by word, or many at once, each with its adapter."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from pylora.commands.app import (
    ADAPTER_NAMES,
    MAKE,
    NEW_TOKENS,
    DrawSeed,
    MinP,
    Model,
    Penalty,
    Precision,
    Temperature,
    TopK,
    TopP,
    command,
)
from pylora.commands.inputs import file_or_stdin, text_or_stdin
from pylora.commands.template import TemplateArgs, say_notes, use_template
from pylora.numbers.precision import check_choice

_UNNAMED = "="  # of the adapter without a name; no name that is given has this sign
_WHAT = "What it is asked"


@command(
    MAKE,
    'pylora generate SmolLM2.gguf "The sea is" -n 40',
    'pylora generate SmolLM2.gguf "Who are you?" --chat --adapter runs/tone',
    "echo 'The sea is' | pylora generate SmolLM2.gguf -",
)
def generate(
    model: Model,
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="PROMPT",
            help="text to continue, or with --chat a question; - reads standard input",
        ),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            *ADAPTER_NAMES, metavar="DIR",
            help="PEFT folder or run; or NAME=DIR, repeatedly, for the lines of --prompts",
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", rich_help_panel=_WHAT,
            help='JSONL of {"prompt": text, "adapter": name}, in place of PROMPT; - reads it',
        ),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat/--no-chat", rich_help_panel=_WHAT, help="through the model's chat template"
        ),
    ] = False,
    system: Annotated[
        str | None,
        typer.Option(
            "--system", "--system-prompt", metavar="TEXT", rich_help_panel=_WHAT,
            help="system message, with --chat",
        ),
    ] = None,
    template_arg: TemplateArgs = None,
    max_new_tokens: Annotated[
        int,
        typer.Option(
            *NEW_TOKENS, metavar="N", help="most tokens to write"
        ),
    ] = 128,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    seed: DrawSeed = 0,
    precision: Precision = None,
) -> None:  # fmt: skip
    """Continue a text, with or without an adapter; words appear as they come.

    With --prompts: many texts at once, each with the adapter that its line names; prints a line
    {"adapter", "text"} for each.
    """
    from pylora.adapters.adapter import Adapter
    from pylora.adapters.own_tokenizer import tokenizer_of
    from pylora.adapters.pool import AdapterPool
    from pylora.commands.prompts import adapter_folders, asked_of
    from pylora.formats import open_checkpoint
    from pylora.front.speak import begin
    from pylora.generation.generate import generate as run
    from pylora.generation.sampling import Sampling, whole_number
    from pylora.generation.text import TextStream
    from pylora.model.llama import Llama
    from pylora.model.with_whole import alone

    check_choice(precision)
    whole_number("--max-new-tokens", max_new_tokens, 0)  # before the model is loaded
    Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    folders = adapter_folders(adapter or ())
    asked = asked_of(
        folders,
        prompt=None if prompt is None else text_or_stdin(prompt),
        prompts=file_or_stdin(prompts),
    )
    with open_checkpoint(model) as checkpoint:
        tokenizer = tokenizer_of(checkpoint, list(folders.values()))
        use_template(tokenizer, template_arg)
        config = checkpoint.config
        loaded = {
            name: Adapter.load(folder, config, base=checkpoint.load)
            for name, folder in folders.items()
        }
        llama = Llama.from_checkpoint(checkpoint, precision=precision)
        if all(a.adapter is not None for a in asked):
            llama = alone(llama, list(loaded.values()))
    say_notes(tokenizer)
    pool = AdapterPool(llama)
    for name, one in loaded.items():
        pool.add(name or _UNNAMED, one)

    def ids_of(text: str) -> list[int]:
        if not chat:
            return begin(tokenizer, text)
        messages = [{"role": "system", "content": system}] if system is not None else []
        messages.append({"role": "user", "content": text})
        return tokenizer.encode_chat(tokenizer.apply_chat(messages, add_generation_prompt=True))

    starts = [ids_of(a.text) for a in asked]
    stream = _Stream(tokenizer, starts[0]) if prompts is None else None
    answers = run(
        llama,
        starts,
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        eos_ids=tokenizer.eos_ids,
        on_token=stream,
        pool=pool,
        adapters=[_UNNAMED if a.adapter == "" else a.adapter for a in asked],
    )
    if stream is not None:
        stream.end()
        return
    for a, start, answer in zip(asked, starts, answers, strict=True):
        name = str(folders[None]) if a.adapter == "" else a.adapter
        text = TextStream(tokenizer, start)
        for token in answer:
            text.push(token)
        text.finish()
        print(json.dumps({"adapter": name, "text": text.text}, ensure_ascii=False))


class _Stream:
    """Prints text as its tokens come."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        from pylora.generation.text import TextStream

        self.text = TextStream(tokenizer, prompt)

    def __call__(self, row: int, token: int) -> None:
        print(self.text.push(token), end="", flush=True)

    def end(self) -> None:
        print(self.text.finish())
