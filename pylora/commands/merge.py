"""`pylora merge` and `pylora unmerge`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pylora.commands.app import MAKE, AdapterDir, Model, command
from pylora.commands.guard import unfinished, warn
from pylora.commands.outputs import check_file, check_folder
from pylora.display.console import Console, megabytes

if TYPE_CHECKING:
    from pylora.merging.to_gguf import GGUFReport

NewFolder = Annotated[
    Path, typer.Argument(metavar="OUT", help="new folder, a Hugging Face model afterwards")
]


@command(
    MAKE,
    "pylora merge SmolLM2.gguf runs/tone merged --dtype bf16",
    "pylora merge SmolLM2.gguf runs/tone --to merged.gguf --type q4_k_m",
)
def merge(
    model: Model,
    adapter: AdapterDir,
    out: Annotated[
        Path | None,
        typer.Argument(metavar="OUT", help="new folder, a Hugging Face model afterwards"),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="f32, f16 or bf16; default: as the model is stored"),
    ] = None,
    to: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="write one GGUF file, for llama.cpp, in place of OUT"),
    ] = None,
    type_: Annotated[
        str | None,
        typer.Option(
            "--type",
            metavar="NAME",
            help="of the GGUF file: f32, f16, bf16, q8_0, q4_0, q4_1, q5_0, q5_1, q2_k, q3_k_m, "
            "q4_k_m, q5_k_m, q6_k; default: as the model is stored",
        ),
    ] = None,
    dry: Annotated[
        bool,
        typer.Option("--dry-run", help="with --to: say what rounding takes, and write nothing"),
    ] = False,
    every: Annotated[bool, typer.Option("--all", help="with --to: a line for each module")] = False,
) -> None:
    """Write the model with the adapter merged into it: a folder, or one GGUF file."""
    if to is not None:
        _to_gguf(model, adapter, to, type_, dry, every)
        return
    assert out is not None  # rules.py
    from pylora.merging.merge import check_merge_output, merge_checkpoint

    check_folder(out)
    check_merge_output(model, out, dtype)
    with unfinished(f"{out} was not written"):
        report = merge_checkpoint(model, adapter, out, dtype=dtype)
    weights, residue = megabytes(report.weight_bytes), megabytes(report.residue_bytes)
    for note in report.notes:
        print(f"note: {note}", file=sys.stderr)
    Console().say(
        f"{report.directory}: {len(report.modules)} modules merged{_whole(report.whole)}, "
        f"{weights} of weights, "
        f"{residue} that make `pylora unmerge` exact; tokenizer: {report.tokenizer}"
    )


def _whole(names: Sequence[str]) -> str:
    """What took the place of the base's, in words."""
    if not names:
        return ""
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f", {', '.join(names[:4])}{more} replaced by the adapter's own"


def _to_gguf(
    model: Path, adapter: Path, to: Path, type_: str | None, dry: bool, every: bool
) -> None:
    from pylora.formats.gguf_types import mixture
    from pylora.merging.to_gguf import check_output, merge_to_gguf

    if type_ is not None:
        mixture(type_)
    check_output(to, model)
    check_file(to, what="--to")
    screen = Console()
    with unfinished(f"{to} was not written"):
        report = merge_to_gguf(
            model, adapter, to, type_, look=lambda found: _show(screen, found, every), dry=dry
        )
    for note in report.notes:
        print(f"note: {note}", file=sys.stderr)
    kinds = ", ".join(f"{n} {kind}" for kind, n in report.kinds.items())
    done = "nothing was written (--dry-run)" if dry else f"{report.path}: {report.type}"
    screen.say(
        f"{done}; {megabytes(report.weight_bytes)} of weights ({kinds}){_whole(report.whole)}; "
        "tokenizer: "
        f"{report.tokenizer}"
    )


def _show(screen: Console, report: GGUFReport, every: bool) -> None:
    """What the type leaves of each module's delta, before the file is there."""
    from pylora.adapters.fold import fold

    columns = ("module", "type", "delta / weight", "kept", "noise / delta")
    rows: list[tuple[object, ...]] = []
    alike = lambda m: (m.kind, m.path) if every else m.kind
    for group in fold(report.modules, lambda m: m.path, alike):
        items = group.items
        mean = [
            sum(values) / len(items) for values in zip(*((m.delta, m.kept, m.noise) for m in items))
        ]
        rows.append(
            (
                group.pattern,
                items[0].kind,
                f"{mean[0]:.2g}",
                f"{100 * mean[1]:.1f} %",
                f"{mean[2]:.2g}",
            )
        )
    screen.table(columns, rows, right=columns[2:])
    if report.swallowed:
        shown = ", ".join(report.swallowed[:8])
        more = len(report.swallowed) - 8
        warn(
            f"rounding to {report.type} takes most of the delta of {len(report.swallowed)} of "
            f"{len(report.modules)} modules: {shown}{f' and {more} more' if more > 0 else ''}; a "
            "type with more bits keeps more, and an adapter beside the base keeps all "
            "(pylora convert)"
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
