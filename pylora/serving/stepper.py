"""One step: which tokens of which requests, through the model, and what comes next in each.

Requests that wait for their next token are all in every step. Prompts come in pieces beside them,
as large as `Pace` allows: half of it for the prompt that came first, so that it ends, the rest for
the shortest, so that it is not behind a long one. The bits are those of `generate` for each alone:
rows do not depend on their neighbours, nor a prompt's on the pieces that it comes in.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pylora.errors import PyloraError
from pylora.generation.choosing import Picked, Words, likeliest, pick
from pylora.generation.logprobs import logprobs
from pylora.model.decoder import Batch
from pylora.model.llama import Llama
from pylora.serving.pace import Pace
from pylora.serving.request import Echo, Pooled, Token
from pylora.serving.run import Run
from pylora.serving.scheduler import Scheduler

_ECHO_LOGITS = 1 << 24  # numbers that an echo's step may have


@dataclass(frozen=True)
class Part:
    """The next n tokens of a request."""

    run: Run
    n: int


@dataclass(frozen=True)
class Outcome:
    """What a step has come to."""

    decoding: int
    prompt_tokens: int
    seconds: float
    said: list[Run]  # that have another token
    ended: list[tuple[Run, str]]  # by the reason of `Done`
    failed: list[tuple[Run, PyloraError]]


class Stepper:
    """Steps of one model. The engine's thread alone uses it."""

    def __init__(self, model: Llama, scheduler: Scheduler, pace: Pace) -> None:
        self.model, self.scheduler, self.pace = model, scheduler, pace
        vocab = model.config.vocab_size
        self._echo_rows = max(1, min(pace.most, _ECHO_LOGITS // vocab))
        self._by_length = model.rope.by_length
        self._batch: Batch | None = None  # of the last step, where it can go on
        self._runs: list[Run] = []  # whose it is
        self._normed: Any = None  # rows behind the last norm, where the last step had to give them

    def step(self) -> Outcome:
        """Computes, chooses, and says each token."""
        parts = self._parts()
        decoding = sum(part.run.pending == 1 for part in parts)
        prompt = sum(part.n for part in parts if part.run.pending > 1)
        begun = time.perf_counter()
        logits = self._forward(parts)
        outcome = Outcome(decoding, prompt, time.perf_counter() - begun, [], [], [])
        self._continue(parts, logits, outcome)
        self.pace.note(decoding, prompt, time.perf_counter() - begun)
        return outcome

    def forget(self) -> None:
        """The next step begins anew."""
        self._batch, self._runs = None, []

    # ---- which tokens -------------------------------------------------------------------------

    def _parts(self) -> list[Part]:
        running = self.scheduler.running
        decoding = [Part(run, 1) for run in running if run.pending == 1]
        prompts = sorted((r for r in running if r.pending > 1), key=lambda r: r.pending)
        left = self.pace.piece(len(decoding)) if prompts else 0
        parts = decoding
        # Half for the one that joined first, the rest for the shortest, then the next.
        share = {min(prompts, key=running.index): -(-left // 2)} if len(prompts) > 1 else {}
        left -= sum(share.values())
        for run in prompts:
            n = min(run.pending, share.get(run, 0) + left)
            if run.every:
                n = min(n, self._echo_rows)
            left -= max(0, n - share.get(run, 0))
            if n > 0:
                parts.append(Part(run, n))
        # Those of one adapter side by side.
        return sorted(parts, key=lambda part: part.run.lease.number)

    # ---- through the model --------------------------------------------------------------------

    def _forward(self, parts: Sequence[Part]) -> Any:
        """Logits of what is wanted, one part behind the other: all rows of a part that is echoed,
        else the last one."""
        runs = [part.run for part in parts]
        single = all(part.n == 1 for part in parts)
        if single and self._batch is not None and runs == self._runs and self._in_place(runs):
            batch = self._batch
            batch.advance()
        else:
            batch = self._new_batch(parts)
        batch.step.want_normed = any(p.run.request.pooling and _wanted(p) for p in parts)
        whole = all(run.pending == 1 for run in runs)
        self._batch, self._runs = (batch, runs) if whole else (None, [])
        ids: list[int] = []
        for part in parts:
            ids.extend(part.run.ids(part.run.length, part.n))
        logits = batch.forward(ids)
        self._normed = batch.step.normed
        return logits

    def _in_place(self, runs: Sequence[Run]) -> bool:
        """Whether the rows of the last batch's requests still are where they were."""
        assert self._batch is not None
        seqs = self._batch.seqs
        for i, run in enumerate(runs):
            assert run.extent is not None
            if run.extent.start != seqs.k_start[i] or run.length != seqs.k_len[i]:
                return False
        return True

    def _new_batch(self, parts: Sequence[Part]) -> Batch:
        runs = [part.run for part in parts]
        spans = None
        if self._by_length:
            spans = np.concatenate([p.run.spans(p.run.length, p.n) for p in parts])
        batch = Batch(
            self.model,
            self.scheduler.arena.kv,
            [part.n for part in parts],
            np.array([run.slot for run in runs], np.int64),
            [run.lease.packed for run in runs],
            spans,
        )
        q, wanted = batch.seqs.q_start, [_wanted(part) for part in parts]
        if wanted != [1] * len(parts):
            rows = [np.arange(end - n, end) for end, n in zip(q[1:].tolist(), wanted, strict=True)]
            batch.step.output = np.concatenate(rows)
            if not batch.step.output.size:  # a step has an output, whoever wants it
                batch.step.output = q[-1:] - 1
        return batch

    # ---- what comes next ----------------------------------------------------------------------

    def _continue(self, parts: Sequence[Part], logits: Any, outcome: Outcome) -> None:
        """Moves each request on by its rows of the logits."""
        at, ready = 0, []
        rows: Any = None
        for part in parts:
            run, n = part.run, _wanted(part)
            if run.echo is not None:
                rows = self.model.ops.to_numpy(logits) if rows is None else rows
                self._echo(run, rows[at : at + n])
            if run.request.pooling is not None and n:
                normed = self.model.ops.to_numpy(self._normed[at : at + n])
                self._pool(run, normed, run.length + part.n >= run.prompt.size)
            at += n
            run.length += part.n
            if run.pending == 0:
                ready.append((run, at - 1))
        if not ready:
            return
        if rows is None and all(run.plain for run, _ in ready):
            some = logits if len(ready) == at else logits[[row for _, row in ready]]
            found = likeliest(some)
            for (run, _), token in zip(ready, found, strict=True):
                self._settle(run, token, outcome)
            return
        rows = self.model.ops.to_numpy(logits) if rows is None else rows
        if len(ready) < len(rows):
            rows = rows[[row for _, row in ready]]
        runs = [run for run, _ in ready]
        for run, said in zip(runs, self._choose(runs, rows), strict=True):
            self._settle(run, said, outcome)

    def _choose(self, runs: Sequence[Run], rows: np.ndarray) -> list[Token | Picked]:
        """The next token of each by its row [vocab]; None: the mask lets nothing come."""
        masks = [self._mask(run) for run in runs]
        allowed = [None if isinstance(mask, PyloraError) else mask for mask in masks]
        found: list[Token | Picked] = list(pick(rows, [run.chooser for run in runs], allowed))
        for i, mask in enumerate(masks):
            if isinstance(mask, PyloraError):
                found[i] = mask
        wanted = [run.request.logprobs for run in runs]
        if any(k is not None for k in wanted):
            for i, logs in enumerate(logprobs(rows, wanted)):
                token = found[i]
                if logs is not None and isinstance(token, int):
                    found[i] = Token(token, logs.of(token), logs.top(wanted[i] or 0))
        return found

    def _mask(self, run: Run) -> Words | PyloraError | None:
        """The tokens that may come, or what went wrong there."""
        if run.request.mask is None:
            return None
        try:
            return allowed_words(run.request.mask.allowed(run.answer))
        except PyloraError as error:
            return error
        except Exception as error:  # of a mask, which is not ours
            said = PyloraError(f"the mask of allowed tokens failed: {error}")
            said.__cause__ = error
            return said

    def _settle(self, run: Run, found: Token | Picked, outcome: Outcome) -> None:
        """The answer goes on by a token, or ends."""
        if isinstance(found, PyloraError):
            outcome.failed.append((run, found))
            return
        if run.request.max_new_tokens == 0:  # asked for its echo or its pooled row alone
            outcome.ended.append((run, "length"))
            return
        token = found if isinstance(found, Token) or found is None else Token(found)
        if token is None or token.id in run.ends:
            outcome.ended.append((run, "stop"))
            return
        run.take(token)
        outcome.said.append(run)
        if len(run.answer) >= run.request.max_new_tokens:
            outcome.ended.append((run, "length"))

    def _echo(self, run: Run, rows: np.ndarray) -> None:
        """Logprobs of the prompt's tokens by the logits [n, vocab] of the n tokens from run.length
        on."""
        assert run.echo is not None
        top, size = run.request.logprobs or 0, run.prompt.size
        if run.length == 0:
            run.echo.append(Token(int(run.prompt[0])))
        for i, found in enumerate(logprobs(rows, [top] * len(rows)), run.length + 1):
            if i < size and found is not None:
                token = int(run.prompt[i])
                run.echo.append(Token(token, found.of(token), found.top(top)))
        if run.length + len(rows) >= size:
            echo, run.echo = Echo(tuple(run.echo)), None
            run.say(echo)

    def _pool(self, run: Run, rows: np.ndarray, whole: bool) -> None:
        """Takes in the prompt's rows behind the last norm, one by one: the bits of their sum do not
        depend on the pieces that a prompt comes in. `whole`: they are the last."""
        if run.request.pooling == "last":
            if whole:
                run.say(Pooled(rows[-1].astype(np.float64)))
            return
        total = np.zeros(rows.shape[1]) if run.pooled is None else run.pooled
        for row in rows:
            total += row
        run.pooled = total
        if whole:
            run.say(Pooled(total / run.prompt.size))


def _wanted(part: Part) -> int:
    """How many of a part's rows, its last ones, have logits that somebody wants."""
    if part.run.every:
        return part.n
    return int(part.n == part.run.pending)


def allowed_words(mask: np.ndarray) -> Words:
    """The tokens that a mask allows (see `Mask`), as bits, a copy. PyloraError for another kind of
    array."""
    mask = np.asarray(mask)
    if mask.ndim != 1 or mask.dtype not in (np.bool_, np.uint32, np.int32):
        raise PyloraError(
            "a mask must be a bool array [vocab] or 32-bit words of its bits, got "
            f"{mask.dtype} {list(mask.shape)}"
        )
    if mask.dtype != np.bool_:
        return np.array(mask).view(np.uint32)
    bits = np.zeros(-(-mask.size // 32) * 32, np.bool_)
    bits[: mask.size] = mask
    words: Words = np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32, copy=False)
    return words
