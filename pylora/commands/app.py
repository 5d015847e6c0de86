"""The typer application, how a verb registers, and the arguments that several verbs share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, ParamSpec, TypeVar

import typer

from pylora.commands.guard import verb
from pylora.commands.parse import Verb, Verbs

P = ParamSpec("P")
T = TypeVar("T")

MAKE, LOOK, TEST, HERE = "Train and use", "Look", "Test an implementation", "This machine"
ADAPTER, DATA, HOW, RUN = "The adapter", "The data", "How it learns", "The run"

app = typer.Typer(
    cls=Verbs,
    help="LoRA without a deep-learning framework: train, run, merge and inspect adapters.",
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def command(
    part: str, *examples: str, cls: type[Verb] = Verb, name: str | None = None
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Registers a verb: the part of the help it stands in, example command lines, and how its
    command line is read; `name` where it is not the function's."""

    def register(function: Callable[P, T]) -> Callable[P, T]:
        app.command(name, cls=cls, rich_help_panel=part, epilog="\n".join(examples))(verb(function))
        return function

    return register


Model = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL",
        help="a GGUF file, a Hugging Face folder, what `pylora pack` wrote, or an id of the Hub "
        "whose model is in its cache",
    ),
]
AdapterDir = Annotated[
    Path,
    typer.Argument(metavar="ADAPTER", help="a PEFT folder, or the folder of a training run"),
]
Seed = Annotated[int, typer.Option(help="of everything that is drawn at random", metavar="N")]
Rank = Annotated[
    int,
    typer.Option(
        "--rank", "-r", "--r", "--lora-r", "--lora-rank", help="rank of A and B",
        rich_help_panel=ADAPTER,
    ),
]  # fmt: skip
Alpha = Annotated[
    float | None,
    typer.Option(
        "--alpha", "--lora-alpha", help="lora_alpha; default: twice the rank",
        metavar="X", rich_help_panel=ADAPTER,
    ),
]  # fmt: skip
Targets = Annotated[
    str,
    typer.Option(
        "--targets", "--target-modules", "--lora-target-modules", metavar="NAMES",
        help="modules, separated by commas; or a regular expression; or all-linear",
        rich_help_panel=ADAPTER,
    ),
]  # fmt: skip
RsLora = Annotated[
    bool,
    typer.Option(
        "--rslora/--no-rslora", "--use-rslora", help="scale by alpha / sqrt(r), not alpha / r",
        rich_help_panel=ADAPTER,
    ),
]  # fmt: skip
ModulesToSave = Annotated[
    str | None,
    typer.Option(
        "--modules-to-save", metavar="NAMES", rich_help_panel=ADAPTER,
        help="modules that are trained whole beside A and B, such as embed_tokens,lm_head,norm",
    ),
]  # fmt: skip
TokenIndices = Annotated[
    str | None,
    typer.Option(
        "--trainable-token-indices", metavar="IDS", rich_help_panel=ADAPTER,
        help="tokens whose rows of the embedding are trained as they are: 151665,151666, or "
        '{"embed_tokens": [...], "lm_head": [...]}',
    ),
]  # fmt: skip
Precision = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="of the base model: fp32, fp32x3, bf16, int8, int4, int8a8, int4a8; fp16 on cuda; "
        "auto: what trains fastest here; default: fp32, or what MODEL is packed in",
    ),
]
EveryModule = Annotated[
    bool, typer.Option("--all", help="a line for each module, where like ones share one")
]


_DRAW = "How tokens are chosen"
Temperature = Annotated[
    float,
    typer.Option(
        "--temperature", "--temp", "-t", metavar="X", rich_help_panel=_DRAW,
        help="0 takes the likeliest token, and draws none",
    ),
]  # fmt: skip
TopK = Annotated[
    int,
    typer.Option(metavar="N", rich_help_panel=_DRAW, help="draw from the N likeliest; 0: from all"),
]
TopP = Annotated[
    float,
    typer.Option( metavar="X", rich_help_panel=_DRAW,
        help="draw from the likeliest that have this probability together",
    ),
]  # fmt: skip
MinP = Annotated[
    float,
    typer.Option( metavar="X", rich_help_panel=_DRAW,
        help="draw from those that have this share of the likeliest's probability",
    ),
]  # fmt: skip
Penalty = Annotated[
    float,
    typer.Option(
        "--repetition-penalty", "--repeat-penalty", metavar="X", rich_help_panel=_DRAW,
        help="above 1: what was said becomes less likely",
    ),
]  # fmt: skip
DrawSeed = Annotated[
    int, typer.Option("--seed", metavar="N", rich_help_panel=_DRAW, help="of the draws")
]
NEW_TOKENS = ("--max-new-tokens", "-n", "--max-tokens", "--n-predict")
ADAPTER_NAMES = ("--adapter", "-a", "--adapter-path")


def _version(wanted: bool) -> None:
    if wanted:
        import pylora

        print(f"pylora {pylora.__version__}")
        raise typer.Exit


@app.callback()
@verb
def common(
    backend: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="what computes: c, numpy, cuda, cupy or auto; default: c if built"
        ),
    ] = None,
    version: Annotated[
        bool,
        typer.Option("--version", "-V", callback=_version, is_eager=True, help="show it and stop"),
    ] = False,
) -> None:
    """LoRA without a deep-learning framework: train, run, merge and inspect adapters."""
    if backend is not None:
        import pylora

        pylora.use(backend)
