"""`mpiexec -n N`: the same bits for any N, one voice, and an end that leaves whole checkpoints."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("typer")
pytest.importorskip("tokenizers")
pytest.importorskip("mpi4py")

import hosts
from tiny_model import DATA, write_tiny_model

import pylora
from pylora.adapters.adapter import Adapter
from pylora.formats.safetensors import SafeTensors
from pylora.training.checkpoint import checkpoints, read

_BESIDE = Path(sys.executable).parent / "mpiexec"
_FOUND = str(_BESIDE) if _BESIDE.exists() else shutil.which("mpiexec")
pytestmark = pytest.mark.skipif(_FOUND is None, reason="no mpiexec: pip install mpich")
MPIEXEC = _FOUND or ""
ENV = os.environ | {
    "PYTHONPATH": str(Path(pylora.__file__).parents[1]),
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
}
PYLORA = [sys.executable, "-m", "pylora"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "data.jsonl"
    lines = (DATA / "train.jsonl").read_text("utf-8").splitlines()[:40]
    file.write_text("\n".join(lines) + "\n", "utf-8")
    return file


def run(n: int, *args: object, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    words = [*PYLORA, *map(str, args)]
    return subprocess.run(
        [MPIEXEC, "-n", str(n), *words], capture_output=True, text=True, env=ENV, timeout=timeout
    )


def weights(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def test_the_same_bits_for_1_2_and_4_processes_and_a_resumption_by_another_number(
    model: Path, data: Path, tmp_path: Path
) -> None:
    how = ["--accumulation", "4", "--epochs", "2", "--dropout", "0.1", "--eval", data]
    alone = subprocess.run(
        [*PYLORA, "train", str(model), str(data), str(tmp_path / "1"), *map(str, how)],
        env=ENV, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert alone.returncode == 0, alone.stderr
    for n in (2, 4):
        done = run(n, "train", model, data, tmp_path / str(n), *how)
        assert done.returncode == 0, done.stderr
        assert weights(tmp_path / str(n)) == weights(tmp_path / "1")
        # one voice: as many lines as of one process
        assert done.stdout.count("trainable parameters") == 1
        assert done.stdout.count("evaluation:") == 1

    def logged(folder: str) -> list[tuple[float, ...]]:
        lines = (tmp_path / folder / "log.jsonl").read_text().splitlines()
        return [tuple(r[k] for k in ("step", "loss", "eval_loss") if k in r)
                for r in map(json.loads, lines)]  # fmt: skip

    assert logged("1") == logged("2") == logged("4")

    # 3 of the steps by four processes, the others by two
    part = [model, data, tmp_path / "p", *how]
    stopped = run(4, "train", *part, "--save-every", "3", "--keep", "9")
    assert stopped.returncode == 0, stopped.stderr
    for later in checkpoints(tmp_path / "p")[1:]:
        shutil.rmtree(later)
    shutil.rmtree(tmp_path / "p" / "adapter")
    done = run(2, "train", *part, "--save-every", "3", "--keep", "9", "--resume")
    assert done.returncode == 0, done.stderr
    assert weights(tmp_path / "p") == weights(tmp_path / "1")


def test_errors_are_said_once(model: Path, data: Path, tmp_path: Path) -> None:
    few = run(4, "train", model, data, tmp_path / "a", "--accumulation", "2")
    assert few.returncode != 0
    assert few.stderr.count("give --accumulation 4") == 1
    assert "Traceback" not in few.stderr
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(data.read_text("utf-8").splitlines()[:9]), "utf-8")
    both = [
        [*PYLORA, "train", str(model), str(d), str(tmp_path / "b"), "--accumulation", "2"]
        for d in (data, other)
    ]
    done = subprocess.run(
        [MPIEXEC, "-n", "1", *both[0], ":", "-n", "1", *both[1]],
        capture_output=True, text=True, env=ENV, timeout=120,
    )  # fmt: skip
    assert done.returncode != 0
    assert done.stderr.count("rank 1 of 2 has another ") == 1
    assert "another training data than rank 0" in done.stderr
    # only one of them fails: the other does not wait for it for ever
    both[1][4] = str(tmp_path / "nothing")
    done = subprocess.run(
        [MPIEXEC, "-n", "1", *both[0], ":", "-n", "1", *both[1]],
        capture_output=True, text=True, env=ENV, timeout=60,
    )  # fmt: skip
    assert done.returncode != 0
    assert done.stderr.count("there is no such file") == 1


def _children(pid: int) -> list[int]:
    """All processes below pid."""
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout
    mine = [int(p) for p in found.split()]
    return mine + [p for child in mine for p in _children(child)]


@pytest.mark.skipif(shutil.which("pgrep") is None, reason="no pgrep")
@pytest.mark.parametrize("how", ["killed", "interrupted"])
def test_a_dead_rank_ends_the_run_and_leaves_a_whole_checkpoint(
    how: str, model: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    args = ["train", model, data, out, "--accumulation", "2", "--steps", "100000"]
    words = [MPIEXEC, "-n", "2", *PYLORA, *map(str, args), "--save-every", "3", "--log-every", "9"]
    process = subprocess.Popen(words, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        until = time.monotonic() + 60
        while not checkpoints(out) and time.monotonic() < until and process.poll() is None:
            time.sleep(0.05)
        ranks = []
        for pid in _children(process.pid):
            try:
                cmdline = Path(f"/proc/{pid}/cmdline").read_bytes()
            except OSError:
                continue
            if cmdline.startswith(sys.executable.encode()):
                ranks.append(pid)
        assert len(ranks) == 2
        os.kill(ranks[1], signal.SIGKILL if how == "killed" else signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode != 0
    newest = checkpoints(out)[-1]
    progress, _ = read(newest)
    assert progress.step >= 3
    if how == "interrupted":  # every rank stops after the same step, and it is saved
        assert progress.step == int(newest.name.rpartition("-")[2])
        assert b"to go on: mpiexec -n 2 pylora train" in err
    with SafeTensors(newest / "adapter_model.safetensors") as stored:
        assert all(np.isfinite(stored.load(name)).all() for name in stored.tensors)
    assert isinstance(Adapter.load(newest, pylora.LlamaConfig.tiny().modules()), Adapter)


@pytest.mark.skipif(
    not (os.environ.get("PYLORA_NAMESPACES") and hosts.possible()),
    reason="PYLORA_NAMESPACES is not set, or there is no right to make network namespaces",
)
def test_between_two_hosts(model: Path, data: Path, tmp_path: Path) -> None:
    """Two network namespaces with a cable between them: another MPI path, the same bits."""
    version = subprocess.run([MPIEXEC, "--version"], capture_output=True, text=True).stdout
    if "HYDRA" not in version:
        pytest.skip("the launcher's options are MPICH's")
    how = ["--accumulation", "2", "--epochs", "2"]
    here = run(2, "train", model, data, tmp_path / "here", *how)
    assert here.returncode == 0, here.stderr
    with hosts.two_hosts(tmp_path) as two:
        words = [*PYLORA, "train", model, data, tmp_path / "apart", *how]
        done = subprocess.run(
            [*two.launch(MPIEXEC), "-n", "2", *map(str, words)],
            capture_output=True, text=True, env=ENV, timeout=120,
        )  # fmt: skip
        sent = two.sent()
    assert done.returncode == 0, done.stderr
    assert weights(tmp_path / "apart") == weights(tmp_path / "here")
    # What must cross: in each of 10 steps about the gradients' bytes, half there and half back.
    size = sum(a.A.nbytes + a.B.nbytes for a in Adapter.load(
        tmp_path / "here" / "adapter", pylora.open_checkpoint(model).config.modules()
    ).values())  # fmt: skip
    assert sent > 5 * size
