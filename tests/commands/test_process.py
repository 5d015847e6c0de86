"""The command as a process: signals, pipes that break, streams that are closed or strange."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("tokenizers")

from tiny_model import write_tiny_model

import pylora

SCRIPT = "import sys\nfrom pylora.commands.cli import main\nsys.exit(main())\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "data.jsonl"
    file.write_text('{"prompt": "truth exists:", "completion": " yes"}\n' * 4)
    return file


@pytest.fixture(params=["module", "script"])
def start(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    """The two ways to start the command."""
    if request.param == "module":
        return [sys.executable, "-m", "pylora"]
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "pylora"  # as pip writes it
    script.write_text(SCRIPT)
    return [sys.executable, str(script)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_it_starts_leaves_no_traceback(
    start: list[str], number: int, model: Path
) -> None:
    ended = set()
    for wait in range(12):
        process = subprocess.Popen(
            [*start, "generate", str(model), "truth", "-n", "100"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(Path(pylora.__file__).parents[1])},
        )
        # Before the interpreter has found its modules a signal is its own matter.
        time.sleep(0.25 + 0.12 * wait)
        process.send_signal(number)
        _, said = process.communicate(timeout=120)
        ended.add(process.returncode)
        assert process.returncode in (0, -number, 128 + number), said
        assert "Traceback" not in said and "Exception" not in said, said
    assert ended - {0}, "none of them was in time"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_it_trains_saves_the_step(
    number: int, model: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    args = ["train", str(model), str(data), str(out), "--steps", "100000", "--overwrite"]
    process = subprocess.Popen(
        [sys.executable, "-m", "pylora", *args],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    log = out / "log.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") > 2):
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    word = "interrupted" if number == signal.SIGINT else "terminated"
    (saved,) = out.glob("checkpoint-*")
    assert process.returncode == 128 + number
    assert said.startswith(f"pylora: {word} after step ") and f"saved in {saved}; to go on:" in said
    assert said.endswith(f"to go on: pylora train --resume {out}\n") and said.count("\n") == 1


def test_an_ignored_signal_stays_ignored(model: Path, data: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "pylora", "generate", str(model), "truth", "-n", "5"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),  # as nohup does
    )
    time.sleep(1.0)
    process.send_signal(signal.SIGHUP)
    out, said = process.communicate(timeout=120)
    assert process.returncode == 0 and out and not said


def command(*args: object, **how: object) -> subprocess.CompletedProcess[str]:
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | how
    return subprocess.run(  # type: ignore[call-overload,no-any-return]
        [sys.executable, "-m", "pylora", *map(str, args)], text=True, check=False, **how
    )


@pytest.mark.parametrize("verb", ["--help", "plan", "inspect", "conformance"])
def test_a_pipe_that_breaks_is_no_error_to_read_about(verb: str, model: Path) -> None:
    args = {"plan": ["plan", model, "--all"], "inspect": ["inspect", "--numbers"]}
    args["conformance"] = ["conformance", "--list"]
    read, write = os.pipe()
    os.close(read)
    done = command(*args.get(verb, [verb]), stdout=write)
    os.close(write)
    assert done.returncode == 1 and done.stderr == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
@pytest.mark.parametrize("args", [["info"], ["--help"], ["--version"], ["inspect", "--numbers"]])
def test_output_that_cannot_be_written_is_a_sentence(args: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = command(*args, stdout=full)
    assert done.returncode == 1 and "No space left" in done.stderr
    assert done.stderr.startswith("pylora: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("closed", [0, 1, 2])
def test_closed_streams(closed: int, model: Path) -> None:
    kept = {0: "stdin", 1: "stdout", 2: "stderr"}[closed]
    how = {} if closed == 0 else {kept: None}
    args = ["generate", model, "-"] if closed == 0 else ["plan", model if closed == 1 else "gone"]
    done = command(*args, preexec_fn=lambda: os.close(closed), **how)
    assert done.returncode == (0 if closed == 1 else 1)
    assert "Traceback" not in (done.stderr or "")
    if closed == 0:
        assert "standard input is closed" in done.stderr


def test_standard_input_is_read_for_a_dash(model: Path, data: Path, tmp_path: Path) -> None:
    given = command("generate", model, "truth exists:", "-n", "4").stdout
    for text in ("truth exists:", "truth exists:\n", "\ufefftruth exists:\r\n"):
        assert command("generate", model, "-", "-n", "4", input=text).stdout == given
    done = command("generate", model, "--prompts", "-", "-n", "4", input='{"prompt": "a"}\n')
    assert done.returncode == 0 and done.stdout.startswith('{"adapter": null')
    out = tmp_path / "run"
    done = command("train", model, "-", out, "--steps", "1", input=data.read_text())
    assert done.returncode == 0 and (out / "adapter").is_dir(), done.stderr
    assert "is empty" in command("generate", model, "-", input="").stderr
    both = command("train", model, "-", tmp_path / "o", "--eval", "-", input="")
    assert both.returncode == 1 and "cannot both" in both.stderr


def at_terminal(*args: object, **env: str) -> str:
    """What a terminal gets."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(
            sys.executable,
            [sys.executable, "-m", "pylora", *map(str, args)],
            {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS")} | env,
        )
    got = b""
    while True:
        try:
            piece = os.read(terminal, 4096)
        except OSError:  # the end, on Linux
            break
        if not piece:
            break
        got += piece
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, got
    return got.decode("utf-8", errors="replace")


def test_terminals(model: Path, data: Path, tmp_path: Path) -> None:
    train = ["train", model, data, tmp_path / "run", "--steps", 4, "--overwrite"]
    live = at_terminal(*train, TERM="xterm", COLUMNS="70")
    written = [line for line in live.split("\r") if line.startswith("step ")]
    assert written[-1].startswith("step 4/4") and all(len(line) < 70 for line in written)
    assert "\r" not in at_terminal(*train, TERM="dumb").replace("\r\n", "\n")
    plain = at_terminal(*train, TERM="xterm", NO_COLOR="1", PYTHONIOENCODING="ascii")
    assert plain.isascii() and "#" in plain and "\x1b[" not in plain
    table = at_terminal("plan", model, TERM="xterm", COLUMNS="72", PYTHONIOENCODING="ascii")
    assert "24 x 24" in table and all(len(line) <= 72 for line in table.splitlines())
