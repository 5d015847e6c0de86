"""Laws of what else lies in an adapter's directory: settings that are JSON, and pickles, which are
not touched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pylora.conformance.laws.container import REFUSED, law, made_of, put, turned
from pylora.conformance.laws.files import CONFIG, WEIGHTS, adapters, compare, fitting
from pylora.conformance.testcase import Problem, Trial


class _Pickled:
    """Unpickling it writes a file."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (Path(self.marker),)


def _pickles(t: Trial, p: Problem) -> None:
    """No file of a directory is unpickled, whatever its name."""
    import pickle

    p = fitting(p)
    marker = t.directory() + "/unpickled"
    poison = pickle.dumps(_Pickled(marker))
    good = made_of(p).bytes()
    config = json.dumps({"peft_type": "LORA", **p.config}).encode()
    for names, weights in (
        (("adapter_model.bin",), None),
        (("adapter_model.bin", "adapter_model.pt", "adapter_model.pth", "adapter_model.pkl"), None),
        ((), poison),
        (("adapter_model.bin", "training_args.bin", "optimizer.pt", "rng_state.pth"), good),
        (("adapter_config.pkl", "pytorch_model.bin"), good),
    ):
        directory = t.directory() + "/adapter"
        t.write(f"{directory}/{CONFIG}", config)
        for name in names:
            t.write(f"{directory}/{name}", poison)
        if weights is not None:
            t.write(f"{directory}/{WEIGHTS}", weights)
        if weights is good:
            compare(t, t.load(directory, p.modules), adapters(p), p)
        else:
            t.must_raise(f"{names or WEIGHTS}, a pickle", "load", directory, p.modules)
        if Path(marker).exists():
            t.fail(f"load unpickled {names or WEIGHTS}: code of whoever wrote the file has run")


def _config_texts(p: Problem) -> dict[str, bytes]:
    text = json.dumps({"peft_type": "LORA", **p.config})
    inner, r = text[1:], p.config["r"]
    return {
        "a setting twice": f'{{"r": {r}, {inner}'.encode(),
        "a setting twice, differently": f'{{"r": {r + 1}, {inner}'.encode(),
        "a pattern's key twice": f'{text[:-1]}, "alpha_pattern": {{"x": 1, "x": 2}}}}'.encode(),
        "NaN": f'{{"lora_dropout": NaN, {inner}'.encode(),
        "Infinity": f'{{"lora_dropout": Infinity, {inner}'.encode(),
        "NaN in a setting that has no effect": f'{{"revision": NaN, {inner}'.encode(),
        "1e999": f'{{"lora_dropout": 1e999, {inner}'.encode(),
        "something behind the object": f"{text} {{}}".encode(),
        "a comma too many": f"{text[:-1]},}}".encode(),
        "no object but a list": f"[{text}]".encode(),
        "no object but null": b"null",
        "bytes that are not UTF-8": text[:-1].encode() + b', "revision": "\xff"}',
        "half of the text": text[: len(text) // 2].encode(),
        "nothing": b"",
        "Python in place of JSON": repr({"peft_type": "LORA", **p.config}).encode(),
        "lists that are nested too deep": (
            f'{text[:-1]}, "revision": '.encode() + b"[" * 50000 + b"]" * 50000 + b"}"
        ),
    }


def _refuses_texts(t: Trial, p: Problem) -> None:
    p = fitting(p)
    good = made_of(p).bytes()
    t.load(put(t, p, good), p.modules)
    bad = _config_texts(p)
    for why in turned(list(bad), p.seed):
        t.must_raise(f"a {CONFIG} with {why}", "load", put(t, p, good, bad[why]), p.modules)
    for lacks in (CONFIG, WEIGHTS):
        directory = put(t, p, good)
        Path(directory, lacks).unlink()
        t.must_raise(f"a directory without {lacks}", "load", directory, p.modules)
    t.must_raise("a directory that is not there", "load", t.directory() + "/none", p.modules)


LAWS = (
    law(
        "K25",
        "Nothing is unpickled.",
        "a pickle that would write a file, under six names and as the weights: refused where it is "
        "all there is, and never run",
        "whoever publishes an adapter runs code on every machine that loads it",
        ("K-7",),
        _pickles,
        20,
    ),
    law(
        "K26",
        "Settings that are not JSON, or say a thing twice, are an error.",
        f"16 texts in place of {CONFIG}, and none: {REFUSED}",
        "another parser takes the other value; NaN passes every comparison",
        ("K-10",),
        _refuses_texts,
        30,
    ),
)
