"""log p(answer | prompt) of the base model, computed once for each answer and kept.

The base is the model without its adapter, so no second model exists. A value is a function of the
base's numbers, of how it is computed and of the tokens alone: the file names the first two, and
values go by the digest of the third, so that a file that belongs to something else is not used.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pylora.files.bounded import read_text
from pylora.files.whole import atomic_write
from pylora.model.through import TokenTop, through
from pylora.training.checkpoint import fingerprint
from pylora.training.objectives.answers import Answer
from pylora.training.objectives.rows import laid_out

FILE = "reference.json"
_LIMIT = 2**30  # bytes


class Reference:
    """The base's log-probabilities, by the digest of an answer."""

    def __init__(self, batch_rows: int = 2048) -> None:
        """`batch_rows`: about how many tokens are computed at a time; no number depends on it."""
        self.values: dict[str, float] = {}
        self.computed = 0  # answers that were not on file
        self._batch_rows = batch_rows

    def __getitem__(self, answer: Answer) -> float:
        return self.values[answer.digest]

    def fill(self, model: Any, answers: Iterable[Answer], out_dir: Path | None = None) -> None:
        """Computes what is missing, of the model without its adapter, which is there afterwards as
        it was before."""
        wanted = {answer.digest: answer for answer in answers}
        of = {
            "base model": fingerprint(model),
            "backend": model.ops.name,
            "precision": model.precision_report,
        }
        file = None if out_dir is None else out_dir / FILE
        if file is not None:
            known = _read(file, of)
            self.values |= {d: known[d] for d in wanted if d in known}
        missing = [a for d, a in wanted.items() if d not in self.values]
        if not missing:
            return
        with _without_adapter(model):
            self._compute(model, missing)
        if file is not None:
            with atomic_write(file) as beside:
                beside.write_text(json.dumps({"of": of, "logp": self.values}), encoding="utf-8")

    def _compute(self, model: Any, missing: list[Answer]) -> None:
        missing.sort(key=len)
        while missing:
            some = [missing.pop()]
            rows = len(some[0])
            while missing and rows + len(missing[-1]) <= self._batch_rows:
                some.append(missing.pop())
                rows += len(some[-1])
            ids, labels, seqs, parts = laid_out(some, [a.labels for a in some])
            top = TokenTop(labels)
            through(model, ids, seqs, top, grads=False)
            self.values |= {a.digest: a.logp(top.nll[p]) for a, p in zip(some, parts)}
            self.computed += len(some)


@contextmanager
def _without_adapter(model: Any) -> Iterator[None]:
    was = model.adapter
    model.collect()  # where it has been trained on another memory
    model.detach()
    try:
        yield
    finally:
        if was is not None:
            model.attach(was)


def _read(file: Path, of: dict[str, Any]) -> dict[str, float]:
    """The values on file; none where there is no such file, or one of another base. They can be
    computed again, so damage costs time alone."""
    try:
        found = json.loads(read_text(file, limit=_LIMIT))
    except Exception:
        return {}
    if not isinstance(found, dict) or found.get("of") != of:
        return {}
    values = found.get("logp")
    if not isinstance(values, dict):
        return {}
    return {d: v for d, v in values.items() if isinstance(v, float) and math.isfinite(v)}
