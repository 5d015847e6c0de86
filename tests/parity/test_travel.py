"""Adapters and merged models that were made here, in llama.cpp: the logits that pylora has.

How far two float32 computations may be apart comes from the model itself: Rounded moves every
number that a computation rounds, as in tests/parity/test_gguf_families.py.
"""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import json
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

for package in ("hypothesis", "torch", "transformers", "gguf", "llama_cpp"):
    pytest.importorskip(package)
import gguf_families
import llama_cpp
from family_cases import their_model
from travellers import draw, rules

from pylora.adapters.adapter import Adapter
from pylora.adapters.convert import read_adapter, write_adapter
from pylora.check.gradient import SIGMAS
from pylora.check.rounding import Exact
from pylora.conformance.suite import tokenizer
from pylora.conformance.suite.tokenizer import SIZE
from pylora.formats import open_checkpoint
from pylora.formats.gguf_header import read_header
from pylora.formats.gguf_types import MIXTURES
from pylora.merging.to_gguf import merge_to_gguf
from pylora.model.llama import Llama
from pylora.types import LoRA

_CASES = runpy.run_path(str(Path(__file__).with_name("test_gguf_families.py")))
CASES, _HALF, AsLlamaCpp = (_CASES[name] for name in ("CASES", "_HALF", "AsLlamaCpp"))
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
IDS = np.random.default_rng(3).integers(3, SIZE - 3, 30)
# One case of each family: what differs is names, the order of rows, and which modules there are.
FAMILIES = {case.split()[0]: case for case in reversed(CASES)}


def theirs(model: Path, adapter: Path | None = None) -> np.ndarray:
    """Logits [tokens, vocabulary] of llama.cpp, with a cache of float32."""
    net = llama_cpp.Llama(
        str(model), n_ctx=64, n_batch=64, n_threads=1, logits_all=True, verbose=False,
        type_k=0, type_v=0, lora_path=None if adapter is None else str(adapter),
    )  # fmt: skip
    net.eval(IDS.tolist())
    out = np.array(net.scores[: IDS.size], np.float64)
    net.close()
    return out


def doubled(lora: LoRA) -> LoRA:
    return dataclasses.replace(lora, A=lora.A.astype(np.float64), B=lora.B.astype(np.float64))


def agree(file: Path, adapter: Adapter, got: np.ndarray, half: bool, slack: float = 0.0) -> None:
    """`got` are the logits of the model with the adapter, within what rounding moves; `slack`, of
    the adapter's own effect, for what a form says less exactly."""
    with open_checkpoint(file) as checkpoint:

        def run(ops: Any, with_it: bool = True) -> np.ndarray:
            net = Llama(
                checkpoint.config,
                lambda name: checkpoint.load(name).astype(np.float64),
                backend=ops,
            )
            if with_it:
                net.attach({path: doubled(lora) for path, lora in adapter.items()})
            return np.asarray(net.forward(IDS)[0])

        exact, plain = run(Exact()), run(Exact(), False)
        moved = [run(AsLlamaCpp(seed, half)) for seed in range(2)]
    size, effect = np.linalg.norm(exact), np.linalg.norm(exact - plain)
    allowed = SIGMAS * max(np.linalg.norm(m - exact) for m in moved) + 4 * 2.0**-24 * size
    allowed += slack * effect
    assert allowed < 0.2 * effect  # so a module that is left out, or a wrong scale, is seen
    assert np.linalg.norm(got - exact) <= allowed


@pytest.mark.parametrize("kind", FAMILIES)
def test_an_adapter_that_was_made_here_is_the_same_in_llama_cpp(kind: str, tmp_path: Path) -> None:
    model = their_model(kind, CASES[FAMILIES[kind]])
    model.save_pretrained(tmp_path / "model")
    base = tmp_path / "model.gguf"
    gguf_families.write(tmp_path / "model", base)
    with open_checkpoint(base) as checkpoint:
        config = checkpoint.config
    settings = rules(config)
    name = "experts and more" if config.experts else "rslora, ranks and alphas"
    adapter, file = draw(config, settings[name], 1), tmp_path / "adapter.gguf"
    write_adapter(file, adapter, config, "gguf")
    agree(base, adapter, theirs(base, file), kind in _HALF)
    assert read_adapter(file, config).digest() == adapter.digest()


def test_embedding_and_head_that_are_not_tied_are_the_same_in_llama_cpp(tmp_path: Path) -> None:
    model = their_model("llama", CASES["llama"])
    model.save_pretrained(tmp_path / "model")
    base, file = tmp_path / "model.gguf", tmp_path / "adapter.gguf"
    gguf_families.write(tmp_path / "model", base)
    with open_checkpoint(base) as checkpoint:
        config = checkpoint.config
    adapter = draw(config, rules(config)["embedding and head"], 2)
    write_adapter(file, adapter, config, "gguf")
    agree(base, adapter, theirs(base, file), False)


