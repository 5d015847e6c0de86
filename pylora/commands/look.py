"""The verbs that check and tell: check, conformance, suite, vectors, doctor, info, demo."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pylora.commands.app import ADAPTER_NAMES, HERE, LOOK, TEST, Model, Seed, command
from pylora.commands.engine_options import (
    AdaptersBy,
    ApiKey,
    BaseNames,
    ConvertCommand,
    EnginePrecision,
    EngineUrl,
    FormOfFiles,
    Patience,
    RestartCommand,
    SuiteDir,
    TestNames,
    Timeout,
)
from pylora.commands.guard import unfinished
from pylora.commands.inputs import file_or_stdin
from pylora.commands.outputs import check_file, check_folder
from pylora.commands.ported import ported
from pylora.display.console import Console


@command(LOOK, "pylora check SmolLM2.gguf --adapter runs/tone --json report.json")
def check(
    model: Model,
    adapter: Annotated[
        Path | None,
        typer.Option(
            *ADAPTER_NAMES, metavar="DIR",
            help="PEFT folder or run; default: random, on q, k, v and o",
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="records to take tokens from; default: random tokens")
    ] = None,
    tokens: Annotated[int, typer.Option(metavar="N", help="tokens to check with")] = 24,
    seed: Seed = 0,
    as_json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="file to write the report to")
    ] = None,
) -> None:  # fmt: skip
    """Prove gradients, merging and zero-init on a real model and adapter; exit code 1 if not."""
    from pylora.check.check import check_model
    from pylora.files.whole import atomic_write

    if as_json is not None:
        check_file(as_json, what="--json")
    data = file_or_stdin(data)
    with unfinished("no report was written"):
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
    if as_json is not None:
        screen.say(f"report: {as_json}")
    failed = sum(f.verdict == "FAIL" for f in report.findings)
    screen.say(f"FAILED: {failed} of {len(rows)} checks" if failed else "everything holds")
    if failed:
        raise typer.Exit(1)


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


@command(
    TEST,
    "pylora conformance mypackage.mylora:Implementation",
    "pylora conformance --list",
    "pylora conformance --suite suite --engine http://127.0.0.1:8000/v1 --precision bf16",
    "pylora conformance --suite suite --convert 'convert.py --base {base} {in} --outfile {out}'",
)
def conformance(
    implementation: Annotated[
        str | None,
        typer.Argument(metavar="PACKAGE.MODULE:CLASS", help="found on PYTHONPATH or here"),
    ] = None,
    profile: Annotated[
        str, typer.Option(metavar="NAME", help="quick (100 examples a law) or nightly")
    ] = "quick",
    law: Annotated[
        list[str] | None, typer.Option(metavar="ID", help="id of a law; may be repeated")
    ] = None,
    examples: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="per law, in place of a profile")
    ] = None,
    seed: Seed = 0,
    as_list: Annotated[bool, typer.Option("--list", help="show the laws and stop")] = False,
    mutants: Annotated[
        bool, typer.Option("--mutants", help="kill the kit's own wrong implementations and stop")
    ] = False,
    junit: Annotated[
        Path | None, typer.Option(metavar="FILE", help="write the report as JUnit's XML too")
    ] = None,
    as_json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="write the report as JSON too")
    ] = None,
    suite: SuiteDir = None,
    engine: EngineUrl = None,
    restart: RestartCommand = None,
    convert: ConvertCommand = None,
    adapters_by: AdaptersBy = "vllm",
    precision: EnginePrecision = "fp32",
    form: FormOfFiles = None,
    api_key: ApiKey = None,
    timeout: Timeout = 60.0,
    patience: Patience = 120.0,
    bases: BaseNames = None,
    tests: TestNames = None,
) -> None:
    """Test an implementation of LoRA against the laws, or an engine or converter against a suite;
    exit code 1 if anything is wrong."""
    from pylora.conformance.running import command as kit

    screen = Console()
    if suite is not None:
        from pylora.conformance.engines.command import Settings, test

        for file, name in ((as_json, "--json"), (junit, "--junit")):
            if file is not None:
                check_file(file, what=name)
        settings = Settings(
            suite, engine, restart, convert, adapters_by, precision, form, api_key, timeout,
            patience, tuple(bases or ()), tuple(tests or ()), as_json, junit,
        )  # fmt: skip
        with unfinished("no report was written"):
            if not test(settings, screen.say):
                raise typer.Exit(1)
        return
    if mutants:
        from pylora.conformance.mutants.hunt import hunt

        if not hunt(screen.say, seed=seed):
            raise typer.Exit(1)
        return
    if implementation is None:
        screen.say(kit.listing(law or []).removesuffix("\n"))
        return
    chosen = law or []
    if not kit.test(implementation, profile, chosen, examples, seed, screen.say, junit, as_json):
        raise typer.Exit(1)


@command(TEST, "pylora suite --out suite", "pylora suite --out suite --families llama,qwen3")
def suite(
    out: Annotated[Path, typer.Option(metavar="DIR", help="folder to write; docs/engines.md")],
    families: Annotated[
        str, typer.Option(metavar="NAMES", help="separated by commas; default: all that pylora has")
    ] = "",
    seed: Seed = 0,
) -> None:
    """Write tiny models and adapters with what each must answer, to test engines with."""
    from pylora.conformance.suite.write import check_output, write_suite

    check_folder(out, what="--out")
    check_output(out)
    screen = Console()
    wanted = [name.strip() for name in families.split(",") if name.strip()]
    with unfinished(f"{out} was not written"):
        manifest = write_suite(out, wanted, seed, screen.say)
    count = sum(len(base["cases"]) for base in manifest["bases"])
    bases = len(manifest["bases"])
    screen.say(f"{out}: {bases} models, {count} adapters, seed {seed}")


@command(TEST, "pylora vectors --out vectors", "pylora vectors --check port_output")
def vectors(
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="folder to write; docs/porting.md")
    ] = None,
    port: Annotated[
        Path | None,
        typer.Option("--check", metavar="DIR", help="what a port computed: folder or outputs.json"),
    ] = None,
    as_json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="file for the whole report")
    ] = None,
    badge: Annotated[
        Path | None, typer.Option(metavar="FILE", help="file for a shields.io endpoint")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option(metavar="FILE", help="file for a table of the statements")
    ] = None,
) -> None:
    """Write the golden vectors, or hold against them what a port computed; exit code 1 if a
    number is wrong or nothing was computed."""
    from pylora.conformance.vectors.all import all_cases, all_questions
    from pylora.conformance.vectors.cases import VERSION, check_output, write

    if port is not None:
        for option, file in (("--json", as_json), ("--badge", badge), ("--markdown", markdown)):
            if file is not None:
                check_file(file, what=option)
        if not ported(port, Console(), as_json=as_json, badge=badge, markdown=markdown):
            raise typer.Exit(1)
        return
    assert out is not None  # rules.py
    check_folder(out, what="--out")
    check_output(out)
    with unfinished(f"{out} was not written"):
        cases, questions = all_cases(), all_questions()
        write(out, cases, questions)
    numbers = sum(expected.value.size for case in cases for expected in case.outputs.values())
    asked = sum(len(some) for _, some in questions.values())
    Console().say(
        f"{out}: version {VERSION}, {len(cases)} cases, {numbers} numbers to be met, "
        f"{asked} questions to be answered"
    )


@command(HERE, "pylora doctor")
def doctor() -> None:
    """Show the extras and a GPU's parts: what is here, what is not, and what to do about it."""
    from pylora.commands.doctor import examine

    screen, steps = Console(), examine()
    screen.table(("part", "state", "what"), [(s.what, s.state, s.text) for s in steps])
    for s in steps:
        if s.advice:
            screen.say(f"{s.what}: {s.advice}")


