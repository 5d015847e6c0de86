"""Writes the suite: bases, adapters in every form, answers, and manifest.json. The same seed and
families give the same bytes.

manifest.json is the index: paths in it are relative to it, with the SHA-256 of every file. Answers
are one file for each adapter, {"right": answer, "wrong": {rule: answer}}.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from pylora.conformance.suite import adapters, bases, forms, sequences, tokenizer, tolerance, wrong
from pylora.conformance.suite.adapters import Adapter, Meaning
from pylora.conformance.suite.answers import PROMPTS, TEXTS, Answer, answer
from pylora.conformance.suite.bases import Base
from pylora.conformance.suite.cases import CASES
from pylora.conformance.suite.hostile import CANARY, REFUSED
from pylora.errors import ConfigError
from pylora.files.whole import atomic_dir

FORMAT, VERSION, MANIFEST = "pylora-suite", 1, "manifest.json"
PAIR = ("alpha", "second")  # the adapters that are switched between


def write_suite(
    out: Path, families: Iterable[str] = (), seed: int = 0, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Writes the suite to `out`, whole or not at all; returns the manifest.

    ConfigError for an unknown family, a negative seed, or a folder with other files in it.
    """
    wanted = bases.families(families)
    if not 0 <= seed < 2**64:
        raise ConfigError(f"--seed {seed}: a whole number from 0 to 2^64 - 1")
    check_output(out)
    with atomic_dir(out, replace=True) as folder:
        listed = []
        for family in wanted:
            for tied in (False, True):
                base = bases.make(family, tied, seed)
                say(base.name)
                listed.append(_base(base, folder, seed))
        manifest = _manifest(seed, listed)
        manifest["files"] = {
            str(p.relative_to(folder).as_posix()): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(folder.rglob("*"))
            if p.is_file()
        }
        _dump(folder / MANIFEST, manifest)
    return manifest


def check_output(out: Path) -> None:
    """ConfigError unless the folder is empty, is not there, or is an older suite."""
    if out.is_dir() and any(out.iterdir()):
        try:
            known = json.loads((out / MANIFEST).read_text(encoding="utf-8"))["format"] == FORMAT
        except (OSError, ValueError, KeyError, TypeError):
            known = False
        if not known:
            raise ConfigError(f"--out {out} is a folder with other files in it; name another")


def _manifest(seed: int, listed: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "seed": seed,
        "tokens": tokenizer.texts(),
        "prompts": [{"text": t, "ids": list(ids)} for t, ids in zip(TEXTS, PROMPTS)],
        "precisions": {n: [r.element, r.block] for n, r in tolerance.PRECISIONS.items()},
        "tolerance": {
            "formula": "safety (element sensitivity[0] + block sensitivity[1]) + floor",
            "safety": tolerance.SAFETY,
            "floor": tolerance.FLOOR,
        },
        "pair": list(PAIR),
        "canary": CANARY,
        "bases": listed,
    }


def _base(base: Base, folder: Path, seed: int) -> dict[str, Any]:
    home = f"bases/{base.name}"
    bases.write_hf(base, folder / home)
    gguf = None
    if base.gguf_arch is not None:
        gguf = f"gguf/{base.name}.gguf"
        bases.write_gguf_model(base, folder / gguf)
    drawn = {case.name: adapters.draw(case, base, seed) for case in CASES if case.of(base)}
    listed = [_case(a, folder) for a in drawn.values()]
    right = answer(base, Meaning())
    return {
        "name": base.name,
        "family": base.family,
        "tied": base.tied,
        "hf": home,
        "gguf": gguf,
        "answer": said(right),
        "sensitivity": _pair(tolerance.sensitivity(base, Meaning(), right)),
        "cases": listed,
        "refuse": _refused(drawn[PAIR[0]], folder),
        "sequences": _sequences(base, *(drawn[name].meaning() for name in PAIR)),
    }


def _case(adapter: Adapter, folder: Path) -> dict[str, Any]:
    base, case = adapter.base, adapter.case
    found: dict[str, Any] = {}
    for form, write in forms.FORMS.items():
        place = f"adapters/{base.name}/{case.name}/{form}"
        try:
            write(adapter, folder / place)
            found[form] = {"path": f"{place}/adapter.gguf" if form == "gguf" else place}
        except forms.CannotSay as why:
            found[form] = {"not_expressible": str(why)}
    right, meaning = answer(base, adapter.meaning()), adapter.meaning()
    rules = {rule: answer(base, m) for rule, m in wrong.wrongs(adapter).items()}
    place = f"answers/{base.name}/{case.name}.json"
    said_wrong = {rule: said(a) for rule, a in rules.items()}
    (folder / place).parent.mkdir(parents=True, exist_ok=True)
    _dump(folder / place, {"right": said(right), "wrong": said_wrong})
    return {
        "name": case.name,
        "rule": case.rule,
        "may_be_refused": case.allowed,
        "forms": found,
        "answers": place,
        "sensitivity": _pair(tolerance.sensitivity(base, meaning, right)),
        "wrong": {rule: wrong.sentence(rule) for rule in rules},
    }


def _refused(good: Adapter, folder: Path) -> list[dict[str, Any]]:
    out = []
    for form, cases in REFUSED.items():
        for case in cases:
            if form == "gguf" and good.base.gguf_arch is None:
                continue
            place = f"refuse/{good.base.name}/{case.name}/{form}"
            case.write(good, folder / place)
            path = f"{place}/adapter.gguf" if form == "gguf" else place
            out.append({"name": case.name, "why": case.why, "form": form, "path": path})
    return out


def _sequences(base: Base, one: Meaning, two: Meaning) -> dict[str, Any]:
    """Answers to several adapters used wrongly; `next` of the last prompt alone for prefixes."""
    which = len(PROMPTS) - 1
    prefix = []
    owners = {"": Meaning(), PAIR[0]: one, PAIR[1]: two}
    for reader in owners:
        for owner in owners:
            if reader == owner:
                continue
            for kept in sequences.kept_lengths(len(PROMPTS[which])):
                got = sequences.foreign_prefix(base, owners[reader], owners[owner], which, kept)
                entry = {
                    "reader": reader,
                    "owner": owner,
                    "kept": kept,
                    "next": said(got)["next"][0],
                }
                prefix.append(entry)
    return {"both": said(answer(base, sequences.both(one, two))), "prompt": which, "prefix": prefix}


def said(a: Answer) -> dict[str, Any]:
    """An answer as JSON: five decimals, which is finer than any tolerance."""
    return {
        "prompt": [[round(float(x), 5) for x in p] for p in a.prompt],
        "next": [[round(float(x), 5) for x in p] for p in a.next],
    }


def _pair(s: tolerance.Sensitivity) -> list[float]:
    return [s.element, s.block]


def _dump(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")
