"""`pylora suite` and `pylora conformance --suite`, from the command line to the report's files."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("tokenizers")

from fake_engine import FAULTS, Engine, served
from suites import book

from pylora.commands import cli

SUITE = ["conformance", "--suite"]


def engine(kind: type[Engine]) -> Engine:
    return kind(Path(book().path("bases/llama")))


def test_a_right_engine_is_recognized_and_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["--json", str(tmp_path / "r.json"), "--junit", str(tmp_path / "r.xml")]
    tests = ["--test", "alpha", "--test", "dora", "--test", "refuse nan"]
    with served(engine(Engine)) as url:
        assert cli.main([*SUITE, str(book().folder), "--engine", url, *files, *tests]) == 0
    said = capsys.readouterr().out
    assert "llama          alpha                  right" in said
    assert "4 tests: 4 right" in said
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["about"]["precision"] == "fp32"
    verdicts = {f["test"]: f["verdict"] for f in found["findings"]}
    assert verdicts == {"base": "right", "alpha": "right", "dora": "right", "refuse nan": "right"}
    tree = ElementTree.parse(tmp_path / "r.xml").getroot()
    assert tree.attrib["tests"] == "4" and tree.attrib["failures"] == "0"


def test_a_wrong_engine_is_exit_code_1_and_a_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["--json", str(tmp_path / "r.json"), "--junit", str(tmp_path / "r.xml")]
    with served(engine(FAULTS["alpha"][2])) as url:
        args = [*SUITE, str(book().folder), "--engine", url, "--test", "alpha", *files]
        assert cli.main(args) == 1
    said = capsys.readouterr().out
    assert "llama, alpha (the scale is alpha / r): alpha is used in place of alpha / r" in said
    (_, alpha) = json.loads((tmp_path / "r.json").read_text())["findings"]
    assert alpha["wrong_rule"] == "alpha-as-scale" and alpha["error"] > 1
    tree = ElementTree.parse(tmp_path / "r.xml").getroot()
    assert tree.attrib["failures"] == "1" and len(tree.findall("testcase/failure")) == 1


def test_a_command_is_started_for_each_adapter(capsys: pytest.CaptureFixture[str]) -> None:
    """One adapter for the life of a process, and requests are told the key."""
    here = Path(__file__).resolve().parents[2] / "support"
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import fake_engine, time, pathlib;"
        "e = fake_engine.Engine(pathlib.Path(sys.argv[2]));"
        "a = sys.argv[4:]; a and e.load('base', pathlib.Path(a[0]));"
        "e.chosen = lambda name: e.adapters.get('base');"
        "fake_engine.forever(e, int(sys.argv[3]))"
    )
    command = f'{sys.executable} -c "{program}" {here} {{base}} {{port}} [{{adapter}}]'
    args = ["--restart", command, "--adapters-by", "command", "--form", "peft", "--base", "llama"]
    tests = ["alpha", "second", "switching", "in-flight", "refuse nan"]
    listed = [word for test in tests for word in ("--test", test)]
    assert cli.main([*SUITE, str(book().folder), *args, *listed]) == 0
    said = capsys.readouterr().out
    assert "6 tests: 5 right, 1 not tested" in said
    assert "refused: the command ended with exit code 1" in said


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["--engine", "http://127.0.0.1:9/v1"], 1, "nothing listens there"),
        (["--engine", "no address"], 1, "is no address like"),
        ([], 1, "give either the address of an engine or the command"),
        (["--engine", "http://x/v1", "--precision", "fp31"], 1, "there is no precision 'fp31'"),
        (["--engine", "http://x/v1", "--adapters-by", "magic"], 1, "there is no way 'magic'"),
        (["--engine", "http://x/v1", "--form", "bin"], 1, "there is no form 'bin'"),
        (["--engine", "http://x/v1", "--base", "lama"], 1, "the suite has no base 'lama'"),
        (["--engine", "http://x/v1", "--test", "alpa"], 1, "did you mean 'alpha'?"),
        (["--engine", "http://x/v1", "--adapters-by", "command"], 1, "need --restart"),
        (["--convert", "cp {in}"], 1, "the command must have {out}"),
        (["--restart", "/none/x {port}", "--base", "llama"], 1, "/none/x cannot be started"),
    ],
)
def test_what_cannot_be_done_is_a_sentence(
    args: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*SUITE, str(book().folder), *args]) == code
    message = capsys.readouterr().err
    assert said in message and "Traceback" not in message


def test_a_folder_that_is_no_suite_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*SUITE, str(tmp_path), "--engine", "http://x/v1"]) == 1
    assert "write a suite: pylora suite --out" in capsys.readouterr().err
    (tmp_path / "manifest.json").write_text("{}")
    assert cli.main([*SUITE, str(tmp_path), "--engine", "http://x/v1"]) == 1
    assert "is no suite of version 1" in capsys.readouterr().err


def test_an_engine_of_another_model_is_not_taken_for_a_wrong_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pylora.conformance.suite import bases

    bases.write_hf(bases.make("llama", False, 77), tmp_path / "other")
    with served(Engine(tmp_path / "other")) as url:
        assert cli.main([*SUITE, str(book().folder), "--engine", url]) == 1
    assert "answers as none of the suite's bases" in capsys.readouterr().err
