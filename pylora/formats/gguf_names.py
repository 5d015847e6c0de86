"""What the tensors of a model are called in a GGUF file, and the order of their rows there.

The way back of formats/gguf.py: from Hugging Face's names and order to llama.cpp's, for whatever is
written as GGUF. Nothing is read or written here.
"""

from __future__ import annotations

from pylora.errors import UnsupportedError
from pylora.formats.base import Array
from pylora.formats.gguf import (
    BLOCK_ROLES,
    EXPERT_ROLES,
    TOP_ROLES,
    deinterleave,
    head_by_head,
    hf_name,
)
from pylora.model.config import LlamaConfig
from pylora.model.tensors import norm_roles

Place = tuple[str, int | None]  # a tensor's name, and which of the experts that are stacked in it
_NORMS = ("input_norm", "after_attention", "mid_norm", "after_mlp")


def architecture(config: LlamaConfig) -> str:
    """llama.cpp's name of the family. UnsupportedError where it has none."""
    gguf = config.family.gguf
    if gguf is None:
        raise UnsupportedError(
            f"llama.cpp has no architecture for {config.model_type} models, so nothing of them can "
            "be written as GGUF"
        )
    return gguf.arch


def places(config: LlamaConfig) -> dict[str, Place]:
    """Hugging Face's name of every tensor of the model -> where it is in a GGUF file.

    Raises UnsupportedError where llama.cpp has no such family or no name for one of its tensors.
    """
    architecture(config)
    wanted = config.tensors()
    out: dict[str, Place] = {}
    own = config.family.gguf.stems if config.family.gguf is not None else {}
    layers: list[int | None] = [None, *range(config.num_hidden_layers)]
    for layer in layers:
        stems = {**(TOP_ROLES if layer is None else BLOCK_ROLES), **own}
        norms = () if layer is None else norm_roles(config, layer)
        for stem in stems:
            role = stems[stem]
            # One path may be a norm before the feed-forward part or one behind attention.
            if layer is not None and role in _NORMS and role not in norms:
                continue
            if role in own.values() and stem not in own:
                continue  # the family has another name for it
            for ending in ("weight", "bias"):
                name = f"{stem}.{ending}" if layer is None else f"blk.{layer}.{stem}.{ending}"
                hf = hf_name(name, config)
                if hf in wanted and hf is not None:
                    out[hf] = name, None
        if layer is not None and config.has_experts(layer):
            out |= _experts(config, layer)
    if lacking := [name for name in wanted if name not in out]:
        raise UnsupportedError(f"llama.cpp has no name for {lacking[0]!r} of {config.model_type}")
    return {name: out[name] for name in wanted}


def _experts(config: LlamaConfig, layer: int) -> dict[str, Place]:
    names = config.names
    at = f"{names.layer}.{layer}.{names.experts}"
    return {
        f"{at}.{e}.{getattr(names, role)}.weight": (f"blk.{layer}.{stem}.weight", e)
        for stem, role in EXPERT_ROLES.items()
        for e in range(config.experts)
    }


def as_gguf(rows: Array, path: str, config: LlamaConfig) -> Array:
    """The rows of a module's weight or bias, or of an adapter's B, in the order of GGUF files.

    rows: [d, anything] or [d]; a copy where the order differs.
    """
    if heads := _turned_heads(path, config):
        halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, -1)
        ordered: Array = halves.swapaxes(1, 2).reshape(rows.shape)
        return ordered
    if _by_heads(path, config):
        n = config.num_attention_heads
        apart = rows.reshape(n, 3, rows.shape[0] // n // 3, -1)
        ordered = apart.swapaxes(0, 1).reshape(rows.shape)
        return ordered
    return rows


def as_hf(rows: Array, path: str, config: LlamaConfig) -> Array:
    """The way back of `as_gguf`."""
    if heads := _turned_heads(path, config):
        return deinterleave(rows, heads)
    if _by_heads(path, config):
        return head_by_head(rows, config.num_attention_heads)
    return rows


def _turned_heads(path: str, config: LlamaConfig) -> int:
    """In how many heads the converter interleaves the rows of this module; 0: it does not."""
    gguf, names = config.family.gguf, config.names
    if gguf is None or not gguf.permuted:
        return 0
    if path.endswith(f".{names.q}"):
        return config.num_attention_heads
    return config.num_key_value_heads if path.endswith(f".{names.k}") else 0


def _by_heads(path: str, config: LlamaConfig) -> bool:
    return config.fused_qkv == "groups" and path.endswith(f".{config.names.qkv}")
