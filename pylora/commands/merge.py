"""`pylora merge` and `pylora unmerge`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from pylora.commands.app import MAKE, AdapterDir, Model, command
from pylora.commands.guard import unfinished
from pylora.commands.outputs import check_folder
from pylora.display.console import Console, megabytes

NewFolder = Annotated[
    Path, typer.Argument(metavar="OUT", help="new folder, a Hugging Face model afterwards")
]


@command(MAKE, "pylora merge SmolLM2.gguf runs/tone merged --dtype bf16")
def merge(
    model: Model,
    adapter: AdapterDir,
    out: NewFolder,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="f32, f16 or bf16; default: as the model is stored"),
    ] = None,
) -> None:
    """Write the model with the adapter merged into it, for transformers and for `unmerge`."""
    from pylora.merging.merge import check_merge_output, merge_checkpoint

    check_folder(out)
    check_merge_output(model, out, dtype)
    with unfinished(f"{out} was not written"):
        report = merge_checkpoint(model, adapter, out, dtype=dtype)
    weights, residue = megabytes(report.weight_bytes), megabytes(report.residue_bytes)
    for note in report.notes:
        print(f"note: {note}", file=sys.stderr)
    Console().say(
        f"{report.directory}: {len(report.modules)} modules merged, {weights} of weights, "
        f"{residue} that make `pylora unmerge` exact; tokenizer: {report.tokenizer}"
    )


@command(MAKE, "pylora unmerge merged base-again")
def unmerge(
    merged: Annotated[
        Path, typer.Argument(metavar="MERGED", help="folder that `pylora merge` wrote")
    ],
    out: NewFolder,
) -> None:
    """Take the adapter out of a merged model again: the original weights, bit for bit."""
    from pylora.merging.merge import unmerge_checkpoint

    check_folder(out)
    with unfinished(f"{out} was not written"):
        report = unmerge_checkpoint(merged, out)
    Console().say(
        f"{report.directory}: {len(report.modules)} modules unmerged, {report.tensors} tensors "
        f"verified by SHA-256; tokenizer: {report.tokenizer}"
    )
