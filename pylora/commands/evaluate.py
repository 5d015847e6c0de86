"""`pylora eval`: an adapter on records it has not seen, beside the base model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from pylora.commands.app import ADAPTER_NAMES, LOOK, Model, Precision, command
from pylora.commands.guard import unfinished
from pylora.commands.inputs import file_or_stdin
from pylora.display.console import Console

Metrics = Annotated[
    list[str] | None,
    typer.Option(
        "--metric",
        metavar="NAME",
        help="beside the loss: exact, token-accuracy, json, regex:PATTERN, or FILE.py:function "
        "of (answer, expected); may be repeated",
    ),
]


@command(
    LOOK, "pylora eval SmolLM2.gguf test.jsonl --adapter runs/tone --metric exact", name="eval"
)
def evaluation(
    model: Model,
    data: Annotated[
        Path,
        typer.Argument(metavar="DATA", help="records, as for training; - reads standard input"),
    ],
    adapter: Annotated[
        Path | None,
        typer.Option(*ADAPTER_NAMES, metavar="ADAPTER", help="PEFT folder, or folder of a run"),
    ] = None,
    metric: Metrics = None,
    fields: Annotated[
        str | None,
        typer.Option(metavar="OURS=THEIRS,-NAME", help="names of the records' fields, as in train"),
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(help="most tokens of a record; a longer one is an error")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="records that are computed at a time")] = 8,
    show: Annotated[int, typer.Option(metavar="N", help="answers to show, before and after")] = 0,
    precision: Precision = "fp32",
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object")] = False,
) -> None:
    """Measure loss, answers that are right, and what else you ask for: the base beside the adapter.

    Without --metric: exact and token-accuracy, and json where every expected answer is JSON.
    """
    from pylora.adapters.adapter import Adapter
    from pylora.adapters.own_tokenizer import tokenizer_of
    from pylora.errors import ConfigError
    from pylora.formats import open_checkpoint
    from pylora.generation import metrics
    from pylora.model.llama import Llama
    from pylora.numbers.precision import check_choice
    from pylora.training.evaluate import evaluate
    from pylora.training.examples import load_examples

    check_choice(precision)
    for name, value in (("batch-size", batch_size), ("show", show + 1)):
        if value < 1:
            raise ConfigError(f"--{name} is {value if name != 'show' else show}: too small")
    asked = None if metric is None else metrics.metrics(metric)
    with unfinished("nothing was measured"), open_checkpoint(model) as checkpoint:
        chosen = None
        if adapter is not None:
            chosen = Adapter.load(adapter, checkpoint.config, base=checkpoint.load)
        tokenizer = tokenizer_of(checkpoint, () if adapter is None else (adapter,))
        source = file_or_stdin(data) or data
        examples = load_examples(source, tokenizer, max_length=max_length, fields=fields)
        if asked is None:
            asked = metrics.metrics(_default(examples, tokenizer))
        llama = Llama.from_checkpoint(checkpoint, precision=precision)
        judge = metrics.Judge(llama, tokenizer, examples, asked, batch_size=batch_size)
        found: dict[str, dict[str, float]] = {}
        said: dict[str, list[tuple[str, str]]] = {}
        for name, one in (("base", None), ("adapter", chosen)):
            if name == "adapter" and one is None:
                continue
            llama.attach(one) if one is not None else llama.detach()
            e = evaluate(llama, examples, batch_size=batch_size)
            found[name] = {"loss": e.nll, "perplexity": e.perplexity, **judge().metrics}
            if show and judge.questions:
                said[name] = judge.answers()[:show]
    _report(Console(), examples, found, said, as_json)


def _default(examples: Any, tokenizer: Any) -> list[str]:
    """What is measured where nobody says."""
    from pylora.generation.metrics import TOKENS, is_json, question

    questions = [question(example) for example in examples]
    if any(q is None for q in questions):
        return [TOKENS]
    texts = [tokenizer.decode(q.expected).strip() for q in questions if q is not None]
    structured = all(text[:1] in ("{", "[") and is_json(text) for text in texts)
    return ["exact", TOKENS, *(["json"] if structured else [])]


def _report(
    screen: Console,
    examples: Any,
    found: dict[str, dict[str, float]],
    said: dict[str, list[tuple[str, str]]],
    as_json: bool,
) -> None:
    if as_json:
        screen.say(json.dumps({"records": len(examples), **found}))
        return
    rows = [
        (name.replace("_", " "), *(f"{figures[name]:.4g}" for figures in found.values()))
        for name in found["base"]
    ]
    title = f"{len(examples):,} records, {sum(e.label_count for e in examples):,} tokens that count"
    screen.table(("figure", *found), rows, title=title, right=tuple(found))
    for i, (answer, expected) in enumerate(next(iter(said.values()), [])):
        screen.say(f"expected  {expected}")
        for name in said:
            screen.say(f"{name:<9} {answer if name == 'base' else said[name][i][0]}")
