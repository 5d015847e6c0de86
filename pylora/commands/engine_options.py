"""The options of `pylora conformance` for engines and converters; see docs/engines.md."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_PART = "An engine or a converter"

SuiteDir = Annotated[
    Path | None,
    typer.Option("--suite", metavar="DIR", rich_help_panel=_PART, help="what `pylora suite` wrote"),
]
EngineUrl = Annotated[
    str | None,
    typer.Option(
        "--engine", metavar="URL", rich_help_panel=_PART,
        help="an engine that runs, such as http://127.0.0.1:8000/v1",
    ),
]  # fmt: skip
RestartCommand = Annotated[
    str | None,
    typer.Option(
        "--restart", metavar="COMMAND", rich_help_panel=_PART,
        help="starts an engine: with {base}, {port}, and [--lora {adapter}] or {loras}",
    ),
]  # fmt: skip
ConvertCommand = Annotated[
    str | None,
    typer.Option(
        "--convert", metavar="COMMAND", rich_help_panel=_PART,
        help="converts the adapter {in} of the model {base} to {out}",
    ),
]  # fmt: skip
AdaptersBy = Annotated[
    str,
    typer.Option(
        "--adapters-by", metavar="WAY", rich_help_panel=_PART,
        help="vllm, llama.cpp, llama.cpp-global, model-name, mlx, or command (with --restart)",
    ),
]  # fmt: skip
EnginePrecision = Annotated[
    str,
    typer.Option(
        "--precision", metavar="NAME", rich_help_panel=_PART,
        help="that the engine computes in: fp32, tf32, fp16, bf16, q8_0, int8, fp8, int4",
    ),
]  # fmt: skip
FormOfFiles = Annotated[
    str | None,
    typer.Option(
        "--form", metavar="NAME", rich_help_panel=_PART,
        help="of the adapters' files: peft, gguf, mlx; default: what --adapters-by takes",
    ),
]  # fmt: skip
ApiKey = Annotated[
    str | None,
    typer.Option(
        "--api-key", metavar="KEY", envvar="PYLORA_ENGINE_KEY", rich_help_panel=_PART,
        help="sent as a bearer token",
    ),
]  # fmt: skip
Timeout = Annotated[
    float,
    typer.Option(
        "--timeout", metavar="SECONDS", min=0.1, rich_help_panel=_PART,
        help="for one answer, or one conversion",
    ),
]  # fmt: skip
Patience = Annotated[
    float,
    typer.Option(
        "--start-timeout", metavar="SECONDS", min=0.1, rich_help_panel=_PART,
        help="until an engine that was started answers",
    ),
]  # fmt: skip
BaseNames = Annotated[
    list[str] | None,
    typer.Option(
        "--base", metavar="NAME", rich_help_panel=_PART,
        help="a model of the suite; may be repeated; default: that of the engine, or all",
    ),
]  # fmt: skip
TestNames = Annotated[
    list[str] | None,
    typer.Option(
        "--test", metavar="NAME", rich_help_panel=_PART, help="this alone; may be repeated"
    ),
]  # fmt: skip
