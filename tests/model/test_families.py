"""Every family beside transformers and PEFT: logits, loss, gradients, decoding, files, bad input.

Each number may be off by what rounding in float32 moves it, twice: their side rounds, too. How far
that is comes from the model itself (check/rounding.py), with the angles of rotary tables as
transformers makes them, in float32.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("hypothesis")
pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
from family_cases import (
    FAMILIES,
    FULL,
    SLIDING,
    Theirs,
    linear_names,
    quiet,
    run_theirs,
    their_model,
)
from hypothesis import HealthCheck, given, seed, settings

from pylora import backends
from pylora.adapters.adapter import Adapter
from pylora.adapters.inspect import inspect, modules_of
from pylora.adapters.loraconfig import LoraConfig
from pylora.adapters.plan import resolve
from pylora.check.check import check_model
from pylora.check.gradient import SIGMAS
from pylora.check.rounding import Exact, Rounded
from pylora.errors import ConfigError, FileFormatError, PlanError, PyloraError, UnsupportedError
from pylora.formats import open_checkpoint
from pylora.merging.merge import merge_checkpoint, unmerge_checkpoint
from pylora.model import families
from pylora.model.config import LlamaConfig
from pylora.model.decoder import Batch, pack_adapter
from pylora.model.llama import Llama
from pylora.reference import IGNORE
from pylora.types import LoRA

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
BACKENDS = ("numpy", "c")
MIXTURES = ("mixtral", "qwen3_moe", "olmoe")
PARAMETERS = ["experts.gate_up_proj", "mlp.experts.down_proj"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
# Pages that add no feature are tried once; .ci/nightly tries all of them many times.
PAGES = ("gemma", "cohere2", "nemotron", "arcee", "seed_oss", "ernie4_5", "glm", "glm4",
         "ministral3", "granitemoehybrid")  # fmt: skip
EXAMPLES_EACH = int(os.environ.get("PYLORA_FAMILY_EXAMPLES", "0"))
SEED = os.environ.get("PYLORA_FAMILY_SEED", "")  # other examples than every day's
some = settings(
    max_examples=EXAMPLES_EACH or 3,
    deadline=None,
    database=None,
    derandomize=not SEED,
    suppress_health_check=list(HealthCheck),
)


class AsTheirs(Rounded):
    """Rounding with angles that are products of float32: far positions are further off."""

    def rope(self, x: Any, cos: Any, sin: Any, position: Any, *args: Any, **more: Any) -> Any:
        x = self._off(x, 4.0 + 4.0 * np.asarray(position)[:, None])
        return super().rope(x, cos, sin, position, *args, **more)


def test_an_adapter_of_experts_is_saved_as_peft_reads_it(tmp_path: Path) -> None:
    """Ours to PEFT: the same logits; and its settings name what it does not fit."""
    import peft
    import torch

    theirs = run_theirs("olmoe", EXAMPLES["olmoe"], tmp_path, ["q_proj"], PARAMETERS)
    modules = open_checkpoint(theirs.directory).config.modules()
    adapter = Adapter.load(theirs.adapter, modules)
    assert {e.kind for e in adapter.plan} == {"linear", "experts"}
    for lora in adapter.values():
        lora.B[...] *= 0.5
    found = {s.path: s for s in inspect(adapter)}["model.layers.0.mlp.experts.down_proj"]
    assert found.rank == 3 and len(found.singular_values) == 4 * 3
    alone = inspect(Adapter.load(theirs.adapter, modules_of(theirs.adapter)))
    whole = inspect(Adapter.load(theirs.adapter, modules))
    assert {s.path: s for s in alone} == {s.path: s for s in whole}, "without the model"
    adapter.save(tmp_path / "ours")
    again = Adapter.load(tmp_path / "ours", modules)
    assert again.digest() == adapter.digest()
    model = quiet().AutoModelForCausalLM.from_pretrained(
        theirs.directory, attn_implementation="eager"
    )
    loaded = peft.PeftModel.from_pretrained(model, tmp_path / "ours").eval()
    with torch.no_grad():
        want = loaded(torch.tensor(theirs.ids)[None]).logits[0].numpy()
    net = Llama.from_checkpoint(open_checkpoint(theirs.directory), backend="c")
    net.attach(adapter)
    got = np.asarray(net.forward(theirs.ids)[0])
    assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want)
    fresh = LoraConfig(r=2, target_parameters=["experts.down_proj"])
    assert [e.path for e in resolve(fresh, modules)] == [
        f"model.layers.{i}.mlp.experts.down_proj" for i in range(2)
    ]
    with pytest.raises(PlanError, match="target_parameters: 'experts.up'.*down_proj, gate_up_proj"):
        resolve(LoraConfig(r=2, target_parameters=["experts.up"]), modules)
    with pytest.raises(ConfigError, match="target_parameters takes no lora_dropout"):
        LoraConfig(target_parameters=["experts.down_proj"], lora_dropout=0.1)


def wide(lora: LoRA) -> LoRA:
    return LoRA(lora.A.astype(np.float64), lora.B.astype(np.float64), lora.scale)


class Pair:
    """Our model of their files in float32, and what rounding moves its numbers by."""

    def __init__(self, theirs: Theirs) -> None:
        self.theirs = theirs
        self.checkpoint = open_checkpoint(theirs.directory)
        self.config = self.checkpoint.config
        self.adapter = Adapter.load(
            theirs.adapter, self.config.modules(), base=self.checkpoint.load
        )
        self.labels = np.append(theirs.ids[1:], IGNORE)

    def model(self, ops: Any) -> Llama:
        if not isinstance(ops, Exact):
            return Llama.from_checkpoint(self.checkpoint, backend=ops)

        def tensor(name: str) -> np.ndarray:
            return self.checkpoint.load(name).astype(np.float64)

        return Llama(self.config, tensor, backend=ops)

    def run(self, ops: Any) -> dict[Any, np.ndarray]:
        """Base logits, logits, loss and gradients of one backend."""
        net, ids = self.model(ops), self.theirs.ids
        out: dict[Any, np.ndarray] = {"base": np.asarray(net.forward(ids)[0])}
        net.attach({p: wide(x) for p, x in self.adapter.items()} if isinstance(ops, Exact)
                   else self.adapter)  # fmt: skip
        out["logits"] = np.asarray(net.forward(ids)[0])
        nll, grads = net.loss(ids, self.labels)
        out["loss"] = np.asarray(nll).sum(keepdims=True) / (ids.size - 1)
        for path, grad in (grads or {}).items():
            out[path, "A"], out[path, "B"] = np.asarray(grad.A), np.asarray(grad.B)
        return out

    def decoded(self, ops: Any) -> np.ndarray:
        """Logits after the prompt and each further token, one at a time."""
        net, t = self.model(ops), self.theirs
        net.attach(self.adapter)
        kv = net.kv_cache(1, t.ids.size)
        rows = [net.decode(t.ids[: t.prompt], kv, [t.prompt])]
        rows += [net.decode(t.ids[i : i + 1], kv, [1]) for i in range(t.prompt, t.ids.size)]
        return np.concatenate([np.asarray(row) for row in rows])

    def allowed(self) -> dict[Any, float]:
        """By number, how far two float32 computations may be apart, in the norm of the whole."""
        exact = self.run(Exact())
        moved = [self.run(AsTheirs(seed)) for seed in range(2)]
        ulps = 8 * 2.0**-24  # of a number that is stored, and of the last sums on either side
        return {
            key: 2 * SIGMAS * max(np.linalg.norm(m[key] - value) for m in moved)
            + ulps * np.linalg.norm(value)
            for key, value in exact.items()
        }


def their_numbers(t: Theirs) -> dict[Any, np.ndarray]:
    return {"base": t.base, "logits": t.logits, "loss": np.array([t.loss]), **t.grads}


@pytest.mark.parametrize("kind", FAMILIES)
def test_logits_loss_gradients_and_decoding(kind: str) -> None:
    """The choice of experts is a step: a text whose routers are nearly undecided is passed over."""

    @given(FAMILIES[kind][1])
    @settings(some, max_examples=EXAMPLES_EACH or (1 if kind in PAGES else 3))
    def holds(drawn: dict[str, Any]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            mixture = kind in MIXTURES
            targets, parameters = (ATTENTION, PARAMETERS) if mixture else ([], None)
            theirs = run_theirs(kind, drawn, Path(folder), targets, parameters)
            pair = Pair(theirs)
            allowed = pair.allowed()
            want = their_numbers(theirs)
            scale = {key: np.linalg.norm(value) for key, value in want.items()}
            if mixture and allowed["base"] > 1e-3 * scale["base"]:
                return
            for name in BACKENDS:
                got = pair.run(backends.get(name))
                assert set(got) == set(want)
                for key, value in want.items():
                    error = np.linalg.norm(got[key].reshape(value.shape) - value)
                    assert error <= allowed[key], (name, key, error, allowed[key], scale[key])
                error = np.linalg.norm(pair.decoded(backends.get(name)) - theirs.decoded)
                assert error <= 2 * allowed["logits"], (name, "decoded", error)

    (seed(int(SEED))(holds) if SEED else holds)()


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_configuration_survives_its_own_file(kind: str) -> None:
    @given(FAMILIES[kind][1])
    @settings(some, max_examples=15)
    def holds(drawn: dict[str, Any]) -> None:
        transformers = quiet()
        config = getattr(transformers, FAMILIES[kind][0])(**drawn)
        ours = LlamaConfig.from_hf(json.loads(config.to_json_string(use_diff=False)))
        assert LlamaConfig.from_hf(ours.to_hf()) == ours
        again = getattr(transformers, FAMILIES[kind][0])(**ours.to_hf())
        assert LlamaConfig.from_hf(json.loads(again.to_json_string(use_diff=False))) == ours

    holds()


def older(settings: dict[str, Any], name: str) -> dict[str, Any]:
    """A config.json as transformers 4 wrote it: rotary settings beside the others."""
    c = dict(settings)
    raw = c.pop("rope_parameters", None)
    c["torch_dtype"] = c.pop("dtype", None)
    if not raw:
        return c
    if FULL in raw:  # Gemma 3 and OLMo 3, which then had them by other names
        if c["model_type"] == "gemma3_text":
            c["rope_local_base_freq"] = raw[SLIDING]["rope_theta"]
        elif raw[SLIDING]["rope_theta"] != raw[FULL]["rope_theta"]:
            return settings
        raw = raw[FULL]
    raw = dict(raw)
    if "partial_rotary_factor" in raw:
        part = raw.pop("partial_rotary_factor")
        c["rotary_pct" if c["model_type"] == "gpt_neox" else "partial_rotary_factor"] = part
    theta = raw.pop("rope_theta")
    c["rotary_emb_base" if c["model_type"] == "gpt_neox" else "rope_theta"] = theta
    kind = raw.pop("rope_type")
    c["rope_scaling"] = None if kind == "default" else {name: kind, **raw}
    return c


@pytest.mark.parametrize("kind", FAMILIES)
def test_all_spellings_of_a_configuration_mean_the_same(kind: str) -> None:
    """As transformers 5 writes it, whole and by what differs; as transformers 4 did; as the text
    part of a multimodal one, without what its class has by default."""

    @given(FAMILIES[kind][1])
    @settings(some, max_examples=EXAMPLES_EACH or 3)
    def holds(drawn: dict[str, Any]) -> None:
        transformers = quiet()
        config = getattr(transformers, FAMILIES[kind][0])(**drawn)
        whole = json.loads(config.to_json_string(use_diff=False))
        want = LlamaConfig.from_hf(whole)
        assert LlamaConfig.from_hf(json.loads(config.to_json_string())) == want
        for name in ("rope_type", "type"):
            assert LlamaConfig.from_hf(older(whole, name)) == want
        usual = json.loads(type(config)().to_json_string(use_diff=False))
        part = {k: v for k, v in whole.items() if k == "model_type" or v != usual.get(k, k)}
        assert LlamaConfig.from_hf({"model_type": "whole", "text_config": part}) == want

    holds()


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_merge_loads_in_transformers_and_can_be_undone(kind: str, tmp_path: Path) -> None:
    import torch

    drawn = EXAMPLES.get(kind, _BASE)
    targets, parameters = (ATTENTION, PARAMETERS) if kind in MIXTURES else ([], None)
    theirs = run_theirs(kind, drawn, tmp_path, targets, parameters)
    merge_checkpoint(theirs.directory, theirs.adapter, tmp_path / "merged")
    merged = quiet().AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", attn_implementation="eager"
    )
    with torch.no_grad():
        got = merged(torch.tensor(theirs.ids)[None]).logits[0].numpy()
    assert np.linalg.norm(got - theirs.logits) <= 1e-5 * np.linalg.norm(theirs.logits)
    unmerge_checkpoint(tmp_path / "merged", tmp_path / "back")
    before, after = open_checkpoint(theirs.directory), open_checkpoint(tmp_path / "back")
    assert after.config == before.config
    for name in before.names():
        assert after.load(name).tobytes() == before.load(name).tobytes(), name


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("kind", ["gemma2", "phi3", "gpt2", "olmo3", "olmoe"])
def test_a_mixed_batch_gives_each_sequence_what_it_has_alone(kind: str, name: str) -> None:
    """Adapters sit on fused modules, too; sequences of other lengths lie beside each other."""
    ops, drawn = backends.get(name), EXAMPLES[kind]
    model = their_model(kind, drawn)
    config = LlamaConfig.from_hf(json.loads(model.config.to_json_string(use_diff=False)))
    net, rng = Llama.random(config, seed=1, backend=ops), np.random.default_rng(2)
    adapters = []
    for _ in range(2):
        loras = {
            path: LoRA(
                rng.standard_normal((2, s.k)).astype("f4"),
                rng.standard_normal((s.d, 2)).astype("f4") / 4,
                0.5,
            )  # fmt: skip
            for path, s in config.modules().items()
            if s.kind == "linear"
        }
        loras |= {
            path: LoRA(
                rng.standard_normal((2 * s.experts, s.k)).astype("f4"),
                rng.standard_normal((s.d, 2 * s.experts)).astype("f4") / 4,
                0.5,
            )  # fmt: skip
            for path, s in config.modules().items()
            if s.kind == "experts"
        }
        adapters.append(pack_adapter(net, loras))
    texts = [rng.integers(0, config.vocab_size, n) for n in (5, 9, 3)]
    using = [adapters[0], adapters[1], None]
    kv = net.kv_cache(3, 12)
    batch = Batch(net, kv, [5, 9, 3], np.arange(3), using)
    rows = np.asarray(batch.forward(np.concatenate(texts)))
    following = Batch(net, kv, [1, 1, 1], np.arange(3), using)
    more = np.asarray(following.forward([7, 8, 9]))
    for i, text in enumerate(texts):
        alone = net.kv_cache(1, 12)
        one = Batch(net, alone, [text.size], np.zeros(1, np.int64), [using[i]])
        assert np.asarray(one.forward(text))[0].tobytes() == rows[i].tobytes()
        one = Batch(net, alone, [1], np.zeros(1, np.int64), [using[i]])
        assert np.asarray(one.forward([7 + i]))[0].tobytes() == more[i].tobytes()


# ---- a setting of each that has everything -------------------------------------------------------

_BASE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_TYPES = ["sliding_attention", "full_attention"]
EXAMPLES: dict[str, dict[str, Any]] = {
    "gemma2": {**_BASE, "head_dim": 10, "sliding_window": 4, "attn_logit_softcapping": 2.0},
    "gemma3_text": {**_BASE, "head_dim": 10, "sliding_window": 4, "layer_types": _TYPES},
    "phi3": {**_BASE, "partial_rotary_factor": 0.5},
    "olmo2": {**_BASE},
    "olmo3": {**_BASE, "sliding_window": 4, "layer_types": _TYPES},
    "gpt2": {"vocab_size": 61, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 64,
             "bos_token_id": 1, "eos_token_id": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
             "attn_pdrop": 0.0},
    "mixtral": {**_BASE, "num_local_experts": 3},
    "olmoe": {**_BASE, "num_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**_BASE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12,
                  "head_dim": 10},
    "ministral": {**_BASE, "head_dim": 10, "sliding_window": 4, "layer_types": _TYPES},
    "qwen3": {**_BASE, "head_dim": 10},
    "granite": {**_BASE, "residual_multiplier": 0.5, "logits_scaling": 4.0},
    "stablelm": {**_BASE, "use_parallel_residual": True, "use_qkv_bias": True,
                 "qk_layernorm": True},
    "gpt_neox": {k: v for k, v in _BASE.items() if k != "num_key_value_heads"},
    "exaone4": {**_BASE, "sliding_window": 4, "layer_types": _TYPES},
    "ministral3": {**_BASE, "head_dim": 10},
    "gemma": {**_BASE, "head_dim": 10},
    "granitemoehybrid": {**_BASE, "shared_intermediate_size": 20, "num_local_experts": 0,
                         "layer_types": ["full_attention"] * 2, "mamba_n_heads": 4,
                         "mamba_d_head": 16},
    "cohere": {**_BASE, "use_qk_norm": True},
    "cohere2": {**_BASE, "sliding_window": 4, "layer_types": _TYPES},
    "nemotron": {**_BASE, "hidden_act": "relu2"},
    "seed_oss": {**_BASE, "head_dim": 10, "residual_dropout": 0.0, "attention_dropout": 0.0},
    "ernie4_5": {**_BASE, "head_dim": 10},
    "glm": {**_BASE, "head_dim": 8},
    "glm4": {**_BASE, "head_dim": 8},
}  # fmt: skip


@pytest.mark.parametrize("kind", ["gemma3_text", "phi3", "gpt2", "olmoe"])
def test_the_checks_of_a_real_model_pass(kind: str, tmp_path: Path) -> None:
    """Gradients by finite differences, rows, merging: what `pylora check` proves."""
    their_model(kind, EXAMPLES[kind]).save_pretrained(tmp_path)
    report = check_model(tmp_path, backend="c")
    assert report.ok, [f for f in report.findings if f.verdict == "FAIL"]


# ---- files ---------------------------------------------------------------------------------------


def test_the_text_part_of_a_multimodal_checkpoint(tmp_path: Path) -> None:
    import torch

    transformers = quiet()
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 14, "patch_size": 14}  # fmt: skip
    config = transformers.Gemma3Config(text_config=EXAMPLES["gemma3_text"], vision_config=vision)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.config.model_type == "gemma3_text"
        assert "other parts" in checkpoint.notes[0]
        assert checkpoint.settings["model_type"] == "gemma3_text"
        net = Llama.from_checkpoint(checkpoint, backend="c")
    ids = np.arange(3, 20)
    with torch.no_grad():
        want = model(torch.tensor(ids)[None]).logits[0].numpy()
    got = np.asarray(net.forward(ids)[0])
    assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want)


_PARTS = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
          "num_attention_heads": 2, "image_size": 14, "patch_size": 14}  # fmt: skip
_QWEN = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 8, "patch_size": 14,
         "out_hidden_size": 32, "deepstack_visual_indexes": [0]}  # fmt: skip
_MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1],
                              "rope_theta": 1e4}}  # fmt: skip
_IMAGE = {"image_token_index": 10}
# Class of the model -> its text part, what else its configuration has, the family that it is.
MULTIMODAL: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "Mistral3": ({"model_type": "mistral"}, {**_IMAGE, "vision_config": {
        **_PARTS, "model_type": "pixtral", "head_dim": 4}}, "mistral"),
    "Llava": ({"model_type": "llama"}, {**_IMAGE, "vision_config": {
        **_PARTS, "model_type": "clip_vision_model"}}, "llama"),
    "Qwen2VL": (_MROPE, {"vision_config": {"depth": 1, "embed_dim": 16, "hidden_size": 32,
                                           "num_heads": 2, "patch_size": 14}}, "qwen2"),
    "Qwen2_5_VL": (_MROPE, {"vision_config": _QWEN}, "qwen2"),
    "Qwen3VL": ({**_MROPE, "head_dim": 8}, {"vision_config": _QWEN}, "qwen3"),
    "Qwen3VLMoe": ({**_MROPE, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2,
                    "moe_intermediate_size": 12}, {"vision_config": _QWEN}, "qwen3_moe"),
    "SmolVLM": ({"model_type": "llama"}, {"vision_config": _PARTS, "image_token_id": 10}, "llama"),
    "InternVL": ({"model_type": "qwen2"}, {"image_token_id": 10, "vision_config": {
        **_PARTS, "image_size": [14, 14], "patch_size": [14, 14]}}, "qwen2"),
}  # fmt: skip


@pytest.mark.parametrize("name", MULTIMODAL)
def test_text_parts_of_what_people_have(name: str, tmp_path: Path) -> None:
    """Their files leave out what a class has by default; all three of a text's positions are one;
    what is merged into them is a model of the text part's family."""
    import torch

    transformers, (text, more, kind) = quiet(), MULTIMODAL[name]
    config = getattr(transformers, f"{name}Config")(text_config={**_BASE, **text}, **more)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    model.save_pretrained(tmp_path / "whole")
    with open_checkpoint(tmp_path / "whole") as checkpoint:
        assert checkpoint.config.model_type == kind
        assert "other parts" in checkpoint.notes[0]
        net = Llama.from_checkpoint(checkpoint, backend="c")
        settings = checkpoint.settings
    assert LlamaConfig.from_hf(settings) == net.config
    assert settings["model_type"] == kind and "vision_config" not in settings
    ids = np.arange(11, 30)
    with torch.no_grad():
        want = model(input_ids=torch.tensor(ids)[None], use_cache=False).logits[0].numpy()
    got = np.asarray(net.forward(ids)[0])
    assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want)


