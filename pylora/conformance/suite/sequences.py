"""Wrong answers that come of several adapters: both in use at once, a cache that is not its own.

Which adapter was left over needs no numbers of its own: those of the other adapter are its sign.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pylora.conformance.suite.adapters import Meaning
from pylora.conformance.suite.answers import PROMPTS, Answer, log_softmax, model_of
from pylora.conformance.suite.bases import Base
from pylora.types import LoRA

BLOCK = 16  # tokens; caches of prefixes share whole blocks, others all tokens but the last


def both(one: Meaning, other: Meaning) -> Meaning:
    """Both adapters' updates at once: one of the sum of their ranks, scales multiplied in."""
    out: dict[str, LoRA] = {}
    for path in dict.fromkeys([*one.loras, *other.loras]):
        parts = [m.loras[path] for m in (one, other) if path in m.loras]
        A = np.concatenate([p.A for p in parts])
        B = np.concatenate([p.scale * p.B for p in parts], axis=1)
        out[path] = replace(parts[0], A=A, B=B, scale=1.0)
    return replace(one, loras=out)


def kept_lengths(n: int) -> list[int]:
    """How many tokens of a prompt of n a cache may have kept: all but the last, or whole blocks."""
    blocks = (n - 1) // BLOCK * BLOCK
    return list(dict.fromkeys(p for p in (n - 1, blocks, BLOCK) if 0 < p < n))


def foreign_prefix(
    base: Base,
    reader: Meaning,
    owner: Meaning,
    which: int,
    kept: int,
    prompts: Sequence[Sequence[int]] = PROMPTS,
) -> Answer:
    """What `reader` says after a prompt of which another adapter has computed the first tokens."""
    prompt = prompts[which]
    model = model_of(base, owner)
    kv = model.kv_cache(1, len(prompt))
    model.decode(prompt[:kept], kv, [kept])
    model.attach(reader.loras)
    logits = model.decode(prompt[kept:], kv, [len(prompt) - kept])
    return Answer((), (log_softmax(logits)[0],))
