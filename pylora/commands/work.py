"""The verbs that make something: train, generate, merge, unmerge; and plan, which says of what."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pylora.commands.app import (
    AdapterDir,
    Alpha,
    Model,
    Precision,
    Rank,
    RsLora,
    Seed,
    Targets,
    app,
)
from pylora.commands.guard import verb
from pylora.commands.template import TemplateArgs, use_template
from pylora.display.console import Console, megabytes
from pylora.errors import ConfigError
from pylora.numbers.precision import check_precision

if TYPE_CHECKING:
    from pylora.adapters.loraconfig import LoraConfig
    from pylora.training.train import TrainResult


_UNNAMED = "="  # of the adapter without a name; no name that is given has this sign


@app.command()
@verb
def train(
    model: Model,
    data: Annotated[Path, typer.Argument(help="JSONL: prompt and completion, messages, or text")],
    out: Annotated[Path, typer.Argument(help="folder of the run; the adapter is in OUT/adapter")],
    eval_data: Annotated[Path | None, typer.Option("--eval", help="JSONL to evaluate on")] = None,
    config: Annotated[
        Path | None, typer.Option(help="adapter_config.json, in place of the options below")
    ] = None,
    rank: Rank = 8,
    alpha: Alpha = None,
    targets: Targets = "q_proj,k_proj,v_proj,o_proj",
    rslora: RsLora = False,
    dropout: Annotated[float, typer.Option(help="lora_dropout")] = 0.0,
    learning_rate: Annotated[float, typer.Option("--lr", help="peak learning rate")] = 2e-4,
    epochs: Annotated[int, typer.Option(help="passes over the data")] = 1,
    steps: Annotated[int | None, typer.Option(help="updates, in place of epochs")] = None,
    batch_size: Annotated[int, typer.Option(help="examples per update")] = 8,
    accumulation: Annotated[int, typer.Option(help="micro-batches per update")] = 1,
    packing: Annotated[bool, typer.Option(help="fill batches up to --max-tokens")] = False,
    max_tokens: Annotated[int | None, typer.Option(help="tokens per micro-batch")] = None,
    max_length: Annotated[int | None, typer.Option(help="most tokens of a record")] = None,
    truncate: Annotated[bool, typer.Option(help="cut longer records; else an error")] = False,
    template_arg: TemplateArgs = None,
    schedule: Annotated[str, typer.Option(help="cosine, linear or constant")] = "cosine",
    warmup: Annotated[int, typer.Option(help="steps of warm-up")] = 0,
    weight_decay: float = 0.0,
    lora_plus: Annotated[float, typer.Option(help="rate of B over rate of A (LoRA+)")] = 1.0,
    recompute: Annotated[bool, typer.Option(help="gradient checkpointing")] = False,
    precision: Precision = "fp32",
    eval_every: Annotated[int | None, typer.Option(help="steps between evaluations")] = None,
    save_every: Annotated[int | None, typer.Option(help="steps between checkpoints")] = None,
    resume: Annotated[bool, typer.Option(help="continue the run in OUT, bit for bit")] = False,
    overwrite: Annotated[bool, typer.Option(help="replace the run in OUT")] = False,
    seed: Seed = 0,
) -> None:
    """Fine-tune an adapter. Writes OUT/adapter (PEFT), log.jsonl, loss.png and checkpoints."""
    from pylora.adapters.adapter import Adapter
    from pylora.adapters.plan import resolve
    from pylora.formats import open_checkpoint
    from pylora.model.llama import Llama
    from pylora.training.examples import load_examples
    from pylora.training.train import TrainConfig
    from pylora.training.train import train as run

    settings = TrainConfig(
        learning_rate=learning_rate,
        epochs=epochs,
        steps=steps,
        batch_size=batch_size,
        accumulation=accumulation,
        packing=packing,
        max_tokens=max_tokens,
        schedule=schedule,
        warmup_steps=warmup,
        weight_decay=weight_decay,
        lora_plus_ratio=lora_plus,
        recompute=recompute,
        seed=seed,
        eval_every=eval_every,
        save_every=save_every,
    )
    check_precision(precision)
    screen = Console()
    with open_checkpoint(model) as checkpoint:
        tokenizer = checkpoint.tokenizer()
        use_template(tokenizer, template_arg)
        lora = _lora_config(config, rank, alpha, targets, rslora, dropout, checkpoint.path)
        plan = resolve(lora, checkpoint.config.modules())
        limit = {"max_length": max_length, "too_long": "truncate" if truncate else "error"}
        examples = load_examples(data, tokenizer, **limit)  # type: ignore[arg-type]
        evals = load_examples(eval_data, tokenizer, **limit) if eval_data else None  # type: ignore[arg-type]
        llama = Llama.from_checkpoint(checkpoint, precision=precision)
        adapter = Adapter.init(plan, lora, seed, base=checkpoint.load)
    screen.say(
        f"{len(examples):,} examples; {adapter.num_parameters:,} trainable parameters "
        f"({100 * adapter.num_parameters / llama.config.num_parameters:.2f} %); "
        f"base model in {llama.precision_report}"
    )
    if examples.truncated:
        screen.say(f"{examples.truncated:,} examples were cut to {max_length} tokens")
    with screen.training() as on_step:
        result = run(
            llama,
            adapter,
            examples,
            settings,
            out,
            evals,
            on_step,
            resume=resume,
            overwrite=overwrite,
        )
    _after_training(screen, result, out)


def _after_training(screen: Console, result: TrainResult, out: Path) -> None:
    from pylora.display.plots import loss_curve, sparkline
    from pylora.errors import MissingExtraError
    from pylora.training.log import evaluations

    screen.say(
        f"loss {result.losses[0]:.4f} {sparkline(result.losses)} {result.losses[-1]:.4f}; "
        f"{result.tokens_per_second:.0f} tokens/s"
    )
    if result.evaluation is not None:
        e = result.evaluation
        screen.say(f"evaluation: loss {e.nll:.4f}, perplexity {e.perplexity:.2f}")
    try:
        seen = evaluations(out / "log.jsonl")
        loss_curve(out / "loss.png", result.losses, evaluations=seen)
    except MissingExtraError as error:
        screen.say(f"no picture of the loss: {error}")
    screen.say(f"adapter: {out / 'adapter'}")


def _lora_config(
    file: Path | None,
    rank: int,
    alpha: float | None,
    targets: str,
    rslora: bool,
    dropout: float,
    base: Path,
) -> LoraConfig:
    """The settings in an adapter_config.json, or those of the options."""
    from pylora.adapters.loraconfig import LoraConfig
    from pylora.files.bounded import read_text

    if file is not None:
        return LoraConfig.from_json(read_text(file, limit=1 << 24), str(file))
    names = tuple(name.strip() for name in targets.split(",") if name.strip())
    plain = all(name.replace("_", "").replace(".", "").isalnum() for name in names)
    listed = plain and targets.strip().lower() != "all-linear"
    return LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        target_modules=names if listed else targets.strip(),
        use_rslora=rslora,
        lora_dropout=dropout,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base.name,
    )


@app.command()
@verb
def generate(
    model: Model,
    prompt: Annotated[
        str | None, typer.Argument(help="text to continue, or with --chat a question")
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DIR",
            help="PEFT directory; or NAME=DIR, repeatedly, for the lines of --prompts",
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help='JSONL of {"prompt": text, "adapter": name}, in place of one prompt'),
    ] = None,
    chat: Annotated[bool, typer.Option(help="through the model's chat template")] = False,
    system: Annotated[str | None, typer.Option(help="system message, with --chat")] = None,
    template_arg: TemplateArgs = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n")] = 128,
    temperature: Annotated[float, typer.Option(help="0: greedy")] = 0.0,
    top_k: Annotated[int, typer.Option(help="0: all")] = 0,
    top_p: float = 1.0,
    precision: Precision = "fp32",
    seed: Seed = 0,
) -> None:
    """Continue a text, with or without an adapter; words appear as they come.

    With --prompts: many texts at once, each with the adapter that its line names; prints a line
    {"adapter", "text"} for each.
    """
    from pylora.adapters.adapter import Adapter
    from pylora.adapters.pool import AdapterPool
    from pylora.commands.prompts import Asked, adapter_folders, read_prompts
    from pylora.formats import open_checkpoint
    from pylora.generation.generate import generate as run
    from pylora.generation.text import TextStream
    from pylora.model.llama import Llama

    if system is not None and not chat:
        raise ConfigError("--system needs --chat")
    if template_arg and not chat:
        raise ConfigError("--template-arg needs --chat")
    check_precision(precision)
    folders = adapter_folders(adapter or ())
    if (prompt is None) == (prompts is None):
        raise ConfigError("give either a prompt or --prompts FILE")
    if prompts is not None:
        asked = read_prompts(prompts, folders)
    elif len(folders) > 1:
        raise ConfigError("one prompt takes one --adapter; give several with --prompts FILE")
    else:
        asked = [Asked(prompt or "", next((name or "" for name in folders), None))]
    with open_checkpoint(model) as checkpoint:
        tokenizer = checkpoint.tokenizer()
        use_template(tokenizer, template_arg)
        modules = checkpoint.config.modules()
        loaded = {
            name: Adapter.load(folder, modules, base=checkpoint.load)
            for name, folder in folders.items()
        }
        llama = Llama.from_checkpoint(checkpoint, precision=precision)
    pool = AdapterPool(llama)
    for name, one in loaded.items():
        pool.add(name or _UNNAMED, one)

    def ids_of(text: str) -> list[int]:
        if not chat:
            return tokenizer.encode(text, bos=tokenizer.add_bos)
        messages = [{"role": "system", "content": system}] if system is not None else []
        messages.append({"role": "user", "content": text})
        return tokenizer.encode_chat(tokenizer.apply_chat(messages, add_generation_prompt=True))

    starts = [ids_of(a.text) for a in asked]
    stream = _Stream(tokenizer, starts[0]) if prompts is None else None
    answers = run(
        llama,
        starts,
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        eos_ids=tokenizer.eos_ids,
        on_token=stream,
        pool=pool,
        adapters=[_UNNAMED if a.adapter == "" else a.adapter for a in asked],
    )
    if stream is not None:
        stream.end()
        return
    for a, start, answer in zip(asked, starts, answers, strict=True):
        name = str(folders[None]) if a.adapter == "" else a.adapter
        text = TextStream(tokenizer, start)
        for token in answer:
            text.push(token)
        text.finish()
        print(json.dumps({"adapter": name, "text": text.text}, ensure_ascii=False))


class _Stream:
    """Prints text as its tokens come."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        from pylora.generation.text import TextStream

        self.text = TextStream(tokenizer, prompt)

    def __call__(self, row: int, token: int) -> None:
        print(self.text.push(token), end="", flush=True)

    def end(self) -> None:
        print(self.text.finish())


