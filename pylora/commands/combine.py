"""`pylora combine`: several adapters made into one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pylora.commands.app import MAKE, Seed, command
from pylora.commands.guard import unfinished
from pylora.commands.outputs import check_folder
from pylora.display.console import Console

if TYPE_CHECKING:
    from pylora.adapters.loraconfig import LoraConfig


@command(
    MAKE, "pylora combine runs/legal runs/verse both --weights 0.7,0.3 --method ties --density 0.5"
)
def combine(
    adapters: Annotated[
        list[Path],
        typer.Argument(metavar="ADAPTER...", help="PEFT folders or training runs, of one base"),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="folder for the new adapter")],
    weights: Annotated[
        str | None,
        typer.Option(metavar="X,...", help="how much each counts; default: 1 each"),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="cat (exact), svd, linear, ties, dare_linear, dare_ties or magnitude_prune; the "
            "last four also with _svd",
        ),
    ] = "cat",
    density: Annotated[
        float | None,
        typer.Option(metavar="X", help="share of the elements that ties, dare and prune keep"),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(metavar="R", help="rank that svd gives; default: the largest"),
    ] = None,
    majority_sign: Annotated[
        str, typer.Option(metavar="NAME", help="how ties votes: total or frequency")
    ] = "total",
    seed: Seed = 0,
) -> None:  # fmt: skip
    """Make one adapter of several: their weighted sum, exact or cut to a rank; TIES; DARE."""
    from pylora.adapters.adapter import Adapter
    from pylora.adapters.combine import combine as combined
    from pylora.adapters.inspect import modules_of
    from pylora.adapters.peft import read_config
    from pylora.errors import ConfigError

    check_folder(out)
    if out.is_dir() and any(out.iterdir()):
        raise ConfigError(
            f"OUT {out} is a folder that has something in it; the last word is the folder that is "
            "written, so name a new one"
        )
    factors = _numbers(weights, len(adapters))
    for path in adapters:
        _refuse_whole(path, read_config(path))
    items = [
        (Adapter.load(path, modules_of(path)), weight)
        for path, weight in zip(adapters, factors, strict=True)
    ]
    with unfinished(f"{out} was not written"):
        made = combined(
            items, method, density=density, rank=rank, majority_sign=majority_sign, seed=seed
        )
        made.adapter.save(out)
    console = Console()
    console.say(f"{out}: {made.adapter!r}")
    if method.endswith("svd"):
        worst = max(made.lost, key=lambda path: made.lost[path])
        console.say(
            f"cut to rank {made.adapter.config.r}: {made.total_lost:.2%} of the update is lost "
            f"(Frobenius norm), at most {made.lost[worst]:.2%}, in {worst}"
        )


def _refuse_whole(path: Path, config: LoraConfig) -> None:
    """UnsupportedError where an adapter's settings bring whole weights."""
    from pylora.errors import UnsupportedError

    for name in ("modules_to_save", "trainable_token_indices"):
        if getattr(config, name):
            raise UnsupportedError(
                f"{path}: {name} = {getattr(config, name)!r:.100} replaces weights of the base "
                "model, and replacements cannot be summed; use this adapter alone, or merge it"
            )


def _numbers(text: str | None, n: int) -> list[float]:
    """The weights of n adapters."""
    from pylora.errors import ConfigError

    if text is None:
        return [1.0] * n
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--weights takes numbers such as 0.7,0.3, got {text!r:.60}") from None
    if len(numbers) != n:
        raise ConfigError(f"--weights names {len(numbers)} numbers for {n} adapters")
    return numbers
