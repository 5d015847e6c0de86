"""Which type each tensor of a GGUF file gets in a mixture such as Q4_K_M: llama.cpp's choice.

A mixture's name is that of most tensors; some that matter more get more bits, by their kind and
their layer, and one whose rows are no whole blocks gets a type of smaller ones
(src/llama-quant.cpp, without an importance matrix). Nothing is encoded here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from pylora.errors import ConfigError
from pylora.formats.base import Shape
from pylora.formats.ggml import BY_NAME
from pylora.formats.gguf_names import architecture
from pylora.model.config import LlamaConfig


@dataclass(frozen=True)
class Mixture:
    """A file's type: the number that general.file_type has, and what most of its tensors are."""

    number: int
    kind: str


MIXTURES = {
    "f32": Mixture(0, "F32"),
    "f16": Mixture(1, "F16"),
    "bf16": Mixture(32, "BF16"),
    "q8_0": Mixture(7, "Q8_0"),
    "q4_0": Mixture(2, "Q4_0"),
    "q4_1": Mixture(3, "Q4_1"),
    "q5_0": Mixture(8, "Q5_0"),
    "q5_1": Mixture(9, "Q5_1"),
    "q2_k": Mixture(10, "Q2_K"),
    "q3_k_s": Mixture(11, "Q3_K"),
    "q3_k_m": Mixture(12, "Q3_K"),
    "q3_k_l": Mixture(13, "Q3_K"),
    "q4_k_s": Mixture(14, "Q4_K"),
    "q4_k_m": Mixture(15, "Q4_K"),
    "q5_k_s": Mixture(16, "Q5_K"),
    "q5_k_m": Mixture(17, "Q5_K"),
    "q6_k": Mixture(18, "Q6_K"),
}
_SHORT = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m", "fp16": "f16", "fp32": "f32"}
# Of rows that are no whole blocks.
_SMALLER = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_OUTPUTS_OF_EIGHT = ("q2_k", "q3_k_s", "q3_k_m", "q4_k_s", "q4_k_m")  # of eight experts
_KEPT = ("_norm.weight", "ffn_gate_inp.weight")  # small, and read as they are
_LAYER = re.compile(r"blk\.(\d+)\.")


def mixture(name: str) -> tuple[str, Mixture]:
    """The mixture of that name, in any case. ConfigError names those that there are."""
    wanted = name.lower().replace("-", "_")
    wanted = _SHORT.get(wanted, wanted)
    if wanted not in MIXTURES:
        raise ConfigError(f"there is no type {name!r}; choose one of {', '.join(MIXTURES)}")
    return wanted, MIXTURES[wanted]


def choose(
    shapes: Mapping[str, Shape], stored: Mapping[str, str], wanted: str, config: LlamaConfig
) -> dict[str, str]:
    """GGUF name -> ggml's type, for a file of the mixture `wanted`.

    shapes: of every tensor of the file; stored: what each is now, which vectors, norms, routers and
    tables of positions stay.
    """
    kind = MIXTURES[wanted].kind
    state = _State(wanted, kind, config, tied="output.weight" not in shapes)
    out = {}
    for name in sorted(shapes, key=_order):
        if not quantized(name, shapes[name]):
            out[name] = stored[name]
        elif kind in ("F32", "F16", "BF16"):
            out[name] = kind
        else:
            out[name] = _fitting(state.choose(name, shapes[name][-1]), shapes[name][-1])
    return {name: out[name] for name in shapes}


def quantized(name: str, shape: Shape) -> bool:
    """Whether llama.cpp changes the type of a tensor at all."""
    weight = len(shape) > 1 and name.endswith("weight") and name != "position_embd.weight"
    return weight and not any(part in name for part in _KEPT)


def _order(name: str) -> tuple[int, str]:
    """llama.cpp's: by layer, then by name; this counts, since some kinds are counted."""
    found = _LAYER.match(name)
    return int(found[1]) if found else -1, name


def _fitting(kind: str, width: int) -> str:
    if width % BY_NAME[kind].numbers:
        kind = _SMALLER.get(kind, kind)
    return "F16" if width % BY_NAME[kind].numbers else kind


class _State:
    """What the choice depends on beside a tensor itself."""

    def __init__(self, wanted: str, kind: str, config: LlamaConfig, tied: bool) -> None:
        self.wanted, self.kind, self.tied = wanted, kind, tied
        self.layers, self.experts = config.num_hidden_layers, config.experts
        self.values = self.downs = 0
        self.sharing = config.num_attention_heads // config.num_key_value_heads
        shared = config.num_attention_heads != config.num_key_value_heads
        arch = architecture(config)
        self.largest = self.layers == 80 and (arch == "qwen2" or (arch == "llama" and shared))

    def choose(self, name: str, width: int) -> str:
        """The type of the next tensor in order."""
        kind, medium = self.kind, self.wanted in ("q4_k_m", "q5_k_m")
        if name == "output.weight" or (self.tied and name == "token_embd.weight"):
            if width % BY_NAME[kind].numbers or kind == "Q8_0":
                return "Q8_0"
            return "Q6_K"
        if "attn_v.weight" in name or "attn_qkv.weight" in name:
            kind = self._of_values(kind, medium)
            self.values += 1
            return "Q8_0" if self.experts == 8 else kind
        if "attn_k.weight" in name:
            return "Q8_0" if self.experts == 8 else kind
        if "ffn_down" in name:
            layer = self.downs
            if self.experts > 1 and (found := _LAYER.match(name)):
                layer = int(found[1])
            self.downs += 1
            return self._of_downs(kind, medium, layer)
        if "attn_output.weight" in name:
            if self.experts == 8:
                return "Q5_K" if self.wanted in _OUTPUTS_OF_EIGHT else kind
            return {"q2_k": "Q3_K", "q3_k_m": "Q4_K", "q3_k_l": "Q5_K"}.get(self.wanted, kind)
        return kind

    def _of_values(self, kind: str, medium: bool) -> str:
        """Of v, and of q, k and v in one."""
        if self.wanted == "q2_k":
            kind = "Q4_K" if self.sharing >= 4 else "Q3_K"
        elif self.wanted == "q3_k_m":
            kind = "Q5_K" if self.values < 2 else "Q4_K"
        elif self.wanted == "q3_k_l":
            kind = "Q5_K"
        elif medium and self._more(self.values, self.layers):
            kind = "Q6_K"
        elif self.wanted == "q4_k_s" and self.values < 4:
            kind = "Q5_K"
        return "Q5_K" if self.largest and kind in ("Q3_K", "Q4_K") else kind

    def _of_downs(self, kind: str, medium: bool, layer: int) -> str:
        if self.wanted in ("q2_k", "q3_k_l"):
            return "Q3_K" if self.wanted == "q2_k" else "Q5_K"
        if self.wanted == "q3_k_m":
            return "Q5_K" if layer < self.layers // 16 else "Q4_K"
        if medium and self._more(layer, self.layers):
            return "Q6_K"
        if self.wanted == "q4_k_s" and layer < self.layers // 8:
            return "Q5_K"
        return kind

    @staticmethod
    def _more(layer: int, layers: int) -> bool:
        """The first and last eighth, and every third between them."""
        eighth = layers // 8
        return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
