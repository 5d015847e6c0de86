"""The verbs that look: inspect, check, demo, vectors, info, doctor, conformance."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from pylora.commands.app import Model, Seed, app
from pylora.commands.guard import verb
from pylora.display.console import Console, megabytes
from pylora.errors import ConfigError


@app.command()
@verb
def inspect(
    adapter: Annotated[Path | None, typer.Argument(help="PEFT directory")] = None,
    model: Annotated[
        Path | None, typer.Option(help="check the adapter against this model's modules")
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="PNG to draw")] = None,
    numbers: Annotated[
        bool, typer.Option("--numbers", help="the parameter counts LoRA is known by, computed")
    ] = False,
) -> None:
    """Show how far an adapter moves each module: norm and singular values of its delta."""
    from pylora.adapters.inspect import numbers as compute_numbers

    screen = Console()
    if numbers:
        rows = [
            (
                n.what,
                n.rank,
                f"{n.trainable:,}",
                f"{n.full:,}",
                f"{100 * n.trainable / n.full:.3f} %",
            )
            for n in compute_numbers()
        ]
        columns = ("weight", "r", "trainable with LoRA", "all", "share")
        screen.table(columns, rows, right=columns[1:])
    if adapter is None:
        if not numbers:
            raise ConfigError("name a PEFT directory to inspect, or give --numbers")
        return
    _inspect_adapter(screen, adapter, model, picture)


def _inspect_adapter(
    screen: Console, directory: Path, model: Path | None, picture: Path | None
) -> None:
    from pylora.adapters.adapter import Adapter
    from pylora.adapters.inspect import inspect as measure
    from pylora.adapters.inspect import modules_of
    from pylora.display.plots import adapter_picture
    from pylora.formats import open_checkpoint

    if model is None:
        adapter = Adapter.load(directory, modules_of(directory))
    else:
        with open_checkpoint(model) as checkpoint:
            adapter = Adapter.load(directory, checkpoint.config.modules(), base=checkpoint.load)
    stats = measure(adapter)
    screen.table(
        ("module", "d × k", "r", "scale", "norm", "stable rank", "singular values"),
        [
            (
                s.path,
                f"{s.d} × {s.k}",
                s.rank,
                f"{s.scale:g}",
                f"{s.norm:.4g}",
                f"{s.stable_rank:.2f}",
                _first(s.singular_values),
            )
            for s in stats
        ],
        right=("d × k", "r", "scale", "norm", "stable rank"),
    )
    full = sum(s.d * s.k for s in stats)
    screen.say(
        f"{adapter.num_parameters:,} parameters ({megabytes(4 * adapter.num_parameters)} in "
        f"float32) in {len(stats)} modules whose weights have {full:,}: "
        f"{100 * adapter.num_parameters / full:.2f} %"
    )
    if picture is not None:
        adapter_picture(picture, stats, title=f"Adapter {directory.name}: {len(stats)} modules")
        screen.say(f"picture: {picture}")


def _first(values: Sequence[float], most: int = 5) -> str:
    shown = " ".join(f"{value:.3g}" for value in values[:most])
    return shown + (" …" if len(values) > most else "")


@app.command()
@verb
def check(
    model: Model,
    adapter: Annotated[
        Path | None, typer.Option(help="PEFT directory; default: random, on q, k, v and o")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="JSONL to take tokens from; default: random tokens")
    ] = None,
    tokens: Annotated[int, typer.Option(help="tokens to check with")] = 24,
    seed: Seed = 0,
    as_json: Annotated[
        Path | None, typer.Option("--json", help="file to write the report to")
    ] = None,
) -> None:
    """Prove gradients, merging and zero-init on a real model and adapter; exit code 1 if not."""
    from pylora.check.check import check_model
    from pylora.files.whole import atomic_write

    report = check_model(model, adapter, data=data, tokens=tokens, seed=seed)
    if as_json is not None:
        with atomic_write(as_json) as file:
            file.write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
    screen = Console()
    rows = [
        (f.check, f.verdict, _figure(f.measured), _figure(f.allowed), f.text)
        for f in report.findings
    ]
    columns = ("check", "verdict", "measured", "allowed", "of what")
    screen.table(columns, rows, right=("measured", "allowed"))
    screen.say(f"{report.tokens} tokens; {report.scope}; backend {report.backend}")
    failed = sum(f.verdict == "FAIL" for f in report.findings)
    screen.say(f"FAILED: {failed} of {len(rows)} checks" if failed else "everything holds")
    if failed:
        raise typer.Exit(1)


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


@app.command()
@verb
def demo(
    model: Annotated[
        Path | None, typer.Option(help="GGUF file or folder, in place of the downloaded model")
    ] = None,
    out: Annotated[Path, typer.Option(help="folder for everything it writes")] = Path("out/demo"),
    short: Annotated[bool, typer.Option("--short", help="fewer steps and items")] = False,
    steps: Annotated[int | None, typer.Option(min=1, help="training steps")] = None,
    precision: Annotated[
        str, typer.Option(help="auto: bf16 where the processor multiplies it, else fp32")
    ] = "auto",
    seed: Seed = 0,
) -> None:
    """Teach SmolLM2-135M a notation, measured before and after: minutes on two cores."""
    from dataclasses import replace

    from pylora.demo.demo import SHORT, Settings, run

    settings = replace(SHORT if short else Settings(), seed=seed, precision=precision)
    if steps is not None:
        settings = replace(settings, steps=steps)
    # With another model or length nobody knows what to expect: then the figures are only shown.
    run(out, model=model, settings=settings, judge=model is None and steps is None)


@app.command()
@verb
def vectors(
    out: Annotated[Path, typer.Option(help="folder to write; see docs/porting.md")],
) -> None:
    """Write the golden vectors that a port is checked against."""
    from pylora.conformance.vectors.all import all_cases
    from pylora.conformance.vectors.cases import VERSION, write

    cases = all_cases()
    write(out, cases)
    numbers = sum(expected.value.size for case in cases for expected in case.outputs.values())
    print(f"{out}: version {VERSION}, {len(cases)} cases, {numbers} numbers to be met")


@app.command()
@verb
def info() -> None:
    """Show versions, backends, the instruction set in use and the number of threads."""
    from pylora import build_info

    for name, value in build_info().items():
        print(f"{name}: {', '.join(value) if isinstance(value, list) else value}")


@app.command()
@verb
def doctor() -> None:
    """Show the extras and a GPU's parts: what is here, what is not, and what to do about it."""
    from pylora.commands.doctor import examine

    screen, steps = Console(), examine()
    screen.table(("part", "state", "what"), [(s.what, s.state, s.text) for s in steps])
    for s in steps:
        if s.advice:
            screen.say(f"{s.what}: {s.advice}")


