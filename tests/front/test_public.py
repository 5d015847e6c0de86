"""What a newcomer meets first: the names, what is printed, and what a mistaken type is told."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tokenizers")

from tiny_model import write_tiny_model

import pylora
from pylora.adapters.inspect import inspect as inspect_adapter
from pylora.check.check import check
from pylora.errors import PyloraError, WrongTypeError
from pylora.formats import open_checkpoint
from pylora.formats.safetensors import SafeTensors
from pylora.generation.generate import generate, stream
from pylora.generation.prompt_cache import PromptCache
from pylora.generation.sampling import Sampling
from pylora.generation.text import TextStream
from pylora.merging.merge import merge_adapter, merge_checkpoint, unmerge_checkpoint
from pylora.model.llama import random_weights
from pylora.training.config import TrainConfig
from pylora.training.evaluate import evaluate
from pylora.training.examples import Example, load_examples
from pylora.training.train import train
from pylora.types import Residue

RECORDS = [{"prompt": "truth exists.", "completion": " ∃Φ"}]


class Kit:
    """One of each thing, by the names that the table uses."""

    def __init__(self, folder: Path) -> None:
        self.path = write_tiny_model(folder / "model")
        self.text, self.texts, self.ids, self.lists = "time", ["time"], [1, 2, 3], [[1, 2, 3]]
        self.file = self.path / "model.safetensors"
        self.checkpoint = open_checkpoint(self.path)
        self.model_config = self.checkpoint.config
        self.modules = self.model_config.modules()
        self.tokenizer = self.checkpoint.tokenizer()
        self.llama = pylora.Llama.from_checkpoint(self.checkpoint)
        self.lora_config = pylora.LoraConfig.fresh(2)
        self.plan = pylora.resolve(self.lora_config, self.modules)
        self.adapter = pylora.Adapter.init(self.plan, self.lora_config)
        self.adapter_path = folder / "adapter"
        self.adapter.save(self.adapter_path)
        self.examples = load_examples(RECORDS, self.tokenizer)
        self.train_config = TrainConfig(steps=1)
        self.result = train(self.llama, self.adapter, self.examples, self.train_config)
        self.llama.detach()
        self.pool = pylora.AdapterPool(self.llama)
        self.model = pylora.load(self.path)
        self.lora = next(iter(self.adapter.values()))
        self.module = self.llama.modules[next(iter(self.adapter))]
        self.number, self.nothing, self.list, self.dict = 3, None, ["x"], {"x": 1}
        self.array = np.ones((2, 3), np.float32)
        self.bytes = b"time"
        self.llama_class = pylora.Llama
        self.out = folder / "out"


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    return Kit(tmp_path_factory.mktemp("kit"))


# What is called, what is passed in the place that is tried, and (of some) what the advice names.
# A call is written with X for that place.
def _rows() -> list[tuple[str, Any, dict[str, str]]]:
    p = pylora
    model = {"path": "pylora.load", "text": "pylora.load", "checkpoint": "from_checkpoint"}
    model |= {"model_config": "no weights", "model": "model.llama", "adapter": "", "number": ""}
    model |= {"nothing": "", "llama_class": "the class Llama itself", "dict": "", "list": ""}
    adapter = {"path": "Adapter.load", "text": "Adapter.load", "plan": "Adapter.init"}
    adapter |= {"lora_config": "Adapter.init", "result": "result.adapter", "number": "", "list": ""}
    adapter |= {"llama": "", "ids": "", "bytes": ""}
    whole = {"path": "Adapter.load", "text": "Adapter.load", "result": "result.adapter"}
    whole |= {"dict": "Adapter(config, plan", "number": "", "nothing": "", "llama": "", "plan": ""}
    plan = {"lora_config": "resolve(config", "adapter": "adapter.plan", "llama": "resolve"}
    plan |= {"path": "", "text": "", "dict": "", "nothing": "", "number": ""}
    settings = {"dict": "from_dict", "text": "read_config", "path": "read_config", "nothing": ""}
    settings |= {"plan": "was made of", "train_config": "how to train", "model_config": "adapter's"}
    settings |= {"adapter": "adapter.config", "number": ""}
    modules = {
        "model_config": "config.modules()",
        "llama": "model.config.modules()",
        "path": "open",
    }
    modules |= {"checkpoint": "checkpoint.config.modules()", "model": "model.config.modules()"}
    modules |= {"text": "open_checkpoint", "list": "", "nothing": "", "number": "", "dict": ""}
    config = {"dict": "from_hf", "llama": "model.config", "checkpoint": "checkpoint.config"}
    config |= {"lora_config": "adapter's", "path": "open_checkpoint", "text": "", "nothing": ""}
    checkpoint = {"path": "open_checkpoint(path)", "text": "open_checkpoint(path)", "number": ""}
    checkpoint |= {"llama": "packed weights", "nothing": "", "model_config": ""}
    ids = {"text": "tokenizer.encode", "path": "encode", "number": "a list of ids", "nothing": ""}
    ids |= {"bytes": "tokenizer.encode", "dict": ""}
    prompts = {"text": "tokenizer.encode", "texts": "model.generate(texts)", "ids": "[ids]"}
    prompts |= {"path": "", "number": "", "nothing": "", "dict": ""}
    text = {"ids": "tokenizer.decode", "path": "read_text", "bytes": "decode()", "number": ""}
    text |= {"nothing": "", "array": "decode"}
    tokenizer = {"path": "open_checkpoint", "text": "", "checkpoint": "checkpoint.tokenizer()"}
    tokenizer |= {"llama": "token ids alone", "model": "model.tokenizer", "nothing": ""}
    examples = {"path": "load_examples", "text": "load_examples", "texts": "load_examples"}
    examples |= {
        "ids": "Example.of",
        "lists": "Example.of",
        "number": "",
        "dict": "",
        "nothing": "",
    }
    run = {"dict": "TrainConfig(**values)", "lora_config": "what to train", "number": "steps="}
    run |= {"text": "", "ids": ""}
    pool = {"dict": "AdapterPool(model)", "adapter": "AdapterPool(model)", "list": "", "number": ""}
    out = {"number": "", "nothing": "", "llama": "", "adapter": "save it first", "bytes": ""}
    location = {"number": "", "nothing": "", "llama": "", "checkpoint": "", "bytes": "", "list": ""}
    lora = {"adapter": "model.attach", "number": "", "text": "", "dict": "", "plan": ""}
    array = {"list": "numpy", "ids": "numpy", "text": "ids", "number": "", "nothing": ""}
    seqs = {"ids": "Seqs.of", "number": "Seqs.of", "text": ""}
    cache = {"nothing": "model.kv_cache", "number": "", "dict": ""}
    forward = {"nothing": "", "array": "logits, cache", "list": "", "number": ""}
    backend = {"number": "", "list": "", "path": "its name", "dict": ""}
    messages = {"text": "'role'", "dict": "[message]", "number": "", "nothing": "", "bytes": ""}
    name = {"adapter": "the name comes first", "number": "", "nothing": "", "list": "one name"}

    return [
        ("Llama.attach(X)", lambda k, x: k.llama.attach(x), adapter | {"nothing": "detach"}),
        ("Llama.check(X)", lambda k, x: k.llama.check(x), adapter | {"nothing": ""}),
        ("Llama(X)", lambda k, x: p.Llama(x, random_weights(k.model_config)), config),
        (
            "Llama(, X)",
            lambda k, x: p.Llama(k.model_config, x),
            {"dict": "weights.get", "path": ""},
        ),
        ("Llama.random(X)", lambda k, x: p.Llama.random(x), config),
        ("Llama.from_checkpoint(X)", lambda k, x: p.Llama.from_checkpoint(x), checkpoint),
        ("Llama(backend=X)", lambda k, x: p.Llama.random(k.model_config, backend=x), backend),
        ("Llama.forward(X)", lambda k, x: k.llama.forward(x), ids),
        ("Llama.forward(, X)", lambda k, x: k.llama.forward([1, 2, 3], x), seqs),
        ("Llama.loss(X)", lambda k, x: k.llama.loss(x, [1, 2, 3]), ids),
        ("Llama.loss(, X)", lambda k, x: k.llama.loss([1, 2, 3], x), ids),
        ("Llama.loss(seqs=X)", lambda k, x: k.llama.loss([1], [2], x), seqs),
        ("Llama.backward(X)", lambda k, x: k.llama.backward(x, k.llama.forward([1])[1]), array),
        ("Llama.backward(, X)", lambda k, x: k.llama.backward(k.array, x), forward),
        ("Llama.decode(X)", lambda k, x: k.llama.decode(x, k.llama.kv_cache(1, 9), [3]), ids),
        ("Llama.decode(, X)", lambda k, x: k.llama.decode([1], x, [1]), cache),
        ("LoRALinear.lora = X", lambda k, x: setattr(k.module, "lora", x), lora),
        ("LoRALinear.forward(X)", lambda k, x: k.module.forward(x), array),
        ("KVCache(X)", lambda k, x: p.KVCache(x, 1, 1, ops=k.llama.ops), config),
        ("Attention(X)", lambda k, x: p.Attention(x, 0, lambda n: n, ops=k.llama.ops), config),
        ("Block(X)", lambda k, x: p.Block(x, 0, lambda n: n, ops=k.llama.ops), config),
        ("resolve(X)", lambda k, x: p.resolve(x, k.modules), settings),
        ("resolve(, X)", lambda k, x: p.resolve(k.lora_config, x), modules),
        ("Adapter(X)", lambda k, x: p.Adapter(x, k.plan, k.adapter), settings),
        ("Adapter(, X)", lambda k, x: p.Adapter(k.lora_config, x, k.adapter), plan),
        ("Adapter(,, X)", lambda k, x: p.Adapter(k.lora_config, k.plan, x), adapter),
        ("Adapter.init(X)", lambda k, x: p.Adapter.init(x, k.lora_config), plan),
        ("Adapter.init(, X)", lambda k, x: p.Adapter.init(k.plan, x), settings),
        ("Adapter.load(X)", lambda k, x: p.Adapter.load(x, k.modules), location),
        (
            "Adapter.load(, X)",
            lambda k, x: p.Adapter.load(k.adapter_path, x),
            {kind: said for kind, said in modules.items() if kind != "model_config"},
        ),
        (
            "Adapter.load(base=X)",
            lambda k, x: p.Adapter.load(k.adapter_path, k.modules, base=x),
            {"checkpoint": "checkpoint.load", "path": ""},
        ),
        ("Adapter.save(X)", lambda k, x: k.adapter.save(x), out),
        ("Adapter.stack(X)", lambda k, x: p.Adapter.stack(x), {"adapter": "[(", "path": ""}),
        ("combine(X)", lambda k, x: p.combine(x), {"adapter": "[(", "path": ""}),
        ("combine([(X, 1)])", lambda k, x: p.combine([(x, 1.0)], "svd"), whole),
        ("Server(X)", lambda k, x: p.Server(x), {"number": "", "nothing": ""}),
        ("Adapter.stack([X])", lambda k, x: p.Adapter.stack([x]), {"adapter": "(adapter, 1.0)"}),
        ("Adapter.stack([(X, 1)])", lambda k, x: p.Adapter.stack([(x, 1.0)]), whole),
        (
            "Adapter.stack([(, X)])",
            lambda k, x: p.Adapter.stack([(k.adapter, x)]),
            {"text": "", "nothing": ""},
        ),
        ("parameters(X)", lambda k, x: p.parameters(x), whole),
        ("inspect(X)", lambda k, x: inspect_adapter(x), adapter | {"nothing": ""}),
        (
            "LoraConfig.from_dict(X)",
            lambda k, x: p.LoraConfig.from_dict(x),
            {"text": "read_config", "path": "read_config", "nothing": "", "list": ""},
        ),
        (
            "LlamaConfig.from_hf(X)",
            lambda k, x: p.LlamaConfig.from_hf(x),
            {"text": "", "path": "", "nothing": "", "list": ""},
        ),
        ("AdapterPool(X)", lambda k, x: p.AdapterPool(x), model),
        ("AdapterPool.add(, X)", lambda k, x: k.pool.add("a", x), adapter | {"nothing": ""}),
        ("open_checkpoint(X)", lambda k, x: open_checkpoint(x), location | {"adapter": ""}),
        ("generate(X)", lambda k, x: generate(x, [[1]], 1), model),
        ("generate(, X)", lambda k, x: generate(k.llama, x, 1), prompts),
        ("generate(, [X])", lambda k, x: generate(k.llama, [x], 1), {"dict": "", "path": "read"}),
        ("generate(pool=X)", lambda k, x: generate(k.llama, [[1]], 1, pool=x), pool),
        ("stream(X)", lambda k, x: stream(x, [[1]], 1), model),
        ("PromptCache(X)", lambda k, x: PromptCache(x), model),
        ("train(X)", lambda k, x: train(x, k.adapter, k.examples), model),
        ("train(, X)", lambda k, x: train(k.llama, x, k.examples), adapter | {"nothing": ""}),
        ("train(,, X)", lambda k, x: train(k.llama, k.adapter, x), examples),
        ("train(,,, X)", lambda k, x: train(k.llama, k.adapter, k.examples, x), run),
        (
            "train(out_dir=X)",
            lambda k, x: train(k.llama, k.adapter, k.examples, k.train_config, x),
            {"number": "", "llama": "", "bytes": ""},
        ),
        (
            "train(eval_examples=X)",
            lambda k, x: train(k.llama, k.adapter, k.examples, k.train_config, None, x),
            {"path": "load_examples", "text": "load_examples", "number": ""},
        ),
        (
            "train(on_step=X)",
            lambda k, x: train(k.llama, k.adapter, k.examples, k.train_config, on_step=x),
            {"number": "", "text": ""},
        ),
        ("evaluate(X)", lambda k, x: evaluate(x, k.examples), model),
        ("evaluate(, X)", lambda k, x: evaluate(k.llama, x), examples),
        ("load_examples(X)", lambda k, x: load_examples(x, k.tokenizer), {"number": "", "ids": ""}),
        ("load_examples(, X)", lambda k, x: load_examples(RECORDS, x), tokenizer),
        ("Tokenizer.encode(X)", lambda k, x: k.tokenizer.encode(x), text | {"texts": "for t in"}),
        ("Tokenizer.decode(X)", lambda k, x: k.tokenizer.decode(x), ids),
        ("Tokenizer.apply_chat(X)", lambda k, x: k.tokenizer.apply_chat(x), messages),
        ("merge_checkpoint(X)", lambda k, x: merge_checkpoint(x, k.adapter_path, k.out), location),
        ("merge_checkpoint(, X)", lambda k, x: merge_checkpoint(k.path, x, k.out), location),
        ("merge_checkpoint(,, X)", lambda k, x: merge_checkpoint(k.path, k.adapter_path, x), out),
        ("merge_adapter(X)", lambda k, x: merge_adapter(x, k.adapter, k.out), checkpoint),
        ("merge_adapter(, X)", lambda k, x: merge_adapter(k.checkpoint, x, k.out), whole),
        ("unmerge_checkpoint(X)", lambda k, x: unmerge_checkpoint(x, k.out), out),
        ("unmerge_checkpoint(, X)", lambda k, x: unmerge_checkpoint(k.path, x), out),
        ("check(X)", lambda k, x: check(x, k.adapter, None), checkpoint),  # type: ignore[arg-type]
        ("check(, X)", lambda k, x: check(k.checkpoint, x, None), whole),  # type: ignore[arg-type]
        ("use(X)", lambda k, x: p.use(x), backend),
        ("Model(X)", lambda k, x: p.Model(x, k.llama), checkpoint),
        ("Model(, X)", lambda k, x: p.Model(k.checkpoint, x), model),
        ("load(X)", lambda k, x: p.load(x), location),
        ("load(, X)", lambda k, x: p.load(k.path, x), {"number": "", "list": "", "plan": ""}),
        (
            "Model.generate(X)",
            lambda k, x: k.model.generate(x),
            {"ids": "model.llama", "lists": "model.llama", "path": "read_text", "nothing": ""}
            | {"dict": "model.chat", "bytes": "decode()", "number": "", "array": ""},
        ),
        (
            "Model.chat(X)",
            lambda k, x: k.model.chat(x),
            {"ids": "tokenizer.decode", "path": "", "number": "", "nothing": "", "bytes": ""},
        ),
        (
            "Model.chat(system=X)",
            lambda k, x: k.model.chat("a", system=x),
            {"ids": "", "dict": "", "number": ""},
        ),
        ("Model.generate(stop=X)", lambda k, x: k.model.generate("a", stop=x), {"number": ""}),
        (
            "Model.generate(adapter=X)",
            lambda k, x: k.model.generate("a", adapter=x),
            {"adapter": "adapters.add", "number": ""},
        ),
        ("Model.score(X)", lambda k, x: k.model.score(x), text | {"dict": ""}),
        (
            "Model.train(X)",
            lambda k, x: k.model.train(x),
            {"number": "", "nothing": "", "texts": "'prompt'", "bytes": "", "dict": ""},
        ),
        ("Model.train(out=X)", lambda k, x: k.model.train(RECORDS, x), {"number": "", "bytes": ""}),
        ("Model.train(adapter=X)", lambda k, x: k.model.train(RECORDS, adapter=x), name),
        ("Model.merge(X)", lambda k, x: k.model.merge(x), out),
        ("Model.save(X)", lambda k, x: k.model.save(x), out),
        ("Adapters.add(X)", lambda k, x: k.model.adapters.add(x, k.adapter), name),
        (
            "Adapters.add(, X)",
            lambda k, x: k.model.adapters.add("a", x),
            {"number": "", "nothing": "", "plan": "", "result": "result.adapter", "dict": ""},
        ),
        ("Adapters.use(X)", lambda k, x: k.model.adapters.use(x), {"adapter": "add", "number": ""}),
        ("pylora.generate(X)", lambda k, x: p.generate(x, "a"), {"llama": "parts", "number": ""}),
        ("pylora.train(X)", lambda k, x: p.train(x, []), {"llama": "parts", "nothing": "load"}),
    ]


ROWS = _rows()
CASES = [
    pytest.param(call, given, advice, id=f"{where} with {given}")
    for where, call, wrong in ROWS
    for given, advice in wrong.items()
]


@pytest.mark.parametrize(("call", "given", "advice"), CASES)
def test_a_wrong_type_is_told_what_to_pass(kit: Kit, call: Any, given: str, advice: str) -> None:
    with pytest.raises(WrongTypeError) as error:
        call(kit, getattr(kit, given))
    said = str(error.value)
    assert isinstance(error.value, (PyloraError, TypeError)) and "\n" not in said
    assert advice in said and 15 < len(said) < 400, said
    assert not kit.out.exists() and not any(m.lora for m in kit.llama.modules.values())


def test_the_table_has_every_public_function() -> None:
    """Each name of `pylora` that takes one of these things is tried above."""
    tried = {where.split("(")[0].split(".")[0].split(" ")[0] for where, _, _ in ROWS} | {
        # Plain data, checked field by field where they are used; or no argument to mistake.
        "LoRA", "LoRAGrad", "DropKey", "Seqs", "ModuleSpec", "Plan", "LoraConfig", "LlamaConfig",
        "Embedding", "IGNORE", "PyloraError", "build_info", "set_num_threads",
    }  # fmt: skip
    assert {name for name in pylora.__all__ if not name.startswith("_")} <= tried


# ---- names and help ----------------------------------------------------------------------------


def test_dir_shows_the_public_names_alone() -> None:
    program = "import pylora; print(*dir(pylora)); print(*pylora.__all__)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    shown, public = (line.split() for line in done.stdout.splitlines())
    assert shown == sorted(public)
    assert not {"Any", "importlib", "platform", "annotations", "TYPE_CHECKING"} & set(shown)
    assert {"load", "Model", "train", "generate", "Adapter", "Llama"} <= set(shown)


def test_every_public_name_is_there_and_documented() -> None:
    for name in pylora.__all__:
        value = getattr(pylora, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert (inspect.getdoc(value) or "").strip(), name
            for method, function in vars(value).items() if inspect.isclass(value) else ():
                public = not method.startswith("_") and callable(function)
                assert not public or inspect.getdoc(function), f"{name}.{method}"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("chat", "load(path).chat"),
        ("Trainer", "train"),
        ("from_pretrained", "pylora.load"),
        ("AutoModelForCausalLM", "pylora.load"),
        ("PeftModel", "adapter="),
        ("merge", "merge"),
        ("TrainConfig", "pylora.training.config.TrainConfig"),
        ("lod", "pylora.load"),
        ("Lama", "pylora.Llama"),
    ],
)
def test_a_name_that_is_not_there_leads_to_one_that_is(name: str, hint: str) -> None:
    with pytest.raises(AttributeError, match="did you mean pylora") as error:
        getattr(pylora, name)
    assert hint in str(error.value)


def test_every_hint_leads_somewhere() -> None:
    for meant in pylora._MEANT.values():
        first, *rest = meant.split("(")[0].split(".")
        value = getattr(pylora, first)
        for part in rest:
            value = getattr(value, part)
    with pytest.raises(AttributeError, match="no attribute '__wrapped__'$"):
        getattr(pylora, "__wrapped__")  # noqa: B009
    assert not hasattr(pylora, "_ipython_display_")


def test_parts_are_attributes() -> None:
    program = """