@app.command()
@verb
def merge(
    model: Model,
    adapter: AdapterDir,
    out: Annotated[Path, typer.Argument(help="new Hugging Face directory")],
    dtype: Annotated[
        str | None, typer.Option(help="f32, f16 or bf16; default: as the model is stored")
    ] = None,
) -> None:
    """Write the model with the adapter merged into it, for transformers and for `unmerge`."""
    from pylora.merging.merge import merge_checkpoint

    report = merge_checkpoint(model, adapter, out, dtype=dtype)
    weights, residue = megabytes(report.weight_bytes), megabytes(report.residue_bytes)
    print(
        f"{report.directory}: {len(report.modules)} modules merged, {weights} of weights, "
        f"{residue} that make `pylora unmerge` exact; tokenizer: {report.tokenizer}"
    )


@app.command()
@verb
def unmerge(
    merged: Annotated[Path, typer.Argument(help="directory that `pylora merge` wrote")],
    out: Annotated[Path, typer.Argument(help="new Hugging Face directory")],
) -> None:
    """Take the adapter out of a merged model again: the original weights, bit for bit."""
    from pylora.merging.merge import unmerge_checkpoint

    report = unmerge_checkpoint(merged, out)
    print(
        f"{report.directory}: {len(report.modules)} modules unmerged, {report.tensors} tensors "
        f"verified by SHA-256; tokenizer: {report.tokenizer}"
    )


