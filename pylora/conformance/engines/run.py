"""Tests a whole engine: each adapter alone, then switching, in flight, caches, replacing, refusing.

Every test ends in a finding; nothing that an engine does ends the run, unless the engine is gone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from pylora.conformance.engines import verdict as v
from pylora.conformance.engines.ask import Asking, Body, Got, Prompt, probe
from pylora.conformance.engines.book import Book
from pylora.conformance.engines.diagnose import whose_cache
from pylora.conformance.engines.http import EngineError, Http, Refusal
from pylora.conformance.engines.loading import Loading, NotHere
from pylora.conformance.engines.verdict import Verdict, judge
from pylora.conformance.suite.tolerance import PRECISIONS

SEQUENCES = {
    "switching": "an adapter leaves nothing behind",
    "prefix-cache": "a cache belongs to one adapter",
    "in-flight": "an answer does not depend on its neighbours",
    "replacing": "a name that gets other weights has them",
}
_THREADS, _ROUNDS = 8, 6
_BOTH = "two adapters are in use at once"
_LEFT = "left:"  # and a name: answers of that adapter in place of those asked for


@dataclass(frozen=True)
class Finding:
    """One test: of which base, its name, the rule it is for, and the verdict."""

    base: str
    test: str
    rule: str
    verdict: Verdict
    seconds: float = 0.0


@dataclass
class Run:
    """A suite against an engine that gets its adapters in one way."""

    book: Book
    load: Loading
    precision: str
    say: Callable[[Finding], None] = lambda finding: None
    only: Sequence[str] = ()  # names of tests; none: all
    findings: list[Finding] = field(default_factory=list)

    def all(self, bases: Sequence[str]) -> list[Finding]:
        """Every test on these bases, or (none named) on those that the engine can be given.

        EngineError where it cannot be reached or gives no log-probabilities.
        """
        entries = list(self.book.bases(bases))
        if self.load.server.template is None and not bases:
            entries = [self._recognized(entries)]
        for entry in entries:
            OneBase(self, entry).all()
        return self.findings

    def _recognized(self, entries: list[Any]) -> Any:
        """The base that a running engine has, by its answers."""
        http = self.load.open("", [])
        target = self.load.plain()
        limits = [self.book.tolerance(e, self.precision) for e in entries]
        prompts, names = self.book.prompts, self.book.names
        nearest = lambda got: min(v.distance([(0, got)], e["answer"]) for e in entries)
        asking = probe(http, target, prompts, names, nearest, max(limits))
        got = [(i, asking.ask(http, target, p)) for i, p in enumerate(prompts)]
        off = [v.distance(got, e["answer"]) for e in entries]
        best = min(range(len(entries)), key=off.__getitem__)
        limit = limits[best]
        if off[best] > limit:
            raise EngineError(
                f"{http} answers as none of the suite's bases: the nearest is "
                f"{entries[best]['name']}, {off[best]:.3g} nats off, of which {limit:.2g} are "
                f"allowed in {self.precision}. Does it serve one, without an adapter?"
            )
        return entries[best]

    def note(self, base: str, test: str, rule: str, found: Verdict, since: float) -> Verdict:
        """Writes a finding down."""
        finding = Finding(base, test, rule, found, time.monotonic() - since)
        self.findings.append(finding)
        self.say(finding)
        return found


class OneBase:
    """The tests on one base."""

    def __init__(self, run: Run, entry: Any) -> None:
        self.run, self.book, self.load, self.entry = run, run.book, run.load, entry
        self.name: str = entry["name"]
        self.tolerance = self.book.tolerance(entry, run.precision)
        self.cases = {c["name"]: c for c in entry["cases"]}
        self.pair: list[str] = self.book.manifest["pair"]
        self.asking: Asking
        self.good: list[str] = []  # adapters that the engine had right
        self.gone = ""  # why nothing can be asked any more
        self.place, self.paths = "", [""]  # of the base, and of its adapters

    def all(self) -> None:
        """All of them, the base first: without it nothing can be said."""
        form = self.load.form
        base = self.entry["gguf" if form == "gguf" else "hf"]
        if base is None:
            why = f"there is no {form} of this family"
            self._note("base", "the base alone", Verdict(v.CANNOT_SAY, why))
            return
        found = [c["forms"][form].get("path") for c in self.entry["cases"]]
        self.place, self.paths = self.book.path(base), [self.book.path(p) for p in found if p]
        since = time.monotonic()
        try:
            http = self.load.open(self.place, self.paths)
            off = lambda got: v.distance([(0, got)], self.entry["answer"])
            prompts, names = self.book.prompts, self.book.names
            self.asking = probe(http, self.load.plain(), prompts, names, off, self.tolerance)
            got = self._ask(self.load.plain())
        except EngineError as error:
            self._note("base", "the base alone", Verdict(v.FAILED, str(error)), since)
            return
        alone = judge(got, self.entry["answer"], {}, {}, self.tolerance)
        if alone.kind != v.RIGHT:
            text = f"{alone.text}{self._hint(alone)}: nothing can be said about adapters"
            self._note("base", "the base alone", replace(alone, text=text), since)
            return
        self._note("base", "the base alone", replace(alone, text=self._ways()), since)
        for case in self.entry["cases"]:
            self._guarded(case["name"], case["rule"], partial(self._case, case))
        works = (self._switching, self._prefix, self._flight, self._replacing)
        for (test, rule), work in zip(SEQUENCES.items(), works):
            self._guarded(test, rule, work)
        for entry in self.entry["refuse"]:
            if entry["form"] == form:
                name = f"refuse {entry['name']}"
                self._guarded(name, entry["why"], partial(self._refuse, entry))

    def _hint(self, alone: Verdict) -> str:
        """A precision in which the base would be right."""
        off = alone.error if alone.error is not None else float("inf")
        for name in PRECISIONS:
            if off <= self.book.tolerance(self.entry, name):
                return f" (--precision {name} would allow it: is something kept in {name}?)"
        return ""

    def _ways(self) -> str:
        full, quick = self.asking.full.name, self.asking.quick.name
        said = f"asked by {full}" if full == quick else f"asked by {full} and {quick}"
        return "; ".join([said, *self.asking.wrong])

    # ---- asking ----------------------------------------------------------------------------------

    def _http(self) -> Http:
        return self.load.http()

    def _ask(
        self, target: Body, prompts: tuple[Prompt, ...] | None = None
    ) -> list[tuple[int, Got]]:
        listed = self.book.prompts if prompts is None else prompts
        return [(i, self.asking.ask(self._http(), target, p)) for i, p in enumerate(listed)]

    def _use(self, name: str) -> Body:
        path = self.cases[name]["forms"][self.load.form]["path"]
        return self.load.use(name, self.book.path(path))

    def _target(self, name: str) -> Body:
        return self._use(name) if name else self.load.plain()

    def _right(self, name: str) -> Any:
        return self.book.answers(self.cases[name])["right"] if name else self.entry["answer"]

    def _allowed(self, name: str) -> float:
        entry = self.cases[name] if name else self.entry
        return self.book.tolerance(entry, self.run.precision)

    def _note(self, test: str, rule: str, found: Verdict, since: float | None = None) -> Verdict:
        return self.run.note(self.name, test, rule, found, since or time.monotonic())

    def _guarded(self, test: str, rule: str, work: Callable[[], Verdict]) -> None:
        if self.run.only and test not in self.run.only:
            return
        since = time.monotonic()
        try:
            if self.gone:
                raise NotHere(self.gone)
            found = work()
        except NotHere as why:
            found = Verdict(v.NOT_TESTED, str(why))
        except Refusal as refusal:
            found = Verdict(v.FAILED, str(refusal))
        except EngineError as error:
            found = Verdict(v.FAILED, f"{error}{self.load.server.ended()}")
            self._revive(test)
        self._note(test, rule, found, since)

    def _revive(self, test: str) -> None:
        """After an answer that did not come: the engine is started anew, if it can be."""
        server = self.load.server
        try:
            if server.template is not None:
                server.stop()
                self.load.open(self.place, self.paths)
            self._ask(self.load.plain(), self.book.prompts[:1])
        except EngineError:
            self.gone = f"the engine answers nothing any more, since {test}"

    # ---- the tests -------------------------------------------------------------------------------

    def _case(self, case: Any) -> Verdict:
        form = case["forms"][self.load.form]
        if "path" not in form:
            return Verdict(v.CANNOT_SAY, form["not_expressible"])
        name = case["name"]
        try:
            got = self._ask(self._use(name))
        except Refusal as refusal:
            if "CRASHED" in str(refusal):
                return Verdict(v.FAILED, str(refusal))
            allowed = case["may_be_refused"]
            if allowed:
                return Verdict(v.REFUSED, f"allowed ({allowed}): {refusal}")
            return Verdict(v.FAILED, f"refused, though it is an ordinary adapter: {refusal}")
        answers = self.book.answers(case)
        wrong, sentences = dict(answers["wrong"]), dict(case["wrong"])
        for other in self.good[-1:]:
            wrong[_LEFT + other] = self._right(other)
            sentences[_LEFT + other] = f"the answers are those of {other}, which was used before"
        if name in self.pair and self.good:
            wrong["both"], sentences["both"] = self.entry["sequences"]["both"], _BOTH
        found = judge(got, answers["right"], wrong, sentences, self._allowed(name))
        if found.kind == v.RIGHT:
            self.good.append(name)
        return self._explained(found, name, got, ["", *self.pair, *self.good])

    def _explained(
        self, found: Verdict, name: str, got: list[tuple[int, Got]], names: Sequence[str]
    ) -> Verdict:
        """A wrong answer that follows no rule, explained by another cache if it can be."""
        if found.kind != v.WRONG or found.rule:
            return found
        seed, allowed = self.book.manifest["seed"], self._allowed(name)
        for i, g in got:
            if v.distance([(i, g)], self._right(name)) > allowed:
                cause = whose_cache(self.entry, seed, name, names, i, g, allowed)
                return replace(found, text=cause, rule="prefix") if cause else found
        return found

    def _several(self) -> list[str]:
        """The base and the adapters that were right, the pair first; empty if they are too few."""
        names = [n for n in self.pair if n in self.good]
        return ["", *names, *(n for n in self.good if n not in names)] if len(names) == 2 else []

    def _judged(
        self, name: str, got: list[tuple[int, Got]], others: dict[str, tuple[str, Any]]
    ) -> Verdict:
        wrong = {rule: answer for rule, (_, answer) in others.items()}
        sentences = {rule: text for rule, (text, _) in others.items()}
        return judge(got, self._right(name), wrong, sentences, self._allowed(name))

    def _others(self, name: str, names: list[str], what: str) -> dict[str, tuple[str, Any]]:
        return {
            _LEFT + (n or "base"): (what.format(n or "the base"), self._right(n))
            for n in names
            if n != name
        }

    def _switching(self) -> Verdict:
        names = self._several()[:3]
        if not names:
            return Verdict(v.NOT_TESTED, "needs two adapters that are right alone")
        _, one, two = names
        for name in (one, two, one, "", two, ""):
            others = self._others(name, names, "the answers are those of {}, which was used before")
            if name:
                others["both"] = (_BOTH, self.entry["sequences"]["both"])
            found = self._judged(name, self._ask(self._target(name)), others)
            if found.kind != v.RIGHT:
                return replace(found, text=f"{name or 'the base'}, switched to: {found.text}")
        return Verdict(v.RIGHT)

    def _prefix(self) -> Verdict:
        names = self._several()[:3]
        if not names:
            return Verdict(v.NOT_TESTED, "needs two adapters that are right alone")
        which = self.entry["sequences"]["prompt"]
        prompt, before = self.book.prompts[which], ""
        for name in ("", *names[1:], "", names[2], names[1]):
            target = self._target(name)  # first: it may start the engine anew
            got = [(which, self.asking.next(self._http(), target, prompt))]
            others = {
                f"prefix:{p['owner'] or 'base'}:{p['kept']}": (
                    f"the first {p['kept']} tokens are taken from a cache of "
                    f"{p['owner'] or 'the base'}",
                    {"next": {which: p["next"]}},
                )
                for p in self.entry["sequences"]["prefix"]
                if p["reader"] == name
            }
            others |= self._others(name, names, "the answers are those of {}")
            found = self._explained(self._judged(name, got, others), name, got, names)
            if found.kind != v.RIGHT:
                text = f"{name or 'the base'}, asked after {before or 'the base'}: {found.text}"
                return replace(found, text=text)
            before = name
        return Verdict(v.RIGHT)

    def _flight(self) -> Verdict:
        names = self._several()[:8]
        if not self.load.mixes:
            return Verdict(v.NOT_TESTED, "the engine has one adapter at a time this way")
        if not names:
            return Verdict(v.NOT_TESTED, "needs two adapters that are right alone")
        targets = {name: self._target(name) for name in names}
        prompts = self.book.prompts
        jobs = [(n, i) for _ in range(_ROUNDS) for i in range(len(prompts)) for n in names]

        def work(job: tuple[str, int]) -> Got:
            name, i = job
            ask = self.asking.next if i % 2 else self.asking.ask
            return ask(self._http(), targets[name], prompts[i])

        with ThreadPoolExecutor(_THREADS) as pool:
            got = list(pool.map(work, jobs))
        known = {n: self._right(n) for n in names}
        for (name, i), g in zip(jobs, got):
            if v.distance([(i, g)], known[name]) <= self._allowed(name):
                continue
            text = "it gets the answer of its neighbour {}"
            found = self._judged(name, [(i, g)], self._others(name, names, text))
            found = self._explained(found, name, [(i, g)], names)
            said = f"{name or 'the base'}, with others in flight: {found.text}"
            return replace(found, text=said)
        return Verdict(v.RIGHT, f"{len(jobs)} requests, {len(names)} targets, {_THREADS} threads")

    def _replacing(self) -> Verdict:
        if not self.load.renames:
            return Verdict(v.NOT_TESTED, "the engine gives no names this way")
        names = self._several()[1:3]
        if not names:
            return Verdict(v.NOT_TESTED, "needs two adapters that are right alone")
        paths = [self.book.path(self.cases[n]["forms"][self.load.form]["path"]) for n in names]
        for step, (name, path) in enumerate([*zip(names, paths), (names[0], paths[0])]):
            target = self.load.use("pylora-suite-name", path)
            others = self._others(name, ["", *names], "a name with new weights answers as {}")
            found = self._judged(name, self._ask(target), others)
            if found.kind != v.RIGHT:
                return replace(found, text=f"weights {step + 1} under one name: {found.text}")
            self.load.drop("pylora-suite-name")
            try:
                got = self._ask(target, self.book.prompts[:1])
            except Refusal:
                continue
            after = self._judged(name, got, self._others(name, ["", *names], "as {}"))
            as_what = name if after.kind == v.RIGHT else after.text
            return Verdict(
                v.WRONG, f"an adapter that was unloaded is still answered for: {as_what}"
            )
        return Verdict(v.RIGHT)

    def _refuse(self, entry: Any) -> Verdict:
        canary = self.load.server.folder / self.book.manifest["canary"]
        name = f"refuse-{entry['name']}"
        path = self.book.path(entry["path"])
        got: list[tuple[int, Got]] = []
        refused = ""
        try:
            got = self._ask(self.load.use(name, path))
        except Refusal as refusal:
            refused = str(refusal)
        self._forget(name)
        if refused and not canary.exists():
            if "CRASHED" in refused:
                return Verdict(v.FAILED, refused)
            return self._alive(Verdict(v.RIGHT, f"refused: {refused}"))
        if canary.exists():
            return Verdict(v.FAILED, "the pickle's program was RUN")
        others = {n: self._right(n) for n in ("", self.pair[0])}
        as_what = "other numbers"
        for n, answer in others.items():
            if v.distance(got, answer) <= self._allowed(n):
                as_what = f"those of {n}" if n else "the base's"
        return self._alive(Verdict(v.WRONG, f"accepted; the answers are {as_what}"))

    def _forget(self, name: str) -> None:
        try:
            self.load.drop(name)
        except EngineError:
            pass  # it never was there

    def _alive(self, found: Verdict) -> Verdict:
        """The finding, unless the engine no longer answers, or not rightly."""
        got = self._ask(self.load.plain(), self.book.prompts[:1])
        after = judge(got, self.entry["answer"], {}, {}, self.tolerance)
        if after.kind != v.RIGHT:
            return Verdict(v.FAILED, f"{found.text}; afterwards the base is wrong: {after.text}")
        return found


def failed(findings: list[Finding]) -> Iterator[Finding]:
    """Those that are wrong."""
    return (f for f in findings if f.verdict.kind in v.BAD)
