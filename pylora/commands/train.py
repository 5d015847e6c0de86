"""`pylora train`: reads the data, trains, and says where everything lies, also when interrupted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pylora.commands import arranging, learning
from pylora.commands.adapters import lora_config, refuse_too_large, warn_about_size
from pylora.commands.app import (
    ADAPTER,
    DATA,
    HOW,
    MAKE,
    RUN,
    Alpha,
    Model,
    ModulesToSave,
    Precision,
    Rank,
    RsLora,
    Seed,
    Targets,
    TokenIndices,
    command,
)
from pylora.commands.evaluate import Metrics
from pylora.commands.find_lr import check_alone, find_rate
from pylora.commands.guard import unfinished
from pylora.commands.inputs import file_or_stdin
from pylora.commands.objectives import (
    AIM,
    HEADS,
    NAMES,
    check_begun,
    check_teacher,
    check_whole,
    taught,
)
from pylora.commands.outputs import check_folder
from pylora.commands.room import Fits, Wanted, beyond_its_positions, in_room
from pylora.commands.run_said import after_training, how_long, saying_where, write_model_card
from pylora.commands.template import TemplateArgs, refuse_unused, use_template
from pylora.commands.together import together
from pylora.display.console import Console
from pylora.errors import ConfigError
from pylora.numbers.precision import check_choice
from pylora.training.launched import launched

if TYPE_CHECKING:
    from pylora.training.evaluate import Evaluation
    from pylora.training.train import StepInfo


def _option(*names: str, part: str, help: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=help, metavar=metavar, rich_help_panel=part)


@command(
    MAKE,
    "pylora train SmolLM2.gguf data.jsonl runs/tone --epochs 3",
    "pylora train --resume runs/tone",
    "pylora train --config run.yaml",
    cls=arranging.TrainVerb,
)
@together
def train(
    context: typer.Context,
    model: Model,
    data: Annotated[
        Path,
        typer.Argument(
            metavar="DATA",
            help="records (JSONL, JSON, CSV, parquet): prompt and completion, messages, text, or "
            "what --objective is about; - reads standard input",
        ),
    ],
    out: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="folder of the run; the adapter will be OUT/adapter"),
    ],
    rank: Rank = 8,
    alpha: Alpha = None,
    targets: Targets = "all-linear",
    rslora: RsLora = False,
    dora: Annotated[
        bool,
        _option(
            "--dora/--no-dora", "--use-dora",
            part=ADAPTER, help="DoRA: the lengths of W's rows are trained, too",
        ),
    ] = False,
    dropout: Annotated[
        float, _option("--dropout", "--lora-dropout", part=ADAPTER, help="lora_dropout")
    ] = 0.0,
    init: Annotated[
        str,
        _option(
            "--init", "--init-lora-weights", part=ADAPTER, metavar="NAME",
            help="how A and B begin: kaiming, gaussian, pissa, olora, eva, loftq",
        ),
    ] = "kaiming",
    modules_to_save: ModulesToSave = None,
    trainable_token_indices: TokenIndices = None,
    adapter_config: Annotated[
        Path | None,
        _option(
            "--adapter-config", part=ADAPTER, help="adapter_config.json, in place of the above"
        ),
    ] = None,
    start: Annotated[
        Path | None,
        _option(
            "--from", part=ADAPTER, metavar="DIR",
            help="adapter to start from, in place of the above: a PEFT folder or a run's",
        ),
    ] = None,
    eval_data: Annotated[
        Path | None,
        _option(
            "--eval", "--eval-data", "--eval-file", part=DATA, help="records to evaluate on"
        ),
    ] = None,
    max_length: Annotated[
        int | None,
        _option(
            "--max-length", "--max-seq-length", "--max-seq-len",
            part=DATA, help="most tokens of a record; a longer one is an error",
        ),
    ] = None,
    truncate: Annotated[
        bool, _option("--truncate/--no-truncate", part=DATA, help="cut longer records")
    ] = False,
    packing: Annotated[
        bool, _option("--packing/--no-packing", part=DATA, help="fill batches up to --max-tokens")
    ] = False,
    max_tokens: Annotated[
        int | None,
        _option("--max-tokens", part=DATA, help="most tokens that are computed at a time"),
    ] = None,
    fields: Annotated[
        str | None,
        _option(
            "--fields",
            part=DATA,
            metavar="OURS=THEIRS,-NAME",
            help="names that the records have for fields and roles, and fields to pass over, "
            "such as prompt=question,completion=answer,-label; see docs/data.md",
        ),
    ] = None,
    template_arg: TemplateArgs = None,
    objective: Annotated[
        str,
        _option("--objective", part=AIM, metavar="NAME", help=f"one of {', '.join(NAMES)}"),
    ] = "sft",
    beta: Annotated[
        float | None,
        _option("--beta", "--lambda", part=AIM, help="of dpo, ipo (τ), simpo, orpo (λ), kto"),
    ] = None,
    label_smoothing: Annotated[
        float | None,
        _option("--label-smoothing", part=AIM, help="how often a preference is wrong: dpo, simpo"),
    ] = None,
    gamma: Annotated[
        float | None,
        _option("--gamma", "--simpo-gamma", part=AIM, help="the margin that simpo asks for"),
    ] = None,
    desirable_weight: Annotated[
        float | None, _option("--desirable-weight", part=AIM, help="of kto's desirable answers")
    ] = None,
    undesirable_weight: Annotated[
        float | None, _option("--undesirable-weight", part=AIM, help="of kto's others")
    ] = None,
    teacher: Annotated[
        Path | None,
        _option("--teacher", part=AIM, metavar="MODEL", help="of distill; default: MODEL itself"),
    ] = None,
    teacher_adapter: Annotated[
        Path | None,
        _option("--teacher-adapter", part=AIM, metavar="ADAPTER", help="that the teacher has"),
    ] = None,
    top_k: Annotated[
        int, _option("--top-k", part=AIM, help="tokens of which a teacher's word is kept")
    ] = 32,
    temperature: Annotated[
        float | None, _option("--temperature", part=AIM, help="of teacher and student")
    ] = None,
    mix: Annotated[
        float | None, _option("--mix", part=AIM, help="of distill: the weight of the labels")
    ] = None,
    classes: Annotated[
        str | None,
        _option("--classes", part=AIM, metavar="N|A,B", help="of classify: how many, or names"),
    ] = None,
    learning_rate: Annotated[
        float | None,
        _option(
            "--lr", "--learning-rate",
            part=HOW, help="peak learning rate; default: by the model's width, 1e-3 at 768",
        ),
    ] = None,
    find_lr: learning.FindLr = False,
    epochs: Annotated[
        int | None,
        _option(
            "--epochs", "--num-epochs", "--num-train-epochs",
            part=HOW, help="passes over the data; default: enough for 120 updates, at most 30",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        _option("--steps", "--max-steps", "--iters", part=HOW, help="updates, in place of epochs"),
    ] = None,
    batch_size: Annotated[
        int, _option("--batch-size", "--train-batch-size", part=HOW, help="examples per update")
    ] = 8,
    accumulation: Annotated[
        int, _option("--accumulation", part=HOW, help="parts that an update is computed in")
    ] = 1,
    schedule: learning.Schedule = "cosine",
    warmup: Annotated[
        int, _option("--warmup", "--warmup-steps", part=HOW, help="steps until the peak rate")
    ] = 0,
    floor: Annotated[
        float, _option("--floor", "--min-lr-ratio", part=HOW, help="rate at the end / peak rate")
    ] = 0.0,
    decay_steps: learning.DecaySteps = None,
    cycles: learning.Cycles = None,
    optimizer: learning.Optim = "adamw",
    weight_decay: Annotated[
        float, _option("--weight-decay", part=HOW, help="decoupled, of A and B")
    ] = 0.0,
    max_grad_norm: Annotated[
        float, _option("--max-grad-norm", part=HOW, help="the gradient is clipped to this norm")
    ] = 1.0,
    lora_plus: Annotated[
        float,
        _option(
            "--lora-plus", "--loraplus-lr-ratio", part=HOW, help="rate of B over rate of A (LoRA+)"
        ),
    ] = 1.0,
    label_smoothing_factor: learning.LabelSmoothing = 0.0,
    neftune_noise_alpha: learning.Neftune = 0.0,
    rank_dropout: learning.RankDropout = 0.0,
    precision: Precision = None,
    fit: Fits = False,
    recompute: Annotated[
        bool,
        _option(
            "--recompute/--no-recompute", "--gradient-checkpointing", "--grad-checkpoint",
            part=RUN, help="gradient checkpointing: less memory, one more forward pass",
        ),
    ] = False,
    eval_every: Annotated[
        int | None,
        _option(
            "--eval-every", "--eval-steps", "--steps-per-eval",
            part=RUN,
            help="steps between evaluations; default: about ten in a run; one is before it, and "
            "one at its end in any case",
        ),
    ] = None,
    metric: Metrics = None,
    sample: Annotated[
        list[str] | None,
        _option(
            "--sample", part=RUN, metavar="PROMPT",
            help="prompt to answer at each evaluation; may be repeated",
        ),
    ] = None,
    best_by: Annotated[
        str,
        _option(
            "--best-by", part=RUN, metavar="NAME",
            help="whose best evaluation's adapter is kept: loss or a metric's name; last: the last",
        ),
    ] = "loss",
    patience: Annotated[
        int | None,
        _option(
            "--patience", "--early-stopping-patience",
            part=RUN, help="evaluations without a better one, after which the run ends",
        ),
    ] = None,
    save_every: Annotated[
        int | None,
        _option(
            "--save-every", "--save-steps",
            part=RUN, help="steps between checkpoints; one is at the end in any case",
        ),
    ] = None,
    save_minutes: Annotated[
        float,
        _option(
            "--save-minutes",
            part=RUN, help="a checkpoint also after so many minutes without one; 0: not",
        ),
    ] = 10.0,
    keep: Annotated[
        int, _option("--keep", "--save-total-limit", part=RUN, help="checkpoints kept")
    ] = 2,
    log_every: Annotated[
        int,
        _option(
            "--log-every", "--logging-steps", "--steps-per-report",
            part=RUN, help="steps between lines of OUT/log.jsonl",
        ),
    ] = 1,
    report_to: learning.ReportTo = None,
    resume: Annotated[
        bool,
        _option(
            "--resume/--no-resume",
            part=RUN, help="continue the run in OUT, bit for bit; `--resume OUT` needs no more",
        ),
    ] = False,
    overwrite: Annotated[
        bool, _option("--overwrite/--no-overwrite", part=RUN, help="replace the run in OUT")
    ] = False,
    seed: Seed = 0,
    config: Annotated[
        Path | None,
        _option(
            "--config",
            part=RUN, help="settings, YAML or JSON; what is typed comes first. Also an "
            "adapter_config.json",
        ),
    ] = None,
    print_config: Annotated[
        bool,
        _option(
            "--print-config", part=RUN, help="show the settings as a file for --config, and stop"
        ),
    ] = False,
) -> None:  # fmt: skip
    """Fine-tune an adapter. Writes OUT/adapter (PEFT), log.jsonl, loss.png and checkpoints.

    Names of these options in transformers, PEFT, TRL and mlx-lm are taken, too, where they mean
    the same (docs/training.md).
    """
    from pylora import backends
    from pylora.adapters.adapter import Adapter
    from pylora.adapters.own_tokenizer import tokenizer_of
    from pylora.adapters.plan import resolve
    from pylora.adapters.whole import num_whole
    from pylora.formats import open_checkpoint
    from pylora.generation.metrics import Judge, metrics
    from pylora.model.llama import Llama
    from pylora.training.beginnings import begin, check_init, of_config
    from pylora.training.enough import settled, total_steps, undertrained
    from pylora.training.log import step_line
    from pylora.training.mpi import world
    from pylora.training.objectives.choose import choose, read
    from pylora.training.reporting import Reports, check_names
    from pylora.training.train import TrainConfig, check_out_dir
    from pylora.training.train import train as run
    from pylora.training.watching import evaluation_line, interval

    try:
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
            floor=floor,
            decay_steps=decay_steps,
            cycles=cycles,
            optimizer=optimizer,
            label_smoothing_factor=label_smoothing_factor,
            neftune_noise_alpha=neftune_noise_alpha,
            rank_dropout=rank_dropout,
            weight_decay=weight_decay,
            max_grad_norm=max_grad_norm,
            lora_plus_ratio=lora_plus,
            recompute=recompute,
            seed=seed,
            log_every=log_every,
            eval_every=eval_every,
            save_every=save_every,
            save_minutes=save_minutes or None,
            keep=keep,
            best_by=None if eval_data is None or best_by == "last" else best_by,
            patience=patience,
        )
        aim = choose(
            objective,
            beta=beta,
            label_smoothing=label_smoothing,
            gamma=gamma,
            desirable_weight=desirable_weight,
            undesirable_weight=undesirable_weight,
            temperature=temperature,
            mix=mix,
        )
        check_teacher(objective, teacher, teacher_adapter)
        if find_lr:
            check_alone()
        check_begun(objective, start, init, bool(metric or sample))
        check_choice(precision)
        asked = metrics(metric or ())
        check_names(report_to or ())
    except ConfigError as error:
        raise ConfigError(arranging.place_of(context, str(error))) from None
    check_folder(out)
    check_out_dir(out, resume=resume, overwrite=overwrite)
    screen = Console()
    with unfinished("nothing was trained yet"), open_checkpoint(model) as checkpoint:
        tokenizer = tokenizer_of(checkpoint, ())
        use_template(tokenizer, template_arg)
        refuse_unused_arguments = refuse_unused(template_arg, tokenizer)
        if start is not None:
            adapter = Adapter.load(start, checkpoint.config, base=checkpoint.load)
            plan = adapter.plan
        else:
            lora = lora_config(
                adapter_config,
                rank,
                alpha,
                targets,
                rslora,
                dropout,
                checkpoint.path,
                dora,
                modules_to_save,
                trainable_token_indices,
            )
            check_whole(objective, lora)
            lora, init = of_config(lora, init)
            check_init(init, lora, precision or checkpoint.packed_as or "fp32")
            plan = resolve(lora, checkpoint.config.modules())
        warn_about_size(plan, checkpoint.config.num_parameters)
        lora = adapter.config if start is not None else lora
        whole = num_whole(lora, checkpoint.config)
        refuse_too_large(plan, backends.get().name, whole)
        limit: dict[str, Any] = {"max_length": max_length, "fields": fields}
        limit["too_long"] = "truncate" if truncate else "error"
        data, eval_data = _files(data, eval_data)
        examples, evals = read(objective, data, eval_data, tokenizer, classes=classes, **limit)
        refuse_unused_arguments()
        beyond_its_positions(checkpoint, [*examples, *(evals or ())])
        to_come = whole if start is None else 0  # those of an adapter that is here are held already
        wanted = Wanted(checkpoint, plan, precision, settings, list(map(len, examples)), to_come)
        settings, precision, fitted = in_room(screen, wanted, fit)
        llama = Llama.from_checkpoint(checkpoint, precision=precision)
        judge = None
        if evals is not None and (asked or sample):
            judge = Judge(llama, tokenizer, evals, asked, sample or ())
        if objective in HEADS:
            adapter = aim.fresh(plan, lora, seed, llama, examples, checkpoint.load)
        elif start is None:
            adapter = begin(init, lora, llama, checkpoint.load, examples, seed)
        if objective == "distill":
            examples, evals = taught(
                llama,
                (examples, evals),
                (data, eval_data),
                limit,
                teacher,
                teacher_adapter,
                top_k,
                temperature,
            )
    screen.say(
        f"{len(examples):,} examples; {adapter.num_parameters:,} trainable parameters "
        f"({100 * adapter.num_parameters / llama.config.num_parameters:.2f} %); "
        f"base model in {llama.precision_report}"
    )
    more = () if evals is None else evals.notes
    for note in (*tokenizer.notes, *examples.notes, *more):
        screen.say(f"note: {note}")
    if examples.truncated:
        screen.say(f"{examples.truncated:,} examples were cut to {max_length} tokens")
    lengths = [len(example) for example in examples]
    settings = settled(settings, lengths, llama.config.hidden_size)
    total = total_steps(settings, lengths)
    if evals is not None and eval_every is None:
        every = interval(total, len(evals), settings.batch_size)
        settings = replace(settings, eval_every=every)
    if find_lr:
        find_rate(screen, (llama, adapter, examples, aim), settings, steps, out)
        return
    screen.say(how_long(settings, total))
    if short := undertrained(total):
        screen.say(f"note: {short}")
    chosen = {n: getattr(settings, n) for n in ("learning_rate", "epochs")}
    if fitted:  # a resumed run is this one, whatever memory there is then
        now = {"recompute": settings.recompute, "accumulation": settings.accumulation}
        chosen |= {**now, "precision": precision, "fit": False}
    record = arranging.record(context.command, context.params | chosen)
    names = (report_to or ()) if world().rank == 0 else ()
    reports = Reports(names, out, json.loads(record), lambda text: screen.say(f"note: {text}"))
    with saying_where(out, context.find_root().obj) as seen, screen.training() as show, reports:

        def on_step(info: StepInfo) -> None:
            if not seen and world().rank == 0:  # the run is what its folder says now
                arranging.write_record(out, record)
            seen.append((info.step, info.steps))
            show(info)
            reports.add(step_line(info, llama.precision_report))

        def on_evaluation(step: int, evaluation: Evaluation) -> None:
            show.evaluated(step, evaluation)
            reports.add(evaluation_line(step, evaluation))

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
            measure=judge,
            on_evaluation=on_evaluation,
            objective=aim,
            ranks=world(),
        )
    if world().rank == 0:
        after_training(screen, result, out)
        write_model_card(out, str(model), str(data), examples, record, result)


def _files(data: Path, evals: Path | None) -> tuple[Path, Path | None]:
    """The two files of records; one of them may be standard input."""
    if str(data) == "-" and evals is not None and str(evals) == "-":
        raise ConfigError("DATA and --eval cannot both be standard input")
    if launched() > 1 and "-" in (str(data), str(evals)):
        raise ConfigError("several processes cannot read standard input; give a file")
    return file_or_stdin(data) or data, file_or_stdin(evals)
