"""The demo: SmolLM2-135M-Instruct learns a notation it has never seen, on a CPU, in minutes.

Measured before it trains and after it has, on statements whose compositions it was never trained
on; nor was any setting chosen by them: that is what the validation split is for. Everything it
prints is computed in that run, and lies in the output folder afterwards:

    report.json         every figure        generations.jsonl   what was said, item by item
    loss.png            the loss curves     log.jsonl           the training log
    adapter/            the adapter, a PEFT directory           adapter.png  what it changed
    checkpoint-NNNNNN/  the adapter and the optimizer's state after the last step

It judges the notation task alone; it is not a benchmark of the model.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pylora import build_info
from pylora.adapters.adapter import Adapter, parameters
from pylora.adapters.inspect import inspect
from pylora.adapters.loraconfig import LoraConfig
from pylora.adapters.plan import resolve
from pylora.demo.fetch import MODELS, SMOLLM2, fetch
from pylora.demo.items import (
    DATA,
    Items,
    answers,
    encode_prompts,
    exact_match,
    read_items,
    right,
)
from pylora.demo.merge import compare_merged, outputs
from pylora.demo.show import show_answers
from pylora.display.console import Console, megabytes
from pylora.display.plots import adapter_picture, loss_curve, sparkline
from pylora.display.waiting import waiting
from pylora.errors import PyloraError
from pylora.files.whole import atomic_write
from pylora.formats import open_checkpoint
from pylora.model.llama import Llama
from pylora.numbers.precision import check_precision, fastest
from pylora.training.examples import Example, load_examples
from pylora.training.memory import peak_rss_bytes
from pylora.training.train import TrainConfig, TrainResult, train


@dataclass(frozen=True)
class Settings:
    """What the demo does; `expect_*` are what a run on the real model is held to.

    The values were chosen on the validation split (docs/training.md), never on the held-out one.
    """

    steps: int = 200
    tokens_per_step: int = 132  # about 8 examples
    learning_rate: float = 2e-3
    rank: int = 8
    alpha: float = 16
    targets: str | tuple[str, ...] = "all-linear"
    test_items: int = 150
    validation_items: int = 50
    evaluations: int = 4  # of the validation split's loss while it trains, the last one at the end
    precision: str = "auto"  # what trains fastest here: `fastest_precision`
    seed: int = 0
    expect_before: float = 0.05  # at most
    expect_after: float = 0.95  # at least


SHORT = Settings(steps=80, test_items=50, validation_items=20, evaluations=2, expect_after=0.20)


def fastest_precision(info: dict[str, Any]) -> str:
    """`fastest` of the machine that `info`, of build_info(), is about."""
    return fastest(info["backend"], info.get("isa"))


def run(
    out_dir: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str] | None = None,
    settings: Settings = Settings(),
    judge: bool = True,
    console: Console | None = None,
) -> dict[str, Any]:
    """Runs the demo and returns what it writes to report.json.

    model: the name of a model that can be fetched (`pylora.demo.fetch.MODELS`; default: SmolLM2),
    or a GGUF file or Hugging Face folder. With `judge`, accuracy beyond what `settings` expects
    raises PyloraError, after everything has been written.
    """
    info = build_info()
    precision = settings.precision
    precision = check_precision(fastest_precision(info) if precision == "auto" else precision)
    began, load = time.perf_counter(), load_average()
    out, screen = Path(out_dir), console or Console()
    screen.heading("1. The model")
    source = _source(model, screen)
    items = read_items("test", settings.test_items)
    with open_checkpoint(source) as checkpoint:
        with waiting(screen.say, "reading and packing the weights"):
            tokenizer = checkpoint.tokenizer()
            examples = load_examples(DATA / "train.jsonl", tokenizer)
            seen = load_examples(DATA / "validation.jsonl", tokenizer)[: settings.validation_items]
            validation = read_items("validation", settings.validation_items)
            llama = Llama.from_checkpoint(checkpoint, precision=precision)
        plan_config = LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            target_modules=settings.targets,
            task_type="CAUSAL_LM",
            base_model_name_or_path=source.name,
        )
        plan = resolve(plan_config, llama.config.modules())
        adapter = Adapter.init(plan, plan_config, settings.seed)
        total, trainable = llama.config.num_parameters, adapter.num_parameters
        precision_report = llama.precision_report
        screen.say(
            f"{source}, {_size(source)}; backend {llama.ops.name} ({info.get('isa', '')}), "
            f"precision {precision_report}"
        )
        share = 100 * trainable / total
        kinds = sorted({path.rsplit(".", 1)[-1] for path in adapter})
        screen.say(
            f"{total:,} parameters, {trainable:,} of them trainable ({share:.2f} %): "
            f"r = {settings.rank} on {', '.join(kinds)}"
        )

        screen.heading(f"2. Before: {len(items)} held-out statements")
        with waiting(screen.say, "answering") as note:
            before = answers(llama, tokenizer, items, note)
        screen.say(f"exact match {exact_match(items, before):.1%}{_after(began)}")

        screen.heading(f"3. Training on {len(examples):,} others")
        result, curve = _train(llama, adapter, examples, seen, settings, out, screen)
        with waiting(screen.say, "answering the validation split"):
            learnt = exact_match(validation, answers(llama, tokenizer, validation))
        screen.say(
            f"exact match on {len(validation)} validation statements, of the same kind as the "
            f"held-out ones: {learnt:.1%}{_after(began)}"
        )
        with waiting(screen.say, "drawing"):
            title = f"{source.stem} learns a notation"
            loss_curve(out / "loss.png", result.losses, title=title, evaluations=curve)
            title = f"What was learnt: {len(adapter)} modules, r = {settings.rank}"
            adapter_picture(out / "adapter.png", inspect(adapter), title=title)

        screen.heading("4. After: the same statements, the adapter read back from disk")
        loaded = Adapter.load(out / "adapter", llama.config.modules())
        _check_equal(adapter, loaded)
        llama.attach(loaded)
        with waiting(screen.say, "answering") as note:
            after = answers(llama, tokenizer, items, note)
        show_answers(screen, items, before, after)

        screen.heading("5. Merged into the weights, and out again")
        with waiting(screen.say, "merging, comparing, unmerging") as note:
            some, ops = encode_prompts(tokenizer, items[:24]), llama.ops
            apart = outputs(llama, some)
            del llama
            merge = compare_merged(checkpoint, loaded, some, apart, ops, precision, note)
        screen.table(("merge", "value"), list(merge.rows()), right=("value",))

    adapter_bytes = _size_of_folder(out / "adapter")
    screen.say(
        f"sizes: base {megabytes(merge.base_bytes)} in float32, {_size(source)} in its file; "
        f"adapter {megabytes(adapter_bytes)} ({100 * adapter_bytes / merge.base_bytes:.2f} %)"
    )
    report = {
        "exact_match_before": exact_match(items, before),
        "exact_match_after": exact_match(items, after),
        "exact_match_validation": learnt,
        "seconds": time.perf_counter() - began,
        "tokens_per_second": result.tokens_per_second,
        "trainable_parameters": trainable,
        "total_parameters": total,
        "adapter_bytes": adapter_bytes,
        "peak_rss_bytes": peak_rss_bytes(),
        "loss": result.losses,
        "validation_loss": curve,
        "training_seconds": result.seconds,
        "training_tokens": result.tokens,
        "training_items": len(examples),
        "validation_items": len(validation),
        "test_items": len(items),
        "first_statement_right": right(items[0], after[0]),
        "base_bytes": merge.base_bytes,
        "merge": asdict(merge),
        "settings": asdict(settings),
        "targets": kinds,
        "model": source.name,
        "precision": precision_report,
        "build": info,
        "load_before": load,
    }
    _write(out, report, items, before, after)
    rss, seconds = peak_rss_bytes(), time.perf_counter() - began
    screen.say(
        f"{seconds:.0f} s in all, {result.tokens_per_second:.0f} tokens/s in training, "
        f"peak memory {megabytes(rss) if rss else 'unknown'}; everything is in {out}"
    )
    if judge:
        _judge(report, settings)
    return report


def _source(model: str | os.PathLike[str] | None, screen: Console) -> Path:
    """The model's file or folder. What lies there under a model's name comes before the name."""
    if model is None:
        return fetch(SMOLLM2, say=screen.say)
    path = Path(model)
    if path.exists():
        return path
    if str(model) in MODELS:
        return fetch(MODELS[str(model)], say=screen.say)
    if path.name == str(model) and not path.suffix:
        near = difflib.get_close_matches(str(model).lower(), MODELS, 1, 0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise PyloraError(
            f"no model {model}: give a GGUF file, a Hugging Face folder, or one of the names "
            f"{', '.join(MODELS)}{hint}"
        )
    return path


Curve = list[tuple[int, float]]  # (step, loss of the validation split)


def _train(
    model: Llama,
    adapter: Adapter,
    examples: Sequence[Example],
    seen: Sequence[Example],
    settings: Settings,
    out: Path,
    screen: Console,
) -> tuple[TrainResult, Curve]:
    config = TrainConfig(
        learning_rate=settings.learning_rate,
        steps=settings.steps,
        packing=True,
        max_tokens=settings.tokens_per_step,
        warmup_steps=min(10, settings.steps),
        schedule="linear",
        seed=settings.seed,
        keep=1,
        eval_every=max(1, settings.steps // settings.evaluations),
    )
    with screen.training() as show:
        result = train(model, adapter, examples, config, out, seen, show, overwrite=True)
    curve = [(step, evaluation.nll) for step, evaluation in result.evaluations]
    line = sparkline([math.log(max(loss, 1e-6)) for loss in result.losses])
    first, last = result.losses[0], sum(result.losses[-10:]) / len(result.losses[-10:])
    screen.say(
        f"loss {first:.3f} {line} {last:.3f} (log scale); {result.tokens:,} tokens; loss of the "
        f"validation split {curve[0][1]:.3f} → {curve[-1][1]:.3f}"
    )
    return result, curve


def _after(began: float) -> str:
    return f" ({time.perf_counter() - began:.0f} s since the start)"


def load_average() -> float | None:
    """Processes that wanted to run in the last minute, where the system says it."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _write(
    out: Path,
    report: dict[str, Any],
    items: Items,
    before: list[str],
    after: list[str],
) -> None:
    lines = [
        json.dumps({**item, "before": b, "after": a}, ensure_ascii=False) + "\n"
        for item, b, a in zip(items, before, after, strict=True)
    ]
    with atomic_write(out / "generations.jsonl") as beside:
        beside.write_text("".join(lines), encoding="utf-8")
    with atomic_write(out / "report.json") as beside:
        text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False)
        beside.write_text(text + "\n", encoding="utf-8")


def _judge(report: dict[str, Any], settings: Settings) -> None:
    before, after = report["exact_match_before"], report["exact_match_after"]
    if before > settings.expect_before or after < settings.expect_after:
        raise PyloraError(
            f"the demo did not show what it should: exact match was {before:.1%} before (expected "
            f"at most {settings.expect_before:.0%}) and {after:.1%} after (expected at least "
            f"{settings.expect_after:.0%})"
        )


def _size_of_folder(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def _size(path: Path) -> str:
    return megabytes(path.stat().st_size if path.is_file() else _size_of_folder(path))


def _check_equal(adapter: Adapter, loaded: Adapter) -> None:
    """PyloraError unless every array of both has the same bits."""
    ours, theirs = parameters(adapter), parameters(loaded)
    same = ours.keys() == theirs.keys() and all(
        ours[key].tobytes() == theirs[key].tobytes() for key in ours
    )
    if not same:
        raise PyloraError("the adapter read back from disk is not the one that was saved")
