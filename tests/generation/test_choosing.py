"""Choosers: an answer's token depends on its own settings, stream and past."""

from __future__ import annotations

import numpy as np
import pytest

from pylora.errors import PyloraError
from pylora.generation.choosing import Chooser, choose, likeliest
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
