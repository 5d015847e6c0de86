"""Every option of every verb is carried out or refused by name: this walks over all of them."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("tokenizers")

import typer
from tiny_model import write_tiny_model

from pylora.check.report import Report
from pylora.commands import cli, foreign, rules
from pylora.commands.verbs import app
from pylora.merging.to_gguf import GGUFReport, Rounded

COMMAND: Any = typer.main.get_command(app)
VERBS: dict[str, Any] = dict(COMMAND.commands)
OPTIONS = [
    (verb, param.name)
    for verb, command in VERBS.items()
    for param in command.params
    if param.param_type_name == "option" and param.name != "help"
]


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model, data, an adapter on it, prompts, and its adapter_config.json."""
    where = tmp_path_factory.mktemp("there")
    model, data = write_tiny_model(where / "model"), where / "data.jsonl"
    records = [{"prompt": f"{w} exists:", "completion": f" {w}"} for w in ("truth", "life", "time")]
    data.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    assert cli.main(["train", str(model), str(data), str(where / "run"), "--steps", "1"]) == 0
    pairs = where / "pairs.jsonl"
    pairs.write_text('{"prompt": "truth is", "chosen": " life", "rejected": " time"}\n')
    texts = where / "texts.jsonl"
    texts.write_text('{"text": "truth", "label": 0}\n{"text": "life", "label": 1}\n')
    prompts = where / "prompts.jsonl"
    prompts.write_text('{"prompt": "truth exists:"}\n', encoding="utf-8")
    config = where / "config.json"
    config.write_text('{"r": 3, "target_modules": ["q_proj"]}', encoding="utf-8")
    run = where / "run"
    pack = ["pack", str(model), str(where / "packed"), "--precision", "bf16"]
    assert cli.main(pack) == 0
    return {
        "model": model, "data": data, "run": run, "other": run / "adapter", "prompts": prompts,
        "c": config, "packed": where / "packed", "pairs": pairs, "texts": texts,
    }  # fmt: skip


def base(verb: str, there: dict[str, Path], out: Path) -> list[str]:
    """The least command line of a verb, to which one option is added."""
    model, run = str(there["model"]), str(there["run"])
    return {
        "train": ["train", model, str(there["data"]), str(out / "run")],
        "eval": ["eval", model, str(there["data"])],
        "generate": ["generate", model, "truth"],
        "chat": ["chat", model],
        "serve": ["serve", model],
        "merge": ["merge", model, run, str(out / "merged")],
        "pack": ["pack", model, str(out / "packed"), "--precision", "fp32"],
        "combine": ["combine", run, str(there["other"]), str(out / "both")],
        "convert": ["convert", run, str(out / "a.gguf"), "--base", model],
        "unmerge": ["unmerge", str(there["model"]), str(out / "base")],
        "plan": ["plan", model],
        "inspect": ["inspect", run],
        "check": ["check", model],
        "demo": ["demo", "--out", str(out / "demo")],
        "vectors": ["vectors", "--out", str(out / "vectors")],
        "conformance": ["conformance", "package.module:Class"],
        "suite": ["suite", "--out", str(out / "suite")],
    }.get(verb, [verb])


