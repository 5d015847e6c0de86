"""Tiny models of every family with odd settings, as transformers makes them, and adapters by PEFT.

The strategies draw what families differ in: head sizes, windows shorter and longer than the text,
heads of keys, tied heads, each kind of rotary scaling past its original length.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

VOCAB, POSITIONS, ORIGINAL = 61, 64, 12
SLIDING, FULL = "sliding_attention", "full_attention"


def scalings() -> st.SearchStrategy[dict[str, Any]]:
    """Rotary parameters of every kind that all families have in common."""
    base = st.sampled_from((1e4, 500.0))
    factor = st.sampled_from((2.0, 5.5))
    original = {"original_max_position_embeddings": ORIGINAL}
    yarn = {
        "attention_factor": st.sampled_from((None, 1.3)),
        "beta_fast": st.sampled_from((16, 32)),
        "beta_slow": st.sampled_from((1, 2)),
        "truncate": st.booleans(),
    }
    plain = st.fixed_dictionaries({"rope_type": st.just("default"), "rope_theta": base})
    linear = st.fixed_dictionaries(
        {"rope_type": st.just("linear"), "rope_theta": base, "factor": factor}
    )
    llama3 = st.fixed_dictionaries(
        {
            "rope_type": st.just("llama3"),
            "rope_theta": base,
            "factor": factor,
            "low_freq_factor": st.just(1.0),
            "high_freq_factor": st.sampled_from((2.0, 4.0)),
        }
    )
    scaled = st.fixed_dictionaries(
        {"rope_type": st.just("yarn"), "rope_theta": base, "factor": factor, **yarn}
    )
    return st.one_of(plain, linear, llama3.map(lambda s: s | original), scaled.map(
        lambda s: {k: v for k, v in s.items() if v is not None} | original
    ))  # fmt: skip


@st.composite
def any_scaling(draw: Any, c: dict[str, Any], part: float = 1.0) -> dict[str, Any]:
    """`c` with rotary parameters of any kind, of a family that rotates all layers alike: those of
    `scalings`, a base that grows with the text, and factors of each pair."""
    kind = draw(st.sampled_from(("", "", "", "dynamic", "longrope")))
    theta = draw(st.sampled_from((1e4, 500.0)))
    if kind == "dynamic":
        grows = {
            "rope_type": kind,
            "factor": draw(st.sampled_from((3.0, 6.5))),
            "rope_theta": theta,
        }
        return c | {"max_position_embeddings": ORIGINAL, "rope_parameters": grows}
    if kind == "longrope":
        head = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
        pairs = int(head * part) // 2
        factors = st.lists(st.sampled_from((0.8, 1.2, 3.0)), min_size=pairs, max_size=pairs)
        own = {"rope_type": kind, "rope_theta": theta, "short_factor": draw(factors)}
        own |= {"long_factor": draw(factors), "factor": draw(st.sampled_from((0.5, 4.0)))}
        if draw(st.booleans()):
            own["attention_factor"] = 1.2
        return c | {"rope_parameters": own | {"original_max_position_embeddings": ORIGINAL}}
    return c | {"rope_parameters": draw(scalings())}


@st.composite
def sizes(draw: Any, layers: int = 3, experts: bool = False) -> dict[str, Any]:
    """What every family has. The width is a multiple of the heads, as Gemma's classes want."""
    kv = draw(st.sampled_from((1, 2, 3)))
    n = kv * draw(st.sampled_from((1, 2, 3)))
    return {
        "vocab_size": VOCAB,
        "hidden_size": n * draw(st.sampled_from((8, 12) if experts else (8, 12, 4, 14))),
        # torch's product of experts wants rows of whole 16 bytes
        "intermediate_size": draw(st.sampled_from((20, 28) if experts else (20, 33))),
        "num_hidden_layers": layers,
        "num_attention_heads": n,
        "num_key_value_heads": kv,
        "max_position_embeddings": POSITIONS,
        "tie_word_embeddings": draw(st.booleans()),
        "rms_norm_eps": draw(st.sampled_from((1e-6, 1e-3))),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


@st.composite
def llama(draw: Any) -> dict[str, Any]:
    c = draw(sizes())
    if draw(st.booleans()):
        c["head_dim"] = draw(st.sampled_from((2, 6, 18)))
    bias = {"attention_bias": draw(st.booleans()), "mlp_bias": draw(st.booleans())}
    return draw(any_scaling(c | bias))


@st.composite
def windowed(draw: Any, extra: tuple[str, ...] = ()) -> dict[str, Any]:
    """A window that is shorter or longer than the text of 30 tokens, by one as well. Of 2 at least:
    of 1 transformers' cache keeps all keys, where it means none (`keys[-window + 1 :]`)."""
    c = draw(sizes()) | {"sliding_window": draw(st.sampled_from((3, 7, 50, 2, 29, 30, 31)))}
    if "head_dim" in extra:
        c["head_dim"] = draw(st.sampled_from((4, 10, 2, 18)))
    if "layer_types" in extra:
        c["layer_types"] = draw(st.lists(st.sampled_from((SLIDING, FULL)), min_size=3, max_size=3))
    return c


@st.composite
def mistral(draw: Any) -> dict[str, Any]:
    return draw(any_scaling(draw(windowed(("head_dim",)))))


@st.composite
def ministral(draw: Any) -> dict[str, Any]:
    return draw(windowed(("head_dim", "layer_types"))) | {"rope_parameters": draw(scalings())}


@st.composite
def qwen2(draw: Any) -> dict[str, Any]:
    layers = draw(st.sampled_from((1, 0, 2, 3, 9)))
    use = {"use_sliding_window": draw(st.booleans()), "max_window_layers": layers}
    return draw(any_scaling(draw(windowed()) | use))


@st.composite
def qwen3(draw: Any) -> dict[str, Any]:
    bias = {"attention_bias": draw(st.booleans())}
    layers = draw(st.sampled_from((28, 0, 1, 2)))
    use = {"use_sliding_window": draw(st.booleans()), "max_window_layers": layers}
    return draw(any_scaling(draw(windowed(("head_dim",))) | bias | use))


def two_ropes(draw: Any) -> dict[str, Any]:
    local = {"rope_type": "default", "rope_theta": draw(st.sampled_from((1e4, 100.0)))}
    return {"rope_parameters": {FULL: draw(scalings()), SLIDING: local}}


@st.composite
def gemma2(draw: Any) -> dict[str, Any]:
    return draw(windowed(("head_dim", "layer_types"))) | {
        "query_pre_attn_scalar": draw(st.sampled_from((5, 16))),
        "attn_logit_softcapping": draw(st.sampled_from((None, 1.5, 50.0))),
        "final_logit_softcapping": draw(st.sampled_from((None, 2.0))),
    }


@st.composite
def gemma3(draw: Any) -> dict[str, Any]:
    scalar = {"query_pre_attn_scalar": draw(st.sampled_from((5, 16)))}
    return draw(windowed(("head_dim", "layer_types"))) | scalar | two_ropes(draw)


@st.composite
def phi3(draw: Any) -> dict[str, Any]:
    c = draw(sizes())
    head = draw(st.sampled_from((8, 16)))
    part = draw(st.sampled_from((1.0, 0.5, 0.75)))
    c["hidden_size"] = head * c["num_attention_heads"]
    c["partial_rotary_factor"] = part
    if draw(st.booleans()):
        return c | {"sliding_window": draw(st.sampled_from((None, 5, 2, 30)))}
    pairs = int(head * part) // 2
    factors = st.lists(st.sampled_from((1.0, 1.2, 3.0)), min_size=pairs, max_size=pairs)
    longrope = {
        "rope_type": "longrope",
        "short_factor": draw(factors),
        "long_factor": draw(factors),
    }
    return c | {"original_max_position_embeddings": ORIGINAL, "rope_scaling": longrope}


@st.composite
def smollm3(draw: Any) -> dict[str, Any]:
    rotated = draw(st.lists(st.sampled_from((0, 1)), min_size=3, max_size=3))
    window = {"sliding_window": 5, "use_sliding_window": draw(st.booleans())}
    return draw(sizes()) | {"no_rope_layers": rotated, "rope_parameters": draw(scalings())} | window


@st.composite
def granite(draw: Any) -> dict[str, Any]:
    return draw(sizes()) | {
        "embedding_multiplier": draw(st.sampled_from((1.0, 3.5))),
        "residual_multiplier": draw(st.sampled_from((1.0, 0.3))),
        "attention_multiplier": draw(st.sampled_from((0.2, 0.05))),
        "logits_scaling": draw(st.sampled_from((1.0, 6.0))),
        "attention_bias": draw(st.booleans()),
        "mlp_bias": draw(st.booleans()),
        "rope_parameters": draw(scalings()),
    }


@st.composite
def olmo2(draw: Any) -> dict[str, Any]:
    c = draw(sizes()) | {"attention_bias": draw(st.booleans())}
    return draw(any_scaling(c))


@st.composite
def olmo3(draw: Any) -> dict[str, Any]:
    return draw(windowed(("layer_types",))) | two_ropes(draw)


@st.composite
def gpt2(draw: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "n_embd": 24,
        "n_layer": 2,
        "n_head": draw(st.sampled_from((2, 3, 1, 8))),  # of 3 numbers, too: nothing is rotated
        "n_positions": draw(st.sampled_from((POSITIONS, 30))),
        "n_inner": draw(st.sampled_from((None, 30))),
        "activation_function": draw(st.sampled_from(("gelu_new", "gelu", "relu2", "silu"))),
        "scale_attn_weights": draw(st.booleans()),
        "scale_attn_by_inverse_layer_idx": draw(st.booleans()),
        "tie_word_embeddings": draw(st.booleans()),
        "bos_token_id": 1,
        "eos_token_id": 2,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    }


@st.composite
def mixtral(draw: Any) -> dict[str, Any]:
    n = draw(st.sampled_from((3, 4)))
    top = draw(st.sampled_from((1, 2, 3)))
    own = {"num_local_experts": n, "num_experts_per_tok": top}
    own["sliding_window"] = draw(st.sampled_from((None, 5, 2)))
    c = draw(sizes(experts=True)) | own
    c["head_dim"] = c["hidden_size"] // c["num_attention_heads"]  # transformers' YaRN needs it
    return draw(any_scaling(c))


@st.composite
def qwen3_moe(draw: Any) -> dict[str, Any]:
    return draw(sizes(experts=True)) | {
        "head_dim": draw(st.sampled_from((6, 10))),
        "num_experts": 4,
        "num_experts_per_tok": draw(st.sampled_from((1, 3, 4))),
        "moe_intermediate_size": 12,
        "norm_topk_prob": draw(st.booleans()),
        "attention_bias": draw(st.booleans()),
        "mlp_only_layers": draw(st.sampled_from(([], [1], [0, 2]))),
        "decoder_sparse_step": 1,
        "use_sliding_window": draw(st.booleans()),
        "sliding_window": 4,
        "max_window_layers": draw(st.sampled_from((0, 1))),
        "rope_parameters": draw(scalings()),
    }


@st.composite
def olmoe(draw: Any) -> dict[str, Any]:
    own = {"num_experts": 4, "num_experts_per_tok": draw(st.sampled_from((1, 3, 4)))}
    return (
        draw(sizes(experts=True))
        | own
        | {
            "norm_topk_prob": draw(st.booleans()),
            "attention_bias": draw(st.booleans()),
            "rope_parameters": draw(scalings()),
        }
    )


@st.composite
def cohere(draw: Any) -> dict[str, Any]:
    own = {"logit_scale": draw(st.sampled_from((0.25, 3.0))), "use_qk_norm": draw(st.booleans())}
    bias = {"attention_bias": draw(st.booleans())}
    return layered(draw(sizes())) | own | bias | {"rope_parameters": draw(scalings())}


def layered(c: dict[str, Any], name: str = "layer_norm_eps") -> dict[str, Any]:
    """The same sizes with LayerNorm's name of what is added to the variance."""
    return {k: v for k, v in c.items() if k != "rms_norm_eps"} | {name: c["rms_norm_eps"]}


def pairs_of(c: dict[str, Any], *parts: float) -> st.SearchStrategy[float]:
    """Parts of a head that are pairs: of others transformers rotates more than it says."""
    head = c["hidden_size"] // c["num_attention_heads"]
    return st.sampled_from([part for part in parts if int(head * part) % 2 == 0])


@st.composite
def stablelm(draw: Any) -> dict[str, Any]:
    c = layered(draw(sizes()))
    return c | {
        "use_qkv_bias": draw(st.booleans()),
        "use_parallel_residual": draw(st.booleans()),
        "qk_layernorm": draw(st.booleans()),
        "partial_rotary_factor": draw(pairs_of(c, 0.5, 1.0)),
    }


@st.composite
def starcoder2(draw: Any) -> dict[str, Any]:
    own = {"use_bias": draw(st.booleans()), "sliding_window": draw(st.sampled_from((None, 4, 2)))}
    return draw(any_scaling(layered(draw(sizes()), "norm_epsilon") | own))


@st.composite
def gpt_neox(draw: Any) -> dict[str, Any]:
    c = layered(draw(sizes())) | {"use_parallel_residual": draw(st.booleans())}
    c |= {"attention_bias": draw(st.booleans())}
    c["hidden_act"] = draw(st.sampled_from(("gelu", "gelu_new", "silu")))
    del c["num_key_value_heads"]
    return c | {"rotary_pct": draw(pairs_of(c, 0.5, 1.0, 0.25))}


@st.composite
def exaone4(draw: Any) -> dict[str, Any]:
    return draw(windowed(("layer_types",))) | {"rope_parameters": draw(scalings())}


@st.composite
def ministral3(draw: Any) -> dict[str, Any]:
    """With queries that do not grow: that begins behind the original length, which is the last."""
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "mscale": 1.0}
    yarn |= {"original_max_position_embeddings": ORIGINAL, "mscale_all_dim": 1.0}
    yarn["llama_4_scaling_beta"] = 0.0
    own = {"head_dim": draw(st.sampled_from((4, 10)))}
    return draw(sizes()) | own | {"rope_parameters": yarn}


