"""A conversation's keys and values, kept: the bits of computing everything again."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pylora.adapters.pool import AdapterPool
from pylora.errors import ConfigError, WrongTypeError
from pylora.generation.generate import generate, stream
from pylora.generation.prompt_cache import PromptCache
from pylora.model.config import LlamaConfig
from pylora.model.llama import Llama
from pylora.types import LoRA

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "head_dim": 8}


def a_model(ops: Any, precision: str = "fp32", **over: Any) -> Llama:
    config = LlamaConfig.tiny(**SIZES, max_position_embeddings=600, **over)
    return Llama.random(config, seed=5, backend=ops, precision=precision)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int4"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_turns_have_the_bits_of_computing_them_anew(
    ops: Any, precision: str, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = a_model(ops, precision)
    logits: list[bytes] = []
    from pylora.model.decoder import Batch

    forward = Batch.forward

    def heard(self: Batch, ids: Any) -> Any:
        out = forward(self, ids)
        logits.append(np.array(ops.to_numpy(out)).tobytes())
        return out

    monkeypatch.setattr(Batch, "forward", heard)
    settings: dict[str, Any] = {"temperature": temperature, "eos_ids": (7,)}
    cache, talk = PromptCache(net), [1, 2, 3]
    for turn in range(4):
        logits.clear()
        kept = generate(net, [talk], 9, cache=cache, **settings)[0]
        with_cache = list(logits)
        logits.clear()
        assert generate(net, [talk], 9, **settings)[0] == kept
        assert logits == with_cache
        talk = [*talk, *kept, 7, 10 + turn, 11]
    if ops.bitwise:
        assert len(cache.ids) > 30


def test_only_what_is_new_is_computed(ops: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    net = a_model(ops)
    if not ops.bitwise:
        pytest.skip("nothing is kept on this backend")
    cache = PromptCache(net)
    first = generate(net, [[1, 2, 3]], 4, eos_ids=(), cache=cache)[0]
    assert cache.ids == [1, 2, 3, *first[:3]]
    from pylora.model.decoder import Batch

    forward, sizes = Batch.forward, []
    monkeypatch.setattr(
        Batch, "forward", lambda self, ids: (sizes.append(len(ids)), forward(self, ids))[1]
    )
    generate(net, [[1, 2, 3, *first, 9]], 2, eos_ids=(), cache=cache)
    assert sizes == [2, 1], "the last answer's last token and the new one, then one token"
    sizes.clear()
    generate(net, [[1, 2, 3, *first, 9]], 1, eos_ids=(), cache=cache)
    assert sizes == [1], "the same prompt again: its last token alone"
    sizes.clear()
    generate(net, [[1, 2, 40, 3]], 1, eos_ids=(), cache=cache)
    assert sizes == [2], "another way from the third token on"


def test_another_adapter_computes_anew(ops: Any, rng: np.random.Generator) -> None:
    net = a_model(ops)
    pool = AdapterPool(net)
    for name in ("a", "b"):
        lora = {
            path: LoRA(
                rng.standard_normal((2, spec.k)).astype(np.float32),
                rng.standard_normal((spec.d, 2)).astype(np.float32),
                1.0,
            )
            for path, spec in net.config.modules().items()
        }
        pool.add(name, lora)
    cache, prompt = PromptCache(net), [1, 2, 3, 4, 5]
    alone = {n: generate(net, [prompt], 6, pool=pool, adapters=[n]) for n in ("a", "b", None)}
    assert alone["a"] != alone["b"]
    for name in ("a", "b", None, "b", "b", "a"):
        got = generate(net, [prompt], 6, pool=pool, adapters=[name], cache=cache)
        assert got == alone[name]
    pool.add("a", {}, replace=True)  # the name is the same, the adapter is not
    assert generate(net, [prompt], 6, pool=pool, adapters=["a"], cache=cache) == alone[None]


def test_room_grows_with_the_conversation(ops: Any) -> None:
    net = a_model(ops)
    cache, talk = PromptCache(net), [1]
    for _ in range(5):
        talk += generate(net, [talk], 100, eos_ids=(), cache=cache)[0]
    assert talk[1:] == generate(net, [[1]], 500, eos_ids=())[0]
    with pytest.raises(ConfigError, match="max_position_embeddings"):
        generate(net, [talk], 100, cache=cache)


def test_an_answer_that_is_broken_off_leaves_a_usable_cache(ops: Any) -> None:
    net = a_model(ops)
    cache = PromptCache(net)
    tokens = stream(net, [[1, 2, 3]], 50, eos_ids=(), cache=cache)
    begun = [next(tokens)[1] for _ in range(5)]
    del tokens
    whole = generate(net, [[1, 2, 3]], 20, eos_ids=())[0]
    assert begun == whole[:5]
    rest = generate(net, [[1, 2, 3, *whole[:5]]], 15, eos_ids=(), cache=cache)[0]
    assert rest == whole[5:]


def test_what_it_does_not_serve(ops: Any) -> None:
    net = a_model(ops)
    cache = PromptCache(net)
    with pytest.raises(ConfigError, match="one prompt, not 2"):
        generate(net, [[1], [2]], 2, cache=cache)
    with pytest.raises(ConfigError, match="another model"):
        generate(a_model(ops), [[1]], 2, cache=cache)
    with pytest.raises(WrongTypeError, match="pylora.load"):
        PromptCache("model.gguf")  # type: ignore[arg-type]
    assert repr(cache) == "PromptCache(0 tokens, room for 0)"
