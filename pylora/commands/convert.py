"""`pylora convert`: an adapter from one form into another."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from pylora.commands.app import MAKE, command
from pylora.commands.guard import unfinished
from pylora.commands.outputs import check_file, check_folder
from pylora.display.console import Console

SPOKEN = {"peft": "a PEFT folder", "gguf": "a GGUF adapter", "mlx": "an mlx-lm folder"}


@command(
    MAKE,
    "pylora convert runs/tone tone.gguf --base SmolLM2.gguf",
    "pylora convert tone.gguf tone-peft --base SmolLM2.gguf",
    "pylora convert runs/tone tone-mlx --to mlx --base org/model",
)
def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="IN", help="a PEFT or mlx-lm folder, the folder of a run, or a GGUF adapter"
        ),
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="new folder, or a file that ends in .gguf")
    ],
    base: Annotated[
        Path,
        typer.Option(
            "--base",
            "--model",
            "-m",
            metavar="MODEL",
            help="the base model: its names, order of rows and shapes; its weights are not read",
        ),
    ],
    form: Annotated[
        str | None,
        typer.Option(
            "--to",
            metavar="FORM",
            help="peft, gguf or mlx; default: gguf where OUT ends in .gguf, peft from others",
        ),
    ] = None,
) -> None:
    """Turn an adapter into another form: PEFT, GGUF (llama.cpp, Ollama, LM Studio), MLX."""
    from pylora.adapters.convert import convert as run
    from pylora.adapters.convert import form_for
    from pylora.adapters.locate import find_adapter, form_of

    wanted = form_for(out, form_of(find_adapter(source)), form)
    (check_file if wanted == "gguf" else check_folder)(out, what="OUT")
    with unfinished(f"{out} was not written"):
        done = run(source, out, base, form)
    for note in done.notes:
        print(f"note: {note}", file=sys.stderr)
    screen = Console()
    screen.say(
        f"{done.path}: {SPOKEN[done.form]} of {done.modules} modules, from {SPOKEN[done.source]}"
    )
    if done.rounded:
        screen.say(
            f"{len(done.rounded)} modules have a scale of their own, which is multiplied into B "
            "and rounded once, to float32; converting back gives the same bits"
        )
