"""Golden vectors: every backend keeps every one of them, and the files are what they say."""

from __future__ import annotations

import hashlib
import json
import re
import runpy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vector_runners import RUNNERS, Outputs

from pylora.conformance.bounds.ops import assert_within
from pylora.conformance.vectors import cases as vectors
from pylora.conformance.vectors import model as vector_model
from pylora.conformance.vectors.all import all_cases, all_questions
from pylora.conformance.vectors.cases import Case
from pylora.errors import ConfigError, FileFormatError, UnsupportedError
from pylora.model.config import LlamaConfig
from pylora.types import Seqs

DOCS = Path(__file__).parents[2] / "docs"


# ---- every backend -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("vectors") / "v1"
    return vectors.write(where, all_cases(), all_questions())


@pytest.fixture(scope="module")
def cases(written: Path) -> list[Case]:
    found = vectors.load(written)
    for case in found:
        if case.op == "embed":
            case.files["adapter"] = written / case.name / "adapter"  # type: ignore[assignment]
    return found


def check(case: Case, got: Outputs) -> None:
    assert set(got) >= set(case.outputs), case.name
    for name, want in case.outputs.items():
        value = np.asarray(got[name])
        if want.bound is None:
            assert value.dtype == want.value.dtype, f"{case.name}/{name}"
            assert value.tobytes() == want.value.tobytes(), f"{case.name}/{name}"
        else:
            assert_within(value, want.value, want.bound, f"{case.name}/{name}")


def test_every_backend_keeps_every_vector(ops: Any, cases: list[Case]) -> None:
    assert {case.op for case in cases} == set(RUNNERS)
    with np.errstate(invalid="ignore"):  # one case has NaN, and asks for what it must not reach
        for case in cases:
            check(case, RUNNERS[case.op](ops, case))