@st.composite
def gemma(draw: Any) -> dict[str, Any]:
    own = {"head_dim": draw(st.sampled_from((4, 10, 2))), "attention_bias": draw(st.booleans())}
    return draw(any_scaling(draw(sizes()) | own))


@st.composite
def granitemoehybrid(draw: Any) -> dict[str, Any]:
    c = draw(granite())
    heads = c["num_attention_heads"]
    return c | {
        "shared_intermediate_size": draw(st.sampled_from((20, 33))),
        "num_local_experts": 0,
        "layer_types": ["full_attention"] * 3,
        "position_embedding_type": draw(st.sampled_from((None, "rope"))),
        "mamba_n_heads": heads,  # of layers that it has none of
        "mamba_d_head": 2 * c["hidden_size"] // heads,
    }


@st.composite
def cohere2(draw: Any) -> dict[str, Any]:
    own = {"logit_scale": draw(st.sampled_from((0.25, 3.0))), "attention_bias": draw(st.booleans())}
    return layered(draw(windowed(("layer_types",)))) | own | {"rope_parameters": draw(scalings())}


@st.composite
def nemotron(draw: Any) -> dict[str, Any]:
    c = layered(draw(sizes()), "norm_eps") | {"hidden_act": "relu2"}
    bias = {"attention_bias": draw(st.booleans()), "mlp_bias": draw(st.booleans())}
    return c | bias | {"partial_rotary_factor": draw(pairs_of(c, 0.5, 1.0))}


