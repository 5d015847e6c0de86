"""Whole weights in files, without PEFT: what is read, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapters_made import make

from pylora.adapters.adapter import Adapter
from pylora.adapters.combine import combine
from pylora.adapters.convert import write_adapter
from pylora.adapters.peft import CONFIG, WEIGHTS, read_shown
from pylora.errors import FileFormatError, PlanError, PyloraError, UnsupportedError
from pylora.formats.safetensors import SafeTensors, save
from pylora.model.config import LlamaConfig
from pylora.model.llama import random_weights

MODEL = LlamaConfig.tiny()
TIED = LlamaConfig.tiny(tie_word_embeddings=True)
BASE = random_weights(MODEL, 4)
P = "base_model.model."
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
DELTA = f"{P}model.embed_tokens.token_adapter.trainable_tokens_delta"
V, H = MODEL.vocab_size, MODEL.hidden_size


def table(rows: int = V, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, H)).astype(np.float32)


def written(folder: Path, settings: dict[str, Any], tensors: dict[str, Any]) -> Path:
    """A plain adapter with more settings and more tensors; None takes one away."""
    make().save(folder)
    config = json.loads((folder / CONFIG).read_text()) | settings
    (folder / CONFIG).write_text(json.dumps(config))
    with SafeTensors(folder / WEIGHTS) as file:
        there: dict[str, Any] = {k: np.array(file.load(k)) for k in file.tensors} | tensors
    save(folder / WEIGHTS, {k: a for k, a in there.items() if a is not None}, {"format": "pt"})
    return folder


def load(folder: Path, model: LlamaConfig = MODEL) -> Adapter:
    return Adapter.load(folder, model, base=BASE)


def test_a_saved_module_is_read_written_and_part_of_the_digest(tmp_path: Path) -> None:
    new = table()
    place = written(tmp_path / "a", {"modules_to_save": ["embed_tokens"]}, {P + EMBEDDING: new})
    adapter = load(place)
    assert adapter.whole is not None and np.array_equal(adapter.whole.tensors[EMBEDDING], new)
    assert adapter.digest() != make().digest()
    assert adapter.num_parameters == make().num_parameters + new.size
    assert "1 whole weights" in repr(adapter)
    adapter.save(tmp_path / "b")
    assert load(tmp_path / "b").digest() == adapter.digest()
    assert adapter.without_whole().whole is None and list(adapter.without_whole()) == list(adapter)


def test_rows_are_laid_into_the_base_and_float16_is_widened(tmp_path: Path) -> None:
    rows = table(2).astype(np.float16)
    place = written(tmp_path / "a", {"trainable_token_indices": [5, 2]}, {DELTA: rows})
    adapter = load(place)
    assert adapter.whole is not None
    want = np.array(BASE(EMBEDDING))
    want[[5, 2]] = rows
    assert np.array_equal(adapter.whole.tensors[EMBEDDING], want)
    assert adapter.num_parameters == make().num_parameters + rows.size
    with pytest.raises(PlanError, match="base=checkpoint.load"):
        Adapter.load(place, MODEL)


def test_a_copy_of_the_bases_table_is_no_weight_of_the_adapter(tmp_path: Path) -> None:
    place = written(tmp_path / "a", {}, {P + EMBEDDING: BASE(EMBEDDING)})
    assert load(place).whole is None
    place = written(tmp_path / "b", {}, {P + EMBEDDING: table()})
    assert load(place).whole is not None


BAD: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"modules_to_save": ["lm_head"]}, {}, r"names lm_head.*no tensor 'base_model.model.lm_head"),
    ({"modules_to_save": ["score"]}, {}, "'score' matches no module"),
    ({"modules_to_save": ["layers"]}, {}, "list of all layers"),
    ({"modules_to_save": ["lm_head"]}, {P + HEAD: table()[:, 1:]}, rf"shape.*\[tokens, {H}\]"),
    ({"modules_to_save": ["lm_head"]}, {P + HEAD: table()[0]}, rf"shape.*\[tokens, {H}\]"),
    ({"modules_to_save": ["lm_head"]}, {P + HEAD: table() * np.float32(np.nan)}, "NaN"),
    ({"modules_to_save": ["lm_head"]}, {P + HEAD: table().astype(np.int32)}, "I32"),
    ({"modules_to_save": ["lm_head"]}, {P + HEAD: table(V + 3)}, f"no '{P}{EMBEDDING}'"),
    (
        {"modules_to_save": ["lm_head", "embed_tokens"]},
        {P + HEAD: table(V + 3), P + EMBEDDING: table(V + 2)},
        "vocabularies differ",
    ),
    (
        {"modules_to_save": ["lm_head"]},
        {P + HEAD: table(), f"{P}lm_head.modules_to_save.weight": table(seed=1)},
        "same module, with different numbers",
    ),
    ({"modules_to_save": ["norm"]}, {f"{P}model.norm.weight": table()[0]}, "input_layernorm"),
    ({}, {f"{P}model.norm.weight": table()[0]}, "not expected.*model.norm.weight"),
    ({}, {f"{P}model.nothing.weight": table()}, "not expected.*model.nothing.weight"),
    ({}, {DELTA: table(2)}, "settings do not name"),
    ({"trainable_token_indices": [1, 2]}, {}, "no tensor '.*trainable_tokens_delta'"),
    ({"trainable_token_indices": [1, 2]}, {DELTA: table(3)}, r"shape \(3, "),
    ({"trainable_token_indices": [1, V]}, {DELTA: table(2)}, f"the token {V}"),
    ({"trainable_token_indices": {"q_proj": [1]}}, {}, "'q_proj' is neither"),
    (
        {"trainable_token_indices": [1], "modules_to_save": ["embed_tokens"]},
        {DELTA: table(1), P + EMBEDDING: table()},
        "trained whole already",
    ),
    (
        {"target_modules": ["q_proj", "down_proj", "lm_head"],
         "trainable_token_indices": {"lm_head": [1]}},
        {f"{P}lm_head.token_adapter.trainable_tokens_delta": table(1),
         f"{P}lm_head.lora_A.weight": table(8), f"{P}lm_head.lora_B.weight": np.ones((V, 8))},
        "takes one of them",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "tensors", "message"), BAD, ids=range(len(BAD)))
def test_what_does_not_fit_is_named(
    tmp_path: Path, settings: dict[str, Any], tensors: dict[str, Any], message: str
) -> None:
    place = written(tmp_path / "a", settings, tensors)
    with pytest.raises((PlanError, FileFormatError, UnsupportedError), match=message):
        load(place)


def test_other_rows_of_tied_tables_cannot_be_one(tmp_path: Path) -> None:
    rows = {"embed_tokens": [1], "lm_head": [2]}
    tensors = {DELTA: table(1), f"{P}lm_head.token_adapter.trainable_tokens_delta": table(1)}
    settings = {"trainable_token_indices": rows, "ensure_weight_tying": True}
    with pytest.raises(PlanError, match="wants them to be one"):
        load(written(tmp_path / "a", settings, tensors), TIED)


def test_no_form_but_pefts_has_them_and_nothing_sums_them(tmp_path: Path) -> None:
    place = written(tmp_path / "a", {"modules_to_save": ["lm_head"]}, {P + HEAD: table()})
    adapter = load(place)
    for form, name in (("gguf", "a.gguf"), ("mlx", "mlx")):
        with pytest.raises(UnsupportedError, match="'lm_head.weight' whole.*merge it"):
            write_adapter(tmp_path / name, adapter, MODEL, form)
        assert not (tmp_path / name).exists()
    with pytest.raises(UnsupportedError, match="cannot be summed"):
        combine([(adapter, 1.0), (make(), 1.0)], "cat")


def test_without_the_model_they_are_shown_and_not_run(tmp_path: Path) -> None:
    place = written(tmp_path / "a", {"modules_to_save": ["lm_head"]}, {P + HEAD: table()})
    _, plan, _, whole = read_shown(place, MODEL.modules())
    assert whole == {P + HEAD: (V, H)} and len(plan) == len(make())
    with pytest.raises(PyloraError, match="modules_to_save.*--model"):
        Adapter.load(place, MODEL.modules())