@command(HERE, "pylora info", "pylora --backend numpy info")
def info() -> None:
    """Show versions, backends, the instruction set in use and the number of threads."""
    from pylora import build_info

    screen = Console()
    for name, value in build_info().items():
        screen.say(f"{name}: {', '.join(value) if isinstance(value, list) else value}")


@command(
    HERE, "pylora demo", "pylora demo --model gemma", "pylora demo --short --model SmolLM2.gguf"
)
def demo(
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME or PATH",
            help="smollm2, gemma (3 270M) or qwen (2.5 Coder 0.5B), fetched; or a GGUF file or "
            "folder [default: smollm2]",
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="folder for everything it writes")
    ] = Path("out/demo"),
    short: Annotated[bool, typer.Option("--short", help="fewer steps and items")] = False,
    steps: Annotated[int | None, typer.Option(min=1, metavar="N", help="training steps")] = None,
    precision: Annotated[
        str,
        typer.Option(metavar="NAME", help="auto: bf16 where the processor has it, else fp32"),
    ] = "auto",
    seed: Seed = 0,
) -> None:
    """Teach SmolLM2-135M a notation, measured before and after: minutes on two cores."""
    from dataclasses import replace

    from pylora.demo.demo import SHORT, Settings, run

    check_folder(out, what="--out")
    settings = replace(SHORT if short else Settings(), seed=seed, precision=precision)
    if steps is not None:
        settings = replace(settings, steps=steps)
    # With another model or length nobody knows what to expect: then the figures are only shown.
    with unfinished(f"what was written so far is in {out}"):
        run(out, model=model, settings=settings, judge=model is None and steps is None)
