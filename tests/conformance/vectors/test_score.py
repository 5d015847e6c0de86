"""The score of a port: right and wrong outputs in every form, and folders with anything in them."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pylora.conformance.vectors.cases import Case
from pylora.conformance.vectors.questions import Question
from pylora.conformance.vectors.score import ABSENT, FAILED, PART, PASSED, Score, score
from pylora.errors import FileFormatError


def small() -> list[Case]:
    """Two cases: numbers with a bound and bits, and bits of 16; one output is empty."""
    one = Case("one", "op", ("F-1", "S-1"))
    one.expect("y", np.array([[1.0, -2.0, 3.0]]), 0.01, "a rule", spec=("F-1",))
    one.exact("position", np.array([5, -7], np.int64))
    two = Case("two", "op", ("M-7",))
    two.exact("merged", np.array([0x8000, 3], np.uint16))
    two.exact("none", np.zeros((0, 4), np.float32))
    two.exact("z", np.array([-0.0, 0.5], np.float32))
    return [one, two]


def questions() -> dict[str, tuple[Any, list[Question]]]:
    asked = [
        Question("takes", ("T-1",), {}, {"modules": {"q": {"r": 2, "scale": 2.0}}}),
        Question("refuses", ("T-6",), {}, {"refused": "no such module"}),
    ]
    return {"plans": ({}, asked)}


def right() -> dict[str, Any]:
    return {
        "format": "pylora-outputs",
        "version": 1,
        "cases": {
            "one": {"y": [1.004, -2.0, 3.0], "position": [5, -7]},
            "two": {"merged": [0x8000, 3], "none": [], "z": [-0.0, 0.5]},
        },
        "plans": {
            "takes": {"modules": {"q": {"r": 2, "scale": 2.0}}},
            "refuses": {"refused": "there is no w_proj"},
        },
    }


def of(where: Path, outputs: Any = None) -> Score:
    if outputs is not None:
        (where / "outputs.json").write_text(json.dumps(outputs), encoding="utf-8")
    return score(where, small(), questions())


def folder(where: Path, wide: bool = False) -> Path:
    """The same as files; y in float32 or float64."""
    for case in small():
        (where / case.name).mkdir()
        for name, out in case.outputs.items():
            value = out.value.astype(np.float32) if name == "y" and not wide else out.value
            (where / case.name / f"{name}.bin").write_bytes(value.tobytes())
    return where


def why(found: Score) -> dict[str, str]:
    return {item.name: item.why for item in found.of(FAILED)}


# ---- right ones ----------------------------------------------------------------------------------


def test_all_right_in_one_file(tmp_path: Path) -> None:
    found = of(tmp_path, right())
    assert set(found.states().values()) == {PASSED} and not found.foreign
    assert list(found.states()) == ["F-1", "M-7", "S-1", "T-1", "T-6"]
    badge = {"schemaVersion": 1, "label": "pylora vectors", "color": "brightgreen"}
    assert found.badge() == badge | {"message": "all 5 statements passed"}
    file = tmp_path / "outputs.json"
    assert score(file, small(), questions()).items == found.items


@pytest.mark.parametrize("wide", [False, True])
def test_all_right_in_files_of_either_width(wide: bool, tmp_path: Path) -> None:
    found = of(folder(tmp_path, wide))
    assert not found.of(FAILED) and not found.foreign
    assert found.states() == dict.fromkeys(("F-1", "M-7", "S-1"), PASSED) | dict.fromkeys(
        ("T-1", "T-6"), ABSENT
    )
    assert found.badge()["message"] == "3 of 5 statements passed"
    assert found.badge()["color"] == "yellowgreen"


def test_files_and_json_beside_each_other(tmp_path: Path) -> None:
    outputs = right()
    outputs["cases"] = {"one": {"y": [0, 0, 0]}}  # the file comes first
    found = of(folder(tmp_path), outputs)
    assert set(found.states().values()) == {PASSED}


def test_rows_may_be_lists_of_lists(tmp_path: Path) -> None:
    outputs = right()
    outputs["cases"]["one"]["y"] = [[1, -2.0, 3.0]]
    assert not of(tmp_path, outputs).of(FAILED)


# ---- wrong ones ----------------------------------------------------------------------------------


def test_nothing_is_not_attempted(tmp_path: Path) -> None:
    found = of(tmp_path)
    assert set(found.states().values()) == {ABSENT} and found.state == ABSENT
    assert found.badge()["color"] == "lightgrey"
    assert found.badge()["message"] == "0 of 5 statements passed"


def test_one_wrong_number_fails_what_it_shows_and_nothing_else(tmp_path: Path) -> None:
    outputs = right()
    outputs["cases"]["one"]["y"][1] = -1.98
    found = of(tmp_path, outputs)
    assert [n for n, state in found.states().items() if state == FAILED] == ["F-1"]
    assert why(found)["one/y"] == (
        "1 of 3 numbers are wrong, the first at [0, 1]: np.float64(-1.98), expected "
        "np.float64(-2.0), within 0.01"
    )
    assert found.badge()["color"] == "red"
    assert found.badge()["message"] == "1 of 5 statements failed"


@pytest.mark.parametrize(
    ("case", "output", "value", "said"),
    [
        ("one", "y", [1, -2, "nan"], "1 of 3 numbers are wrong"),
        ("one", "y", [1, -2, "inf"], "1 of 3 numbers are wrong"),
        ("one", "y", [1, -2], "has 2 numbers, expected 3"),
        ("one", "y", [1, -2, 3, 4], "has 4 numbers, expected 3"),
        ("one", "y", [], "has 0 numbers, expected 3"),
        ("one", "y", [1, -2, "three"], "holds 'three', which is no number"),
        ("one", "y", [1, -2, None], "holds None, which is no number"),
        ("one", "y", [1, -2, True], "holds True, which is no number"),
        ("one", "y", 7, "has 1 numbers, expected 3"),
        ("one", "y", {"a": 1}, "has 1 numbers, expected 3"),
        ("one", "y", [[[[[[1, -2, 3]]]]]], "is nested more deeply"),
        ("one", "y", [1, -2, 10**400], "holds an integer that float64 does not"),
        ("one", "position", [5, 7], "1 of 2 numbers are wrong"),
        ("one", "position", [5, -7.0], "holds -7.0, which is no integer"),
        ("one", "position", [5, 2**63], "holds an integer that int64 does not"),
        ("two", "merged", [-1, 3], "holds an integer that uint16 does not"),
        ("two", "z", [0.0, 0.5], "1 of 2 numbers are wrong"),  # the sign of zero
        ("two", "none", [1], "has 1 numbers, expected 0"),
    ],
)
def test_what_is_wrong_in_json_is_said(
    case: str, output: str, value: Any, said: str, tmp_path: Path
) -> None:
    outputs = right()
    outputs["cases"][case][output] = value
    found = of(tmp_path, outputs)
    assert set(why(found)) == {f"{case}/{output}"}
    assert said in why(found)[f"{case}/{output}"]


def test_files_that_are_cut_off_missing_longer_or_nan(tmp_path: Path) -> None:
    where = folder(tmp_path)
    y, merged, none = (where / p for p in ("one/y.bin", "two/merged.bin", "two/none.bin"))
    good = y.read_bytes()
    for data in (good[:-1], good + b"\0", b"", good * 3):
        y.write_bytes(data)
        said = f"has {len(data)} bytes; 3 numbers are 12 (float32) or 24 (float64)"
        assert why(of(where)) == {"one/y": said}
    y.write_bytes(np.array([1, np.nan, 3], np.float32).tobytes())
    assert why(of(where))["one/y"].startswith("1 of 3 numbers are wrong, the first at [0, 1]")
    y.unlink()
    none.write_bytes(b"\0")
    merged.write_bytes(merged.read_bytes()[::-1])
    found = of(where)
    assert why(found)["one/y"] == "is missing, though the case was attempted"
    assert why(found)["two/none"] == "has 1 bytes; 0 numbers are 0 (float32)"
    assert why(found)["two/merged"].startswith("2 of 2 numbers are wrong")


def test_what_belongs_to_no_case_is_named_and_left_alone(tmp_path: Path) -> None:
    where = folder(tmp_path)
    (where / "notes.txt").write_text("mine")
    (where / "one" / "w.bin").write_bytes(b"1234")
    (where / "three").mkdir()
    (where / "three" / "y.bin").write_bytes(b"")
    outputs = right() | {"speed": 3}
    outputs["cases"]["four"] = {"y": []}
    outputs["cases"]["one"]["v"] = []
    outputs["cases"]["two"] = 5
    outputs["plans"]["unknown"] = {}
    found = of(where, outputs)
    assert not found.of(FAILED)
    assert sorted(found.foreign) == [
        "notes.txt",
        "one/w.bin",
        "outputs.json: 'speed'",
        "outputs.json: cases/four/y",
        "outputs.json: cases/one/v",
        "outputs.json: cases/two is no object",
        "plans/unknown",
        "three/y.bin",
    ]


def test_a_part_that_was_not_attempted(tmp_path: Path) -> None:
    outputs = right()
    second = Case("more", "op", ("F-1",))
    second.exact("x", np.zeros(1, np.float32))
    (tmp_path / "outputs.json").write_text(json.dumps(outputs))
    found = score(tmp_path, [*small(), second], questions())
    assert found.states()["F-1"] == PART
    assert found.message() == "4 of 5 statements passed, 1 in part"
    assert "| F-1 | part | 2 | 0 | 1 |" in found.markdown()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"format": "pylora-outputs", "version": 2}',
        '{"format": "else", "version": 1}',
        "[" * 100_000,
        '{"format": "pylora-outputs", "version": 1, "cases": {"one": {"y": [1e999999, '
        + "9" * 5000,
    ],
)
def test_a_file_that_is_no_outputs_is_refused_in_words(text: str, tmp_path: Path) -> None:
    (tmp_path / "outputs.json").write_text(text)
    with pytest.raises(FileFormatError, match=r"outputs\.json"):
        of(tmp_path)


def test_no_folder_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="there is no such folder"):
        of(tmp_path / "none")


def test_links_and_pipes_do_not_stop_it(tmp_path: Path) -> None:
    where = folder(tmp_path)
    (where / "one" / "y.bin").unlink()
    (where / "one" / "y.bin").symlink_to(where / "one")  # a folder
    (where / "two" / "z.bin").unlink()
    os.mkfifo(where / "two" / "z.bin")
    (where / "two" / "none.bin").unlink()
    os.mkfifo(where / "two" / "none.bin")  # 0 bytes are expected, and would be waited for
    found = of(where)
    assert set(why(found)) == {"one/y", "two/z", "two/none"}
    assert why(found)["two/none"] == "is no ordinary file"


def test_noise_never_stops_it(tmp_path: Path) -> None:
    """Outputs with any part put in place of any other."""
    rng = random.Random(3)
    parts: list[Any] = [None, 0, -1.5, "nan", [], {}, [[1]], {"refused": 1}, True, "x" * 300, 2**70]

    def spoil(value: Any) -> Any:
        if rng.random() < 0.15:
            return rng.choice(parts)
        if isinstance(value, dict):
            return {k: spoil(v) for k, v in value.items()}
        if isinstance(value, list):
            return [spoil(v) for v in value]
        return value

    for _ in range(300):
        outputs = right()
        for key in ("cases", "plans"):
            outputs[key] = spoil(outputs[key])
        found = of(tmp_path, outputs)
        json.dumps(found.to_dict()), found.markdown(), found.badge()