# Where another value is not simply the next number: what to give.
VALUES: dict[str, Any] = {
    "alpha": "3.5", "init": "pissa", "targets": "q_proj", "config": "{c}", "adapter_config": "{c}",
    "learning_rate": "0.01", "epochs": "3", "metric": "token-accuracy", "sample": "truth",
    "best_by": "last", "start": "{run}", "patience": "2", "eval_data": "{data}",
    "schedule": "linear", "weights": "0.5,2", "method": "linear", "density": "0.5", "rank": "1",
    "majority_sign": "frequency",
    "precision": "bf16", "max_tokens": "64", "max_length": "64", "steps": "2", "eval_every": "1",
    "save_every": "1", "floor": "0.5", "adapter": "{run}", "prompts": "{prompts}", "system": "s",
    "model": "{model}", "picture": "{out}/p.png", "data": "{data}", "as_json": "{out}/r.json",
    "base": "{run}", "to": "{out}/other.gguf", "type_": "q8_0",
    "out": "{out}/other", "dtype": "bf16", "profile": "nightly", "law": "A1", "examples": "3",
    "backend": "numpy", "template_arg": "a=1", "max_new_tokens": "3", "min_p": "0.2",
    "suite": "{data}", "engine": "http://127.0.0.1:9/v1", "restart": "serve", "convert": "convert",
    "adapters_by": "mlx", "form": "gguf", "api_key": "key", "bases": "llama", "tests": "alpha",
    "families": "qwen2",
    "repetition_penalty": "1.5", "fields": "-label", "dropout": "0.25", "top_p": "0.5",
    "port": "{out}/port", "adapters": "{out}", "load_from": "{out}", "api_keys": "{data}",
    "objective": "dpo", "label_smoothing": "0.1", "mix": "0.5", "temperature": "2", "beta": "0.5",
    "gamma": "2", "desirable_weight": "2", "undesirable_weight": "2", "teacher": "{model}",
    "teacher_adapter": "{run}", "classes": "3",
    "log_level": "error", "host": "0.0.0.0", "log_format": "json",
    "decay_steps": "1", "cycles": "3", "optimizer": "adamw_8bit", "rank_dropout": "0.5",
    "label_smoothing_factor": "0.1", "neftune_noise_alpha": "5", "report_to": "tensorboard",
    "badge": "{out}/b.json", "markdown": "{out}/t.md",
}  # fmt: skip
# What an option needs beside it (and what the least command line then has, too), or takes away.
BESIDE: dict[tuple[str, str], list[str]] = {
    ("train", "truncate"): ["--max-length", "64"],
    ("train", "packing"): ["--max-tokens", "64"],
    ("train", "decay_steps"): ["--schedule", "wsd"],
    ("train", "cycles"): ["--schedule", "cosine_with_restarts"],
    **{
        ("train", o): ["--eval", "{data}"]
        for o in ("eval_every", "metric", "sample", "best_by", "patience")
    },
    ("generate", "system"): ["--chat"],
    ("generate", "template_arg"): ["--chat"],
    **{("merge", o): ["--to", "{out}/m.gguf"] for o in ("type_", "dry", "every")},
    **{(v, o): ["--temperature", "1"] for v in ("generate", "chat") for o in rules._DRAWS},
}
INSTEAD: dict[tuple[str, str], list[str]] = {
    ("generate", "prompts"): ["generate", "{model}"],
    **{("merge", o): ["merge", "{model}", "{run}"] for o in ("to", "type_", "dry", "every")},
    ("pack", "precision"): ["pack", "{model}", "{out}/packed"],
    ("pack", "verify"): ["pack", "{packed}"],
    ("convert", "base"): ["convert", "{run}", "{out}/a.gguf"],
    ("conformance", "as_list"): ["conformance"],
    ("conformance", "mutants"): ["conformance"],
    ("conformance", "suite"): ["conformance"],
    ("suite", "out"): ["suite"],
    ("vectors", "out"): ["vectors"],
    ("vectors", "port"): ["vectors"],
    **{("vectors", o): ["vectors", "--check", "{out}"] for o in ("as_json", "badge", "markdown")},
    ("demo", "out"): ["demo"],
}


# The least command line that an option of an engine's tests is added to.
_SUITE = ["conformance", "--suite", "{data}"]
START: dict[tuple[str, str], list[str]] = {
    **{
        ("conformance", o): [*_SUITE, "--engine", "http://127.0.0.1:9/v1"]
        for o in ("adapters_by", "precision", "form", "api_key", "timeout", "bases", "tests")
    },
    **{("conformance", o): _SUITE for o in ("engine", "restart", "convert")},
    ("conformance", "patience"): [*_SUITE, "--restart", "serve"],
}
# And of those that belong to an objective of training.
_AIM: dict[str, tuple[str, str, list[str]]] = {
    **dict.fromkeys(("beta", "label_smoothing"), ("dpo", "{pairs}", [])),
    "gamma": ("simpo", "{pairs}", []),
    **dict.fromkeys(("desirable_weight", "undesirable_weight"), ("kto", "{pairs}", [])),
    **dict.fromkeys(
        ("temperature", "mix", "top_k"), ("distill", "{data}", ["--teacher", "{model}"])
    ),
    "teacher": ("distill", "{data}", []),
    "teacher_adapter": ("distill", "{data}", []),
    "classes": ("classify", "{texts}", []),
}
START |= {
    ("train", o): ["train", "{model}", data, "{out}/run", "--objective", name, *more]
    for o, (name, data, more) in _AIM.items()
}
INSTEAD[("train", "objective")] = ["train", "{model}", "{pairs}", "{out}/run"]
REFUSED = {"resume": "resume from", "template_arg": "has no argument 'a'"}


class Enough(Exception):
    """What is recorded has been handed down."""


