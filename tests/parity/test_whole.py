"""Whole weights of adapters, against PEFT: modules_to_save, trained rows, resized vocabularies.

Tiny random models made by transformers, adapters made and filled by PEFT. What PEFT computes with
the adapter on, pylora must compute unmerged, in a pool beside the base, and merged; and the merged
directory must give transformers the same.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_hf import SIZES, VOCAB

from pylora.adapters.adapter import Adapter
from pylora.adapters.pool import AdapterPool
from pylora.errors import UnsupportedError
from pylora.formats import open_checkpoint
from pylora.formats.safetensors import SafeTensors
from pylora.merging.merge import merge_checkpoint, unmerge_checkpoint
from pylora.model.decoder import Batch
from pylora.model.llama import Llama
from pylora.training.optimizer import trainable

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

Q = ["q_proj", "down_proj"]


def tokens(*ids: int, **more: Any) -> dict[str, Any]:
    return {"target_modules": Q, "trainable_token_indices": list(ids), **more}


def saved(*names: str, **more: Any) -> dict[str, Any]:
    return {"target_modules": Q, "modules_to_save": list(names), **more}


# kind, tied, size of the vocabulary, settings
CASES: dict[str, tuple[str, bool, int, dict[str, Any]]] = {
    "embedding": ("Llama", False, VOCAB, saved("embed_tokens")),
    "embedding of tied": ("Qwen2", True, VOCAB, saved("embed_tokens")),
    "head of tied": ("Llama", True, VOCAB, saved("lm_head")),
    "both": ("Mistral", False, VOCAB, saved("embed_tokens", "lm_head")),
    "both of tied": ("Qwen3", True, VOCAB, saved("embed_tokens", "lm_head")),
    "tied stays tied": ("Llama", True, VOCAB, saved("embed_tokens", ensure_weight_tying=True)),
    "norms": ("Qwen3", True, VOCAB, saved("norm")),
    "a layer, wins over LoRA": ("Qwen2", False, VOCAB, saved("layers.1", "0.self_attn.q_proj")),
    "rows": ("Llama", False, VOCAB, tokens(1, 40, 3)),
    "rows of tied": ("Qwen2", True, VOCAB, tokens(1, 40, 3)),
    "rows of both": (
        "Mistral",
        False,
        VOCAB,
        {"target_modules": Q, "trainable_token_indices": {"embed_tokens": [2], "lm_head": [7, 4]}},
    ),
    "other rows of tied": (
        "Qwen3",
        True,
        VOCAB,
        {"target_modules": Q, "trainable_token_indices": {"embed_tokens": [2], "lm_head": [7, 4]}},
    ),
    "resized": ("Llama", False, VOCAB + 6, {"target_modules": Q}),
    "resized, tied": ("Qwen2", True, VOCAB + 6, {"target_modules": Q}),
    "smaller": ("Mistral", False, VOCAB - 4, {"target_modules": Q}),
    "resized and saved": ("Qwen3", False, VOCAB + 6, saved("embed_tokens", "lm_head")),
    "resized and saved, tied": ("Llama", True, VOCAB + 6, saved("embed_tokens", "lm_head")),
    "rows of resized": ("Qwen2", False, VOCAB + 6, tokens(44, 47)),
    "rows of resized, tied": ("Qwen3", True, VOCAB + 6, tokens(44, 47)),
    "LoRA on a resized, tied embedding": (
        "Llama",
        True,
        VOCAB + 6,
        {"target_modules": [*Q, "embed_tokens"]},
    ),
}
LENGTH = 9


@dataclass
class Case:
    name: str
    base: Path
    adapter: Path
    ids: np.ndarray
    logits: np.ndarray
    grads: dict[str, np.ndarray]

    @property
    def resized(self) -> bool:
        return CASES[self.name][2] != VOCAB


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    kind, tied, size, settings = CASES[request.param]
    where = tmp_path_factory.mktemp("whole")
    torch.manual_seed(list(CASES).index(request.param))
    config = getattr(transformers, f"{kind}Config")(
        **SIZES, tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2, pad_token_id=None
    )
    made = getattr(transformers, f"{kind}ForCausalLM")
    base = made(config).float().eval()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
            if parameter.ndim > 1:
                parameter.mul_(3)
    base.save_pretrained(where / "base")
    base = made.from_pretrained(where / "base", attn_implementation="eager").eval()
    if size != VOCAB:
        base.resize_token_embeddings(size)
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False, **settings)
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(where / "adapter")
    ids = torch.randint(0, size, (1, LENGTH))
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    grads = {
        n.replace(".default", ""): p.grad.numpy()
        for n, p in model.named_parameters()
        if p.grad is not None
    }
    return Case(
        request.param,
        where / "base",
        where / "adapter",
        ids.numpy()[0],
        out.logits[0].detach().numpy(),
        grads,
    )


def close(got: Any, want: np.ndarray, scale: float = 1.0) -> None:
    np.testing.assert_allclose(
        np.asarray(got), want, rtol=0, atol=2e-5 * scale * float(np.abs(want).max())
    )


AB = (".A", ".B")


def _trained(key: str) -> tuple[str, str]:
    """The path and the part of a whole weight by PEFT's name of its parameter."""
    key = key.removeprefix("base_model.model.")
    if ".trainable_tokens_delta" in key:
        return key.partition(".token_adapter")[0], "weight"
    path, _, part = key.partition(".modules_to_save")
    path, _, part = f"{path}{part}".rpartition(".")
    return path, part


