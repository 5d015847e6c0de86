"""What an adapter is judged by beside its loss: answers that are right, or of the right form.

    exact             the answer is the expected text, but for space around it
    token-accuracy    share of the expected tokens that are the likeliest where they stand
    json              the answer is JSON
    regex:PATTERN     the pattern is found in the answer
    FILE.py:function  function(answer, expected) gives a number, or True and False; the mean counts

Answers are made greedily from what stands before an example's last stretch of counted tokens, with
a few tokens more than the expected answer has. A text that counts from its beginning has no prompt,
and only token-accuracy. A user's file is Python, and is run as such.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pylora.errors import ConfigError, DataError
from pylora.generation.generate import generate
from pylora.reference import IGNORE
from pylora.training.batching import assemble
from pylora.training.evaluate import Measured
from pylora.training.examples import Example

TOKENS = "token-accuracy"
_MORE = 8  # tokens that an answer may have beyond the expected one
_SAMPLE = 48  # tokens of the answer to a prompt that nobody has an answer to

Judgement = Callable[[str, str], float]


@dataclass(frozen=True)
class Metric:
    """One figure: its name in logs, and what it says of an answer (None: token-accuracy)."""

    name: str
    of: Judgement | None


def metric(text: str) -> Metric:
    """The metric that a command line names so. ConfigError if there is none."""
    if text == "exact":
        return Metric("exact_match", lambda answer, expected: float(answer == expected))
    if text == TOKENS:
        return Metric("token_accuracy", None)
    if text == "json":
        return Metric("json_valid", lambda answer, _: float(is_json(answer)))
    if text.startswith("regex:"):
        try:
            pattern = re.compile(text[len("regex:") :])
        except re.error as error:
            raise ConfigError(f"metric {text!r}: this is no regular expression: {error}") from None
        return Metric("regex", lambda answer, _: float(pattern.search(answer) is not None))
    file, colon, name = text.rpartition(":")
    if colon and file.endswith(".py"):
        return Metric(name, _guarded(text, _function(Path(file), name)))
    raise ConfigError(
        f"there is no metric {text!r}; there are exact, {TOKENS}, json, regex:PATTERN, and "
        "FILE.py:function"
    )


def metrics(texts: Sequence[str]) -> list[Metric]:
    """Several; ConfigError for two that a log would call the same."""
    found = [metric(text) for text in texts]
    names = [one.name for one in found]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two metrics are called {name}; give one of them")
    return found


def is_json(text: str) -> bool:
    """Whether a text is one JSON value."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _function(file: Path, name: str) -> Callable[..., Any]:
    if not file.is_file():
        raise ConfigError(f"metric: there is no file {file}")
    spec = importlib.util.spec_from_file_location(f"pylora_metric_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"metric: {file} cannot be loaded as Python")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"metric: {file}: {type(error).__name__}: {error}") from error
    found = getattr(module, name, None)
    if not callable(found):
        there = ", ".join(n for n in vars(module) if callable(vars(module)[n]) and n[0] != "_")
        raise ConfigError(f"metric: {file} has no function {name}; it has {there or 'none'}")
    function: Callable[..., Any] = found
    return function


def _guarded(text: str, function: Callable[..., Any]) -> Judgement:
    def judged(answer: str, expected: str) -> float:
        try:
            value = float(function(answer, expected))
        except Exception as error:
            raise ConfigError(
                f"metric {text} failed on the answer {answer[:60]!r} (expected {expected[:60]!r}): "
                f"{type(error).__name__}: {error}"
            ) from error
        if not math.isfinite(value):
            raise ConfigError(f"metric {text} gave {value} for the answer {answer[:60]!r}")
        return value

    return judged


# ---- asking --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """What an example asks: the tokens before its answer, and the answer's."""

    prompt: list[int]
    expected: list[int]


def question(example: Example) -> Question | None:
    """The last stretch of counted tokens as an answer; None if nothing stands before it."""
    counted = np.flatnonzero(example.labels != IGNORE)
    gaps = np.flatnonzero(np.diff(counted) > 1)
    start = int(counted[gaps[-1] + 1] if gaps.size else counted[0])
    if start == 0:
        return None
    end = int(counted[-1]) + 1
    return Question(example.ids[: start + 1].tolist(), example.labels[start:end].tolist())


class Judge:
    """Measures a model, with the adapter that it has, on examples: train's `measure`."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        examples: Sequence[Example],
        asked: Sequence[Metric],
        prompts: Sequence[str] = (),
        *,
        batch_size: int = 16,
    ) -> None:
        """prompts: texts whose answers are shown, `samples`. DataError where a metric looks at
        answers, and an example has no prompt."""
        self.model, self.tokenizer, self.examples = model, tokenizer, examples
        self.asked, self.batch_size = list(asked), batch_size
        self.questions: list[Question] = []
        if any(one.of is not None for one in asked):
            for example in examples:
                found = question(example)
                if found is None:
                    raise DataError(
                        f"{example.where}: a text without a prompt has no answer to judge; its "
                        f"only metric is {TOKENS}"
                    )
                self.questions.append(found)
        self.prompts = list(prompts)
        self.ids = [tokenizer.encode(text, bos=tokenizer.add_bos) for text in prompts]
        if empty := [text for text, ids in zip(self.prompts, self.ids, strict=True) if not ids]:
            raise DataError(f"the sample {empty[0]!r} has no token")

    def __call__(self) -> Measured:
        """The figures, and answers to the prompts, of the model as it is."""
        found: dict[str, float] = {}
        answers = self.answers() if self.questions else []
        for one in self.asked:
            if one.of is None:
                found[one.name] = self.token_accuracy()
            else:
                values = [one.of(answer, expected) for answer, expected in answers]
                found[one.name] = math.fsum(values) / len(values)
        said = self._generate(self.ids, _SAMPLE)
        pairs = zip(self.prompts, said, strict=True)
        return Measured(found, [{"prompt": text, "answer": answer} for text, answer in pairs])

    def answers(self) -> list[tuple[str, str]]:
        """(answer, expected) of each example, without the space around them."""
        most = max(len(q.expected) for q in self.questions) + _MORE
        room = self.model.config.max_position_embeddings
        most = min(most, room - max(len(q.prompt) for q in self.questions))
        said = self._generate([q.prompt for q in self.questions], most)
        expected = (self.tokenizer.decode(q.expected).strip() for q in self.questions)
        return list(zip(said, expected, strict=True))

    def _generate(self, prompts: list[list[int]], most: int) -> list[str]:
        if not prompts:
            return []
        ends = self.tokenizer.eos_ids
        ids = generate(self.model, prompts, most, eos_ids=ends, batch_size=self.batch_size)
        return [self.tokenizer.decode(one).strip() for one in ids]

    def token_accuracy(self) -> float:
        """The share of counted tokens that are the likeliest at their place."""
        right = counted = 0
        order = sorted(range(len(self.examples)), key=lambda i: len(self.examples[i]))
        for at in range(0, len(order), self.batch_size):
            batch = assemble(self.examples, tuple(order[at : at + self.batch_size]))
            rows = np.flatnonzero(batch.labels != IGNORE)
            logits, _ = self.model.forward(batch.ids, batch.seqs, rows=rows)
            likeliest = self.model.ops.to_numpy(logits).argmax(axis=-1)
            right += int((likeliest == batch.labels[rows]).sum())
            counted += rows.size
        return right / counted
