"""What a model family is: a page of data. The families beside this file are values of `Family`.

A family says what its `config.json` means in features (`read`), how such features are written as a
`config.json` (`write`), what Hugging Face calls its modules (`Names`), which settings it carries
out (`knows`), and how llama.cpp's GGUF files of it differ from Hugging Face's (`Gguf`). Nothing
here computes anything: the decoder takes features and knows no family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Settings = Mapping[str, Any]  # the content of a config.json, with the family's defaults
Fields = dict[str, Any]  # of LlamaConfig


@dataclass(frozen=True)
class Names:
    """Hugging Face's names of modules and norms, by role; those in a layer are below `layer`.N."""

    embedding: str = "model.embed_tokens"
    positions: str = ""  # the table of learned positions
    layer: str = "model.layers"
    norm: str = "model.norm"
    head: str = "lm_head"
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    qkv: str = "self_attn.qkv_proj"
    o: str = "self_attn.o_proj"
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    gate_up: str = "mlp.gate_up_proj"
    down: str = "mlp.down_proj"
    input_norm: str = "input_layernorm"
    mid_norm: str = "post_attention_layernorm"
    after_attention: str = "post_attention_layernorm"
    after_mlp: str = "post_feedforward_layernorm"
    router: str = "mlp.gate"
    experts: str = "mlp.experts"
    parameters: str = (
        "mlp.experts"  # the module whose parameters hold all experts, in transformers 5
    )
    expert_gate: str = "gate_proj"  # below `experts`.N
    expert_up: str = "up_proj"
    expert_down: str = "down_proj"


@dataclass(frozen=True)
class Gguf:
    """A family in llama.cpp's files."""

    arch: str  # general.architecture
    # Tensor stems beyond the common ones, by the role in `Names` that they are.
    stems: Mapping[str, str] = field(default_factory=dict)
    permuted: bool = False  # the converter interleaves the rows of q and k
    # The metadata of this architecture (a function from key and default to value) -> keys of
    # config.json beyond the common ones.
    settings: Callable[[Any], Settings] | None = None
    knows: frozenset[str] = frozenset()  # metadata keys, without the architecture, that it reads


@dataclass(frozen=True)
class Family:
    """One architecture of Hugging Face's."""

    model_type: str
    architecture: str  # the class that config.json names
    title: str  # for people: "Gemma 3 (text)"
    read: Callable[[Settings], Fields]  # fields beyond the common ones (hfconfig.py)
    write: Callable[[Fields], Fields]  # keys of config.json beyond the common ones
    defaults: Settings = field(default_factory=dict)  # of keys that config.json leaves out
    aliases: Mapping[str, str] = field(default_factory=dict)  # its key -> the common key
    names: Names = Names()
    knows: frozenset[str] = frozenset()  # keys of keys.NEUTRAL that it carries out
    activations: Mapping[str, str] = field(default_factory=lambda: SILU)
    complete: Callable[[Fields], None] | None = None  # fills in settings that follow from others
    unit_offset: bool = False  # a norm multiplies by 1 + its weight
    transposed: bool = False  # projections are stored [inputs, outputs] (GPT-2's Conv1D)
    inside: str = ""  # the model_type of a multimodal model whose text part this is
    # Other model_types whose text part is this, and their defaults where they are others.
    also: Mapping[str, Settings] = field(default_factory=dict)
    # What a text part leaves out: vocabulary, hidden and intermediate size, layers, heads.
    sizes: tuple[int | None, ...] = ()
    shown: Settings = field(default_factory=dict)  # what an example has beside the defaults
    listed_norms: bool = False  # norms of each head are tensors "norms.0", "norms.1", ...
    gguf: Gguf | None = None


# What Hugging Face calls an activation -> what features do.
SILU: Mapping[str, str] = {"silu": "silu", "swish": "silu"}
GELU_TANH: Mapping[str, str] = dict.fromkeys(
    ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_accurate"), "gelu_tanh"
)
ALL: Mapping[str, str] = {**SILU, **GELU_TANH, "gelu": "gelu_erf", "relu2": "relu2"}
