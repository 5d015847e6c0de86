"""Many adapters of one model: each prompt gets its own, and nothing else reaches it."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from pylora.adapters.pool import AdapterPool
from pylora.errors import ConfigError, DtypeError, PlanError, PyloraError
from pylora.generation.generate import generate
from pylora.model.config import LlamaConfig
from pylora.model.decoder import Batch, pack_adapter
from pylora.model.llama import Llama
from pylora.types import LoRA

# Sizes that every precision takes: inputs in groups of 32.
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10], [11, 12], [3, 3, 3, 3], [1, 2, 3]]
RANKS = (1, 2, 7, 8, 32, 33, 64)


def a_model(ops: Any, precision: str = "fp32", **over: Any) -> Llama:
    return Llama.random(LlamaConfig.tiny(**SIZES | over), 5, backend=ops, precision=precision)


def an_adapter(model: Llama, seed: int, *, rank: int = 0, every: int = 1) -> dict[str, LoRA]:
    """Ranks of all kinds on every `every`-th module, some with biases; B large enough to matter."""
    rng = np.random.default_rng(seed)
    out = {}
    for i, (path, spec) in enumerate(model.config.modules().items()):
        if i % every:
            continue
        r = rank or RANKS[int(rng.integers(len(RANKS)))]
        A = rng.standard_normal((r, spec.k)).astype(np.float32)
        B = rng.standard_normal((spec.d, r)).astype(np.float32) / np.float32(r)
        bias = base_bias = None
        if rank == 0 and i % 3 == 0:
            bias = rng.standard_normal(spec.d).astype(np.float32)
        if rank == 0 and i % 5 == 1:
            base_bias = rng.standard_normal(spec.d).astype(np.float32)
        out[path] = LoRA(A, B, 0.8, 0.0, bias, base_bias)
    return out


def some_adapters(model: Llama) -> dict[str, dict[str, LoRA]]:
    return {
        "all": an_adapter(model, 1),
        "few": an_adapter(model, 2, every=3),
        "small": an_adapter(model, 3, rank=2),
        "zero": {p: LoRA(a.A, 0 * a.B, a.scale) for p, a in an_adapter(model, 4, rank=3).items()},
    }


def pool_of(model: Llama, adapters: Mapping[str, Mapping[str, LoRA]]) -> AdapterPool:
    pool = AdapterPool(model)
    for name, adapter in adapters.items():
        pool.add(name, adapter)
    return pool


def logits_alone(model: Llama, text: list[int], adapter: Mapping[str, LoRA] | None) -> bytes:
    """Of the last token, by `forward` of the whole sequence with the adapter attached."""
    model.attach(adapter) if adapter is not None else model.detach()
    out = bytes(model.ops.to_numpy(model.forward(text)[0])[-1].tobytes())
    model.detach()
    return out


# ---- bits -------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ("fp32", "fp32x3", "bf16", "int8", "int4"))
@pytest.mark.parametrize("over", [{}, {"model_type": "qwen3", "qk_norm": True}])
def test_a_row_of_a_mixed_batch_has_the_bits_of_a_forward_alone(
    ops: Any, precision: str, over: dict[str, Any]
) -> None:
    model = a_model(ops, precision, **over)
    adapters = some_adapters(model)
    packed = {name: pack_adapter(model, adapter) for name, adapter in adapters.items()}
    names = ["all", None, "few", "few", "small", "zero"]
    texts = [[*prompt, 7, 8] for prompt in PROMPTS]
    kv = model.kv_cache(len(texts), 16)
    slots = np.array([3, 0, 5, 1, 2, 4])
    mine = [None if n is None else packed[n] for n in names]
    lengths = [len(p) for p in PROMPTS]
    batch = Batch(model, kv, lengths, slots, mine)
    seen = [list(p) for p in PROMPTS]
    logits = batch.forward([token for p in PROMPTS for token in p])
    for step in range(3):  # the prompts at once, then a token each
        for i, (name, text) in enumerate(zip(names, seen, strict=True)):
            adapter = None if name is None else adapters[name]
            got = model.ops.to_numpy(logits)[i].tobytes()
            assert got == logits_alone(model, text, adapter), (step, i, name)
        if step == 2:
            break
        ids = [text[len(s)] for text, s in zip(texts, seen, strict=True)]
        seen = [[*s, t] for s, t in zip(seen, ids, strict=True)]
        if step == 0:
            batch = Batch(model, kv, [1] * len(ids), slots, mine)
        else:
            batch.advance()
        logits = batch.forward(ids)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_each_prompt_yields_what_it_does_alone(ops: Any, temperature: float) -> None:
    model = a_model(ops)
    adapters = some_adapters(model)
    names = ["few", "all", None, "all", "small", "few"]
    settings: dict[str, Any] = {"temperature": temperature, "seed": 3}

    def alone(eos_ids: tuple[int, ...]) -> list[list[int]]:
        out = []
        for i, (prompt, name) in enumerate(zip(PROMPTS, names, strict=True)):
            model.attach(adapters[name]) if name else model.detach()
            out += generate(model, [prompt], 9, first_row=i, **settings | {"eos_ids": eos_ids})
        model.detach()
        return out

    free = alone(())
    settings["eos_ids"] = (free[0][3], free[3][5])
    want = alone(settings["eos_ids"])
    assert len({len(row) for row in want}) > 1, "some rows should finish early"
    pool = pool_of(model, adapters)
    for size in (32, 1, 2, 3):
        got = generate(model, PROMPTS, 9, pool=pool, adapters=names, batch_size=size, **settings)
        assert got == want
    order = [4, 2, 0, 5, 1, 3]
    if temperature == 0:
        turned = generate(
            model,
            [PROMPTS[i] for i in order],
            9,
            pool=pool,
            adapters=[names[i] for i in order],
            **settings,
        )
        assert turned == [want[i] for i in order]


def test_a_sequence_outgrows_the_first_table_of_angles(ops: Any) -> None:
    model = a_model(ops, max_position_embeddings=600)
    whole = generate(model, [[1, 2]], 300, eos_ids=())[0]
    assert whole[-1] == int(
        np.argmax(model.ops.to_numpy(model.forward([1, 2, *whole[:-1]], rows=[300])[0])[0])
    )


# ---- the pool ---------------------------------------------------------------------------------


def test_the_active_adapter_is_that_of_prompts_without_a_name(ops: Any) -> None:
    model = a_model(ops)
    adapters = some_adapters(model)
    base = generate(model, PROMPTS, 5, eos_ids=())
    with pool_of(model, adapters) as pool:
        assert pool.active is None and generate(model, PROMPTS, 5, pool=pool, eos_ids=()) == base
        for name in ("all", "few", "all"):
            pool.use(name)
            assert pool.active == name
            model.attach(adapters[name])
            want = generate(model, PROMPTS, 5, eos_ids=())
            model.detach()
            assert generate(model, PROMPTS, 5, pool=pool, eos_ids=()) == want != base
        pool.use(None)
        assert generate(model, PROMPTS, 5, pool=pool, eos_ids=()) == base
        pool.use("few")
        pool.remove("few")
        assert pool.active is None


def test_what_the_pool_holds(ops: Any) -> None:
    model = a_model(ops)
    pool = AdapterPool(model)
    assert len(pool) == 0 and pool.nbytes == 0 and list(pool) == []
    small = an_adapter(model, 1, rank=2)
    pool.add("a", small)
    one = pool.nbytes
    assert one >= sum(lora.A.nbytes + lora.B.nbytes for lora in small.values())
    pool.add("b", small)
    assert pool.nbytes == 2 * one and pool.names == ("a", "b") == tuple(pool)
    assert "a" in pool and "c" not in pool and 3 not in pool
    pool.remove("a")
    assert pool.names == ("b",) and pool.nbytes == one
    pool.add("a", {})
    assert generate(model, PROMPTS, 4, pool=pool, adapters=["a"] * 6) == generate(model, PROMPTS, 4)


def test_bf16_halves_what_an_adapter_and_a_cache_take() -> None:
    """Of A; B is kept in float32, in which it is multiplied."""
    from pylora import backends

    if "c" not in backends.available():
        pytest.skip("the C core is not built")
    sizes = {}
    for precision in ("fp32", "bf16"):
        model = a_model("c", precision)
        A = an_adapter(model, 1, rank=32)
        pool = pool_of(model, {"a": {p: a for p, a in A.items() if "embed" not in p}})
        sizes[precision] = pool.nbytes, sum(a.nbytes for a in model.kv_cache(2, 8).k)
    assert sizes["bf16"][1] * 2 == sizes["fp32"][1]
    assert sizes["bf16"][0] < 0.85 * sizes["fp32"][0]


def test_an_adapter_in_the_pool_is_a_copy_and_an_attached_one_is_not(ops: Any) -> None:
    model = a_model(ops)
    adapter = an_adapter(model, 1)
    base = generate(model, PROMPTS, 5)
    pool = pool_of(model, {"a": adapter})
    model.attach(adapter)
    before = generate(model, PROMPTS, 5)
    model.detach()
    for lora in adapter.values():  # training writes in place
        lora.B[...] = 0
        for bias in (lora.bias, lora.base_bias):
            if bias is not None:
                bias[...] = 0
    assert generate(model, PROMPTS, 5, pool=pool, adapters=["a"] * 6) == before != base
    model.attach(adapter)
    assert generate(model, PROMPTS, 5) == base
    model.detach()
    with pytest.raises(ConfigError, match="'a' already"):
        pool.add("a", adapter)
    pool.add("a", adapter, replace=True)
    assert generate(model, PROMPTS, 5, pool=pool, adapters=["a"] * 6) == base


def test_removing_an_adapter_does_not_disturb_a_generation_that_uses_it(ops: Any) -> None:
    model = a_model(ops)
    pool = pool_of(model, some_adapters(model))
    names = ["few", "all", None, "all", "small", "few"]
    want = generate(model, PROMPTS, 6, pool=pool, adapters=names, batch_size=2, eos_ids=())
    heard: list[int] = []

    def meddle(row: int, token: int) -> None:
        heard.append(token)
        if len(heard) == 2:
            pool.remove("few")
            pool.add("few", {})
        if len(heard) == 5:
            pool.close()

    got = generate(
        model, PROMPTS, 6, pool=pool, adapters=names, batch_size=2, eos_ids=(), on_token=meddle
    )
    assert got == want and len(heard) == 36


def test_threads_may_share_a_pool(ops: Any) -> None:
    model = a_model(ops)
    pool = pool_of(model, some_adapters(model))
    names = ["few", "all", None, "all", "small", "few"]
    want = generate(model, PROMPTS, 8, pool=pool, adapters=names)
    got: dict[int, Any] = {}

    def work(i: int) -> None:
        turned = [names[(i + j) % 6] for j in range(6)], [PROMPTS[(i + j) % 6] for j in range(6)]
        out = generate(model, turned[1], 8, pool=pool, adapters=turned[0])
        got[i] = [out[(j - i) % 6] for j in range(6)]

    workers = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert got == dict.fromkeys(range(3), want)


# ---- what cannot be done ------------------------------------------------------------------------


def test_mistakes_are_named() -> None:
    model, other = a_model("numpy"), a_model("numpy")
    pool = pool_of(model, {"a": an_adapter(model, 1, rank=2)})

    def run(**settings: Any) -> Any:
        return generate(model, [[1], [2]], 2, **settings)

    with pytest.raises(ConfigError, match="no adapter 'b'; it has a"):
        run(pool=pool, adapters=["a", "b"])
    with pytest.raises(ConfigError, match="no adapter 7"):
        run(pool=pool, adapters=["a", 7])
    with pytest.raises(ConfigError, match=r"no adapter \['a'\]"):
        pool.use(["a"])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no adapter 'b'"):
        pool.use("b")
    with pytest.raises(ConfigError, match="no adapter 'b'"):
        pool.remove("b")
    with pytest.raises(ConfigError, match="2 prompts need a list of 2 adapters"):
        run(pool=pool, adapters=["a"])
    with pytest.raises(ConfigError, match="2 prompts need a list of 2 adapters"):
        run(pool=pool, adapters="aa")
    with pytest.raises(ConfigError, match=r"give pool=AdapterPool\(model\)"):
        run(adapters=["a", "a"])
    with pytest.raises(ConfigError, match="made for another model"):
        generate(other, [[1]], 2, pool=pool)
    model.attach(an_adapter(model, 1, rank=1))
    with pytest.raises(ConfigError, match=r"call model.detach\(\)"):
        run(pool=pool)
    model.detach()
    for name in ("", 3, None):
        with pytest.raises(ConfigError, match="the name of an adapter"):
            pool.add(name, {})  # type: ignore[arg-type]
    lora = an_adapter(model, 1, rank=2)["lm_head"]
    with pytest.raises(PlanError, match="modules that the model does not"):
        pool.add("b", {"model.layers.9.mlp.up_proj": lora})
    with pytest.raises(PlanError, match="A has shape"):
        pool.add("b", {"model.layers.0.mlp.down_proj": lora})
    with pytest.raises(DtypeError, match="float64"):
        pool.add("b", {"lm_head": LoRA(lora.A.astype(np.float64), lora.B, 1.0)})
    assert pool.names == ("a",)
    pool.close()
    pool.close()
    for use in (
        lambda: run(pool=pool),
        lambda: pool.add("c", {}),
        lambda: pool.use(None),
        lambda: pool.active,
        lambda: len(pool),
        lambda: "a" in pool,
        lambda: pool.nbytes,
        lambda: pool.__enter__(),
    ):
        with pytest.raises(PyloraError, match="closed"):
            use()


def test_a_batch_ends_where_its_cache_does(ops: Any) -> None:
    model = a_model(ops)
    kv = model.kv_cache(1, 3)
    batch = Batch(model, kv, [1], np.array([0]), [None])
    for _ in range(2):
        batch.forward([5])
        batch.advance()
    batch.forward([5])
    assert kv.length.tolist() == [3]
    with pytest.raises(ConfigError, match="holds 3 tokens"):
        batch.advance()
