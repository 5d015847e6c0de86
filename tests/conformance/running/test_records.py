"""The report as JUnit's XML and as JSON, and that a run leaves nothing where it was started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

pytest.importorskip("hypothesis")
pytest.importorskip("ml_dtypes")

from pylora.conformance import LAWS, run
from pylora.conformance.__main__ import main
from pylora.conformance.correct.plain import Correct
from pylora.conformance.running import records
from pylora.errors import ConfigError

ROOT = Path(__file__).parents[3]
CORRECT = "pylora.conformance.correct.plain:Correct"
NASTY = "<&\"'>\x1b[31m\x00 ]]> \ud800 line\nbreak ü 😀"


class Nasty(Correct):
    """Fails one law, breaks another with a text that no file format likes, and lacks a third."""

    name = f"nasty {NASTY}"
    unmerge = None  # type: ignore[assignment]

    def forward(self, x, W, A, B, scale, bias=None):
        if x.shape[0] == 0:
            raise ValueError(NASTY)
        return super().forward(x, W, A, B, scale * 2, bias)


@pytest.fixture(scope="module")
def report():
    return run(Nasty, ["S1", "F1", "E1", "M6"], examples=12)


def test_junit_holds_each_law_with_its_verdict(report):
    root = ElementTree.fromstring(records.as_junit(report).encode())
    suite = root.find("testsuite")
    assert {k: suite.get(k) for k in ("tests", "failures", "errors", "skipped")} == {
        "tests": "4",
        "failures": "1",
        "errors": "1",
        "skipped": "1",
    }
    cases = {case.get("name").split()[0]: case for case in suite.findall("testcase")}
    assert [c.tag for c in cases["S1"]] == []
    assert "np.array" in cases["F1"].find("failure").text
    said = cases["E1"].find("error").get("message")
    assert "<&\"'>\\x1b[31m\\x00 ]]> \\ud800 line break ü 😀" in said
    assert cases["M6"].find("skipped").get("message") == "there is no unmerge"
    assert all(float(case.get("time")) >= 0 for case in cases.values())


def test_json_holds_each_law_with_its_verdict(report):
    text = records.as_json(report, seed=3, examples=12)
    found = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert text.isascii()
    assert (found["schema"], found["version"]) == ("pylora-conformance-report", 1)
    assert found["implementation"] == Nasty.name
    assert (found["ok"], found["seed"], found["examples"]) == (False, 3, 12)
    laws = {law["id"]: law for law in found["laws"]}
    assert {id: law["status"] for id, law in laws.items()} == {
        "S1": "passed",
        "F1": "failed",
        "E1": "broken",
        "M6": "not tested",
    }
    assert laws["F1"]["error_over_bound"] > 1 and laws["F1"]["spec"] == list(LAWS["F1"].spec)
    assert "np.array" in laws["F1"]["counterexample"]
    assert laws["E1"]["reason"].count("\ud800") == 1 and laws["S1"]["counterexample"] is None
    documented = (ROOT / "docs" / "conformance.md").read_text(encoding="utf-8")
    assert all(f"`{field}`" in documented for field in (*found, *laws["F1"]))


def test_what_an_implementation_says_wrongly_of_itself_is_an_error_in_both():
    class Odd(Correct):
        dtypes = ("float8",)

    report = run(Odd, ["S1"], examples=2)
    suite = ElementTree.fromstring(records.as_junit(report)).find("testsuite")
    assert suite.get("errors") == "1" and "float8" in suite.find("testcase/error").get("message")
    assert json.loads(records.as_json(report, seed=0, examples=2))["ok"] is False


def test_a_report_that_cannot_be_written_is_refused_before_the_laws(tmp_path):
    (tmp_path / "file").write_text("")
    records.check(None, tmp_path / "new" / "report.xml")
    for bad in (tmp_path, tmp_path / "file" / "report.xml"):
        with pytest.raises(ConfigError, match="cannot write the report"):
            records.check(bad)


def test_the_command_of_the_kit_alone(tmp_path, capsys):
    one, other = tmp_path / "a" / "report.xml", tmp_path / "report.json"
    args = ["--law", "S1", "--examples", "3", "--junit", str(one), "--json", str(other), CORRECT]
    assert main(args) == 0
    assert "1 passed" in capsys.readouterr().out
    assert ElementTree.parse(one).find("testsuite").get("tests") == "1"
    assert json.loads(other.read_text())["ok"] is True
    assert main(["--law", "F1", "--law", "E1", "--examples", "3", f"{__name__}:Nasty"]) == 1
    assert "\\ud800" in capsys.readouterr().out
    assert main(["--list", "--law", "S1"]) == 0
    assert main(["--law", "F99", CORRECT]) == 2
    assert "F99" in capsys.readouterr().err
    for wrong in ([], ["--list", CORRECT], ["--profile", "quick", "--examples", "3", CORRECT]):
        with pytest.raises(SystemExit) as end:
            main(wrong)
        assert end.value.code == 2


@pytest.mark.skipif(os.name == "nt", reason="a folder is read-only in another way there")
def test_nothing_is_written_where_it_is_started(tmp_path):
    here, home = tmp_path / "here", tmp_path / "home"
    here.mkdir()
    home.mkdir()
    here.chmod(0o555)
    code = (
        "import sys; from pylora.conformance.__main__ import main; "
        f"sys.exit(main(['--examples', '3', '--law', 'K1', '--law', 'P2', '{CORRECT}']))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(home), "TMPDIR": str(tmp_path)}
    env["PYTHONDONTWRITEBYTECODE"] = "1"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=here, env=env, capture_output=True, text=True
    )
    here.chmod(0o755)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert list(here.iterdir()) == list(home.iterdir()) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["here", "home"]  # no folder is left over
