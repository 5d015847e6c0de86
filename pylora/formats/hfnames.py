"""What the tensors of a Hugging Face directory are called, and which are the language model's.

A file may be of a multimodal model, whose text part has a prefix; it may be of the base model
alone, without the prefix that the whole one has (GPT-2's files); and older exporters left buffers
in it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pylora.formats.base import Array, Shape
from pylora.model.config import LlamaConfig

_TEXT = ("language_model.", "model.language_model.", "text_model.", "model.text_model.")
# Parts of multimodal models whose text part has no prefix.
_OTHERS = ("visual.", "model.visual.")
# Tables of angles and masks that are computed, not learned.
_BUFFERS = re.compile(r"\.rotary_emb\.inv_freq$|\.(attn|attention)\.(masked_)?bias$")


def own_names(config: LlamaConfig, stored: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """The name that a model of `config` has for each of the file's tensors, and those of the file
    that belong to other parts of a multimodal model."""
    found = [name for name in stored if not _is_buffer(config, name)]
    names = config.names
    base, head = names.embedding.split(".")[0], names.head
    text = [name for name in found if name.startswith(_TEXT)]
    out: dict[str, str] = {}
    if text:
        others = []
        for name in found:
            inner = next((name[len(p) :] for p in _TEXT if name.startswith(p)), None)
            if inner is None and name.split(".")[0] != head:
                others.append(name)
                continue
            inner = name if inner is None else inner
            whole = inner.startswith((f"{base}.", f"{head}."))
            out[inner if whole else f"{base}.{inner}"] = name
        return out, others
    others = [name for name in found if name.startswith(_OTHERS)]
    found = [name for name in found if not name.startswith(_OTHERS)]
    bare = base not in ("", head) and not any(name.startswith(f"{base}.") for name in found)
    for name in found:
        if name == "embed_out.weight":  # what older transformers call GPT-NeoX's head
            out[f"{head}.weight"] = name
            continue
        out[f"{base}.{name}" if bare and not name.startswith(f"{head}.") else name] = name
    return out, others


def _is_buffer(config: LlamaConfig, name: str) -> bool:
    if not _BUFFERS.search(name):
        return False
    names = config.names  # an own bias may end in the same words
    biases = {names.qkv, names.o, names.q, names.k, names.v}
    return not any(name.endswith(f".{module}.bias") for module in biases)


def transposed(config: LlamaConfig, name: str) -> bool:
    """Whether Hugging Face stores this tensor [inputs, outputs]."""
    if not config.family.transposed or not name.endswith(".weight"):
        return False
    names = config.names
    inside = name.startswith(f"{names.layer}.")
    modules = (names.qkv, names.q, names.k, names.v, names.o, names.up, names.gate, names.down)
    return inside and name.removesuffix(".weight").endswith(tuple(f".{m}" for m in modules))


def as_stored(
    config: LlamaConfig, specs: Mapping[str, tuple[Shape, str]], produce: Callable[[str], Array]
) -> tuple[dict[str, tuple[Shape, str]], Callable[[str], Array]]:
    """Shapes, dtypes and a source of a model's tensors, as Hugging Face's files hold them."""

    def turned(name: str) -> Array:
        array = produce(name)
        return array.T if transposed(config, name) else array

    shapes = {
        name: (shape[::-1] if transposed(config, name) else shape, dtype)
        for name, (shape, dtype) in specs.items()
    }
    return shapes, turned


def text_settings(config: LlamaConfig, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """The content of a config.json of the language model alone: of a multimodal model's, its text
    part with what the whole says of it."""
    from pylora.model.hfconfig import text_part

    inner = text_part(settings)
    if inner is settings:
        return settings
    own = {"tie_word_embeddings": config.tie_word_embeddings}
    return {**inner, **own, "architectures": [config.family.architecture]}