@pytest.mark.parametrize("kind", [*FAMILIES, *families.ALSO])
def test_what_a_text_part_leaves_out_is_what_its_class_has(kind: str) -> None:
    if kind.endswith("_vl"):
        kind += "_text"  # the older name, of the whole
    if kind == "qwen3_vl_moe":
        kind += "_text"
    if kind == "granitemoehybrid":
        with pytest.raises(UnsupportedError, match="Mamba"):
            LlamaConfig.from_hf({"text_config": {"model_type": kind}})
        return
    of = quiet().models.auto.configuration_auto.CONFIG_MAPPING[kind]
    whole = json.loads(of().to_json_string(use_diff=False))
    ours = LlamaConfig.from_hf({"text_config": {"model_type": kind}})
    assert ours == LlamaConfig.from_hf({"text_config": whole})


def save(kind: str, folder: Path, **changes: Any) -> Path:
    """A model's directory, with a config.json that says something else."""
    their_model(kind, EXAMPLES[kind]).save_pretrained(folder)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return folder


@pytest.mark.parametrize(
    ("kind", "changes", "says"),
    [
        ("gemma3_text", {"num_experts": 4}, "num_experts is 4.*Gemma 3"),
        ("phi3", {"attn_logit_softcapping": 30.0}, "attn_logit_softcapping is 30.0.*Phi-3"),
        ("olmo2", {"embedding_multiplier": 12.0}, "embedding_multiplier"),
        ("mixtral", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("phi3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
        ("olmo3", {"layer_types": ["chunked_attention"] * 2}, "chunked_attention"),
        ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok"),
        ("mixtral", {"num_local_experts": 4}, "missing tensors.*experts.3|shape"),
        ("mixtral", {"num_local_experts": 2}, "unexpected tensors.*experts.2"),
        ("gemma3_text", {"num_hidden_layers": 3, "layer_types": [*_TYPES, _TYPES[0]]}, "missing"),
        ("gemma3_text", {"num_hidden_layers": 1, "layer_types": _TYPES[:1]}, "unexpected"),
        ("phi3", {"num_key_value_heads": 4}, "qkv_proj.weight.*shape"),
    ],
)
def test_a_feature_that_nobody_carries_out_is_named(
    tmp_path: Path, kind: str, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises((FileFormatError, UnsupportedError), match=says):
        open_checkpoint(save(kind, tmp_path, **changes))


def test_an_unknown_architecture_names_the_nearest_and_the_page(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"'gemma4_text'.*'gemma3_text'.*architecture\.md"):
        open_checkpoint(save("gemma3_text", tmp_path, model_type="gemma4_text"))
    with pytest.raises(PyloraError, match="xq9"):
        families.of("xq9")


def test_every_family_says_which_modules_it_has() -> None:
    for kind in FAMILIES:
        assert families.of(kind).model_type == kind
    assert linear_names(their_model("gpt2", EXAMPLES["gpt2"])) == ["c_attn", "c_fc", "c_proj"]