# ---- merged and quantized ------------------------------------------------------------------------

_WIDE = {
    "vocab_size": SIZE, "hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_hidden_layers": 9, "tie_word_embeddings": False,
}  # fmt: skip
WIDTHS = {
    "whole blocks": ("llama", _WIDE),
    "tied": ("llama", {**_WIDE, "tie_word_embeddings": True, "num_hidden_layers": 3,
                       "num_key_value_heads": 1}),
    "rows of 32 alone": ("llama", {**_WIDE, "hidden_size": 96, "intermediate_size": 160,
                                   "num_attention_heads": 3, "num_key_value_heads": 3,
                                   "num_hidden_layers": 3}),
    "rows of nothing whole": ("gpt2", {"vocab_size": SIZE, "n_embd": 40, "n_layer": 2, "n_head": 2,
                                       "n_positions": 64, "bos_token_id": 0, "eos_token_id": 1}),
    "one q, k, v": ("phi3", {**_WIDE, "num_hidden_layers": 4}),
    "eight experts": ("mixtral", {**_WIDE, "num_local_experts": 8, "num_hidden_layers": 3,
                                  "sliding_window": None}),
}  # fmt: skip


@pytest.fixture(scope="module", params=WIDTHS)
def merged(request: Any, tmp_path_factory: Any) -> Iterator[tuple[Path, Path, Path]]:
    """A base, an adapter, and the merge of both in float32."""
    folder = tmp_path_factory.mktemp("merged")
    kind, settings = WIDTHS[request.param]
    if kind != "gpt2":
        settings = {**CASES["llama"], **settings}
    model = their_model(kind, settings)
    model.save_pretrained(folder / "model")
    base = folder / "base.gguf"
    gguf_families.write(folder / "model", base)
    with open_checkpoint(base) as checkpoint:
        config = checkpoint.config
    adapter = draw(config, rules(config)["one module"], 3)
    adapter.save(folder / "adapter")
    whole = folder / "f32.gguf"
    merge_to_gguf(base, folder / "adapter", whole, "f32")
    yield base, folder / "adapter", whole


def digests(file: Path) -> dict[str, tuple[str, str]]:
    header = read_header(file)
    return {
        name: (t.kind, hashlib.sha256(header.rows(name).tobytes()).hexdigest())
        for name, t in header.tensors.items()
    }


def quantize(source: Path, target: Path, number: int) -> None:
    """llama.cpp's own quantizer."""
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = number, 1
    assert not llama_cpp.llama_model_quantize(
        str(source).encode(), str(target).encode(), ctypes.byref(settings)
    )


@pytest.mark.parametrize("name", [n for n in MIXTURES if n != "f32"])
def test_a_merge_has_the_types_and_the_bytes_of_llama_cpp_s_quantizer(
    name: str, merged: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, adapter, whole = merged
    ours, other = tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    merge_to_gguf(base, adapter, ours, name)
    quantize(whole, other, MIXTURES[name].number)
    got, want = digests(ours), digests(other)
    assert got == want
    one, two = read_header(ours).metadata, read_header(other).metadata
    assert one.keys() == two.keys()
    assert all(np.array_equal(one[key], two[key]) for key in one)


def test_llama_cpp_runs_what_was_merged(merged: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, folder, whole = merged
    with open_checkpoint(base) as checkpoint:
        adapter = read_adapter(folder, checkpoint)
        half = checkpoint.config.model_type in _HALF
    agree(base, adapter, theirs(whole), half, slack=2.0**-20)


# ---- from a Hugging Face folder ------------------------------------------------------------------


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_folder_becomes_a_file_that_llama_cpp_runs(kind: str, tmp_path: Path) -> None:
    model = their_model(kind, CASES[FAMILIES[kind]])
    folder, file = tmp_path / "model", tmp_path / "merged.gguf"
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer.tokenizer_json()))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer.settings_json()))
    with open_checkpoint(folder) as checkpoint:
        config = checkpoint.config
    settings = rules(config)
    adapter = draw(config, settings["experts" if config.experts else "odd rank and alpha"], 4)
    adapter.save(tmp_path / "adapter")
    merge_to_gguf(folder, tmp_path / "adapter", file, "f32")
    with open_checkpoint(file) as made:
        text = "Hello, world! 123  \n it's"
        with open_checkpoint(folder) as base:
            assert made.tokenizer().encode(text) == base.tokenizer().encode(text)
    agree(folder, adapter, theirs(file), kind in _HALF, slack=2.0**-20)
