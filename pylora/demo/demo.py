"""The demo: SmolLM2-135M-Instruct learns a notation it has never seen, on a CPU, in minutes.

Measured before it trains and after it has, on statements whose compositions it was never trained
on. Everything it prints is computed in that run, and lies in the output folder afterwards:

    report.json         every figure        generations.jsonl   what was said, item by item
    loss.png            the loss curve      log.jsonl           the training log
    adapter/            the adapter, a PEFT directory           adapter.png  what it changed
    checkpoint-NNNNNN/  the adapter and the optimizer's state after the last step

It judges the notation task alone; it is not a benchmark of the model.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pylora import build_info
from pylora.adapters.adapter import Adapter, parameters
from pylora.adapters.inspect import inspect
from pylora.adapters.loraconfig import LoraConfig
from pylora.adapters.plan import resolve
from pylora.demo.fetch import fetch
from pylora.demo.items import DATA, Items, answers, encode_prompts, exact_match, read_items
from pylora.demo.merge import compare_merged, outputs
from pylora.display.console import Console, megabytes
from pylora.display.plots import adapter_picture, loss_curve, sparkline
from pylora.errors import PyloraError
from pylora.files.whole import atomic_write
from pylora.formats import open_checkpoint
from pylora.model.llama import Llama
from pylora.numbers.precision import check_precision
from pylora.training.examples import load_examples
from pylora.training.train import TrainConfig, TrainResult, train


@dataclass(frozen=True)
class Settings:
    """What the demo does; `expect_*` are what a run on the real model is held to."""

    steps: int = 150
    tokens_per_step: int = 340  # about 17 examples
    learning_rate: float = 2e-3
    rank: int = 8
    alpha: float = 16
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    test_items: int = 150
    precision: str = "fp32"
    seed: int = 0
    expect_before: float = 0.05  # at most
    expect_after: float = 0.80  # at least


SHORT = Settings(steps=80, test_items=50, expect_after=0.20)


def run(
    out_dir: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str] | None = None,
    settings: Settings = Settings(),
    judge: bool = True,
    console: Console | None = None,
) -> dict[str, Any]:
    """Runs the demo and returns what it writes to report.json.

    model: a GGUF file or Hugging Face folder instead of the downloaded one. With `judge`, accuracy
    beyond what `settings` expects raises PyloraError, after everything has been written.
    """
    check_precision(settings.precision)
    began = time.perf_counter()
    out, screen = Path(out_dir), console or Console()
    screen.heading("1. The model")
    source = fetch(say=screen.say) if model is None else Path(model)
    items = read_items(settings.test_items)
    with open_checkpoint(source) as checkpoint:
        tokenizer = checkpoint.tokenizer()
        examples = load_examples(DATA / "train.jsonl", tokenizer)
        llama = Llama.from_checkpoint(checkpoint, precision=settings.precision)
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
        info = build_info()
        screen.say(
            f"{source}, {_size(source)}; backend {llama.ops.name} ({info.get('isa', '')}), "
            f"precision {llama.precision_report}"
        )
        precision = llama.precision_report
        share = 100 * trainable / total
        screen.say(f"{total:,} parameters, {trainable:,} of them trainable ({share:.2f} %)")

        screen.heading(f"2. Before: {len(items)} held-out statements")
        before = answers(llama, tokenizer, items)
        screen.say(f"exact match {exact_match(items, before):.1%}")

        screen.heading(f"3. Training on {len(examples):,} others")
        result = _train(llama, adapter, examples, settings, out, screen)
        loss_curve(out / "loss.png", result.losses, title=f"{source.stem} learns a notation")
        adapter_picture(
            out / "adapter.png",
            inspect(adapter),
            title=f"What was learnt: {len(adapter)} modules, r = {settings.rank}",
        )

        screen.heading("4. After: the same statements, the adapter read back from disk")
        loaded = Adapter.load(out / "adapter", llama.config.modules())
        _check_equal(adapter, loaded)
        llama.attach(loaded)
        after = answers(llama, tokenizer, items)
        _show(screen, items, before, after)

        screen.heading("5. Merged into the weights, and out again")
        some, ops = encode_prompts(tokenizer, items[:24]), llama.ops
        apart = outputs(llama, some)
        del llama
        merge = compare_merged(checkpoint, loaded, some, apart, ops, settings.precision)
        screen.table(("merge", "value"), list(merge.rows()), right=("value",))

    adapter_bytes = _size_of_folder(out / "adapter")
    screen.say(
        f"sizes: base {megabytes(merge.base_bytes)} in float32, {_size(source)} in its file; "
        f"adapter {megabytes(adapter_bytes)} ({100 * adapter_bytes / merge.base_bytes:.2f} %)"
    )
    report = {
        "exact_match_before": exact_match(items, before),
        "exact_match_after": exact_match(items, after),
        "seconds": time.perf_counter() - began,
        "tokens_per_second": result.tokens_per_second,
        "trainable_parameters": trainable,
        "total_parameters": total,
        "adapter_bytes": adapter_bytes,
        "peak_rss_bytes": peak_rss_bytes(),
        "loss": result.losses,
        "training_seconds": result.seconds,
        "training_tokens": result.tokens,
        "training_items": len(examples),
        "test_items": len(items),
        "base_bytes": merge.base_bytes,
        "merge": asdict(merge),
        "settings": asdict(settings),
        "model": source.name,
        "precision": precision,
        "build": info,
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


def _train(
    model: Llama, adapter: Adapter, examples: Any, settings: Settings, out: Path, screen: Console
) -> TrainResult:
    config = TrainConfig(
        learning_rate=settings.learning_rate,
        steps=settings.steps,
        packing=True,
        max_tokens=settings.tokens_per_step,
        warmup_steps=min(10, settings.steps),
        floor=0.05,
        seed=settings.seed,
        keep=1,
    )
    with screen.training() as on_step:
        result = train(model, adapter, examples, config, out, on_step=on_step, overwrite=True)
    line = sparkline([math.log(max(loss, 1e-6)) for loss in result.losses])
    first, last = result.losses[0], sum(result.losses[-10:]) / len(result.losses[-10:])
    screen.say(f"loss {first:.3f} {line} {last:.3f} (log scale)")
    return result


def _show(screen: Console, items: Items, before: list[str], after: list[str]) -> None:
    rows = [
        (item["prompt"].rsplit(".", 1)[0], item["completion"].strip(), _short(b), a)
        for item, b, a in list(zip(items, before, after, strict=True))[:10]
    ]
    screen.table(("statement", "expected", "before", "after"), rows, title="Some of them")
    shares = [f"{exact_match(items, texts):.1%}" for texts in (before, after)]
    screen.table(
        ("exact match", "before", "after"),
        [(f"{len(items)} held-out statements", *shares)],
        right=("before", "after"),
    )


def _short(text: str, most: int = 28) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


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


def peak_rss_bytes() -> int | None:
    """The most memory this process has held; None where the system does not say (Windows)."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024


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
