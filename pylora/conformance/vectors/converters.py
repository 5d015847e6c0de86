"""One adapter in several forms, as cases in JSON: what a converter makes of PEFT's, GGUF's, MLX's
and loralib's names, orders and scales. The tables at the end of the specification.

Each case gives `config` (GGUF: `metadata`) and `tensors`, name -> rows, and expects the same of the
other form. `base` is what a converter has to know of the model. A tensor is listed in the order of
its own form, as rows of its last dimension: GGUF's `ne` is the reverse of that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pylora.conformance.vectors.ops import draw
from pylora.conformance.vectors.questions import Question
from pylora.types import Array

_BLOCK = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_TOP = {"model.embed_tokens": "token_embd", "lm_head": "output"}
_BASE: dict[str, Any] = {
    "architecture": "llama",
    "heads": 2,
    "kv_heads": 1,
    "head_dim": 4,
    "layers": 2,
}
# d and k of each module: hidden size 6, 10 inner units, 2 heads of 4 and one key head
_SIZES = {"q": (8, 6), "k": (4, 6), "v": (4, 6), "o": (6, 8)}
_SIZES |= {"gate": (10, 6), "up": (10, 6), "down": (6, 10)}

Adapter = dict[str, tuple[Array, Array, float]]  # path -> A, B, scale


def gguf_name(path: str) -> str:
    """model.layers.3.mlp.up_proj -> blk.3.ffn_up"""
    if path in _TOP:
        return _TOP[path]
    _, _, layer, module = path.split(".", 3)
    return f"blk.{layer}.{_BLOCK[module]}"


def interleave(rows: Array, heads: int) -> Array:
    """Hugging Face's order of the rows of q and k -> GGUF's: row i of a head to 2i, D/2 + i to
    2i + 1."""
    D = len(rows) // heads
    out = np.empty_like(rows)
    for head in range(heads):
        for i in range(D // 2):
            out[head * D + 2 * i] = rows[head * D + i]
            out[head * D + 2 * i + 1] = rows[head * D + D // 2 + i]
    return out


def _path(module: str, layer: int = 1) -> str:
    if module in ("lm_head", "model.embed_tokens"):
        return module
    wing = "mlp" if module in ("gate", "up", "down") else "self_attn"
    return f"model.layers.{layer}.{wing}.{module}_proj"


def _adapter(name: str, modules: Mapping[str, tuple[int, float]], layer: int = 1) -> Adapter:
    """Random A and B for modules of these ranks and scales."""
    out: Adapter = {}
    for module, (r, scale) in modules.items():
        d, k = {"lm_head": (7, 6), "model.embed_tokens": (6, 7)}.get(module) or _SIZES[module]
        A, B = (
            draw(f"convert/{name}/{module}/A", (r, k)),
            draw(f"convert/{name}/{module}/B", (d, r)),
        )
        out[_path(module, layer)] = A, B, scale
    return out


def _rows(tensors: Mapping[str, Array]) -> dict[str, Any]:
    return {name: a.astype(np.float64).tolist() for name, a in tensors.items()}


def peft(adapter: Adapter, config: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of a PEFT file; `config` says r and alpha, which must give the scales."""
    tensors: dict[str, Array] = {}
    for path, (A, B, _) in adapter.items():
        head, embedding = f"base_model.model.{path}", path == "model.embed_tokens"
        tensors[f"{head}.lora_embedding_A" if embedding else f"{head}.lora_A.weight"] = A
        tensors[f"{head}.lora_embedding_B" if embedding else f"{head}.lora_B.weight"] = B
    return {"config": dict(config), "tensors": _rows(tensors)}


def gguf(adapter: Adapter, alpha: float, architecture: str = "llama") -> dict[str, Any]:
    """Tensors of a GGUF adapter of this alpha: B is multiplied where alpha / r is not the scale."""
    tensors: dict[str, Array] = {}
    for path, (A, B, scale) in adapter.items():
        r, name = len(A), gguf_name(path)
        wide = B.astype(np.float64) * (scale / (alpha / r if alpha else 1))
        if architecture == "llama" and name.endswith(("attn_q", "attn_k")):
            heads = _BASE["heads"] if name.endswith("attn_q") else _BASE["kv_heads"]
            wide = interleave(wide, heads)
        tensors[f"{name}.weight.lora_a"] = A.T if name == "token_embd" else A
        tensors[f"{name}.weight.lora_b"] = wide.astype(np.float32)
    kind = {"general.type": "adapter", "adapter.type": "lora"}
    metadata = kind | {"general.architecture": architecture, "adapter.lora.alpha": alpha}
    return {"metadata": metadata, "tensors": _rows(tensors)}


def mlx(adapter: Adapter) -> dict[str, Any]:
    """mlx-lm's adapters.safetensors and adapter_config.json: one rank and scale for all."""
    tensors = {}
    for path, (A, B, _) in adapter.items():
        tensors[f"{path}.lora_a"], tensors[f"{path}.lora_b"] = A.T, B.T
    (r, scale), *others = {(len(A), scale) for A, _, scale in adapter.values()}
    assert not others
    settings = {"rank": r, "scale": scale}
    config = {"fine_tune_type": "lora", "lora_parameters": settings}
    return {"config": config, "tensors": _rows(tensors)}