import pylora
for part in sorted(pylora._WINGS):
    assert getattr(pylora, part).__name__ == "pylora." + part
assert callable(pylora.train) and callable(pylora.generate)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_help_leads_on() -> None:
    text = pylora.__doc__ or ""
    assert "pylora.load(" in text and "help(pylora.Model)" in text
    for wing in ("formats", "adapters", "training", "generation", "merging", "backends"):
        assert f"pylora.{wing}" in text
    for name in ("temperature", "top_p", "stop", "adapter", "Raises"):
        assert name in (pylora.Model.generate.__doc__ or "")


# ---- what is printed ---------------------------------------------------------------------------


def test_what_is_printed_is_one_line_that_informs(kit: Kit) -> None:
    kit.model.adapters.add("tone", kit.adapter, replace=True)
    logits, cache = kit.llama.forward([1, 2])
    shown: list[tuple[Any, tuple[str, ...]]] = [
        (kit.model, ("llama", "2 layers", "parameters", "fp32")),
        (kit.model.adapters, ("tone",)),
        (kit.llama, ("llama", "2 layers", "no adapter")),
        (kit.adapter, ("14 modules", "r 2", "alpha 4", "parameters")),
        (kit.plan, ("14 modules", "r 2", "alpha 4", "scale 2")),
        (kit.plan.entries[0], ("q_proj", "r 2")),
        (kit.lora, ("A=float32[2, ", "scale=2")),
        (kit.checkpoint, ("model", "llama", "parameters")),
        (kit.tokenizer, ("400 tokens", "chat template")),
        (kit.pool, ("AdapterPool",)),
        (kit.result, ("1 steps", "loss", "tokens/s")),
        (kit.examples, ("1,", "tokens")),
        (kit.examples[0], ("data[0]", "to learn")),
        (kit.module, ("q_proj", "fp32")),
        (kit.llama.embed_tokens, ("embed_tokens",)),
        (kit.llama.blocks[0], ("layers.0",)),
        (kit.llama.blocks[0].attention, ("heads",)),
        (kit.llama.ops, ("c",) if kit.llama.ops.name == "c" else (kit.llama.ops.name,)),
        (kit.module.W, ("fp32",)),
        (kit.llama.kv_cache(2, 8), ("2 slots of 8 tokens",)),
        (kit.model.score("truth exists"), ("tokens", "perplexity")),
        (cache, ("ModelCache",)),
        (pylora.Seqs.of([3] * 500), ("Seqs", "int64[501]")),
        (Residue(np.zeros(9, np.int64), np.zeros(9, np.uint32)), ("int64[9]",)),
        (SafeTensors(kit.file), ("tensors",)),
        (PromptCache(kit.llama), ("0 tokens",)),
        (TextStream(kit.tokenizer, [1]), ("0 tokens",)),
        (Example.of([1, 2], [True, True]), ("1 tokens",)),
    ]  # fmt: skip
    shown += [
        (kit.lora_config, ("r", "lora_alpha=4", "target_modules")),
        (kit.train_config, ("steps=1",)),
        (kit.model_config, ("num_hidden_layers=2",)),
        (Sampling(0.5), ("temperature=0.5",)),
    ]
    for value, parts in shown:
        text = repr(value)
        assert "\n" not in text and len(text) <= 460 and " object at 0x" not in text, text
        assert all(part in text for part in parts), text


def test_alpha_has_one_rule_for_fresh_settings_and_another_for_files() -> None:
    assert pylora.LoraConfig.fresh(16).lora_alpha == 32
    assert pylora.LoraConfig.fresh(16, 8).lora_alpha == 8
    assert pylora.LoraConfig.from_dict({"r": 16, "target_modules": ["q_proj"]}).lora_alpha == 8
    with pytest.raises(PyloraError, match="no field 'dropout'; did you mean lora_dropout"):
        pylora.LoraConfig.fresh(4, dropout=0.1)
