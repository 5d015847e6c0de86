"""Commands that are run: their words, their ends, and that nothing is left of them."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from pylora.conformance.engines.http import EngineError, Http, Refusal
from pylora.conformance.engines.process import Process, Server, words
from pylora.errors import ConfigError


@pytest.mark.parametrize(
    ("template", "adapter", "expected"),
    [
        ("serve {base} --port {port}", None, ["serve", "a b", "--port", "1"]),
        ("serve {base} [--lora {adapter}]", "x y", ["serve", "a b", "--lora", "x y"]),
        ("serve {base} [--lora {adapter}]", None, ["serve", "a b"]),
        ("serve [--lora={adapter}] {base}", None, ["serve", "a b"]),
        ("serve '{base}/x' {loras}", None, ["serve", "a b/x", "--lora", "1", "--lora", "2"]),
    ],
)
def test_the_words_of_a_template(template: str, adapter: str | None, expected: list[str]) -> None:
    flags = ["--lora", "1", "--lora", "2"]
    values = {"base": "a b", "port": "1", "adapter": adapter, "loras": flags}
    assert words(template, values) == expected


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("serve 'x", "No closing quotation"),
        ("serve [--lora {adapter}", "without its ]"),
        ("serve {adapter}", "no {adapter} here"),
        ("", "is empty"),
    ],
)
def test_a_template_that_cannot_be_is_refused(template: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        words(template, {"adapter": None})


def python(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def test_what_a_command_started_ends_with_it(tmp_path: Path) -> None:
    child = "import time; open('there', 'w').close(); time.sleep(60)"
    text = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]);"
    process = Process(python(text + "time.sleep(60)"), tmp_path)
    end = time.monotonic() + 20
    while not (tmp_path / "there").exists() and time.monotonic() < end:
        time.sleep(0.02)
    assert (tmp_path / "there").exists()
    group = process.process.pid
    process.stop()
    while _group_lives(group) and time.monotonic() < end:  # what is killed takes a moment to go
        time.sleep(0.02)
    assert not _group_lives(group)


def _group_lives(group: int) -> bool:
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            return True
    return False


def test_a_command_that_ends_says_why() -> None:
    command = f"{sys.executable} -c \"raise SystemExit('no such model')\" {{base}} {{port}}"
    with Server(None, command, None, 5, 20) as server:
        with pytest.raises(Refusal, match="exit code 1: no such model"):
            server.up("base")


def test_a_command_that_crashes_is_said_to() -> None:
    command = f'{sys.executable} -c "import os; os.abort()" {{base}} {{port}}'
    with Server(None, command, None, 5, 20) as server:
        with pytest.raises(Refusal, match=r"CRASHED \(SIGABRT\)"):
            server.up("base")


def test_a_command_that_never_answers_is_ended() -> None:
    command = f'{sys.executable} -c "import time; time.sleep(60)" {{base}} {{port}}'
    with Server(None, command, None, 5, 1) as server:
        with pytest.raises(EngineError, match="answers nothing within 1 s"):
            server.up("base")
        assert server.process is None


def test_a_program_that_is_not_there_is_named() -> None:
    with Server(None, "/none/engine {base}", None, 5, 1) as server:
        with pytest.raises(ConfigError, match="/none/engine cannot be started"):
            server.up("base")


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://x/v1", "http://", "http://x:y/v1"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="is no address like"):
        Http.of(url)


def test_nobody_there_is_a_sentence() -> None:
    with pytest.raises(EngineError, match="nothing listens there"):
        Http.of("http://127.0.0.1:9/v1", timeout=5).get("/v1/models")
