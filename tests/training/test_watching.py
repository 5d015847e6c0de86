"""The best evaluation's adapter is what a run ends with, also after interruptions."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from training import counting, interrupt_after, problem

from pylora.errors import ConfigError
from pylora.training import watching
from pylora.training.evaluate import Evaluation, Measured
from pylora.training.train import TrainConfig, TrainResult, train

CONFIG = TrainConfig(learning_rate=0.02, steps=8, batch_size=4, eval_every=1, best_by="score")
SCORES = [0.0, 0.1, 0.4, 0.3, 0.6, 0.5, 0.2, 0.2, 0.1]  # of step 0, 1, ...: the best is step 4


def run(out: Path, config: TrainConfig = CONFIG, **options: Any) -> tuple[TrainResult, Any]:
    """A run whose metric is made up; `begun` is the step that it begins at."""
    model, adapter = problem("numpy")
    at = iter(range(options.pop("begun", 0), len(SCORES)))

    def measure() -> Measured:
        return Measured({"score": SCORES[next(at, 4)]}, [{"prompt": "p", "answer": "a"}])

    result = train(
        model, adapter, counting(), config, out, counting(3, 50), measure=measure, **options
    )
    return result, adapter


def test_the_best_is_what_is_left(tmp_path: Path) -> None:
    result, adapter = run(tmp_path)
    assert (result.best_step, result.steps, result.stopped_early) == (4, 8, False)
    assert result.evaluation is not None and result.evaluation.metrics == {"score": 0.6}
    four = train_to(4)
    assert adapter.digest() == four.digest()
    for name in ("adapter", "best-000004"):
        assert type(adapter).load(tmp_path / name, adapter_modules()).digest() == four.digest()
    assert watching.bests(tmp_path) == [4]
    last = type(adapter).load(tmp_path / "checkpoint-000008", adapter_modules())
    assert last.digest() == train_to(8).digest(), "the checkpoint is that of the last step"


def train_to(step: int) -> Any:
    """The adapter of a run of 8 steps as it was after some of them."""
    model, adapter = problem("numpy")
    config = replace(CONFIG, best_by=None, eval_every=None)
    try:
        train(model, adapter, counting(), config, on_step=interrupt_after(step))
    except KeyboardInterrupt:
        pass
    return adapter


def adapter_modules() -> Any:
    return problem("numpy")[0].config.modules()


def test_patience_ends_a_run_and_a_longer_one_waits_for_more(tmp_path: Path) -> None:
    result, adapter = run(tmp_path, replace(CONFIG, patience=2))
    assert (result.steps, result.best_step, result.stopped_early) == (6, 4, True)
    assert adapter.digest() == train_to(4).digest()
    again, _ = run(tmp_path, replace(CONFIG, patience=2), resume=True, begun=6)
    assert again.steps == 6 and again.best_step == 4
    more, _ = run(tmp_path, replace(CONFIG, patience=3), resume=True, begun=7)
    assert (more.steps, more.stopped_early) == (7, True)


@pytest.mark.parametrize("cut", [2, 3, 4, 5])
def test_an_interrupted_run_ends_with_the_same_best(tmp_path: Path, cut: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, on_step=interrupt_after(cut))
    result, adapter = run(tmp_path, resume=True, begun=cut + 1)
    assert result.best_step == 4 and adapter.digest() == train_to(4).digest()


def test_the_best_folders_that_no_checkpoint_needs_are_removed(tmp_path: Path) -> None:
    seen: list[list[int]] = []

    def on_step(info: Any) -> None:
        seen.append(watching.bests(tmp_path))

    run(tmp_path, replace(CONFIG, save_every=1, keep=1), on_step=on_step)
    assert max(map(len, seen)) == 2 and watching.bests(tmp_path) == [4]
    result, _ = run(tmp_path, replace(CONFIG, best_by=None), overwrite=True)
    assert watching.bests(tmp_path) == [] and result.best_step is None


def test_a_figure_that_is_not_there_is_named_at_the_first_evaluation(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="best_by is 'scroe'.*: loss, score"):
        run(tmp_path, replace(CONFIG, best_by="scroe"))
    assert not list(tmp_path.glob("checkpoint-*"))
    model, adapter = problem("numpy")
    with pytest.raises(ConfigError, match="best_by needs eval_examples"):
        train(model, adapter, counting(), CONFIG, tmp_path / "b")
    with pytest.raises(ConfigError, match="best_by needs out_dir"):
        train(model, adapter, counting(), CONFIG, eval_examples=counting(3))
    with pytest.raises(ConfigError, match="patience needs best_by"):
        TrainConfig(patience=2)


def test_what_is_better() -> None:
    assert watching.better(1.0, 2.0, "loss") and not watching.better(2.0, 1.0, "loss")
    assert watching.better(2.0, 1.0, "exact_match") and not watching.better(1.0, 1.0, "exact_match")
    assert watching.better(5.0, None, "loss") and not watching.better(math.nan, None, "loss")


def test_a_line_of_the_log_is_json_whatever_was_found() -> None:
    line = watching.evaluation_line(3, Evaluation(800.0, math.inf, 5, 0.1, {"a": math.nan}))
    assert line == {"step": 3, "eval_loss": 800.0, "eval_perplexity": None, "eval_a": None}


@pytest.mark.parametrize(
    ("steps", "examples", "every"), [(120, 20, 12), (8, 4, 1), (100, 800, 100), (1, 1, 1)]
)
def test_looking_takes_no_more_than_a_share(steps: int, examples: int, every: int) -> None:
    assert watching.interval(steps, examples, 8) == every
