"""Decoding gives the bits of a full forward, whatever is beside a sequence."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from whole_model import ARCHITECTURES, an_adapter

from pylora.errors import ConfigError
from pylora.model.config import LlamaConfig
from pylora.model.llama import Llama
from pylora.types import Seqs


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_row_does_not_depend_on_its_neighbours(
    ops: Any, rng: np.random.Generator, name: str
) -> None:
    config = LlamaConfig.tiny(**ARCHITECTURES[name])
    net = Llama.random(config, backend=ops)
    net.attach(an_adapter(config, rng, biases=True))
    lengths = [1, 17, 4, 30]
    ids = rng.integers(0, config.vocab_size, sum(lengths))
    whole = ops.to_numpy(net.forward(ids, Seqs.of(lengths))[0])
    at = 0
    for n in lengths:
        own = slice(at, at + n)
        assert ops.to_numpy(net.forward(ids[own])[0]).tobytes() == whole[own].tobytes()
        short = ops.to_numpy(net.forward(ids[at : at + (n + 1) // 2])[0])
        assert short.tobytes() == whole[at : at + (n + 1) // 2].tobytes()
        at += n
    rows = np.array([40, 3, 3])
    some = ops.to_numpy(net.forward(ids, Seqs.of(lengths), rows=rows)[0])
    assert some.tobytes() == whole[rows].tobytes()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_decoding_gives_the_bits_of_a_full_forward(
    ops: Any, rng: np.random.Generator, name: str
) -> None:
    """Prompts of several lengths, then single tokens, then a slot given to a new sequence."""
    config = LlamaConfig.tiny(**ARCHITECTURES[name])
    net = Llama.random(config, backend=ops)
    net.attach(an_adapter(config, rng))
    texts = [rng.integers(0, config.vocab_size, 12) for _ in range(4)]
    kv = net.kv_cache(3, 12)

    def last(text: np.ndarray) -> bytes:
        return bytes(ops.to_numpy(net.forward(text)[0])[-1].tobytes())

    def step(parts: list[np.ndarray], slots: list[int], seen: list[np.ndarray]) -> None:
        logits = net.decode(np.concatenate(parts), kv, [len(p) for p in parts], slots)
        assert [r.tobytes() for r in ops.to_numpy(logits)] == [last(s) for s in seen]

    a, b, c, d = texts
    step([a[:5], b[:1], c[:7]], [0, 1, 2], [a[:5], b[:1], c[:7]])
    step([c[7:8], a[5:6], b[1:4]], [2, 0, 1], [c[:8], a[:6], b[:4]])
    kv.clear(0)
    step([b[4:5], d[:9]], [1, 0], [b[:5], d[:9]])
    step([c[8:12]], [2], [c])
    assert kv.length.tolist() == [9, 5, 12]
    with pytest.raises(ConfigError, match="slot 2.*13 tokens.*capacity is 12"):
        net.decode([1], kv, [1], [2])
    assert kv.length.tolist() == [9, 5, 12]
