"""An interrupted run continues bit for bit, and only as the run that it was."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from training import bits, counting, interrupt_after, problem

from pylora.errors import ConfigError, FileFormatError, PlanError
from pylora.formats.safetensors import SafeTensors
from pylora.training import checkpoint
from pylora.training.schedule import learning_rate
from pylora.training.train import StepInfo, TrainConfig, TrainResult, train

# 5 steps an epoch, so that the run is cut in an epoch and goes on into the next one.
CONFIG = TrainConfig(
    learning_rate=0.02,
    steps=7,
    batch_size=3,
    accumulation=2,
    warmup_steps=2,
    weight_decay=0.01,
    lora_plus_ratio=4.0,
    eval_every=2,
)
TIMES = ("tokens_per_second", "seconds", "eta_seconds", "memory_bytes")


def run(ops: Any, out: Path, config: TrainConfig = CONFIG, **options: Any) -> TrainResult:
    """A run from fresh objects, as another process would make them."""
    model, adapter = problem(ops, lora_dropout=0.2)
    return train(model, adapter, counting(14), config, out, counting(3, 50), **options)


def stop(ops: Any, out: Path, after: int, config: TrainConfig = CONFIG) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(ops, out, config, on_step=interrupt_after(after))


def logged(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def moments(path: Path) -> dict[str, bytes]:
    with SafeTensors(path / "optimizer.safetensors") as file:
        return bits({name: file.view(name) for name in file.tensors})


def same(a: Path, b: Path, last: str = "checkpoint-000007") -> None:
    """Everything that a run leaves behind, but for the time it took."""
    assert logged(a) == logged(b)
    assert moments(a / last) == moments(b / last)
    for name in (f"{last}/adapter_model.safetensors", "adapter/adapter_model.safetensors"):
        assert (a / name).read_bytes() == (b / name).read_bytes()
    states = [json.loads((p / last / "state.json").read_text()) for p in (a, b)]
    for state in states:
        state["progress"].pop("seconds")
    assert states[0] == states[1]


@pytest.mark.parametrize("cuts", [[3], [5], [1, 2, 6]])
def test_stopped_and_resumed_is_the_same_run_bit_for_bit(
    ops: Any, tmp_path: Path, cuts: list[int]
) -> None:
    whole = run(ops, tmp_path / "whole")
    stop(ops, tmp_path / "cut", cuts[0])
    for after in cuts[1:]:
        with pytest.raises(KeyboardInterrupt):
            run(ops, tmp_path / "cut", resume=True, on_step=interrupt_after(after))
    end = run(ops, tmp_path / "cut", resume=True)
    assert end.losses == whole.losses and len(end.losses) == 7
    assert (end.steps, end.tokens) == (whole.steps, whole.tokens)
    assert end.evaluation is not None and whole.evaluation is not None
    assert end.evaluation.nll == whole.evaluation.nll
    same(tmp_path / "whole", tmp_path / "cut")


def test_steps_after_the_checkpoint_are_done_again_and_logged_once(
    ops: Any, tmp_path: Path
) -> None:
    """A crash, in contrast to an interrupt, leaves a log that is ahead of the checkpoint."""

    def crash(info: StepInfo) -> None:
        if info.step == 6:
            raise RuntimeError("power cut")

    config = replace(CONFIG, save_every=2)
    run(ops, tmp_path / "whole", config)
    with pytest.raises(RuntimeError, match="power cut"):
        run(ops, tmp_path / "cut", config, on_step=crash)
    with open(tmp_path / "cut/log.jsonl", "a") as file:
        file.write('{"step": 7, "lo')  # a line that was being written
    assert [p.name for p in checkpoint.checkpoints(tmp_path / "cut")] == [
        "checkpoint-000002",
        "checkpoint-000004",
    ]
    run(ops, tmp_path / "cut", config, resume=True)
    same(tmp_path / "whole", tmp_path / "cut")


def test_packing_resumes_bit_for_bit(ops: Any, tmp_path: Path) -> None:
    config = replace(CONFIG, packing=True, max_tokens=20, steps=None, epochs=2)
    whole = run(ops, tmp_path / "whole", config)
    stop(ops, tmp_path / "cut", 3, config)
    run(ops, tmp_path / "cut", config, resume=True)
    same(tmp_path / "whole", tmp_path / "cut", f"checkpoint-{whole.steps:06d}")


def test_a_finished_run_can_be_resumed_and_stays_as_it_is(ops: Any, tmp_path: Path) -> None:
    first = run(ops, tmp_path)
    before = (tmp_path / "log.jsonl").read_bytes()
    again = run(ops, tmp_path, resume=True, on_step=interrupt_after(1))
    assert again.losses == first.losses and again.adapter.digest() == first.adapter.digest()  # type: ignore[attr-defined]
    assert (tmp_path / "log.jsonl").read_bytes() == before


# ---- another run is refused ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.01}, "learning_rate was 0.02 and is 0.01"),
        ({"batch_size": 4}, "batch_size was 3 and is 4"),
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"accumulation": 3}, "accumulation was 2 and is 3"),
        ({"max_grad_norm": None}, "max_grad_norm was 1.0 and is not set"),
    ],
)
def test_other_settings_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    stop("numpy", tmp_path, 2)
    with pytest.raises(ConfigError, match="another run") as caught:
        run("numpy", tmp_path, replace(CONFIG, **changes), resume=True)
    assert message in str(caught.value)


def test_settings_that_change_no_number_may_change(tmp_path: Path) -> None:
    stop("numpy", tmp_path, 2)
    config = replace(CONFIG, save_every=1, eval_every=None, log_every=2, keep=3)
    assert run("numpy", tmp_path, config, resume=True).steps == 7


def test_a_run_may_be_made_longer_and_what_was_done_stays(ops: Any, tmp_path: Path) -> None:
    first = run(ops, tmp_path / "cut")
    longer = run(ops, tmp_path / "cut", replace(CONFIG, steps=9), resume=True)
    assert longer.losses[:7] == first.losses and longer.steps == 9
    # The steps past the end are those of the longer schedule, from where the shorter one was.
    rates = [line["learning_rate"] for line in logged(tmp_path / "cut") if "loss" in line]
    assert rates[:7] == [rate(n, 7) for n in range(1, 8)] and rates[7:] == [rate(8, 9), rate(9, 9)]
    # A constant rate knows no end: the longer run is the one that would have been long at once.
    steady = replace(CONFIG, schedule="constant")
    run(ops, tmp_path / "steady", steady)
    run(ops, tmp_path / "steady", replace(steady, steps=None, epochs=2), resume=True)
    whole = run(ops, tmp_path / "whole", replace(steady, steps=None, epochs=2))
    assert whole.steps == 10
    for name in ("adapter/adapter_model.safetensors", "checkpoint-000010/optimizer.safetensors"):
        assert (tmp_path / "steady" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    with pytest.raises(ConfigError, match="after step 9, and the run is to have 5 steps"):
        run(ops, tmp_path / "cut", replace(CONFIG, steps=5), resume=True)


def rate(step: int, steps: int) -> float:
    return learning_rate(step, steps, peak=0.02, warmup_steps=2)


def test_a_checkpoint_of_before_there_was_a_best_is_read(tmp_path: Path) -> None:
    stop("numpy", tmp_path, 2)
    file = tmp_path / "checkpoint-000002/state.json"
    state = json.loads(file.read_text())
    for name in ("best", "best_step", "stale"):
        del state["progress"][name]
    file.write_text(json.dumps(state))
    assert run("numpy", tmp_path, resume=True).steps == 7


def test_checkpoints_come_by_time(tmp_path: Path) -> None:
    run("numpy", tmp_path, replace(CONFIG, save_minutes=1e-9, keep=20))
    assert len(checkpoint.checkpoints(tmp_path)) == 7
    run("numpy", tmp_path, replace(CONFIG, save_minutes=None, keep=20), overwrite=True)
    assert len(checkpoint.checkpoints(tmp_path)) == 1


def test_other_data_model_and_adapter_are_named(tmp_path: Path) -> None:
    stop("numpy", tmp_path, 2)

    def resume(examples: Any = None, model_seed: int = 0, **lora: Any) -> None:
        model, adapter = problem("numpy", seed=model_seed, **{"lora_dropout": 0.2, **lora})
        train(model, adapter, examples or counting(14), CONFIG, tmp_path, resume=True)

    with pytest.raises(ConfigError, match="training data was"):
        resume(counting(13))
    with pytest.raises(ConfigError, match="base model was"):
        resume(model_seed=1)
    with pytest.raises(
        ConfigError, match="q_proj was rank 4, scale 2.0.* and is rank 8, scale 1.0"
    ):
        resume(r=8)
    with pytest.raises(ConfigError, match="dropout 0.2 and is .*dropout 0.1"):
        resume(lora_dropout=0.1)
    with pytest.raises(ConfigError, match="adapter of .*v_proj was not set"):
        resume(target_modules=["q_proj", "v_proj", "down_proj"])


def test_nothing_to_resume_from(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such directory to resume from"):
        run("numpy", tmp_path / "gone", resume=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no checkpoint to resume from"):
        run("numpy", tmp_path / "empty", resume=True)
    model, adapter = problem("numpy")
    with pytest.raises(ConfigError, match="resume needs out_dir"):
        train(model, adapter, counting(), CONFIG, resume=True)


# ---- damage and crashes -------------------------------------------------------------------------


def test_an_error_while_a_checkpoint_is_written_leaves_the_one_before(
    ops: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, save_every=2)
    run(ops, tmp_path / "whole", config)
    real = checkpoint.save

    def full_disk(path: Path, arrays: Any) -> None:
        if "checkpoint-000004" in str(path):
            path.write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        real(path, arrays)

    monkeypatch.setattr(checkpoint, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        run(ops, tmp_path / "cut", config)
    monkeypatch.undo()
    left = sorted(p.name for p in (tmp_path / "cut").iterdir())
    assert left == ["checkpoint-000002", "log.jsonl"]
    run(ops, tmp_path / "cut", config, resume=True)
    same(tmp_path / "whole", tmp_path / "cut")


KILLED = """
import os, sys
from pathlib import Path
from test_checkpoint import CONFIG, checkpoint, replace, run

