"""Choosers: an answer's token depends on its own settings, stream and past."""

from __future__ import annotations

import numpy as np
import pytest

from pylora.errors import PyloraError
from pylora.generation import choosing
from pylora.generation.choosing import Chooser, Said, choose, likeliest, pick
from pylora.generation.sampling import Sampling
from pylora.numbers import random


def test_draws_are_those_of_the_stream_at_the_position(rng: np.random.Generator) -> None:
    logits = rng.standard_normal((70, 40)).astype(np.float32)
    how = Sampling(1.0, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.2)
    chooser, prompt, answer = Chooser([3, 4, 5], how, 7, 2), [3, 4, 5], []
    for row in logits:
        at = len(prompt) + len(answer)
        u = float(random.unit(7, random.stream("sample", "2"), at, 1)[0])
        counts = {t: answer.count(t) for t in answer}
        want = how.choose(row, u, {*prompt, *answer}, counts)
        assert chooser.choose(row) == chooser.choose(row) == want
        chooser.take(want)
        answer.append(want)


def test_penalties_and_bias_are_openais() -> None:
    logits = np.array([1.0, 1.5, 0.0, 0.0], np.float32)
    how = Sampling(presence_penalty=0.4, frequency_penalty=0.2)
    assert how.choose(logits, 0.5, counts={1: 1}) == 0  # 1.5 - 0.4 - 0.2
    assert how.choose(logits, 0.5, counts={}) == 1
    assert Sampling(frequency_penalty=0.2).choose(logits, 0.5, counts={1: 2}) == 1
    assert Sampling(frequency_penalty=0.2).choose(logits, 0.5, counts={1: 3}) == 0
    assert Sampling(presence_penalty=0.4).choose(logits, 0.5, counts={1: 99}) == 1
    assert Sampling(logit_bias={2: 9.0}).choose(logits, 0.5) == 2
    # The bias comes first: 2.0 is then divided.
    both = Sampling(logit_bias={1: 0.5}, repetition_penalty=3.0)
    assert both.choose(logits, 0.5, {1}) == 0 and both.choose(logits, 0.5, {0}) == 1
    assert Sampling(logit_bias={2: -3.0}).choose(logits, 0.5, allowed=np.array([2, 3])) == 3
    assert Sampling(2.0, top_k=1).choose(logits, 0.99, allowed=np.array([0, 3])) == 0


def test_rows_are_chosen_as_each_alone(rng: np.random.Generator) -> None:
    class Ops:
        to_numpy = staticmethod(np.asarray)

    logits = rng.standard_normal((3, 50)).astype(np.float32)
    plain = [Chooser([1], Sampling(), 0, i) for i in range(3)]
    drawn = [Chooser([1], Sampling(0.5 * i), 0, i) for i in range(3)]
    assert choose(Ops, logits, plain) == logits.argmax(axis=1).tolist()
    assert choose(Ops, logits, drawn) == [c.choose(row) for c, row in zip(drawn, logits)]
    logits[1, 4] = np.nan
    found = likeliest(logits)
    assert found[0] == logits[0].argmax() and found[2] == logits[2].argmax()
    assert isinstance(found[1], PyloraError)
    with pytest.raises(PyloraError, match="not finite"):
        choose(Ops, logits, plain)


def settings(rng: np.random.Generator) -> Sampling:
    """Any."""
    some = [int(t) for t in rng.choice(400, 5, replace=False)]
    return Sampling(
        temperature=float(rng.choice([0, 0.3, 1, 4])),
        top_k=int(rng.choice([0, 0, 1, 40, 500])),
        top_p=float(rng.choice([1, 0.9, 0.3])),
        min_p=float(rng.choice([0, 0, 0.05, 1])),
        repetition_penalty=float(rng.choice([1, 1.3, 0.8])),
        presence_penalty=float(rng.choice([0, 0.5, -0.5])),
        frequency_penalty=float(rng.choice([0, 0.2])),
        logit_bias={t: float(rng.uniform(-5, 5)) for t in some} if rng.random() < 0.3 else {},
    )


def masks(rng: np.random.Generator, n: int) -> list[np.ndarray | None]:
    """Of bits; some allow all, some are shorter than the vocabulary, one allows nothing."""
    words = [rng.integers(0, 2**32, size, np.uint32) for size in rng.integers(1, 14, n)]
    words[0][:] = 0
    return [w if rng.random() < 0.5 else None for w in words]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_batch_is_chosen_as_each_answer_alone(rng: np.random.Generator, dtype: type) -> None:
    for _ in range(30):
        n = int(rng.integers(1, 9))
        logits = (3 * rng.standard_normal((n, 400))).astype(dtype)
        before = logits.copy()
        choosers = [Chooser([1, 2, 2, 7], settings(rng), 5, i) for i in range(n)]
        said = [[int(t) for t in rng.integers(0, 400, 6)] for _ in choosers]
        for chooser, tokens in zip(choosers, said):
            for token in tokens:
                chooser.take(token)
        allowed = masks(rng, n)
        got = pick(logits, choosers, allowed)
        np.testing.assert_array_equal(logits, before)
        alone = [pick(logits[i : i + 1], choosers[i : i + 1], allowed[i : i + 1])[0]
                 for i in range(n)]  # fmt: skip
        assert got == alone
        for i, (chooser, tokens, words) in enumerate(zip(choosers, said, allowed)):
            ids = None
            if words is not None:
                ids = np.array([t for t in range(min(400, 32 * words.size))
                                if int(words[t // 32]) >> t % 32 & 1], np.int64)  # fmt: skip
            if ids is not None and not ids.size:
                assert got[i] is None
                continue
            counts = {t: tokens.count(t) for t in tokens}
            seen = {1, 2, 7, *tokens}
            assert got[i] == chooser.sampling.choose(logits[i], chooser.u, seen, counts, ids)


def test_without_the_core_the_same_is_chosen(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = (3 * rng.standard_normal((40, 400))).astype(np.float32)
    logits[3, 8] = np.inf
    choosers = [Chooser([3, 4], settings(rng), 1, i) for i in range(40)]
    allowed = masks(rng, 40)
    fast = pick(logits, choosers, allowed)
    monkeypatch.setattr(choosing, "core_for", lambda logits: None)
    slow = pick(logits, choosers, allowed)
    assert isinstance(fast[3], PyloraError) and isinstance(slow[3], PyloraError)
    fast[3] = slow[3] = None
    assert fast == slow


def test_logits_that_may_not_be_written_to_are_chosen_from(rng: np.random.Generator) -> None:
    logits = rng.standard_normal((2, 50)).astype(np.float32)
    how = Sampling(repetition_penalty=1e9)
    top = int(logits[0].argmax())
    assert logits[0, top] > 0
    choosers = [Chooser([top], how, 0, 0), Chooser([top], how, 0, 1)]
    want = pick(logits, choosers)
    assert want[0] != top
    logits.flags.writeable = False
    assert pick(logits, choosers) == want
    wide = np.zeros((2, 100), np.float32)
    wide[:, ::2] = logits
    assert pick(wide[:, ::2], choosers) == want


def test_what_was_said_is_counted() -> None:
    said, tokens = Said([5, 5, 9]), [5, 5, 9]
    for token in [*range(100, 300), 5, 299, 299]:
        said.add(token)
        tokens.append(token)
    counted = dict(zip(said.ids.tolist(), said.often.tolist()))
    assert counted == {t: tokens.count(t) for t in tokens}