def opened(case: Case) -> tuple[Llama, Adapter]:
    with open_checkpoint(case.base) as checkpoint:
        adapter = Adapter.load(case.adapter, checkpoint.config, base=checkpoint.load)
        return Llama.from_checkpoint(checkpoint), adapter


def test_logits_and_gradients_are_pefts(case: Case) -> None:
    model, adapter = opened(case)
    before, _ = model.forward(case.ids % VOCAB)
    model.attach(adapter)
    assert model.config.vocab_size == CASES[case.name][2]
    close(model.forward(case.ids)[0], case.logits)
    labels = np.append(case.ids[1:], -100)
    _, grads = model.loss(case.ids, labels)
    assert grads is not None
    seen = set()
    for key, want in case.grads.items():
        if "lora_" in key:
            path, _, part = key.removeprefix("base_model.model.").partition(".lora_")
            close(getattr(grads[path], part.replace("embedding_", "")[0]), want, 5)
            continue
        path, part = _trained(key)
        close(getattr(grads[path], part), want, 5)
        seen.add(f"{path}.{part}")
    assert seen == set(model.whole_arrays) == {n for n in trainable(adapter) if n[-2:] not in AB}
    model.detach()
    assert np.array_equal(model.forward(case.ids % VOCAB)[0], before)


def test_in_a_pool_beside_the_base_each_has_its_own_bits(case: Case) -> None:
    model, adapter = opened(case)
    pool = AdapterPool(model)
    if case.resized:
        with pytest.raises(UnsupportedError, match="vocabulary of its own"):
            pool.add("it", adapter)
        return
    pool.add("it", adapter)
    it = pool.packed("it")
    n, other = LENGTH, case.ids[::-1].copy()

    def logits(texts: list[np.ndarray], adapters: list[Any]) -> Any:
        kv = model.kv_cache(len(texts), n)
        slots = np.arange(len(texts), dtype=np.int64)
        first = Batch(model, kv, [len(t) - 1 for t in texts], slots, adapters)
        first.forward(np.concatenate([t[:-1] for t in texts]))
        batch = Batch(model, kv, [1] * len(texts), slots, adapters)
        return batch.forward([t[-1] for t in texts])

    together = logits([case.ids, other[:4], case.ids[:5]], [it, None, it])
    close(together[0], case.logits[-1])
    close(together[2], case.logits[4])
    for row, (text, one) in enumerate([(case.ids, it), (other[:4], None), (case.ids[:5], it)]):
        assert np.array_equal(together[row], logits([text], [one])[0])


def test_a_merged_directory_is_the_same_model_in_transformers(case: Case, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    merge_checkpoint(case.base, case.adapter, out)
    with open_checkpoint(out) as merged:
        assert merged.config.vocab_size == CASES[case.name][2]
        close(Llama.from_checkpoint(merged).forward(case.ids)[0], case.logits)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager")
    with torch.no_grad():
        close(theirs(torch.from_numpy(case.ids)[None]).logits[0].numpy(), case.logits)
    unmerge_checkpoint(out, tmp_path / "base")
    with open_checkpoint(case.base) as a, open_checkpoint(tmp_path / "base") as b:
        assert a.names() == b.names()
        assert json.loads((case.base / "config.json").read_text())["vocab_size"] == VOCAB
        assert b.config == a.config
        for name in a.names():
            assert np.array_equal(a.load(name), b.load(name)), name


def test_saved_again_it_has_pefts_tensors_and_peft_loads_it(case: Case, tmp_path: Path) -> None:
    model, adapter = opened(case)
    adapter.save(tmp_path / "again")
    copies = ("original_module", "modules_to_save")
    with SafeTensors(case.adapter / "adapter_model.safetensors") as a:
        with SafeTensors(tmp_path / "again" / "adapter_model.safetensors") as b:
            want = {k for k in a.tensors if not any(word in k for word in copies)}
            if case.name == "rows of resized, tied":  # the head's, which are the embedding's
                want = {k for k in want if "lm_head" not in k}
            assert set(b.tensors) == want
            for key in want:
                here, there = a.load(key), b.load(key)
                if key.endswith("token_adapter.base_layer.weight"):  # under the trained rows
                    trained = CASES[case.name][3]["trainable_token_indices"]
                    here, there = (np.delete(x, trained, axis=0) for x in (here, there))
                assert np.array_equal(here, there), key
    again = Adapter.load(tmp_path / "again", model.config, base=open_checkpoint(case.base).load)
    assert again.digest() == adapter.digest()
    base = transformers.AutoModelForCausalLM.from_pretrained(case.base, attn_implementation="eager")
    if case.resized:
        base.resize_token_embeddings(CASES[case.name][2])
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "again").eval()
    with torch.no_grad():
        close(theirs(torch.from_numpy(case.ids)[None]).logits[0].numpy(), case.logits)
