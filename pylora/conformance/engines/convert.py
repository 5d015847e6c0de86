"""Tests a converter: runs it on each adapter of a suite, and compares the numbers that come out.

What comes out may be an adapter of another form or a merged model. An adapter whose rule the output
cannot say must be refused (an exit code that is not 0, or nothing written); one that must be
refused must not become a file that loads.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pylora.conformance.engines import verdict as v
from pylora.conformance.engines.book import Book
from pylora.conformance.engines.deltas import Deltas, read
from pylora.conformance.engines.process import Process, words
from pylora.conformance.engines.run import Finding
from pylora.conformance.engines.verdict import Verdict
from pylora.conformance.suite import adapters, bases
from pylora.conformance.suite.adapters import Adapter, Meaning
from pylora.conformance.suite.bases import Base
from pylora.conformance.suite.cases import CASES
from pylora.conformance.suite.wrong import sentence, wrongs
from pylora.errors import ConfigError, PyloraError

Array = np.ndarray[Any, Any]
_SHARE = "of the largest number"


class Conversion:
    """A command with {in} and {out} (and {base}), against a suite."""

    def __init__(
        self,
        book: Book,
        template: str,
        form: str,
        timeout: float,
        say: Callable[[Finding], None],
        only: Sequence[str] = (),
    ) -> None:
        """ConfigError where the command has no {in} or no {out}."""
        for name in ("{in}", "{out}"):
            if name not in template:
                raise ConfigError(f"--convert {template!r}: the command must have {name}")
        if form not in ("peft", "gguf", "mlx"):
            raise ConfigError(f"there is no form {form!r}; there are peft, gguf, mlx")
        self.book, self.template, self.form = book, template, form
        self.timeout, self.say, self.only = timeout, say, only

    def all(self, wanted: Sequence[str]) -> None:
        """Every adapter of these bases, or of all."""
        for entry in self.book.bases(list(wanted)):
            base = bases.make(entry["family"], entry["tied"], self.book.manifest["seed"])
            for case in entry["cases"]:
                if self.only and case["name"] not in self.only:
                    continue
                form = case["forms"][self.form]
                if "path" not in form:
                    self._note(entry, case["name"], case["rule"], _unsaid(form), time.monotonic())
                    continue
                work = partial(self._judge, case, base)
                self._each(entry, case["name"], case["rule"], form["path"], work)
            for bad in entry["refuse"]:
                name, path = f"refuse {bad['name']}", bad["path"]
                if bad["form"] == self.form and (not self.only or name in self.only):
                    self._each(entry, name, bad["why"], path, _accepted)

    def _note(self, entry: Any, test: str, rule: str, found: Verdict, since: float) -> None:
        self.say(Finding(entry["name"], test, rule, found, time.monotonic() - since))

    def _each(
        self, entry: Any, test: str, rule: str, source: str, work: Callable[[Deltas], Verdict]
    ) -> None:
        """Runs the command on one adapter; `work` judges what it wrote."""
        since = time.monotonic()
        hf = Path(self.book.path(entry["hf"]))
        with tempfile.TemporaryDirectory(prefix="pylora-convert-") as folder:
            there = Path(folder)
            found = self._run(entry, self.book.path(source), there / "out")
            canary = there / self.book.manifest["canary"]
            if canary.exists():
                found = Verdict(v.FAILED, "the pickle's program was RUN")
            elif found is None:
                try:
                    found = work(read(there / "out", hf))
                except PyloraError as error:
                    found = _unread(str(error), test)
            elif found.kind == v.REFUSED:
                found = self._refusal(entry, test, found)
        self._note(entry, test, rule, found, since)

    def _run(self, entry: Any, source: str, out: Path) -> Verdict | None:
        """The command's own verdict; None where it says that it is done."""
        gguf = entry["gguf"]
        values: Mapping[str, str | list[str] | None] = {
            "in": source,
            "out": str(out),
            "base": self.book.path(entry["hf"]),
            "gguf": None if gguf is None else self.book.path(gguf),
        }
        process = Process(words(self.template, values), out.parent)
        try:
            code = process.wait(self.timeout)
            text = process.tail()
        finally:
            process.stop()
        if code is None:
            return Verdict(v.FAILED, f"the command does not end within {self.timeout:g} s")
        if code < 0:
            return Verdict(v.FAILED, f"the command CRASHED (signal {-code}): {text}")
        if code > 0 or not out.exists() or (out.is_dir() and not any(out.iterdir())):
            return Verdict(v.REFUSED, f"exit code {code}: {text}")
        return None

    def _refusal(self, entry: Any, test: str, found: Verdict) -> Verdict:
        if test.startswith("refuse "):
            return Verdict(v.RIGHT, f"refused: {found.text}")
        (case,) = (c for c in entry["cases"] if c["name"] == test)
        if case["may_be_refused"]:
            return Verdict(v.REFUSED, f"allowed ({case['may_be_refused']}): {found.text}")
        return Verdict(v.FAILED, f"refused, though it is an ordinary adapter: {found.text}")

    def _judge(self, case: Any, base: Base, got: Deltas) -> Verdict:
        (known,) = (c for c in CASES if c.name == case["name"])
        adapter = adapters.draw(known, base, self.book.manifest["seed"])
        return judge(adapter, got)