@st.composite
def arcee(draw: Any) -> dict[str, Any]:
    bias = {"attention_bias": draw(st.booleans()), "mlp_bias": draw(st.booleans())}
    own = {"head_dim": draw(st.sampled_from((4, 10)))}
    return draw(sizes()) | own | bias | {"rope_parameters": draw(scalings())}


@st.composite
def seed_oss(draw: Any) -> dict[str, Any]:
    names = ("attention_bias", "attention_out_bias", "mlp_bias")
    own = {name: draw(st.booleans()) for name in names} | {"head_dim": 10}
    dropped = dict.fromkeys(("attention_dropout", "residual_dropout"), 0.0)
    return draw(sizes()) | own | dropped | {"rope_parameters": draw(scalings())}


@st.composite
def ernie4_5(draw: Any) -> dict[str, Any]:
    own = {"head_dim": draw(st.sampled_from((4, 10))), "use_bias": draw(st.booleans())}
    return draw(sizes()) | own | {"rope_parameters": draw(scalings())}


@st.composite
def glm(draw: Any) -> dict[str, Any]:
    own = {"head_dim": draw(st.sampled_from((4, 8))), "attention_bias": draw(st.booleans())}
    return draw(sizes()) | own | {"partial_rotary_factor": draw(st.sampled_from((0.5, 1.0)))}


