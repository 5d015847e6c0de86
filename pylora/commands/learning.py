"""Options of `pylora train` about the update itself: names, and what --help says of them."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from pylora.commands.app import HOW, RUN


def _option(*names: str, help: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=help, metavar=metavar, rich_help_panel=HOW)


Schedule = Annotated[
    str,
    _option(
        "--schedule", "--lr-scheduler-type", "--lr-scheduler",
        metavar="NAME",
        help="of the rate: cosine, linear, constant, cosine_with_restarts, warmup_stable_decay",
    ),
]  # fmt: skip
DecaySteps = Annotated[
    int | None,
    _option(
        "--decay-steps", "--num-decay-steps",
        help="of warmup_stable_decay: the last steps, in which the rate falls; default: a fifth",
    ),
]  # fmt: skip
Cycles = Annotated[
    int | None,
    _option("--cycles", "--num-cycles", help="of cosine_with_restarts; default: 2"),
]
FindLr = Annotated[
    bool,
    _option(
        "--find-lr/--no-find-lr",
        help="no training: try rates for a few steps, and draw what each does to the loss",
    ),
]
ReportTo = Annotated[
    list[str] | None,
    typer.Option(
        "--report-to",
        metavar="NAME",
        rich_help_panel=RUN,
        help="tensorboard (files in OUT/tensorboard), wandb, trackio; may be repeated",
    ),
]
Optim = Annotated[
    str,
    _option(
        "--optim", "--optimizer",
        metavar="NAME", help="adamw, or adamw_8bit, whose moments take a quarter of the memory",
    ),
]  # fmt: skip
LabelSmoothing = Annotated[
    float,
    _option(
        "--label-smoothing-factor",
        help="how much of each label is spread over all tokens, in training",
    ),
]
Neftune = Annotated[
    float,
    _option(
        "--neftune-noise-alpha", "--neftune", help="noise on the embeddings, in training (NEFTune)"
    ),
]
RankDropout = Annotated[
    float,
    _option("--rank-dropout", help="how often a step goes without a rank of a module"),
]