def judge(adapter: Adapter, got: Deltas) -> Verdict:
    """What was made of an adapter, compared as numbers: largest difference of a module's update, as
    a share of the largest number of the right one."""
    meaning, base = adapter.meaning(), adapter.base
    allowed = 8 * got.rounding + 2.0**-20
    if got.replaced:  # rounding the sum, where the base's weight is about as large
        allowed += 4 * got.rounding
    right = changes(base, meaning)
    mine = _mine(base, got)
    off = apart(mine, right)
    if off <= allowed:
        return Verdict(v.RIGHT, got.kind, "", off, allowed, _SHARE)
    ranked = sorted((apart(mine, changes(base, m)), r) for r, m in wrongs(adapter).items())
    if ranked and ranked[0][0] <= allowed:
        rule = ranked[0][1]
        return Verdict(v.WRONG, f"{got.kind}: {sentence(rule)}", rule, off, allowed, _SHARE)
    what = _difference(mine, right)
    return Verdict(
        v.WRONG, f"{got.kind}: {what}; by no rule that is known", "", off, allowed, _SHARE
    )


def changes(base: Base, meaning: Meaning) -> dict[str, Array]:
    """Every tensor that an adapter changes, by its name, as the difference from the base's. A bias
    of B is one of the module, as a merged model has it."""
    out: dict[str, Array] = {}
    for path, lora in meaning.loras.items():
        if lora.rank:
            delta = lora.scale * (lora.B @ lora.A)
            out[f"{path}.weight"] = delta.T if path == "model.embed_tokens" else delta
        if lora.base_bias is not None:
            out[f"{path}.bias"] = lora.base_bias - _weight(base, f"{path}.bias")
        if lora.bias is not None:
            before = out.get(f"{path}.bias", np.zeros(lora.bias.shape))
            out[f"{path}.bias"] = before + lora.scale * lora.bias
    for name, W in meaning.weights.items():
        out[name] = W - _weight(base, name)
    return out


def _weight(base: Base, name: str) -> Array:
    tied = name == "lm_head.weight" and name not in base.weights
    found = base.weights.get("model.embed_tokens.weight" if tied else name)
    W: Array = np.zeros(()) if found is None else found.astype(np.float64)
    return W


def _mine(base: Base, got: Deltas) -> dict[str, Array]:
    out: dict[str, Array] = {}
    for path, delta in got.update.items():
        out[f"{path}.weight"] = delta.T if path == "model.embed_tokens" else delta
    for path, bias in got.bias.items():
        out[f"{path}.bias"] = bias - _weight(base, f"{path}.bias")
    for path, bias in got.added.items():
        out[f"{path}.bias"] = out.get(f"{path}.bias", np.zeros(bias.shape)) + bias
    for name, W in got.replaced.items():
        out[name] = W - _weight(base, name)
    return out


def apart(one: Mapping[str, Array], other: Mapping[str, Array]) -> float:
    """The largest difference over all tensors, as a share of the largest number of both."""
    worst = 0.0
    for name in {*one, *other}:
        a, b = one.get(name), other.get(name)
        if a is not None and b is not None and a.shape != b.shape:
            return float("inf")
        a = np.zeros_like(b) if a is None else a
        b = np.zeros_like(a) if b is None else b
        size = max(float(np.abs(a).max(initial=0)), float(np.abs(b).max(initial=0)))
        if not np.isfinite(size):
            return float("inf")
        if size:
            worst = max(worst, float(np.abs(a - b).max()) / size)
    return worst


def _difference(mine: Mapping[str, Array], right: Mapping[str, Array]) -> str:
    missing = sorted(set(right) - set(mine))
    if missing:
        return f"{len(missing)} of {len(right)} changes are missing, among them {missing[0]}"
    extra = sorted(set(mine) - set(right))
    if extra:
        return f"{len(extra)} tensors are changed that should not be, among them {extra[0]}"
    worst = max(right, key=lambda n: apart({n: mine[n]}, {n: right[n]}))
    return f"{worst} is off by {apart({worst: mine[worst]}, {worst: right[worst]}):.2g} of itself"


def _unsaid(form: Mapping[str, str]) -> Verdict:
    return Verdict(v.CANNOT_SAY, form["not_expressible"])


def _accepted(got: Deltas) -> Verdict:
    return Verdict(v.WRONG, f"accepted: it became {got.kind}")


def _unread(text: str, test: str) -> Verdict:
    if test.startswith("refuse "):
        return Verdict(v.WRONG, f"accepted; what was written is no good file: {text}")
    return Verdict(v.WRONG, f"what was written cannot be read: {text}")
