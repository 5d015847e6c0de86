"""The command line: every verb on a tiny model, and every mistake one readable sentence."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("typer")
pytest.importorskip("tokenizers")

from tiny_model import write_tiny_model

import pylora
from pylora.adapters.adapter import Adapter
from pylora.commands import cli
from pylora.formats import open_checkpoint
from pylora.model.llama import Llama

RECORDS = [
    {"prompt": f"{word} exists. In symbols:", "completion": f" ∃{symbol}"}
    for word, symbol in (("truth", "Φ"), ("life", "Λ"), ("time", "τ"), ("energy", "ε"))
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "records.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in RECORDS), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trained(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "out"
    args = ["train", model, data, out, "--steps", 3, "--lr", 0.05, "--eval", data, "--rslora"]
    args += ["--targets", "q_proj,k_proj,v_proj,o_proj"]
    assert cli.main([str(a) for a in args]) == 0
    return out


def run(capsys: pytest.CaptureFixture[str], *args: object, code: int = 0) -> str:
    """Runs the command in this process; returns what it printed (to stderr if it failed)."""
    capsys.readouterr()
    assert cli.main([str(arg) for arg in args]) == code
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    return printed.err if code else printed.out


def sentence(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """Runs a command that must fail with exit code 1 and a single line on stderr."""
    message = run(capsys, *args, code=1)
    assert message.startswith("pylora: ") and message.count("\n") == 1, message
    return message


def test_plan_reads_the_tensors_that_the_settings_imply(
    model: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(trained / "adapter", folder)
    weights = folder / "adapter_model.safetensors"
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"r": settings["r"] + 1}))
    assert "has shape" in sentence(capsys, "plan", model, folder)
    weights.write_bytes(b"")
    assert "the file is empty" in sentence(capsys, "plan", model, folder)
    weights.unlink()
    assert "there is no adapter_model.safetensors" in sentence(capsys, "plan", model, folder)


# ---- the verbs at work ----------------------------------------------------------------------


def test_train_writes_a_run(trained: Path) -> None:
    names = {p.name for p in trained.iterdir()}
    assert {"adapter", "log.jsonl", "checkpoint-000003"} <= names
    steps = [json.loads(line)["step"] for line in (trained / "log.jsonl").open()]
    assert max(steps) == 3


def test_train_resumes_and_refuses_to_overwrite(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ("train", model, data, tmp_path / "run", "--steps", 2, "--seed", 7)
    run(capsys, *args)
    adapter = (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
    assert "already holds a training run" in sentence(capsys, *args)
    run(capsys, *args, "--resume")
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes() == adapter
    assert "another run" in sentence(capsys, *args[:-1], 8, "--resume")
    run(capsys, *args, "--overwrite")


def test_generate_with_and_without_the_adapter(
    model: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ("generate", model, "truth exists. In symbols:", "-n", 6)
    base = run(capsys, *args)
    tuned = run(capsys, *args, "--adapter", trained / "adapter")
    assert base == run(capsys, *args) and base.endswith("\n")
    assert base != tuned
    sampled = [run(capsys, *args, "--temperature", 2, "--seed", seed) for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    run(capsys, "generate", model, "what is truth", "--chat", "--system", "be brief", "-n", 2)


def test_generate_streams_what_decoding_gives(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pylora.generation.generate import generate

    with open_checkpoint(model) as checkpoint:
        tokenizer, llama = checkpoint.tokenizer(), Llama.from_checkpoint(checkpoint)
    ids = tokenizer.encode("time equals", bos=tokenizer.add_bos)
    expected = tokenizer.decode(generate(llama, [ids], 12, eos_ids=tokenizer.eos_ids)[0])
    assert run(capsys, "generate", model, "time equals", "-n", 12) == expected + "\n"


def test_an_empty_prompt_starts_from_the_beginning_as_in_python(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pylora.load(model) as loaded:
        assert loaded.tokenizer.bos_id is not None
        expected = loaded.generate("", max_new_tokens=4)
    assert run(capsys, "generate", model, "", "-n", 4) == f"{expected}\n"


def test_merge_then_unmerge_gives_the_weights_back(
    model: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merged, back = tmp_path / "merged", tmp_path / "back"
    assert "8 modules merged" in run(capsys, "merge", model, trained / "adapter", merged)
    assert "8 modules unmerged" in run(capsys, "unmerge", merged, back)
    with open_checkpoint(model) as a, open_checkpoint(merged) as b, open_checkpoint(back) as c:
        q = "model.layers.0.self_attn.q_proj.weight"
        assert not np.array_equal(a.load(q), b.load(q))
        assert all(a.load(name).tobytes() == c.load(name).tobytes() for name in a.names())


def test_pack_writes_a_model_that_every_verb_takes(
    model: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed, merged = tmp_path / "packed", tmp_path / "merged"
    said = run(capsys, "pack", model, packed, "--precision", "bf16")
    assert "bytes in bf16 (15 matrices as BF16)" in said and "copied tokenizer.json" in said
    assert "are those that were written" in run(capsys, "pack", packed, "--verify")
    args = ("time equals", "-n", 8, "--adapter", trained)
    here = run(capsys, "generate", packed, *args)
    assert here == run(capsys, "generate", model, *args, "--precision", "bf16")
    assert "is not packed" in sentence(capsys, "pack", model, "--verify")
    assert "8 modules merged" in run(capsys, "merge", packed, trained / "adapter", merged)


def test_combine_makes_one_adapter_of_several(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_folder, both, cut = trained, tmp_path / "both", tmp_path / "cut"
    assert "8 modules" in run(capsys, "combine", run_folder, run_folder, both, "--weights", "2,-1")
    said = run(capsys, "combine", both, cut, "--method", "svd", "--rank", 1)
    assert "cut to rank 1" in said and "% of the update is lost" in said
    before = (both / "adapter_model.safetensors").read_bytes()
    assert "something in it" in sentence(capsys, "combine", cut, both)
    assert (both / "adapter_model.safetensors").read_bytes() == before
    new = tmp_path / "new"
    for weights in ("1", "1,2,3", "one,two", "1,nan", ""):
        sentence(capsys, "combine", both, cut, new, "--weights", weights)
    sentence(capsys, "combine", both, cut, new, "--method", "ties", "--density", 2)
    sentence(capsys, "combine", both, tmp_path / "gone", new)
    assert not new.exists()


def test_plan_shows_each_module_and_its_rules(
    model: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = run(
        capsys, "plan", model, "--targets", "q_proj, v_proj", "-r", 4, "--alpha", 6, "--all"
    )
    assert shown.count("_proj") == 8  # a path and a rule for each of two modules in two layers
    assert "1.5" in shown and "alpha / r" in shown
    lines = run(capsys, "plan", model, trained / "adapter", "--json").splitlines()
    entries = [json.loads(line) for line in lines]
    assert len(entries) == 8
    assert all(e["rule_scale"] == "alpha / sqrt(r) (use_rslora)" for e in entries)
    regex = run(capsys, "plan", model, "--targets", r".*\.1\..*(q|k)_proj", "--json")
    assert regex.count("model.layers.1.self_attn.") == 2


def test_inspect_needs_no_model_and_draws(
    model: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, picture = trained / "adapter", tmp_path / "adapter.png"
    alone = run(capsys, "inspect", adapter, "--picture", picture, "--all")
    assert picture.read_bytes().startswith(b"\x89PNG")
    checked = run(capsys, "inspect", adapter, "--model", model, "--all")
    rows = [sorted(li for li in text.splitlines() if "_proj" in li) for text in (alone, checked)]
    assert rows[0] == rows[1] and len(rows[0]) == 8
    with open_checkpoint(model) as checkpoint:
        loaded = Adapter.load(adapter, checkpoint.config.modules())
    assert f"{loaded.num_parameters:,} parameters" in alone


def test_inspect_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    shown = run(capsys, "inspect", "--numbers")
    for number in ("65,536", "16,777,216", "8,000", "16,000", "32,000", "4,194,304"):
        assert number in shown


def test_families_lists_each_with_what_it_has(capsys: pytest.CaptureFixture[str]) -> None:
    from pylora.model.families import ALL

    shown = run(capsys, "families")
    for name in ALL:
        assert name in shown
    assert f"{len(ALL)} families" in shown and "learned positions" in shown


def test_info_names_the_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert "backend: numpy" in run(capsys, "--backend", "numpy", "info")
    import pylora

    pylora.use(None)


# ---- mistakes -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args",
    [
        ("no-such-verb",),
        ("train",),
        ("train", "m", "d", "o", "--steps", "many"),
        ("generate", "m", "p", "--no-such-option"),
        ("demo", "--steps", "0"),
    ],
)
def test_a_wrong_command_line_exits_with_2(
    args: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, *args, code=2)


def test_missing_and_empty_files(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    empty.write_bytes(b"")
    gone, out = tmp_path / "gone", tmp_path / "out"
    assert str(gone) in sentence(capsys, "plan", gone)
    assert str(gone) in sentence(capsys, "inspect", gone)
    assert str(gone) in sentence(capsys, "generate", model, "p", "--adapter", gone)
    assert str(gone) in sentence(capsys, "train", model, gone, out)
    assert str(gone) in sentence(capsys, "unmerge", gone, out)
    assert str(gone) in sentence(capsys, "demo", "--model", gone, "--out", out)
    assert str(empty) in sentence(capsys, "plan", empty)
    assert "the file is empty" in sentence(capsys, "train", model, empty, out)
    assert not out.exists() or not list(out.rglob("adapter*"))


def test_truncated_files_are_named(
    model: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for source, name in (
        (model, "model.safetensors"),
        (trained / "adapter", "adapter_model.safetensors"),
    ):
        copy = tmp_path / source.name
        copy.mkdir()
        for file in source.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        whole = (copy / name).read_bytes()
        (copy / name).write_bytes(whole[: len(whole) // 2])
    assert "model.safetensors" in sentence(capsys, "generate", tmp_path / "model", "p")
    assert "adapter_model.safetensors" in sentence(capsys, "inspect", tmp_path / "adapter")
    out = tmp_path / "merged"
    sentence(capsys, "merge", model, tmp_path / "adapter", out)
    assert not out.exists()
    gguf = tmp_path / "cut.gguf"
    gguf.write_bytes(b"GGUF\x03\x00\x00\x00\xff\xff\xff\xff\xff\xff\xff\x7f" + b"\0" * 8)
    assert "cut.gguf" in sentence(capsys, "plan", gguf)


def test_settings_out_of_range(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert "nope_proj" in sentence(capsys, "plan", model, "--targets", "nope_proj")
    assert "r" in sentence(capsys, "plan", model, "-r", 0)
    assert "learning_rate" in sentence(capsys, "train", model, data, out, "--lr", -1)
    assert "top_p" in sentence(capsys, "generate", model, "p", "--top-p", 3, "-t", 1)
    assert "no backend 'tpu'" in sentence(capsys, "--backend", "tpu", "plan", model)
    assert not out.exists()


def test_an_output_that_cannot_be_written(
    model: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("not a folder")
    message = sentence(capsys, "merge", model, trained / "adapter", tmp_path / "file" / "out")
    assert "file" in message
    long = tmp_path / ("x" * 300 + ".png")
    message = sentence(capsys, "inspect", trained / "adapter", "--picture", long)
    assert str(long) in message and "File name too long" in message


# ---- the process ----------------------------------------------------------------------------


def command(*args: object, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pylora", *map(str, args)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=os.environ | env,
        check=False,
    )


def test_as_a_process_errors_go_to_stderr_with_code_1(tmp_path: Path) -> None:
    done = command("plan", tmp_path / "gone", LC_ALL="C", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("pylora: ")


def test_the_notation_is_printed_whatever_the_locale() -> None:
    done = command("inspect", "--numbers", LC_ALL="C", PYTHONIOENCODING="ascii")
    assert done.returncode == 0
    assert "4096 × 4096" in done.stdout


def test_without_typer_it_says_what_to_install(tmp_path: Path) -> None:
    blocker = (
        "import sys; sys.modules['typer'] = None\n"
        "from pylora.commands.cli import main; sys.exit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", blocker, "info"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("pylora: ") and "pip install pylora-engine" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
def test_interrupted_training_exits_with_130_and_can_be_resumed(
    model: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    args = ["train", model, data, out, "--steps", 100_000]
    process = subprocess.Popen(
        [sys.executable, "-m", "pylora", *map(str, args)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while process.poll() is None and not (
            (out / "log.jsonl").exists() and (out / "log.jsonl").read_text().count("\n") > 2
        ):
            pass
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130
    (saved,) = out.glob("checkpoint-*")
    step = int(saved.name.rpartition("-")[2])
    assert stderr.startswith(f"pylora: interrupted after step {step} of 100000; saved in {saved};")
    again = shlex.split(stderr.partition("to go on: ")[2])
    assert again == ["pylora", "train", "--resume", str(out)]


def test_each_line_of_a_file_of_prompts_may_name_its_adapter(
    model: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "truth exists. In symbols:"
    base = run(capsys, "generate", model, text, "-n", 6)[:-1]
    tuned = run(capsys, "generate", model, text, "-n", 6, "--adapter", trained / "adapter")[:-1]
    assert tuned == run(
        capsys, "generate", model, text, "-n", 6, "--adapter", f"x={trained / 'adapter'}"
    ).removesuffix("\n")
    file = tmp_path / "prompts.jsonl"
    lines: list[dict[str, str | None]] = [
        {"prompt": text, "adapter": "tuned"},
        {"prompt": text, "adapter": None},
        {"prompt": text},
        {"prompt": text, "adapter": "tuned"},
    ]
    file.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    named = ("--adapter", f"tuned={trained / 'adapter'}")
    many = ("generate", model, "--prompts", file, "-n", 6)
    got = [json.loads(line) for line in run(capsys, *many, *named).splitlines()]
    assert got == [
        {"adapter": "tuned", "text": tuned},
        {"adapter": None, "text": base},
        {"adapter": None, "text": base},
        {"adapter": "tuned", "text": tuned},
    ]
    shown = run(capsys, *many, *named, "--adapter", trained / "adapter").splitlines()
    assert json.loads(shown[2]) == {"adapter": str(trained / "adapter"), "text": tuned}


@pytest.mark.parametrize(
    ("line", "options", "says"),
    [
        ('{"prompt": "a", "adapter": "b"}', (), "prompts.jsonl:1: no adapter is named 'b'"),
        ('{"prompt": "a", "adapter": 3}', (), "must be a name or null"),
        ('{"prompt": "a", "adaptor": "b"}', (), "this one has 'adaptor'"),
        ("", (), "the file is empty"),
        ('{"prompt": "a"}', ("--adapter", "=b"), "write NAME=DIR"),
        ('{"prompt": "a"}', ("--adapter", "b="), "write NAME=DIR"),
        ('{"prompt": "a"}', ("--adapter", "a=b", "--adapter", "a=c"), "two adapters named 'a'"),
        ('{"prompt": "a"}', ("--adapter", "b", "--adapter", "c"), "two adapters without a name"),
        (None, ("text", "--adapter", "a=b", "--adapter", "c=d"), "one prompt takes one --adapter"),
    ],
)
def test_a_wrong_file_of_prompts_is_explained(
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    line: str | None,
    options: tuple[str, ...],
    says: str,
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(line or "")
    given = () if line is None else ("--prompts", str(file))
    assert says in sentence(capsys, "generate", model, *options, *given)