@pytest.fixture
def handed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What reaches the functions that do the work, in words: the verbs' own code runs, theirs not,
    but for what only reads files. Modules that take these functions' names for good are loaded
    before, lest they keep the recorder for the tests that come after."""
    for holder in ("pylora.front.model", "pylora.generation.metrics"):
        importlib.import_module(holder)
    log: list[str] = []

    def spy(target: str, last: bool = False, result: Any = None) -> None:
        module, name = target.rsplit(".", 1)
        before: Callable[..., Any] = getattr(__import__(module, fromlist=[name]), name)

        def record(*args: Any, **kwargs: Any) -> Any:
            log.append(f"{target} {_words(args)} {_words(sorted(kwargs.items()))}")
            if last:
                raise Enough
            return before(*args, **kwargs) if result is None else result

        monkeypatch.setattr(target, record)

    spy("pylora.training.train.train", last=True)
    spy("pylora.training.train.check_out_dir")
    spy("pylora.training.findrate.find_rate", last=True)
    spy("pylora.training.reporting.Reports")
    spy("pylora.training.estimate.ways")
    spy("pylora.training.evaluate.evaluate")
    spy("pylora.generation.metrics.Judge")
    spy("pylora.training.examples.load_examples")
    spy("pylora.training.objectives.choose.choose")
    spy("pylora.training.objectives.choose.read")
    spy("pylora.training.objectives.distill.teach")
    spy("pylora.adapters.plan.resolve")
    spy("pylora.generation.generate.generate", last=True)
    spy("pylora.commands.chat.Chat", last=True)
    spy("pylora.web.log.configure", result=True)
    spy("pylora.web.server.Server", last=True)
    spy("pylora.front.load.load")
    spy("pylora.merging.merge.merge_checkpoint", last=True)
    spy("pylora.merging.merge.unmerge_checkpoint", last=True)
    spy(
        "pylora.merging.to_gguf.merge_to_gguf",
        result=GGUFReport(
            Path("m.gguf"), "q8_0", {}, 0, (Rounded("a.b", "Q8_0", 0.1, 0.2, 0.3),), "none"
        ),
    )
    spy("pylora.adapters.convert.convert", last=True)
    spy("pylora.formats.pack.pack_model", last=True)
    spy("pylora.adapters.combine.combine", last=True)
    spy("pylora.check.check.check_model", result=Report("m", "a", "c", 1, 0, "all of it"))
    spy("pylora.demo.demo.run", last=True)
    spy("pylora.conformance.vectors.all.all_cases", result=[])
    spy("pylora.conformance.vectors.cases.write")
    spy("pylora.commands.look.ported", last=True)
    spy("pylora.conformance.running.command.test", last=True)
    spy("pylora.conformance.running.command.listing")
    spy("pylora.conformance.mutants.hunt.hunt", last=True)
    spy("pylora.conformance.engines.command.test", last=True)
    spy("pylora.conformance.suite.write.write_suite", result={"bases": []})
    spy("pylora.display.plots.adapter_picture")
    spy("pylora.commands.chat.use_template")
    spy("pylora.use")
    yield log
    import pylora

    monkeypatch.undo()
    pylora.use(None)


def _words(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_words, value)) + "]"
    if isinstance(value, dict):
        return _words(sorted(value.items(), key=str))
    if hasattr(value, "arguments"):  # a tokenizer
        return f"tokenizer {value.arguments}"
    if hasattr(value, "precision_report"):
        return f"model in {value.precision_report}"
    text = repr(value)
    return f"<{type(value).__name__}>" if " at 0x" in text or "function" in text else text


def outcome(args: list[str], log: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[Any, ...]:
    """(exit code, what was handed down, what was printed). Nothing else may come out."""
    log.clear()
    capsys.readouterr()
    try:
        code = cli.main(args)
    except Enough:
        code = 0
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return code, tuple(log), said.out, said.err


def typed(verb: str, name: str) -> list[str]:
    """The option with a value that is not its default."""
    param = next(p for p in VERBS[verb].params if p.name == name)
    option = next((o for o in param.opts if o.startswith("--")), param.opts[0])
    if param.is_flag:
        return [param.secondary_opts[0] if param.default is True else option]
    if name in VALUES:
        return [option, {("serve", "port"): "9"}.get((verb, name), VALUES[name])]
    return [option, str(type(param.default or 0)((param.default or 0) + 1))]


@pytest.mark.parametrize(("verb", "name"), OPTIONS)
def test_each_option_is_carried_out(
    verb: str,
    name: str,
    there: dict[str, Path],
    tmp_path: Path,
    handed: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    def filled(args: list[str]) -> list[str]:
        return [a.format(out=tmp_path, **there) if "{" in a else a for a in args]

    start = START.get((verb, name)) or base(verb, there, tmp_path)
    beside = BESIDE.get((verb, name), [])
    without = outcome(filled(start + beside), handed, capsys)
    instead = INSTEAD.get((verb, name), start)
    given = outcome(filled(instead + beside + typed(verb, name)), handed, capsys)
    # There is nothing to resume from, and the tiny model's template has no arguments: said so.
    if (verb, name) == ("train", "template_arg"):
        assert given[0] == 1 and "no conversation" in given[3]
        return
    if name in REFUSED and verb != "chat":  # where it is said when something is answered
        assert given[0] == 1 and REFUSED[name] in given[3]
        return
    assert given[0] == 0, given[3]
    assert given[1:3] != without[1:3], f"{verb} {typed(verb, name)} changes nothing"


@pytest.mark.parametrize("verb", ["train", "generate", "info", "doctor"])
def test_the_backend_is_carried_out_before_and_behind_the_verb(
    verb: str,
    there: dict[str, Path],
    tmp_path: Path,
    handed: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    for args in (["--backend", "numpy"], ["--backend=numpy"]):
        start = base(verb, there, tmp_path)
        for line in (args + start, start + args):
            _, log, _, _ = outcome(line, handed, capsys)
            assert log[0].startswith("pylora.use ['numpy']"), line


# ---- the table ----------------------------------------------------------------------------------


RULES = [(verb, rule) for verb, listed in rules.RULES.items() if verb for rule in listed]


def test_the_table_names_what_there_is() -> None:
    for verb, rule in RULES:
        names = {p.name for p in VERBS[verb].params}
        used = rule.options if isinstance(rule, rules.OneOf) else (rule.option, rule.other)
        assert set(used) <= names, (verb, rule)
    assert {r.option for r in rules.RULES[rules.ROOT]} <= {p.name for p in COMMAND.params}


@pytest.mark.parametrize(("verb", "rule"), RULES)
def test_each_rule_refuses_by_name_and_before_anything_is_read(
    verb: str, rule: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    needed = {"train": 3, "merge": 2, "generate": 1, "plan": 1, "chat": 1, "pack": 1}.get(verb, 0)
    args = [verb, *["/none"] * needed]
    if isinstance(rule, rules.OneOf):
        if not rule.at_least:
            both = [a for option in rule.options[:2] for a in added(verb, option)]
            assert refused([*args, *both], capsys)
        names = rule.options
    elif isinstance(rule, rules.Excludes):
        other = added(verb, rule.other)
        if rule.other == "schedule":
            other = ["--schedule", "constant"]
        if rule.other == "best_by":
            other = ["--best-by", "last"]
        args += ["m:C"] if rule.other == "profile" else []
        args += [*added(verb, rule.option), *other]
        names = (rule.option, rule.other)
    else:
        args += added(verb, rule.option)
        args += ["text"] if verb == "generate" else []
        args += ["--numbers"] if verb == "inspect" else []
        names = (rule.option, rule.other)
    message = refused(args, capsys)
    for name in names:
        param = next(p for p in VERBS[verb].params if p.name == name)
        if param.param_type_name == "option":
            assert any(o in message for o in param.opts), message
        else:
            assert str(param.metavar) in message


def added(verb: str, name: str) -> list[str]:
    param = next(p for p in VERBS[verb].params if p.name == name)
    if param.param_type_name == "argument":
        return ["/none"]
    option = next(o for o in param.opts if o.startswith("--"))
    return [option] if param.is_flag else [option, "3"]


def refused(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The first line on stderr of a command line that is wrong."""
    capsys.readouterr()
    assert cli.main(args) == 2, args
    said = capsys.readouterr()
    assert said.out == "" and "Traceback" not in said.err
    return said.err.splitlines()[0]