@app.command()
@verb
def plan(
    model: Model,
    adapter: Annotated[
        Path | None, typer.Argument(help="PEFT directory or adapter_config.json")
    ] = None,
    rank: Rank = 8,
    alpha: Alpha = None,
    targets: Targets = "q_proj,k_proj,v_proj,o_proj",
    rslora: RsLora = False,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object per module")] = False,
) -> None:
    """Show each module that an adapter would touch: r, alpha, scale, and the rules behind them."""
    from pylora.adapters.plan import resolve
    from pylora.formats import open_checkpoint

    file = adapter / "adapter_config.json" if adapter and adapter.is_dir() else adapter
    with open_checkpoint(model) as checkpoint:
        config = _lora_config(file, rank, alpha, targets, rslora, 0.0, checkpoint.path)
        resolved = resolve(config, checkpoint.config.modules())
        total = checkpoint.config.num_parameters
    if as_json:
        for entry in resolved.entries:
            print(json.dumps(vars(entry)))
        return
    rows = [
        (e.path, f"{e.d} × {e.k}", e.r, f"{e.alpha:g}", f"{e.scale:g}", _rules(e))
        for e in resolved.entries
    ]
    screen = Console()
    screen.table(
        ("module", "d × k", "r", "alpha", "scale", "because of"),
        rows,
        right=("d × k", "r", "alpha", "scale"),
    )
    if resolved.bias_only:
        screen.say(f"and the biases of {len(resolved.bias_only)} modules without LoRA")
    screen.say(
        f"{len(resolved.entries)} modules, {resolved.num_parameters:,} trainable parameters, "
        f"{100 * resolved.num_parameters / total:.3f} % of {total:,}"
    )


def _rules(entry: Any) -> str:
    return "; ".join((entry.rule_target, entry.rule_r, entry.rule_alpha, entry.rule_scale))