# By model_type: transformers' class of configurations, and the strategy.
FAMILIES: dict[str, tuple[str, st.SearchStrategy[dict[str, Any]]]] = {
    "llama": ("LlamaConfig", llama()),
    "mistral": ("MistralConfig", mistral()),
    "ministral": ("MinistralConfig", ministral()),
    "ministral3": ("Ministral3Config", ministral3()),
    "qwen2": ("Qwen2Config", qwen2()),
    "qwen3": ("Qwen3Config", qwen3()),
    "gemma": ("GemmaConfig", gemma()),
    "gemma2": ("Gemma2Config", gemma2()),
    "gemma3_text": ("Gemma3TextConfig", gemma3()),
    "phi3": ("Phi3Config", phi3()),
    "smollm3": ("SmolLM3Config", smollm3()),
    "granite": ("GraniteConfig", granite()),
    "granitemoehybrid": ("GraniteMoeHybridConfig", granitemoehybrid()),
    "olmo2": ("Olmo2Config", olmo2()),
    "olmo3": ("Olmo3Config", olmo3()),
    "gpt2": ("GPT2Config", gpt2()),
    "mixtral": ("MixtralConfig", mixtral()),
    "qwen3_moe": ("Qwen3MoeConfig", qwen3_moe()),
    "olmoe": ("OlmoeConfig", olmoe()),
    "cohere": ("CohereConfig", cohere()),
    "cohere2": ("Cohere2Config", cohere2()),
    "stablelm": ("StableLmConfig", stablelm()),
    "starcoder2": ("Starcoder2Config", starcoder2()),
    "gpt_neox": ("GPTNeoXConfig", gpt_neox()),
    "exaone4": ("Exaone4Config", exaone4()),
    "nemotron": ("NemotronConfig", nemotron()),
    "arcee": ("ArceeConfig", arcee()),
    "seed_oss": ("SeedOssConfig", seed_oss()),
    "ernie4_5": ("Ernie4_5Config", ernie4_5()),
    "glm": ("GlmConfig", glm()),
    "glm4": ("Glm4Config", glm()),
}