def test_a_default_never_clashes_and_no_flag_asks_for_nothing(
    there: dict[str, Path], tmp_path: Path, handed: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    args = base("train", there, tmp_path)
    for more in (["--no-truncate"], ["--no-packing", "--batch-size", "2"], ["--no-resume"]):
        assert outcome(args + more, handed, capsys)[0] == 0


@pytest.mark.parametrize("verb", ["plan", "inspect", "suite", "vectors", "conformance"])
def test_a_backend_is_refused_where_nothing_uses_it(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    args = {"plan": ["m"], "inspect": ["a"], "conformance": ["m:C"]}
    args |= {"suite": ["--out", "o"], "vectors": ["--out", "o"]}
    message = refused(["--backend", "numpy", verb, *args[verb]], capsys)
    assert "--backend" in message and verb in message


# ---- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("--lr", "--learning-rate"), ("--lr", "--learning_rate"), ("--steps", "--max-steps"),
        ("--steps", "--max_steps"), ("--steps", "--iters"), ("--epochs", "--num-train-epochs"),
        ("--epochs", "--num-epochs"), ("--rank", "--lora-r"), ("--rank", "-r"), ("--rank", "--r"),
        ("--alpha", "--lora-alpha"), ("--alpha", "--lora_alpha"), ("--dropout", "--lora-dropout"),
        ("--targets", "--lora_target_modules"), ("--warmup", "--warmup_steps"),
        ("--max-length", "--max-seq-length"), ("--batch-size", "--batch_size"),
        ("--schedule", "--lr_scheduler_type"), ("--recompute", "--gradient_checkpointing"),
        ("--save-every", "--save_steps"), ("--eval-every", "--steps-per-eval"),
    ],
)  # fmt: skip
def test_names_of_other_tools_are_the_same_options(ours: str, theirs: str) -> None:
    from pylora.commands.parse import _names, _spelled

    command = VERBS["train"]
    (spelled,) = _spelled([theirs], _names(command))
    owners = [p.name for p in command.params if spelled in p.opts]
    assert owners == [p.name for p in command.params if ours in p.opts] != []