def questions() -> list[Question]:
    """All cases."""
    out: list[Question] = []

    def put(name: str, source: str, target: str, given: Any, expect: Any, **base: Any) -> None:
        asked = {"from": source, "to": target, "base": _BASE | base} | given
        spec = ("S-1", "S-2", "S-3", "K-2") if "peft" in (source, target) else ("S-3",)
        out.append(Question(name, spec, asked, expect))

    def both(
        name: str, adapter: Adapter, config: Mapping[str, Any], alpha: float, **base: Any
    ) -> None:
        """PEFT to GGUF and back, where no scale has to be folded into B."""
        files = peft(adapter, config), gguf(adapter, alpha, base.get("architecture", "llama"))
        put(f"{name}-to-gguf", "peft", "gguf", *files, **base)
        put(f"{name}-from-gguf", "gguf", "peft", files[1], files[0], **base)

    plain = {"r": 2, "lora_alpha": 6}
    each = _adapter("all", dict.fromkeys(_SIZES, (2, 3.0)))
    both("every-projection", each, plain, 6.0)
    both("no-permutation", _adapter("qwen2", {"q": (2, 3.0), "k": (2, 3.0)}), plain, 6.0,
         architecture="qwen2")  # fmt: skip
    both("embedding", _adapter("embedding", {"model.embed_tokens": (2, 3.0)}), plain, 6.0)
    both("output-layer", _adapter("output", {"lm_head": (2, 3.0)}, 0), plain, 6.0)

    root = _adapter("rslora", {"v": (4, 8 / 2.0), "k": (4, 8 / 2.0)})
    given = peft(root, {"r": 4, "lora_alpha": 8, "use_rslora": True})
    put("rslora-to-gguf", "peft", "gguf", given, gguf(root, 16.0))
    ranks = _adapter("ranks", {"v": (2, 4.0), "down": (8, 1.0)})
    config: dict[str, Any] = {"r": 2, "lora_alpha": 8, "rank_pattern": {"down_proj": 8}}
    put("rank-pattern-to-gguf", "peft", "gguf", peft(ranks, config), gguf(ranks, 8.0))
    alphas = _adapter("alphas", {"v": (2, 4.0), "q": (2, 0.5)})
    config = {"r": 2, "lora_alpha": 8, "alpha_pattern": {"q_proj": 1}}
    put("alpha-pattern-to-gguf", "peft", "gguf", peft(alphas, config), gguf(alphas, 8.0))
    mixed = _adapter("mixed", {"v": (4, 8 / 2.0), "k": (9, 8 / 3.0)})
    config = {"r": 4, "lora_alpha": 8, "use_rslora": True, "rank_pattern": {"k_proj": 9}}
    put("rslora-ranks-to-gguf", "peft", "gguf", peft(mixed, config), gguf(mixed, 16.0))
    zero = _adapter("zero", {"v": (2, 1.0)})
    put(
        "alpha-zero-from-gguf",
        "gguf",
        "peft",
        gguf(zero, 0.0),
        peft(zero, {"r": 2, "lora_alpha": 2}),
    )

    both_ways = peft(each, plain), mlx(each)
    put("every-projection-to-mlx", "peft", "mlx", *both_ways)
    put("every-projection-from-mlx", "mlx", "peft", *both_ways[::-1])
    put("rslora-to-mlx", "peft", "mlx", given, mlx(root))
    embedding = _adapter("embedding", {"model.embed_tokens": (2, 3.0)})
    put("embedding-to-mlx", "peft", "mlx", peft(embedding, plain), mlx(embedding))
    put("embedding-from-mlx", "mlx", "peft", mlx(embedding), peft(embedding, plain))
    twenty = _adapter("twenty", {"up": (8, 20.0)})
    put("scale-20-from-mlx", "mlx", "peft", mlx(twenty), peft(twenty, {"r": 8, "lora_alpha": 160}))
    return [*out, *_loralib()]


def _loralib() -> list[Question]:
    """loralib's state has no settings: lora_alpha is the program's. `MergedLinear` has q, k and v
    in one, here with q and v enabled; its rows are split by parts."""
    base = _BASE | {"lora_alpha": 6}
    single = _adapter("loralib", {"o": (2, 3.0)})
    (path, (A, B, _)), config = next(iter(single.items())), {"r": 2, "lora_alpha": 6}
    tensors = {f"{path}.lora_A": A, f"{path}.lora_B": B}
    given = {"from": "loralib", "to": "peft", "base": base, "tensors": _rows(tensors)}
    out = [Question("linear-from-loralib", ("S-1", "K-2"), given, peft(single, config))]
    parts: Adapter = {}
    for part in ("q", "v"):
        A, B = draw(f"convert/merged/{part}/A", (2, 6)), draw(f"convert/merged/{part}/B", (6, 2))
        parts[_path(part)] = A, B, 3.0
    tensors = {
        "model.layers.1.self_attn.qkv_proj.lora_A": np.concatenate([p[0] for p in parts.values()]),
        "model.layers.1.self_attn.qkv_proj.lora_B": np.concatenate([p[1] for p in parts.values()]),
    }
    merged = {"parts": ["q_proj", "k_proj", "v_proj"], "enabled": [True, False, True]}
    given = {"from": "loralib", "to": "peft", "base": base | merged, "tensors": _rows(tensors)}
    return [
        *out,
        Question("merged-linear-from-loralib", ("S-1", "K-2"), given, peft(parts, config)),
    ]