def killed(path, arrays):
    if "checkpoint-000004" in str(path):
        path.write_bytes(b"half of it")
        os._exit(9)
    real(path, arrays)

real, checkpoint.save = checkpoint.save, killed
run("numpy", Path(sys.argv[1]), replace(CONFIG, save_every=2))
"""


def test_a_process_killed_while_it_writes_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    config, out = replace(CONFIG, save_every=2), tmp_path / "cut"
    run("numpy", tmp_path / "whole", config)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(out)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
        cwd=Path(__file__).parent,
        capture_output=True,
    )
    assert done.returncode == 9, done.stderr.decode()
    leftover = [p for p in out.iterdir() if p.name.startswith(".checkpoint-000004")]
    assert len(leftover) == 1, "the process was killed in the middle of writing"
    assert [p.name for p in checkpoint.checkpoints(out)] == ["checkpoint-000002"]
    run("numpy", out, config, resume=True)
    same(tmp_path / "whole", out)
    assert not leftover[0].exists(), "what the killed process left is cleared away"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("adapter_model.safetensors", b"changed", "not what was written there"),
        ("optimizer.safetensors", None, "the file is missing"),
        ("state.json", b"{", "not JSON"),
        ("state.json", b"[" * 100_000, "not JSON"),
        ("state.json", b"[]", "not a checkpoint of format 1"),
        ("state.json", b'{"format": 2}', "not a checkpoint of format 1"),
        ("state.json", b'{"format": 1}', "is missing"),
        ("state.json", None, "no such file"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_can_be_removed(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    config = replace(CONFIG, save_every=2)
    stop("numpy", tmp_path, 4, config)
    file = tmp_path / "checkpoint-000004" / name
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(FileFormatError, match=message) as caught:
        run("numpy", tmp_path, config, resume=True)
    assert str(file) in str(caught.value)
    shutil.rmtree(tmp_path / "checkpoint-000004")
    assert run("numpy", tmp_path, config, resume=True).steps == 7


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("step", -1, "step is -1, not a count"),
        ("position", "1", "position is '1', not a count"),
        ("losses", [1.0], "1 losses after step 2"),
        ("losses", ["a", "b"], "not a list of numbers"),
        ("best", "0.5", "best is '0.5', not a number"),
        ("more", 1, "does not have the fields of a run"),
    ],
)
def test_a_state_with_odd_progress_is_refused(
    tmp_path: Path, field: str, value: Any, message: str
) -> None:
    stop("numpy", tmp_path, 2)
    file = tmp_path / "checkpoint-000002/state.json"
    state = json.loads(file.read_text())
    state["progress"][field] = value
    file.write_text(json.dumps(state))
    with pytest.raises(FileFormatError, match=message):
        run("numpy", tmp_path, resume=True)


def test_moments_that_do_not_fit_are_named(tmp_path: Path) -> None:
    stop("numpy", tmp_path, 2)
    path = tmp_path / "checkpoint-000002"
    with SafeTensors(path / "optimizer.safetensors") as file:
        arrays = {name: file.view(name).copy() for name in file.tensors}
    first = next(iter(arrays))
    with pytest.raises(PlanError, match="is missing or does not belong"):
        checkpoint.restore_moments(path, {k: v for k, v in arrays.items() if k != first})
    with pytest.raises(PlanError, match=rf"{first} is float32"):
        checkpoint.restore_moments(path, {**arrays, first: arrays[first][:1]})