@app.command()
@verb
def conformance(
    implementation: Annotated[
        str | None, typer.Argument(help="package.module:Class, found on PYTHONPATH or here")
    ] = None,
    profile: Annotated[str, typer.Option(help="quick (100 examples a law) or nightly")] = "quick",
    law: Annotated[list[str] | None, typer.Option(help="id of a law; may be repeated")] = None,
    examples: Annotated[int | None, typer.Option(help="per law, in place of a profile")] = None,
    seed: Seed = 0,
    as_list: Annotated[bool, typer.Option("--list", help="show the laws and stop")] = False,
    mutants: Annotated[
        bool, typer.Option("--mutants", help="kill the kit's own wrong implementations and stop")
    ] = False,
) -> None:
    """Test any implementation of LoRA against the laws; exit code 1 if one fails or breaks."""
    from pylora.conformance.running import command

    if implementation is not None and (mutants or as_list):
        flag = "--mutants" if mutants else "--list"
        raise ConfigError(f"{flag} tests no implementation; leave {implementation!r} out")
    if mutants and (law or examples is not None):
        raise ConfigError("--mutants tries every law; leave --law and --examples out")
    if mutants:
        from pylora.conformance.mutants.hunt import hunt

        if not hunt(print, seed=seed):
            raise typer.Exit(1)
        return
    if as_list:
        print(command.listing(law or []), end="")
        return
    if implementation is None:
        raise ConfigError(
            "name an implementation, package.module:Class, or give --list or --mutants"
        )
    if not command.test(implementation, profile, law or [], examples, seed, print):
        raise typer.Exit(1)
