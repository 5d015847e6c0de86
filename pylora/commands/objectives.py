"""What the command line knows of objectives: their names, and who teaches whom."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pylora.errors import ConfigError

AIM = "What it aims at"

# Those of pylora.training.objectives.choose, which a test compares: --help imports no NumPy.
NAMES = ("sft", "dpo", "ipo", "simpo", "orpo", "kto", "classify", "regress", "distill")


HEADS = ("classify", "regress")  # whose adapters end in a head of their own


def check_begun(objective: str, start: Path | None, init: str, judged: bool) -> None:
    """ConfigError for a beginning, or a judge, that the objective does not have."""
    if objective in HEADS and (start is not None or init not in ("kaiming", "gaussian")):
        what = "--from" if start is not None else f"--init {init}"
        raise ConfigError(f"--objective {objective} begins with a head of its own, without {what}")
    if judged and objective not in ("sft", "distill"):
        raise ConfigError(
            f"--metric and --sample look at answers to prompts, which the records of --objective "
            f"{objective} are not about; its evaluation has figures of its own"
        )


def check_whole(objective: str, config: Any) -> None:
    """ConfigError for whole weights beside a head that takes the place of the model's own."""
    if objective in HEADS:
        for name in ("modules_to_save", "trainable_token_indices"):
            if getattr(config, name):
                raise ConfigError(
                    f"--{name.replace('_', '-')} does not go with --objective {objective}, which "
                    "trains a head of its own in place of the model's (PEFT's modules_to_save of "
                    "its adapter names that)"
                )


def check_teacher(objective: str, teacher: Path | None, teacher_adapter: Path | None) -> None:
    """ConfigError where distill has no teacher."""
    if objective == "distill" and teacher is None and teacher_adapter is None:
        raise ConfigError(
            "--objective distill needs --teacher MODEL, or --teacher-adapter ADAPTER for the same "
            "model with an adapter"
        )


def taught(
    student: Any,
    examples: tuple[Any, Any],
    files: tuple[Path, Path | None],
    options: dict[str, Any],
    teacher: Path | None,
    teacher_adapter: Path | None,
    top_k: int,
    temperature: float | None,
) -> tuple[Any, Any]:
    """The examples with what the teacher says of them, those to train on and those to evaluate on.

    Another model is read, asked, and let go; without one the student with the teacher's adapter is
    asked, and has none afterwards.
    """
    from pylora.adapters.adapter import Adapter
    from pylora.adapters.own_tokenizer import tokenizer_of
    from pylora.formats import open_checkpoint
    from pylora.model.llama import Llama
    from pylora.training.examples import load_examples
    from pylora.training.objectives.distill import check_same_tokens, teach

    asked: dict[str, Any] = {"top_k": top_k, "temperature": temperature or 1.0}
    if teacher is None:
        student.attach(Adapter.load(teacher_adapter or "", student.config))
        found = [None if e is None else teach(student, e, **asked) for e in examples]
        student.detach()
        return found[0], found[1]
    with open_checkpoint(teacher) as checkpoint:
        if checkpoint.config.vocab_size != student.config.vocab_size:
            raise ConfigError(
                f"{teacher} has a vocabulary of {checkpoint.config.vocab_size} tokens, the student "
                f"one of {student.config.vocab_size}; distillation needs one vocabulary"
            )
        tokenizer = tokenizer_of(checkpoint, ())
        for ours, file in zip(examples, files):
            if ours is not None:
                check_same_tokens(ours, load_examples(file or "", tokenizer, **options))
        model = Llama.from_checkpoint(checkpoint, precision=student.precision)
        if teacher_adapter is not None:
            model.attach(Adapter.load(teacher_adapter, checkpoint.config, base=checkpoint.load))
    found = [None if e is None else teach(model, e, **asked) for e in examples]
    return found[0], found[1]
