"""What mlx-lm calls the modules that adapters sit on. Nothing is read or written here."""

from __future__ import annotations

from pylora.model.config import LlamaConfig

# What mlx-lm calls the beginnings of paths that are Hugging Face's otherwise.
_RENAMED = {
    "gpt2": (("transformer.", "model."),),
    "gpt_neox": (
        ("gpt_neox.layers.", "model.h."),
        ("gpt_neox.", "model."),
        ("lm_head", "model.embed_out"),
    ),
}


def name_of(path: str, config: LlamaConfig) -> str:
    for theirs, mine in _RENAMED.get(config.model_type, ()):
        if path.startswith(theirs):
            return mine + path.removeprefix(theirs)
    return path


def homes(config: LlamaConfig) -> dict[str, tuple[str, int]]:
    """mlx-lm's module -> module path here, and which part of a parameter that holds experts."""
    names, out = config.names, {}
    for path, spec in config.modules().items():
        if spec.kind != "experts":
            out[name_of(path, config)] = path, 0
            continue
        layer = path.removeprefix(f"{names.layer}.").split(".")[0]
        at = f"{names.layer}.{layer}.{names.experts.rpartition('.')[0]}.switch_mlp"
        down = path.endswith(".down_proj")
        for part, leaf in enumerate(("down_proj",) if down else ("gate_proj", "up_proj")):
            out[name_of(f"{at}.{leaf}", config)] = path, part
    return out


def layer_prefix(config: LlamaConfig) -> str:
    return name_of(f"{config.names.layer}.", config)


def in_layer(name: str, prefix: str) -> tuple[int, str]:
    """The layer of a module, and its name there; -1 for one outside of the layers."""
    if not name.startswith(prefix):
        return -1, name
    number, _, inner = name.removeprefix(prefix).partition(".")
    return int(number), inner
