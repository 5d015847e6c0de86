"""Golden vectors: every backend keeps every one of them, and the files are what they say."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pylora.adapters.adapter import Adapter
from pylora.conformance.bounds.ops import assert_within
from pylora.conformance.vectors import cases as vectors
from pylora.conformance.vectors import model as vector_model
from pylora.conformance.vectors.all import all_cases
from pylora.conformance.vectors.cases import Case
from pylora.errors import ConfigError, FileFormatError, UnsupportedError
from pylora.model.config import LlamaConfig, ModuleSpec
from pylora.numbers import random
from pylora.types import AdamW, Attn, Drop, LoRA, Seqs

Outputs = dict[str, Any]
RUNNERS: dict[str, Callable[[Any, Case], Outputs]] = {}


def runner(function: Callable[[Any, Case], Outputs]) -> Callable[[Any, Case], Outputs]:
    RUNNERS[function.__name__] = function
    return function


def names(prefix: str, *values: Any) -> Outputs:
    return dict(zip(prefix.split(), values, strict=True))


def drop_of(p: dict[str, Any]) -> Drop | None:
    if "p" not in p:
        return None
    stream = random.stream("dropout", p["path"], str(p["step"]))
    return Drop(p["p"], int(p["seed"]), stream, p["row0"])


@runner
def lora(ops: Any, case: Case) -> Outputs:
    i, p, drop = case.inputs, case.params, drop_of(case.params)
    W, adapter = ops.pack(i["W"]), LoRA(i["A"], i["B"], p["scale"])
    y, h = ops.lora_forward(i["x"], W, i.get("bias"), adapter, drop)
    dx, dA, dB = ops.lora_backward(i["dy"], i["x"], h, W, adapter, drop)
    g, _, _ = ops.lora_backward(i["dy"], None, None, ops.pack(i["B"]))
    return names("h y g dx dA dB", h, y, g, dx, dA, dB)


@runner
def embedding(ops: Any, case: Case) -> Outputs:
    i, grads = case.inputs, {}
    from pylora.model.embedding import Embedding

    module = Embedding("model.embed_tokens", i["W"], ops=ops)
    module.lora = LoRA(i["A"], i["B"], case.params["scale"])
    y, cache = module.forward(i["ids"])
    module.backward(i["dy"], cache, grads)
    grad = grads["model.embed_tokens"]
    return names("y dA dB", y, grad.A, grad.B)


@runner
def merge(ops: Any, case: Case) -> Outputs:
    i, dtype = case.inputs, case.params["dtype"]
    W = i["W"].view({"f32": np.float32, "f16": np.float16, "bf16": np.uint16}[dtype])
    adapter = LoRA(i["A"], i["B"], case.params["scale"])
    merged, residue = ops.merge(W, adapter, dtype)
    back = ops.unmerge(merged, adapter, residue, dtype)
    assert back.tobytes() == W.tobytes()
    return names("merged position bits", merged.view(i["W"].dtype), residue.position, residue.bits)


@runner
def philox(ops: Any, case: Case) -> Outputs:
    seed, stream, first = (int(case.params[n]) for n in ("seed", "stream", "first"))
    return {"words": ops.philox(seed, stream, first, 11)}


@runner
def unit(ops: Any, case: Case) -> Outputs:
    stream = random.stream(case.params["name"])
    assert stream == int(case.params["stream"])
    words = ops.philox(int(case.params["seed"]), stream, 0, 16) >> 6
    return {"u": (words[::2] * 2.0**26 + words[1::2] + 0.5) * 2.0**-52}


@runner
def init(ops: Any, case: Case) -> Outputs:
    from pylora.adapters.adapter import LoraConfig
    from pylora.adapters.plan import resolve

    path, how = case.params["path"], case.params["method"]
    r, k = case.outputs["A"].value.shape
    config = LoraConfig(
        r=r, target_modules=("q_proj",), init_lora_weights="gaussian" if how == "gaussian" else True
    )
    plan = resolve(config, {path: ModuleSpec("linear", len(case.outputs["B"].value), k)})
    made = Adapter.init(plan, config, seed=int(case.params["seed"]))[path]
    return {"A": made.A, "B": made.B}


@runner
def dropout(ops: Any, case: Case) -> Outputs:
    y = ops.dropout(case.inputs["x"], drop_of(case.params))
    return {"y": y, "kept": (y != 0).astype(np.uint8)}


@runner
def rms_norm(ops: Any, case: Case) -> Outputs:
    i = case.inputs
    y, rstd = ops.rms_norm_forward(i["x"], i["w"], case.params["eps"])
    return {"y": y, "rstd": rstd, "dx": ops.rms_norm_backward(i["dy"], i["x"], i["w"], rstd)[0]}


@runner
def rope(ops: Any, case: Case) -> Outputs:
    i, D, layout = case.inputs, case.params["head_dim"], case.params["layout"]

    def turn(inverse: bool) -> Any:
        return ops.rope(i["x"], i["cos"], i["sin"], i["position"], D, layout, inverse)

    return {"y": turn(False), "inverse": turn(True)}


@runner
def attention(ops: Any, case: Case) -> Outputs:
    i, p = case.inputs, case.params
    attn = Attn(p["heads"], p["kv_heads"], p["head_dim"], p["scale"], p["window"])
    seqs = Seqs.of(p["lengths"])
    o, lse = ops.attention_forward(i["q"], i["k"], i["v"], seqs, attn)
    grads = ops.attention_backward(i["do"], i["q"], i["k"], i["v"], o, lse, seqs, attn)
    return names("o lse dq dk dv", o, lse, *grads)


@runner
def swiglu(ops: Any, case: Case) -> Outputs:
    i = case.inputs
    dgate, dup = ops.swiglu_backward(i["dy"], i["gate"], i["up"])
    return {"y": ops.swiglu_forward(i["gate"], i["up"]), "dgate": dgate, "dup": dup}


@runner
def cross_entropy(ops: Any, case: Case) -> Outputs:
    i = case.inputs
    nll, lse = ops.cross_entropy_forward(i["logits"], i["labels"])
    d = ops.cross_entropy_backward(i["logits"], i["labels"], lse, i["weight"])
    return names("nll lse dlogits", nll, lse, d)


@runner
def adamw(ops: Any, case: Case) -> Outputs:
    param, grad, m, v = (case.inputs[n].copy() for n in ("param", "grad", "m", "v"))
    ops.adamw_step(param, grad, m, v, AdamW(**case.params))
    return names("new_param new_m new_v", param, m, v)


@runner
def embed(ops: Any, case: Case) -> Outputs:
    i, path = case.inputs, case.params["path"]
    (d, k), folder = i["W"].shape, case.files["adapter"]
    adapter = Adapter.load(folder, {path: ModuleSpec("linear", d, k)})[path]
    W = ops.pack(i["W"])
    merged, residue = ops.merge(i["W"], adapter)
    assert ops.unmerge(merged, adapter, residue).tobytes() == i["W"].tobytes()
    y, h = ops.lora_forward(i["x"], W, lora=adapter)
    dx, dA, dB = ops.lora_backward(i["dy"], i["x"], h, W, adapter)
    out = names("h y dx dA dB merged", h, y, dx, dA, dB, merged)
    for name, p, grad in (("A", adapter.A, dA), ("B", adapter.B, dB)):
        settings = AdamW(lr=case.params["lr"], step=case.params["step"])
        ops.adamw_step(p, np.ascontiguousarray(grad), np.zeros_like(p), np.zeros_like(p), settings)
        out[f"new_{name}"] = p
    return out


@runner
def block(ops: Any, case: Case) -> Outputs:
    weights, adapter = vector_model.block_parts(case.inputs, case.params["scale"])
    x, dy = case.inputs["x"], case.inputs["dy"]
    return vector_model.block(
        ops, vector_model.BLOCK, weights, adapter, x, dy, tuple(case.params["lengths"])
    )


@runner
def training(ops: Any, case: Case) -> Outputs:
    model, adapter = vector_model.training_model(case.inputs, case.params, np.float32, ops)
    i = case.inputs
    return vector_model.train(model, adapter, i["ids"], i["labels"], i["lr"], case.params)


# ---- every backend -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vectors.write(tmp_path_factory.mktemp("vectors") / "v1", all_cases())


@pytest.fixture(scope="module")
def cases(written: Path) -> list[Case]:
    found = vectors.load(written)
    next(c for c in found if c.name == "embed").files["adapter"] = written / "embed" / "adapter"  # type: ignore[assignment]
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
    again = vectors.write(tmp_path / "again", all_cases())
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
    assert total < 400_000


def test_bounds_are_positive_small_and_finite(cases: list[Case]) -> None:
    for case in cases:
        for name, out in case.outputs.items():
            if out.bound is None or out.value.size == 0:
                continue
            size = max(1.0, float(np.abs(out.value).max()))
            assert np.isfinite(out.bound).all() and (out.bound >= 0).all(), (case.name, name)
            assert out.bound.max() < 1e-3 * size, (case.name, name, out.bound.max())


def test_statements_that_are_cited_exist(cases: list[Case]) -> None:
    import re

    spec = Path(__file__).parents[2] / "docs" / "spec.md"
    known = re.findall(r"^- \*\*([A-Z]-\d+)\*\*", spec.read_text(encoding="utf-8"), re.M)
    assert len(known) == len(set(known))
    for case in cases:
        assert set(case.spec) <= set(known), case.name


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
