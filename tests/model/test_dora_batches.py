"""Batches whose rows have DoRA, plain LoRA or no adapter: each row as alone, on every backend."""

from __future__ import annotations

from typing import Any

import numpy as np
from adapters_made import filled

from pylora.adapters.adapter import Adapter
from pylora.adapters.pool import AdapterPool
from pylora.model.config import LlamaConfig
from pylora.model.decoder import Batch
from pylora.model.llama import Llama


def adapters() -> dict[str, Adapter]:
    targets = ["embed_tokens", "q_proj", "v_proj", "down_proj"]
    made = {
        "dora": filled(1, target_modules=targets, use_dora=True, r=3, base=weights().load),
        "plain": filled(2, target_modules=["q_proj", "up_proj"], r=2),
        "other": filled(3, target_modules=["o_proj", "q_proj"], use_dora=True, base=weights().load),
    }
    return made


def weights() -> Llama:
    return Llama.random(LlamaConfig.tiny(), 5, backend="numpy")


def test_a_row_of_a_mixed_batch_has_the_bits_that_it_has_alone(ops: Any) -> None:
    llama = Llama.random(LlamaConfig.tiny(), 5, backend=ops)
    pool = AdapterPool(llama)
    for name, adapter in adapters().items():
        pool.add(name, adapter)
    ids = [np.arange(3, 9) * (i + 2) % 60 for i in range(4)]
    named = ["dora", None, "plain", "other"]

    def logits(which: list[int]) -> np.ndarray:
        own = llama.kv_cache(len(which), 16)
        batch = Batch(
            llama, own, [ids[i].size for i in which], np.arange(len(which)),
            [pool.packed(named[i]) for i in which],
        )  # fmt: skip
        out: np.ndarray = ops.to_numpy(batch.forward(np.concatenate([ids[i] for i in which])))
        return out

    together = logits([0, 1, 2, 3])
    for i, name in enumerate(named):
        llama.detach()
        if name is not None:
            llama.attach(adapters()[name])
        whole = ops.to_numpy(llama.forward(ids[i])[0])[-1]
        if ops.bitwise:
            assert together[i].tobytes() == logits([i])[0].tobytes() == whole.tobytes()
        else:
            assert np.allclose(together[i], whole, rtol=1e-4, atol=1e-4)
    assert not np.array_equal(together[0], together[1])