def quiet() -> Any:
    """The library, without its notes on tiny vocabularies."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def their_model(kind: str, settings: dict[str, Any], seed: int = 0) -> Any:
    """A model of transformers with random weights, norms and biases among them."""
    import torch

    transformers = quiet()
    config = getattr(transformers, FAMILIES[kind][0])(**settings)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (0.3 if p.ndim == 1 else 0.15))
    return model.eval()


def linear_names(model: Any) -> list[str]:
    """The last names of the modules that "all-linear" adapts."""
    import torch

    found = set()
    for name, module in model.named_modules():
        linear = isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"
        if linear and name != "lm_head":
            found.add(name.rsplit(".", 1)[-1])
    return sorted(found)


@dataclass
class Theirs:
    """What transformers and PEFT give for one text."""

    directory: Path  # the model
    adapter: Path
    ids: np.ndarray
    base: np.ndarray  # logits without the adapter
    logits: np.ndarray
    loss: float
    grads: dict[tuple[str, str], np.ndarray]
    decoded: np.ndarray  # logits of tokens that came one by one, after a prompt
    prompt: int


def whole_path(path: str) -> str:
    """A module's path, or that of the parameter of experts whose adapter PEFT keeps there."""
    if path.endswith(".experts.base_layer"):
        return path.removesuffix(".base_layer") + ".gate_up_proj"
    return f"{path}.down_proj" if path.endswith(".experts") else path


def run_theirs(
    kind: str,
    settings: dict[str, Any],
    folder: Path,
    targets: list[str],
    parameters: list[str] | None = None,
) -> Theirs:
    """Saves the model and a random adapter, and computes with both."""
    import peft
    import torch

    model = their_model(kind, settings)
    model.save_pretrained(folder / "model")
    ids = np.random.default_rng(3).integers(3, VOCAB, 30)
    rows = torch.tensor(ids)[None]
    with torch.no_grad():
        base = model(rows, use_cache=False).logits[0].numpy()
    lora = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=targets or linear_names(model), init_lora_weights=False,
        fan_in_fan_out=kind == "gpt2", target_parameters=parameters,
    )  # fmt: skip
    torch.manual_seed(5)
    adapted = peft.get_peft_model(model, lora)
    adapted.save_pretrained(folder / "adapter")
    out = adapted(rows, labels=rows, use_cache=False)
    out.loss.backward()
    grads = {}
    for name, p in adapted.named_parameters():
        if p.grad is not None and ".lora_" in name:
            path, _, field = name.removeprefix("base_model.model.").partition(".lora_")
            grads[whole_path(path), field[0]] = p.grad.numpy().copy()
    prompt, cache, steps = 7, None, []
    with torch.no_grad():
        for a, b in [(0, prompt), *((i, i + 1) for i in range(prompt, ids.size))]:
            got = adapted(rows[:, a:b], past_key_values=cache, use_cache=True)
            cache = got.past_key_values
            steps.append(got.logits[0, -1].numpy())
    return Theirs(
        folder / "model", folder / "adapter", ids, base, out.logits[0].detach().numpy(),
        float(out.loss), grads, np.array(steps), prompt,
    )  # fmt: skip
