"""`pylora serve`: a model and its adapters behind one HTTP port, with a page to talk to them.

What it does is in pylora/web and pylora/serving; here are the options. Ctrl-C or SIGTERM
end it, and what is being answered ends first.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from pylora.commands.app import MAKE, Model, Precision, command
from pylora.commands.template import TemplateArgs, say_notes, use_template
from pylora.errors import ConfigError

_WHO, _MUCH = "Who may ask, and from where", "How much"
_LEVELS, _FORMS = ("debug", "info", "warning", "error"), ("text", "json")


def _count(name: str, help: str, metavar: str = "N") -> typer.models.OptionInfo:
    """An option of the group "How much"."""
    made: typer.models.OptionInfo = typer.Option(
        name, metavar=metavar, rich_help_panel=_MUCH, help=help
    )
    return made


def _who(name: str, help: str, metavar: str, envvar: str | None = None) -> typer.models.OptionInfo:
    """An option of the group about access."""
    made: typer.models.OptionInfo = typer.Option(
        name, metavar=metavar, rich_help_panel=_WHO, help=help, envvar=envvar
    )
    return made


@command(
    MAKE,
    "pylora serve SmolLM2.gguf --adapters adapters/",
    "pylora serve SmolLM2.gguf --adapter tone=runs/tone --precision int4 --port 8000",
)
def serve(
    model: Model,
    adapters: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="folder whose subfolders are adapters; it is watched"),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter", "-a", "--lora", metavar="[NAME=]DIR",
            help="PEFT folder or run, by name, repeatedly; without one the folder's name",
        ),
    ] = None,
    load_from: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="folder that adapters may be loaded from while it runs"),
    ] = None,
    precision: Precision = None,
    name: Annotated[
        str | None,
        typer.Option(
            "--name", "--alias", "--served-model-name", metavar="NAME",
            help="what the model is called; default: its file's name",
        ),
    ] = None,
    template_arg: TemplateArgs = None,
    host: Annotated[str, _who("--host", "address to listen on; 0.0.0.0: all", "ADDRESS")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, _who("--port", "0: any that is free", "N")] = 8080,
    api_key: Annotated[
        list[str] | None,
        _who("--api-key", "a key that may do everything, repeatedly", "KEY", "PYLORA_API_KEY"),
    ] = None,
    api_keys: Annotated[
        Path | None,
        _who("--api-keys", "JSON list of keys and their adapters; see docs/serving.md", "FILE"),
    ] = None,
    cors: Annotated[
        list[str] | None,
        _who("--cors", "a site whose pages may ask: https://example.org; repeatedly", "ORIGIN"),
    ] = None,
    ssl_certfile: Annotated[
        Path | None, _who("--ssl-certfile", "certificate, for TLS", "FILE")
    ] = None,
    ssl_keyfile: Annotated[Path | None, _who("--ssl-keyfile", "its private key", "FILE")] = None,
    ssl_keyfile_password: Annotated[
        str | None,
        _who("--ssl-keyfile-password", "what it is locked with", "TEXT", "PYLORA_SSL_PASSWORD"),
    ] = None,
    page: Annotated[
        bool, typer.Option("--page/--no-page", rich_help_panel=_WHO, help="the page at /")
    ] = True,
    pooling: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="last or mean: how texts become embeddings; default: not at all"
        ),
    ] = None,
    context: Annotated[
        int | None, _count("--context", "tokens of a prompt and its answer; default: the model's")
    ] = None,
    max_tokens: Annotated[
        int | None, _count("--max-tokens", "tokens of an answer; default: what the context leaves")
    ] = None,
    timeout: Annotated[float | None, _count("--timeout", "for an answer", "SECONDS")] = None,
    max_body: Annotated[int, _count("--max-body", "of a request's body", "KIB")] = 8192,
    max_batch: Annotated[
        int, _count("--max-batch", "answers that are computed together")
    ] = 32,
    queue: Annotated[int, _count("--queue", "requests that may wait; others get 429")] = 256,
    kv_memory: Annotated[
        int, _count("--kv-memory", "for keys and values", "MIB")
    ] = 1024,
    prefill_chunk: Annotated[
        int, _count("--prefill-chunk", "tokens of prompts that one step takes in")
    ] = 512,
    most_adapters: Annotated[
        int | None, _count("--most-adapters", "that are ready at a time; default: by memory alone")
    ] = None,
    adapter_memory: Annotated[
        int, _count("--adapter-memory", "for adapters that are ready", "MIB")
    ] = 2048,
    grace: Annotated[
        float, _count("--grace", "for answers that go on when it is to end", "SECONDS")
    ] = 30.0,
    log_level: Annotated[
        str, typer.Option(metavar="NAME", help="debug, info, warning or error")
    ] = "info",
    log_format: Annotated[
        str, typer.Option(metavar="NAME", help="text, or json: an object a line")
    ] = "text",
) -> None:  # fmt: skip
    """Serve a model and its adapters over HTTP: OpenAI's interface, and a page at /.

    Requests of different adapters are computed together, and none changes another's answer.
    """
    from pylora.front.load import load
    from pylora.web import log
    from pylora.web.server import Server

    for option, value, known in (
        ("--log-level", log_level, _LEVELS), ("--log-format", log_format, _FORMS),
    ):  # fmt: skip
        if value not in known:
            raise ConfigError(f"{option} must be one of {', '.join(known)}, got {value!r}")
    tls = {
        "ssl_certfile": ssl_certfile,
        "ssl_keyfile": ssl_keyfile,
        "ssl_keyfile_password": ssl_keyfile_password,
    }
    log.configure(log_level, log_format)
    with load(model, precision=precision) as loaded:
        use_template(loaded.tokenizer, template_arg)
        if template_arg:  # what is wrong with them is no client's fault
            loaded.tokenizer.render([{"role": "user", "content": "a"}], True)
        say_notes(loaded.tokenizer)
        server = Server(
            loaded,
            adapters=adapters,
            named=_named(adapter or ()),
            load_from=load_from or (),
            name=name,
            host=host,
            port=port,
            api_key=tuple(api_key or ()),
            api_keys=api_keys,
            cors=tuple(cors or ()),
            page=page,
            tls={setting: value for setting, value in tls.items() if value is not None},
            context=context,
            max_tokens=max_tokens,
            timeout=timeout,
            max_body=max_body << 10,
            max_batch=max_batch,
            queue=queue,
            kv_bytes=kv_memory << 20,
            prefill_chunk=prefill_chunk,
            most_adapters=most_adapters,
            adapter_bytes=adapter_memory << 20,
            grace=grace,
            pooling=pooling,
        )
        for folder, why in server.unread.items():
            print(f"note: {folder} is not served: {why}", file=sys.stderr)
        server.run()


def _named(options: Sequence[str]) -> dict[str, Path]:
    """`[NAME=]DIR` as name -> folder. Folders of the same name get the folders above in theirs."""
    found: dict[str, Path] = {}
    for option in options:
        if not option:
            raise ConfigError("--adapter is empty; is a shell variable not set?")
        name, sign, folder = option.partition("=")
        named = bool(sign) and not Path(option).is_dir()
        path = Path(folder if named else option)
        if named and not (name and folder):
            raise ConfigError(f"--adapter {option!r}: write NAME=DIR, or the directory alone")
        parts = path.absolute().parts
        wanted = [name] if named else ["/".join(parts[-n:]) for n in range(1, len(parts))]
        free = next((one for one in wanted if one not in found), None)
        if free is None:
            raise ConfigError(f"two adapters are named {name or path!s}; give each its own name")
        found[free] = path
    return found
