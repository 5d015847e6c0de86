"""`pylora pack`: a base model's weights in the kernels' order, in a file that is used in place."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from pylora.commands.app import MAKE, Model, command
from pylora.commands.guard import unfinished
from pylora.commands.outputs import check_folder
from pylora.display.console import Console
from pylora.errors import ConfigError


@command(
    MAKE,
    "pylora pack Qwen3-30B-A3B-Q4_K_M.gguf qwen3-30b --precision int4",
    'pylora generate qwen3-30b "What is LoRA?" --chat',
    "pylora pack qwen3-30b --verify",
)
def pack(
    model: Model,
    out: Annotated[
        Path | None, typer.Argument(metavar="OUT", help="new folder, which is then a MODEL itself")
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="that it is run in: fp32, fp32x3, bf16, int8, int4; a GGUF's blocks stay as they "
            "are in int8 and int4",
        ),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="read all of MODEL, a packed one, and look for damage"),
    ] = False,
) -> None:
    """Write a model so that it loads at once, from a file that all processes share.

    Its weights are mapped, not read: it may be larger than memory, and opening it takes seconds.
    """
    from pylora.formats import open_checkpoint
    from pylora.formats.pack import check_packing, pack_model
    from pylora.formats.packed import PackedCheckpoint

    screen = Console()
    if verify:
        with open_checkpoint(model) as checkpoint:
            if not isinstance(checkpoint, PackedCheckpoint):
                raise ConfigError(f"{model} is not packed, so it has no digests to compare with")
            n = checkpoint.verify()
        screen.say(f"{model}: {n:,} bytes of weights are those that were written")
        return
    assert out is not None and precision is not None  # rules.py
    check_packing(precision)
    check_folder(out)
    with unfinished(f"{out} was not written"):
        done = pack_model(model, out, precision)
    for note in done.notes:
        print(f"note: {note}", file=sys.stderr)
    kinds = ", ".join(f"{n} matrices as {kind.upper()}" for kind, n in done.kinds.items())
    screen.say(f"{done.directory}: {done.nbytes:,} bytes in {precision} ({kinds})")
    screen.say(f"tokenizer: {done.tokenizer}")