def test_no_hint_stands_for_an_option_that_exists_everywhere() -> None:
    taken = {o for command in VERBS.values() for p in command.params for o in p.opts}
    everywhere = set.intersection(
        *({o for p in command.params for o in p.opts} for command in VERBS.values())
    )
    assert not everywhere & set(foreign.HINTS)
    assert set(foreign.HINTS) - taken  # and most of them exist nowhere


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["trian"], "did you mean train?"),
        (["finetune"], "did you mean train?"),
        (["fuse"], "did you mean merge?"),
        (["evaluate"], "did you mean eval?"),
        (["xyzzy"], "no verb 'xyzzy' (the verbs: "),
        (["train", "m", "d", "o", "--rankk", "3"], "did you mean --rank?"),
        (["train", "m", "d", "o", "--epoch", "3"], "did you mean --epochs?"),
        (["train", "m", "d", "o", "--lrr=3"], "did you mean --lr?"),
        (["plan", "m", "--dropout", "3"], "it is an option of train"),
        (["--bakend", "c", "info"], "did you mean --backend?"),
        (["train", "m", "d", "o", "--per_device_train_batch_size", "3"], "whole update"),
        (["train", "m", "d", "o", "--bf16"], "--precision bf16"),
        (["train", "m", "d", "o", "--output_dir", "x"], "argument"),
        (["train"], "MODEL, DATA and OUT are missing"),
        (["merge", "m", "a"], "give either OUT or --to"),
        (["train", "m", "d", "o", "--steps"], "--steps needs a value"),
        (["train", "m", "d", "o", "--steps", "many"], "--steps: "),
        (["info", "extra"], "extra is one argument too many"),
        (["train", "m", "d", "o", "--lr", "1", "--lr", "2"], "given twice"),
        (["train", "m", "d", "o", "--lr", "1", "--learning_rate=2"], "are the same"),
        (["generate", "m", "p", "-n3", "-n", "4"], "given twice"),
        (["generate", "m", "- a list"], "behind --"),
        (["merge", "", "a", "o"], "MODEL is empty"),
        (["train", "m", "d", ""], "OUT is empty"),
    ],
)
def test_a_wrong_command_line_says_what_would_be_right(
    args: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert says in refused(args, capsys)


# ---- help ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_every_option_its_default_and_an_example(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = []
    for line in (["--help"], ["-h"]):
        assert cli.main([verb, *line]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] and f"pylora {verb}" in shown[0].split("Example")[-1]
    flat = " ".join(shown[0].split())
    for param in VERBS[verb].params:
        if param.param_type_name == "option" and param.name != "help":
            assert param.help, (verb, param.name)
            assert any(o in flat for o in param.opts)
            if isinstance(param.default, (int, float)) and not param.is_flag:
                assert f"(default: {param.default:g})" in flat


def test_without_arguments_help_goes_to_stderr_and_the_code_is_2(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main([]) == 2
    said = capsys.readouterr()
    assert said.out == "" and "train" in said.err and "usage: pylora" in said.err
    assert cli.main(["help", "merge"]) == 0 and "MODEL ADAPTER [OUT]" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    import pylora

    for option in ("--version", "-V"):
        assert cli.main([option]) == 0
        assert capsys.readouterr().out == f"pylora {pylora.__version__}\n"


def test_completion_knows_verbs_and_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("_PYLORA_COMPLETE", "complete_bash")
    for words, current, wanted in (
        ("pylora tr", 1, "train"),
        ("pylora train --lea", 2, "--learning-rate"),
    ):
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(current))
        cli.main([])
        assert wanted in capsys.readouterr().out.split()
