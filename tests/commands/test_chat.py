"""`pylora chat`: a conversation of a pipe's lines and at a terminal, and the commands in it."""

from __future__ import annotations

import io
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("tokenizers")

from tiny_model import write_tiny_model

import pylora
from pylora.adapters.adapter import Adapter
from pylora.adapters.plan import resolve
from pylora.commands import cli
from pylora.commands.chat import Chat
from pylora.formats import open_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("tiny") / "model"
    return write_tiny_model(where, max_position_embeddings=1024)


@pytest.fixture(scope="module")
def adapters(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    where = tmp_path_factory.mktemp("adapters")
    config = pylora.LoraConfig.fresh(4, init_lora_weights=False, target_modules="all-linear")
    with open_checkpoint(model) as checkpoint:
        plan = resolve(config, checkpoint.config.modules())
    Adapter.init(plan, config, 1).save(where / "tone")
    Adapter.init(plan, config, 2).save(where / "run" / "adapter")  # as training leaves it
    return {"tone": where / "tone", "verse": where / "run"}


@pytest.fixture
def piped(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """piped(lines, *options) -> (answers, the rest, exit code)."""

    def run(lines: list[str], *options: object, code: int = 0) -> tuple[str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
        capsys.readouterr()
        few = () if "--max-new-tokens" in options else ("-n", "5")
        got = cli.main(["chat", str(model), *few, *map(str, options)])
        said = capsys.readouterr()
        assert got == code, said.err
        assert "Traceback" not in said.err
        lines = said.err.splitlines(keepends=True)  # less what the tokenizer's files are odd in
        return said.out, "".join(line for line in lines if not line.startswith("note: "))

    return run


def named(adapters: dict[str, Path]) -> list[str]:
    return [part for name, at in adapters.items() for part in ("--adapter", f"{name}={at}")]


def answers(model: Path, *talk: str, **how: Any) -> list[str]:
    """What Model.chat says turn by turn."""
    adapter = how.pop("adapter", None)
    messages, said = [], []
    with pylora.load(model, adapter) as loaded:
        for text in talk:
            messages.append({"role": "user", "content": text})
            said.append(loaded.chat(messages, max_new_tokens=5, **how))
            messages.append({"role": "assistant", "content": said[-1]})
    return said


def test_lines_of_a_pipe_are_a_conversation(piped: Any, model: Path) -> None:
    out, err = piped(["what is truth?", "", "   ", "and time?"])
    assert out == "".join(a + "\n" for a in answers(model, "what is truth?", "and time?"))
    assert err == "", "nothing but the answers"


def test_settings_reach_the_model(piped: Any, model: Path) -> None:
    how: dict[str, Any] = {"temperature": 1.5, "top_k": 50, "top_p": 0.9, "min_p": 0.01, "seed": 3}
    how["repetition_penalty"] = 1.1
    options = [part for k, v in how.items() for part in (f"--{k.replace('_', '-')}", v)]
    out, _ = piped(["what is truth?", "why?"], *options, "--system", "be brief")
    want = answers(model, "what is truth?", "why?", system="be brief", **how)
    assert out == "".join(a + "\n" for a in want)


def test_the_first_adapter_answers_and_others_can_be_chosen(
    piped: Any, model: Path, adapters: dict[str, Path]
) -> None:
    ask = "what is truth?"
    tone, verse, base = (
        answers(model, ask, adapter=a)[0] for a in (adapters["tone"], adapters["verse"], None)
    )
    assert len({tone, verse, base}) == 3
    lines = [ask, "/reset", "/adapter verse", ask, "/reset", "/adapter none", ask]
    out, err = piped(lines, *named(adapters))
    assert out == f"{tone}\n{verse}\n{base}\n"
    assert "verse: answers, weight 1" in err and "the base model answers" in err
    out, _ = piped([ask], "--adapter", adapters["tone"])
    assert out == f"{tone}\n"


def test_an_adapter_with_a_template_of_its_own_is_said_and_used(
    model: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(adapters["tone"], tmp_path / "own")
    (tmp_path / "own" / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    with pylora.load(model, adapters["tone"]) as loaded:
        want = loaded.generate("what is truth?", max_new_tokens=5)
    done = subprocess.run(
        [sys.executable, "-m", "pylora", "chat", str(model), "-n", "5"]
        + ["--adapter", f"tone={tmp_path / 'own'}"],
        input="what is truth?\n",
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.stdout == want + "\n"
    assert done.stderr.count("adapter tone: the adapter's own chat template is used") == 1


def test_weights(piped: Any, model: Path, adapters: dict[str, Path]) -> None:
    ask = "what is truth?"
    with pylora.load(model, adapters) as loaded:
        want = [
            loaded.chat(ask, max_new_tokens=5, adapter=a)
            for a in ({"tone": 0.5}, {"tone": 0.5, "verse": -2.0}, {"verse": -2.0}, None)
        ]
        want.append(loaded.chat(ask, max_new_tokens=5, adapter=["tone", "verse"][0]))
    lines = []
    for command in ("/weight tone 0.5", "/weight verse -2", "/weight tone 0", "/weight verse 0"):
        lines += [command, ask, "/reset"]
    out, err = piped([*lines, "/adapter tone", ask], *named(adapters))
    assert out == "".join(a + "\n" for a in want)
    assert "tone: answers, weight 0.5" in err and "tone: not in use" in err


def test_system_and_reset_and_quit(piped: Any, model: Path) -> None:
    brief = answers(model, "a", system="be brief")[0]
    lines = ["/system be brief", "a", "/reset", "/system", "a", "/quit", "never seen"]
    out, err = piped(lines)
    assert out == f"{brief}\n{answers(model, 'a')[0]}\n"
    assert "system message set" in err and "no system message" in err and "anew" in err


def test_help_lists_each_command(piped: Any) -> None:
    out, err = piped(["/help"])
    assert out == ""
    for name in ("adapter", "weight", "system", "reset", "help", "quit"):
        assert f"/{name}" in err


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/adpter tone", "did you mean /adapter?"),
        ("/xyzzy", "/help lists them"),
        ("/adapter nobody", "no adapter 'nobody'; known: tone, verse"),
        ("/weight tone", "such as /weight tone 0.5"),
        ("/weight tone much", "such as /weight tone 0.5"),
        ("/weight tone nan", "such as /weight tone 0.5"),
        ("/weight tone inf", "finite"),
        ("/weight nobody 1", "no adapter 'nobody'"),
        ("/weight nobody 0", "no adapter 'nobody'"),
        ("a " * 3000, "max_position_embeddings"),
        ("\udcff", "surrogate"),
    ],
)
def test_a_mistake_is_a_sentence_and_the_conversation_goes_on(
    piped: Any, model: Path, adapters: dict[str, Path], line: str, says: str
) -> None:
    want = answers(model, "a", adapter=adapters["tone"])[0]
    out, err = piped([line, "a"], *named(adapters), code=1)
    assert out == f"{want}\n" and says in err
    assert len(err.strip().splitlines()) == 1


def test_a_message_may_begin_with_a_slash(piped: Any, model: Path) -> None:
    out, _ = piped(["//help me"])
    assert out == f"{answers(model, '/help me')[0]}\n"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--top-p", 2, "--temperature", 1], "top_p must be"),
        (["--temperature", -1], "temperature must be"),
        (["--max-new-tokens", 0], "--max-new-tokens must be"),
        (["--adapter", "a=/none"], "no such file"),
        (["--adapter", "none={tone}"], "means the base model"),
        (["--adapter", "a={tone}", "--adapter", "a={tone}"], "two adapters named 'a'"),
        (["--precision", "int3"], "precision"),
    ],
)
def test_wrong_options_are_told_before_the_conversation(
    piped: Any, adapters: dict[str, Path], options: list[Any], says: str
) -> None:
    given = [o.format(**adapters) if isinstance(o, str) else o for o in options]
    out, err = piped(["a"], *given, code=1)
    assert out == "" and says in err


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pylora.load(model) as loaded:
        talk = Chat(loaded, max_new_tokens=30)
        whole = loaded.chat("a", max_new_tokens=30)
        real = loaded.chat

        def broken_off(*args: Any, **how: Any) -> Iterator[str]:
            for i, piece in enumerate(real(*args, **how)):
                if i == 3:
                    raise KeyboardInterrupt
                yield piece

        loaded.chat = broken_off  # type: ignore[method-assign, assignment]
        assert talk.run(iter(["a"])) == 0
        said = capsys.readouterr()
        assert "(stopped)" in said.err and whole.startswith(said.out.rstrip("\n"))
        assert talk.messages[1] == {"role": "assistant", "content": said.out.rstrip("\n")}
        loaded.chat = real  # type: ignore[method-assign]
        assert talk.run(iter(["b"])) == 0 and len(talk.messages) == 4


ENDLESS = """
import itertools, sys, time
from pylora.commands import cli
from pylora.front.model import Model

def chat(self, messages, **settings):
    for i in itertools.count():
        yield f"word{i} "
        time.sleep(0.01)

Model.chat = chat
raise SystemExit(cli.main(["chat", *sys.argv[1:]]))
"""


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
def test_at_a_terminal_ctrl_c_stops_the_answer_and_not_the_program(model: Path) -> None:
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", ENDLESS, str(model)],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        start_new_session=True,
        env=os.environ | {"TERM": "dumb"},
    )
    os.close(follower)
    seen = b""

    def wait_for(text: bytes, after: int = 0, interrupt: bool = False) -> None:
        """interrupt: Ctrl-C until it comes, as a signal may arrive between two answers."""
        nonlocal seen
        until = time.monotonic() + 100
        while text not in seen[after:]:
            if interrupt:
                os.kill(process.pid, signal.SIGINT)
            left = max(0, until - time.monotonic())
            ready, _, _ = select.select([leader], [], [], min(left, 0.5) if interrupt else left)
            assert ready or (interrupt and left), seen
            if not ready:
                continue
            try:
                seen += os.read(leader, 4096)
            except OSError:  # the other side has gone
                break
        assert text in seen[after:], seen

    try:
        wait_for(b"> ")
        assert b"/help shows" in seen
        os.write(leader, b"what is truth?\n")
        wait_for(b"word3 ", len(seen))  # words come one by one
        os.kill(process.pid, signal.SIGINT)
        wait_for(b"(stopped)")
        wait_for(b"> ", seen.rindex(b"(stopped)"))
        at = len(seen)
        wait_for(b"Ctrl-D ends", at, interrupt=True)  # at the prompt it ends nothing
        os.write(leader, b"/quit\n")
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(leader)