WRONG = {
    "alpha for the scale": ("lora-plain", lambda c: c.params.update(scale=c.params["alpha"])),
    "alpha / r for rsLoRA": ("lora-rslora", lambda c: c.params.update(scale=2.0)),
    "another step's mask": ("lora-dropout", lambda c: c.params.update(step=4)),
    "rows counted from 0": ("dropout", lambda c: c.params.update(row0=0)),
    "the other layout": ("rope-half", lambda c: c.params.update(layout="interleaved")),
    "one key too many": ("attention", lambda c: c.params.update(window=5)),
    "sequences run together": ("attention", lambda c: c.params.update(lengths=[6, 3])),
    "no bias correction": ("adamw", lambda c: c.params.update(step=100000)),
    "another eps": ("rms-norm", lambda c: c.params.update(eps=1.1e-5)),
    "the other GELU": ("gelu-tanh", lambda c: c.params.update(kind="gelu_erf")),
    "no cap": ("attention-capped", lambda c: c.params.update(softcap=0.0)),
    "the usual scale": ("attention-scale", lambda c: c.params.update(scale=0.5)),
    "weights as they are": ("choose", lambda c: c.params.update(normalize=False)),
    "the ramp's ends as they are": ("rope-yarn", lambda c: c.params.update(truncate=False)),
    "long factors too early": ("rope-longrope-short", lambda c: c.params.update(length=17)),
    "decay forgotten": ("training", lambda c: c.params.update(weight_decay=0.0)),
    "another dropout": ("training", lambda c: c.params.update(seed="4")),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_mistake_is_outside_the_bound(mistake: str, written: Path) -> None:
    from pylora.backends import get

    name, spoil = WRONG[mistake]
    case = next(c for c in vectors.load(written) if c.name == name)
    check(case, RUNNERS[case.op](get("numpy"), case))
    spoil(case)
    with pytest.raises(AssertionError):
        check(case, RUNNERS[case.op](get("numpy"), case))


def test_the_written_out_block_is_the_models_block(cases: list[Case]) -> None:
    case = next(c for c in cases if c.op == "block")
    from pylora.backends import get
    from pylora.model.block import Block

    ops, prefix = get("numpy"), "model.layers.0."
    wide = {name: a.astype(np.float64) for name, a in case.inputs.items()}
    weights, adapter = vector_model.block_parts(wide, case.params["scale"])
    config: LlamaConfig = vector_model.BLOCK
    from pylora.model.rope import Rope

    rope_tables = Rope(config, np.float64, ops=ops)
    real = Block(config, 0, lambda n: weights[n.removeprefix(prefix)], rope_tables, ops=ops)
    for linear in real.linears:
        linear.lora = adapter[linear.path.removeprefix(prefix)]
    y, cache = real.forward(wide["x"], Seqs.of(case.params["lengths"]))
    grads: dict[str, Any] = {}
    dx = real.backward(wide["dy"].copy(), cache, grads)
    for name, got in [("y", y), ("dx", dx)] + [
        (f"{path.removeprefix(prefix)}.d{f}", getattr(g, f))
        for path, g in grads.items()
        for f in "AB"
    ]:
        want = case.outputs[name].value
        assert_within(got, want, 1e-13 * np.abs(want).max(), name)


def test_the_training_run_learns(cases: list[Case]) -> None:
    losses = next(c for c in cases if c.op == "training").outputs["loss"].value
    assert losses.shape == (20,)
    assert losses[-1] < 0.7 * losses[0]


# ---- the files -----------------------------------------------------------------------------------


def test_generation_is_the_same_bit_for_bit(written: Path, tmp_path: Path) -> None:
    again = vectors.write(tmp_path / "again", all_cases(), all_questions())
    files = sorted(p.relative_to(written) for p in written.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(again) for p in again.rglob("*") if p.is_file())
    for file in files:
        assert (written / file).read_bytes() == (again / file).read_bytes(), file


def test_the_manifest_says_what_the_files_hold(written: Path) -> None:
    manifest = json.loads((written / "manifest.json").read_text())
    assert (manifest["format"], manifest["version"]) == ("pylora-vectors", vectors.VERSION)
    total = 0
    for case in manifest["cases"]:
        for at in [*case["inputs"].values(), *case["outputs"].values()]:
            data = (written / at["file"]).read_bytes()
            assert hashlib.sha256(data).hexdigest() == at["sha256"]
            total += len(data)
        for at in case["outputs"].values():
            assert at["rule"]
            assert ("bound" in at) != (at["rule"] == "exact")
            assert set(at.get("spec", [])) <= set(known_statements())
    assert total < 400_000


def test_bounds_are_positive_small_and_finite(cases: list[Case]) -> None:
    for case in cases:
        for name, out in case.outputs.items():
            if out.bound is None or out.value.size == 0:
                continue
            size = max(1.0, float(np.abs(out.value).max()))
            assert np.isfinite(out.value).all(), (case.name, name)
            assert np.isfinite(out.bound).all() and (out.bound >= 0).all(), (case.name, name)
            loose = case.op == "lora16" or case.name == "attention-large"  # 16 bits, or cancelled
            most = 0.1 if loose else 1e-3
            assert out.bound.max() < most * size, (case.name, name, out.bound.max())


def known_statements() -> list[str]:
    text = (DOCS / "spec.md").read_text(encoding="utf-8")
    return re.findall(r"^- \*\*([A-Z]-\d+)\*\*", text, re.M)


def test_statements_that_are_cited_exist(cases: list[Case]) -> None:
    known = known_statements()
    assert len(known) == len(set(known))
    for case in cases:
        assert set(case.spec) <= set(known), case.name
        for name in case.outputs:
            assert set(case.shown_by(name)) <= set(known), (case.name, name)


PAGE = (DOCS / "porting.md").read_text(encoding="utf-8")


def test_the_page_explains_every_operation_with_its_parameters_and_arrays(
    cases: list[Case],
) -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", PAGE, re.M))
    assert set(rows) >= {case.op for case in cases}
    for case in cases:
        said = rows[case.op] + "".join(rows[op] for op in re.findall(r"as `(\w+)`", rows[case.op]))
        for name in case.params:
            assert f"`{name}`" in said, (case.op, name)
        if case.op in ("block", "training"):  # by their own lists
            continue
        for name in [*case.inputs, *case.outputs]:
            plain = re.sub(r"\.\d+$", ".0", name)  # A.1 as A.0
            words = re.findall(r"[\w.]+", " ".join(re.findall(r"`([^`]+)`", said)))
            assert plain in words, (case.op, name)
    intermediates = PAGE[PAGE.index("- `block`: ") : PAGE.index("- `training`: ")]
    block = next(case for case in cases if case.op == "block")
    for name in block.outputs:
        assert f"`{name}`" in intermediates or name.endswith((".h", ".dA", ".dB")), name


def test_the_page_lists_the_dtypes_that_occur(cases: list[Case]) -> None:
    sentence = PAGE[PAGE.index("- `dtype` is one of") :].split("\n")[0]
    arrays = [
        a for c in cases for a in [*c.inputs.values(), *(o.value for o in c.outputs.values())]
    ]
    found = {name for name, code in vectors.DTYPES.items() for a in arrays if a.dtype == code}
    assert set(re.findall(r"`(\w+)`", sentence)) - {"dtype"} == found == set(vectors.DTYPES)
    assert any(a.size == 0 for a in arrays)


def test_the_page_lists_the_statements_that_the_vectors_show(cases: list[Case]) -> None:
    tool = runpy.run_path(str(DOCS.parent / "tools" / "vector_table.py"))
    assert tool["stale"](cases) is None, "run python tools/vector_table.py"


def test_a_reader_needs_no_escapes_and_finds_other_alphabets(written: Path) -> None:
    text = (written / "manifest.json").read_text(encoding="utf-8")
    assert "\\" not in text
    assert not text.isascii()


def test_damaged_vectors_are_named(written: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(written, copy)
    file = copy / "lora-plain" / "x.bin"
    good = file.read_bytes()
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(FileFormatError, match=r"x\.bin was changed"):
        vectors.load(copy)
    file.write_bytes(good[:-4])
    with pytest.raises(FileFormatError, match=r"x\.bin has 216 bytes"):
        vectors.load(copy)
    file.unlink()
    with pytest.raises(FileFormatError, match="there is no file"):
        vectors.load(copy)
    file.write_bytes(good)
    manifest = copy / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"version": 1', '"version": 2'))
    with pytest.raises(UnsupportedError, match="version 2"):
        vectors.load(copy)
    manifest.write_text(text.replace("lora-plain/x.bin", "../../etc/passwd"))
    with pytest.raises(FileFormatError, match="there is no file"):
        vectors.load(copy)
    manifest.write_text(text.replace('"inputs"', '"inputz"'))
    with pytest.raises(FileFormatError, match="malformed"):
        vectors.load(copy)


def test_an_existing_directory_is_kept(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="mine"):
        vectors.write(tmp_path, [])
    assert (tmp_path / "mine.txt").read_text() == "mine"
