"""Every family that llama.cpp has, in a GGUF file: read as the directory is, run as llama.cpp does.

The file is written with llama.cpp's own tables of names (support/gguf_families.py). That llama.cpp
computes the same logits from the same file proves what no table says: which norms hold one more,
the order of q's and k's rows, the rotation, scales that are nowhere written. How far two float32
computations may be apart comes from the model itself (check/rounding.py).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

for package in ("hypothesis", "torch", "transformers", "gguf", "llama_cpp"):
    pytest.importorskip(package)
import gguf_families
import llama_cpp
from family_cases import FAMILIES, FULL, SLIDING, their_model

from pylora.check.gradient import SIGMAS
from pylora.check.rounding import Exact, Rounded
from pylora.conformance.suite.tokenizer import END_ID, SIZE, START_ID
from pylora.formats import open_checkpoint
from pylora.model.llama import Llama

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
_SHARED: dict[str, Any] = {
    "vocab_size": SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": START_ID,
    "eos_token_id": END_ID,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_MINE = {**_SHARED, "head_dim": 32}  # heads that are wider than their share
_GEMMA = {**_MINE, "sliding_window": 5, "tie_word_embeddings": True, "query_pre_attn_scalar": 32}
_GPT2 = {"vocab_size": SIZE, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64,
         "bos_token_id": START_ID, "eos_token_id": END_ID}  # fmt: skip
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 12}
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 512}  # fmt: skip
_LONG = {"type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3],
         "long_factor": [2.0, 2.5, 3.0, 4.0]}  # fmt: skip
_PHI3 = {**_SHARED, "partial_rotary_factor": 0.5, "rope_scaling": _LONG}
_NEOX = {k: v for k, v in _SHARED.items() if k != "num_key_value_heads"}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}


def rope(scaling: dict[str, Any]) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 1e4, **scaling}}


def two_ropes(scaling: dict[str, Any], theta: float, local: float) -> dict[str, Any]:
    plain = {"rope_type": "default", "rope_theta": local}
    return {"rope_parameters": {FULL: {"rope_theta": theta, **scaling}, SLIDING: plain}}


# A name that begins with the model_type -> settings.
CASES: dict[str, dict[str, Any]] = {
    "llama": _SHARED,
    "llama tied, biases": {**_SHARED, "tie_word_embeddings": True, "attention_bias": True,
                           "mlp_bias": True},
    "llama linear": _SHARED | rope({"rope_type": "linear", "factor": 3.0}),
    "llama llama3": _SHARED | rope(_LLAMA3) | {"max_position_embeddings": 4096},
    "llama yarn": _SHARED | rope(_YARN),
    "mistral": {**_MINE, "sliding_window": None},
    "mixtral": {**_SHARED, "num_local_experts": 4, "sliding_window": None},
    "qwen2": _SHARED,
    "qwen2 yarn": {**_SHARED, "tie_word_embeddings": True} | rope(_YARN),
    "qwen3": _MINE,
    "qwen3_moe": {**_MINE, **_EXPERTS, "moe_intermediate_size": 32, "norm_topk_prob": True},
    "olmoe": {**_SHARED, **_EXPERTS, "num_key_value_heads": 4},
    "gemma2": _GEMMA,
    "gemma3_text": {**_GEMMA, "num_hidden_layers": 7},
    "gemma3_text linear": {**_GEMMA, "num_hidden_layers": 7}
    | two_ropes({"rope_type": "linear", "factor": 8.0}, 1e6, 1e4),
    "phi3": _SHARED,
    "phi3 long": {**_PHI3, "original_max_position_embeddings": 12},
    # llama.cpp chooses by the size of its cache, which is 256 at least
    "phi3 short": {**_PHI3, "original_max_position_embeddings": 256,
                   "max_position_embeddings": 512},
    "smollm3": _SHARED,
    "granite": {**_SHARED, "embedding_multiplier": 3.0, "residual_multiplier": 0.5,
                "attention_multiplier": 0.25, "logits_scaling": 4.0},
    "olmo2": _SHARED,
    "olmo2 yarn": _SHARED | rope(_YARN),
    "olmo3": {**_SHARED, "sliding_window": 5},
    "olmo3 yarn": {**_SHARED, "sliding_window": 5} | two_ropes(_YARN, 1e4, 1e4),
    "gpt2": _GPT2,
    "cohere": {**_SHARED, "logit_scale": 0.25, "tie_word_embeddings": True},
    "stablelm": {**_SHARED, "partial_rotary_factor": 0.5, "use_qkv_bias": True},
    # Norms of q and k heads llama.cpp reads of a Cohere model with 64 layers or more alone.
    "cohere2": {**_SHARED, "sliding_window": 5, "tie_word_embeddings": True},
    "stablelm normed": {**_SHARED, "qk_layernorm": True, "use_parallel_residual": True},
    "stablelm parallel": {**_SHARED, "use_parallel_residual": True},
    "starcoder2": {**_SHARED, "sliding_window": None, "tie_word_embeddings": True},
    "gpt_neox": _NEOX,
    "gpt_neox in turn": {**_NEOX, "use_parallel_residual": False, "rotary_pct": 0.5},
    "exaone4": {**_SHARED, "sliding_window": None, "layer_types": [FULL] * 4},
    "gemma": {**_MINE, "tie_word_embeddings": True},
    "nemotron": {**_SHARED, "hidden_act": "relu2"},
    "arcee": _SHARED,
    "seed_oss": {**_MINE, "attention_bias": True, "attention_dropout": 0.0,
                 "residual_dropout": 0.0},
    "ernie4_5": {**_SHARED, "head_dim": 16, "tie_word_embeddings": True},
    "glm4": {**_SHARED, "head_dim": 16, "attention_bias": True},
}  # fmt: skip
# Its own words for what follows from others, or which a GGUF file does not say.
_UNSAID = {"bos_token_id", "eos_token_ids", "model_type"}
_HALF = (
    "gemma",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "starcoder2",
    "gpt_neox",
)  # GELU by a table of float16


class AsLlamaCpp(Rounded):
    """Rounding as llama.cpp's: a GELU is looked up in a table whose arguments and values are
    float16, and angles are products of float32."""

    def __init__(self, seed: int, half: bool) -> None:
        super().__init__(seed)
        self._u = 2.0**-11 / self._unit() if half else 0.0

    @staticmethod
    def _unit() -> float:
        return 2.0**-24

    def activation_forward(self, x: Any, up: Any, kind: str, dtype: Any = None) -> Any:
        if not kind.startswith("gelu"):
            return super().activation_forward(x, up, kind)
        gate = Exact.activation_forward(self, self._off(x, self._u), None, kind)
        gate = self._off(gate, self._u)
        return gate if up is None else gate * up

    def rope(self, x: Any, cos: Any, sin: Any, position: Any, *args: Any, **more: Any) -> Any:
        """llama.cpp multiplies its way from one frequency to the next."""
        steps = np.arange(1, cos.shape[1] + 1)
        angle = np.arctan2(sin, cos)
        size = np.hypot(sin, cos)
        far = np.arange(len(cos))[:, None] * np.abs(np.ones_like(angle))
        angle = angle + self._unit() * far * steps * self._random.standard_normal(cos.shape[1])
        return super().rope(x, size * np.cos(angle), size * np.sin(angle), position, *args, **more)


def theirs(path: Path, ids: np.ndarray) -> np.ndarray:
    """Logits [tokens, vocabulary] of llama.cpp, with a cache of float32."""
    model = llama_cpp.Llama(
        str(path), n_ctx=64, n_batch=64, n_threads=1, logits_all=True, verbose=False,
        type_k=0, type_v=0,
    )  # fmt: skip
    model.eval(ids.tolist())
    out = np.array(model.scores[: ids.size], np.float64)
    model.close()
    return out


@pytest.mark.parametrize("case", CASES)
def test_a_gguf_file_is_read_and_run_as_llama_cpp_does(case: str, tmp_path: Path) -> None:
    kind = case.split()[0]
    model = their_model(kind, CASES[case])
    model.save_pretrained(tmp_path / "model")
    gguf_families.write(tmp_path / "model", tmp_path / "model.gguf")
    folder, file = open_checkpoint(tmp_path / "model"), open_checkpoint(tmp_path / "model.gguf")
    said, read = (dataclasses.asdict(c.config) for c in (folder, file))
    for fields in (said, read):  # the file has it in numbers, config.json leaves it to be derived
        (fields["rope_scaling"] or {}).pop("attention_factor", None)
    differ = {k: (v, read[k]) for k, v in said.items() if k not in _UNSAID and read[k] != v}
    assert not differ
    assert set(folder.names()) == set(file.names())
    for name in folder.names():
        want = folder.load(name)
        slack = 2.0**-23 if kind in gguf_families._ABOVE_ONE and "norm" in name else 0
        assert np.abs(file.load(name) - want).max() <= slack * (1 + np.abs(want).max()), name

    ids = np.random.default_rng(3).integers(3, SIZE - 3, 30)

    def run(ops: Any) -> np.ndarray:
        net = Llama(file.config, lambda name: file.load(name).astype(np.float64), backend=ops)
        return np.asarray(net.forward(ids)[0])

    exact = run(Exact())
    moved = [run(AsLlamaCpp(seed, kind in _HALF)) for seed in range(2)]
    size = np.linalg.norm(exact)
    allowed = SIGMAS * max(np.linalg.norm(m - exact) for m in moved) + 4 * 2.0**-24 * size
    assert allowed < 0.05 * size  # what a wrong row or norm moves is far more
    error = np.linalg.norm(theirs(tmp_path / "model.gguf", ids) - exact)
    assert error <= allowed, (error, allowed, size)
    ours = np.asarray(Llama.from_checkpoint(file, backend="c").forward(ids)[0])
    assert np.linalg.norm(ours - exact) <= allowed


def test_no_family_that_llama_cpp_has_is_left_out() -> None:
    from pylora.model import families

    here = {case.split()[0] for case in CASES}
    assert (
        here
        == set(gguf_families.ARCHITECTURES)
        == {name for name, family in families.ALL.items() if family.gguf is not None}
    )
    assert here <= set(FAMILIES)
