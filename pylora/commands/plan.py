"""`pylora plan` and `pylora inspect`: which modules an adapter touches, and how far it moves them.

Modules that are alike in all but their layer share a line; --all gives each its own.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pylora.commands.adapters import lora_config, warn_about_size
from pylora.commands.app import (
    HOW,
    LOOK,
    Alpha,
    EveryModule,
    Model,
    ModulesToSave,
    Precision,
    Rank,
    RsLora,
    Targets,
    TokenIndices,
    command,
)
from pylora.commands.guard import unfinished
from pylora.commands.learning import Optim
from pylora.commands.outputs import check_file
from pylora.commands.room import Wanted, short
from pylora.display.console import Console, megabytes
from pylora.errors import ConfigError
from pylora.numbers.precision import check_choice

if TYPE_CHECKING:
    from pylora.adapters.inspect import ModuleStats
    from pylora.adapters.plan import Plan


def _train(*names: str, help: str) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=HOW)


@command(LOOK, "pylora plan SmolLM2.gguf -r 16", "pylora plan SmolLM2.gguf runs/tone --all")
def plan(
    model: Model,
    adapter: Annotated[
        Path | None,
        typer.Argument(metavar="ADAPTER", help="PEFT folder, run, or adapter_config.json"),
    ] = None,
    rank: Rank = 8,
    alpha: Alpha = None,
    targets: Targets = "all-linear",
    rslora: RsLora = False,
    modules_to_save: ModulesToSave = None,
    trainable_token_indices: TokenIndices = None,
    every: EveryModule = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="one JSON object per module, unfolded")
    ] = False,
    batch_size: Annotated[int, _train("--batch-size", help="examples per update")] = 8,
    length: Annotated[int, _train("--length", help="tokens of an example")] = 512,
    accumulation: Annotated[int, _train("--accumulation", help="parts of an update")] = 1,
    recompute: Annotated[
        bool, _train("--recompute/--no-recompute", help="gradient checkpointing")
    ] = False,
    optimizer: Optim = "adamw",
    precision: Precision = None,
) -> None:
    """Show what an adapter would touch: r, alpha and scale of each module, and the rules behind;
    and what memory it would take to train it."""
    from pylora import backends
    from pylora.adapters.adapter import Adapter
    from pylora.adapters.plan import resolve
    from pylora.adapters.whole import whole_named
    from pylora.formats import open_checkpoint
    from pylora.model.whole import whole_of
    from pylora.training.config import TrainConfig

    check_choice(precision)
    settings = TrainConfig(
        batch_size=batch_size, accumulation=accumulation, recompute=recompute, optimizer=optimizer
    )
    if length < 1:
        raise ConfigError(f"--length is {length}; it must be at least 1")
    with open_checkpoint(model) as checkpoint:
        modules = checkpoint.config.modules()
        if adapter is not None and not (
            adapter.is_file() and adapter.suffix == ".json"
        ):  # its tensors must be what it says, too
            loaded = Adapter.load(adapter, checkpoint.config, base=checkpoint.load)
            resolved = loaded.plan
            whole = whole_named(loaded.config, checkpoint.config, whole_of(loaded))
        else:
            config = lora_config(
                adapter,
                rank,
                alpha,
                targets,
                rslora,
                0.0,
                checkpoint.path,
                modules_to_save=modules_to_save,
                trainable_token_indices=trainable_token_indices,
            )
            resolved, whole = resolve(config, modules), whole_named(config, checkpoint.config)
        total = checkpoint.config.num_parameters
        lengths = [length] * batch_size
        wanted = Wanted(checkpoint, resolved, precision, settings, lengths, whole.trained)
        tried, room = wanted.ways(backends.get())
    warn_about_size(resolved, total)
    screen = Console()
    if as_json:
        for entry in resolved.entries:
            screen.say(json.dumps(vars(entry)))
        return
    columns = ("module", "d × k", "r", "alpha", "scale", "because of")
    numbers = ("d × k", "r", "alpha", "scale")
    if every:
        rows = [(e.path, *_settings(e), _rules(e)) for e in resolved.entries]
        screen.table(columns, rows, right=numbers)
    else:
        screen.table(("modules", *columns), _folded(resolved), right=("modules", *numbers))
    if resolved.bias_only:
        screen.say(f"and the biases of {len(resolved.bias_only)} modules without LoRA")
    for name, what in whole.names.items():
        screen.say(f"and, in place of the base's: {name}{what}")
    trained = resolved.num_parameters + whole.trained
    screen.say(
        f"{len(resolved.entries)} modules, {trained:,} trainable parameters, "
        f"{100 * trained / total:.3f} % of {total:,}"
    )
    first = tried[0]
    needs = (
        f"to train it on {batch_size} examples of {length} tokens at a time, in {first.precision}: "
        f"about {first.words()}"
    )
    for line in textwrap.wrap(needs, screen.width) if screen.width else [needs]:
        screen.say(line)
    if first.estimate.total > room:
        screen.say(f"note: {short(tried, room)}")


def _settings(e: Any) -> tuple[str, int, str, str]:
    return f"{e.d} × {e.k}", e.r, f"{e.alpha:g}", f"{e.scale:g}"


def _rules(entry: Any) -> str:
    return "; ".join((entry.rule_target, entry.rule_r, entry.rule_alpha, entry.rule_scale))


def _folded(plan: Plan) -> list[tuple[object, ...]]:
    """A row for all modules that are alike in everything but the layer."""
    from pylora.adapters.fold import fold, without_layer

    groups = fold(
        plan.entries,
        lambda e: e.path,
        lambda e: (*_settings(e), e.kind, e.lora_bias, e.base_bias, without_layer(_rules(e))),
    )
    return [
        (len(g), g.pattern, *_settings(g.items[0]), without_layer(_rules(g.items[0])))
        for g in groups
    ]


@command(
    LOOK,
    "pylora inspect runs/tone --picture delta.png",
    "pylora inspect runs/tone --model SmolLM2.gguf",
    "pylora inspect --numbers",
)
def inspect(
    adapter: Annotated[
        Path | None, typer.Argument(metavar="ADAPTER", help="PEFT folder, or folder of a run")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="check the adapter against this model's modules")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="picture to draw")
    ] = None,
    every: EveryModule = False,
    numbers: Annotated[
        bool, typer.Option("--numbers", help="the parameter counts LoRA is known by, computed")
    ] = False,
) -> None:
    """Show how far an adapter moves each module: norm and singular values of its delta."""
    screen = Console()
    if picture is not None:
        from pylora.extras import need

        check_file(picture, what="--picture", suffix=".png")
        need("matplotlib")
    if numbers:
        _show_numbers(screen)
    if adapter is not None:
        with unfinished(f"{picture} was not written") if picture else unfinished("no file written"):
            _inspect_adapter(screen, adapter, model, picture, every)


def _show_numbers(screen: Console) -> None:
    from pylora.adapters.inspect import numbers

    rows = [
        (n.what, n.rank, f"{n.trainable:,}", f"{n.full:,}", f"{100 * n.trainable / n.full:.3f} %")
        for n in numbers()
    ]
    columns = ("weight", "r", "trainable with LoRA", "all", "share")
    screen.table(columns, rows, right=columns[1:])


def _inspect_adapter(
    screen: Console, directory: Path, model: Path | None, picture: Path | None, every: bool
) -> None:
    from pylora.adapters.adapter import Adapter
    from pylora.adapters.inspect import inspect as measure
    from pylora.adapters.inspect import modules_of
    from pylora.adapters.peft import read_shown
    from pylora.adapters.whole import PREFIX
    from pylora.display.plots import adapter_picture
    from pylora.formats import open_checkpoint

    whole: dict[str, tuple[int, ...]] = {}
    if model is None:
        config, plan, loras, whole = read_shown(directory, modules_of(directory))
        adapter = Adapter(config, plan, loras)
    else:
        with open_checkpoint(model) as checkpoint:
            adapter = Adapter.load(directory, checkpoint.config, base=checkpoint.load)
        if adapter.whole is not None:
            whole = {name: array.shape for name, array in adapter.whole.tensors.items()}
    stats = measure(adapter)
    magnitudes = [lora.magnitude for lora in adapter.values() if lora.magnitude is not None]
    if magnitudes:
        least, most = min(m.min() for m in magnitudes), max(m.max() for m in magnitudes)
        screen.say(
            f"DoRA: the rows of W + scale B A are brought to lengths from {least:.4g} to "
            f"{most:.4g}; the numbers below are those of scale B A alone"
        )
    numbers = ("d × k", "r", "scale", "norm", "stable rank")
    if every:
        rows: list[tuple[object, ...]] = [
            (
                s.path,
                *_shape(s),
                f"{s.norm:.4g}",
                f"{s.stable_rank:.2f}",
                _first(s.singular_values),
            )
            for s in stats
        ]
        screen.table(("module", *numbers, "singular values"), rows, right=numbers)
    else:
        columns = ("modules", "module", *numbers, "largest singular value")
        screen.table(columns, _ranges(stats), right=("modules", *numbers, columns[-1]))
    full = sum(s.d * s.k for s in stats)
    held = adapter.without_whole().num_parameters
    screen.say(
        f"{held:,} parameters ({megabytes(4 * held)} in float32) in {len(stats)} modules whose "
        f"weights have {full:,}: {100 * held / full:.2f} %"
    )
    for name, shape in whole.items():
        size = " × ".join(map(str, shape))
        screen.say(f"in place of the base's: {name.removeprefix(PREFIX)}, {size}")
    if picture is not None:
        adapter_picture(picture, stats, title=f"Adapter {directory.name}: {len(stats)} modules")
        screen.say(f"picture: {picture}")


def _shape(s: ModuleStats) -> tuple[str, int, str]:
    return f"{s.d} × {s.k}", s.rank, f"{s.scale:g}"


def _ranges(stats: Sequence[ModuleStats]) -> list[tuple[object, ...]]:
    """A row for all modules of a pattern: from the least to the greatest of each figure."""
    from pylora.adapters.fold import fold

    groups = fold(stats, lambda s: s.path, _shape)
    return [
        (
            len(g),
            g.pattern,
            *_shape(g.items[0]),
            _span([s.norm for s in g.items], ".4g"),
            _span([s.stable_rank for s in g.items], ".2f"),
            _span([max(s.singular_values, default=0.0) for s in g.items], ".3g"),
        )
        for g in groups
    ]


def _span(values: Sequence[float], form: str) -> str:
    low, high = f"{min(values):{form}}", f"{max(values):{form}}"
    return low if low == high else f"{low} … {high}"


def _first(values: Sequence[float], most: int = 5) -> str:
    shown = " ".join(f"{value:.3g}" for value in values[:most])
    return shown + (" …" if len(values) > most else "")
