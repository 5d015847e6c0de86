"""The typer application, and the arguments that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pylora.commands.guard import verb

app = typer.Typer(
    help="LoRA without a deep-learning framework: train, run, merge and inspect adapters.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Model = Annotated[Path, typer.Argument(help="GGUF file or Hugging Face directory")]
AdapterDir = Annotated[Path, typer.Argument(help="PEFT directory")]
Seed = Annotated[int, typer.Option(help="of everything that is drawn at random")]
Rank = Annotated[int, typer.Option("--rank", "-r", help="rank of A and B")]
Alpha = Annotated[float | None, typer.Option(help="lora_alpha; default: twice the rank")]
Targets = Annotated[
    str, typer.Option(help="modules, separated by commas; or a regular expression; or all-linear")
]
Precision = Annotated[
    str, typer.Option(help="of the base model: fp32, fp32x3, bf16, int8, int4; fp16 on cuda")
]
RsLora = Annotated[bool, typer.Option(help="scale by alpha / sqrt(r) in place of alpha / r")]


@app.callback()
@verb
def common(
    backend: Annotated[
        str | None, typer.Option(help="c, numpy, cuda, cupy or auto; default: c where built")
    ] = None,
) -> None:
    """LoRA without a deep-learning framework: train, run, merge and inspect adapters."""
    if backend is not None:
        import pylora

        pylora.use(backend)
