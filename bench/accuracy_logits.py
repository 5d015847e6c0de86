"""The logits of SmolLM2 on real text: how far each precision's distributions are from float64's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import pylora
from pylora.backends.numpy import NumpyBackend
from pylora.formats import open_checkpoint


class Exact(NumpyBackend):
    """The reference in float64, products of all rows at once: quick, and exact enough to be it."""

    def _rows(self, x: np.ndarray, M: np.ndarray) -> np.ndarray:
        return x @ M


def shared_weights(model: Path, folder: Path) -> None:
    """Writes the model's float32 weights and its shape for the peer, once."""
    import json

    from safetensors.numpy import save_file

    if (folder / "weights.safetensors").exists():
        return
    with open_checkpoint(model) as checkpoint:
        c = checkpoint.config
        tensors = {name: checkpoint.load(name) for name in c.tensors()}
    save_file(tensors, str(folder / "weights.safetensors"))
    names = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
        "num_key_value_heads max_position_embeddings rms_norm_eps rope_theta tie_word_embeddings"
    )
    shape = {name: getattr(c, name) for name in names.split()}
    (folder / "config.json").write_text(json.dumps(shape))


def measure(
    precisions: list[str], model: Path, text: str, quick: bool, peer: Any
) -> dict[str, Any]:
    """{contender: {"kl_mean", "kl_max" (nats a token), "top1" (agreement), "rms" (of logits)}}."""
    with open_checkpoint(model) as checkpoint:
        ids = np.asarray(checkpoint.tokenizer().encode(text)[: 128 if quick else 512])
        config = checkpoint.config
        want = pylora.Llama(
            config, lambda name: checkpoint.load(name).astype(np.float64), backend=Exact()
        ).forward(ids)[0]
        got = {}
        for precision in precisions:
            kw = {} if precision == "fp32" else {"precision": precision}
            llama = pylora.Llama.from_checkpoint(checkpoint, backend="c", **kw)
            got[f"pylora {precision}"] = compare(llama.forward(ids)[0], want)
            del llama
    if peer.python is not None:
        shared_weights(model, peer.folder)
        np.savez(peer.folder / "logits.npz", ids=ids)
    for precision in ("fp32", "bf16"):
        found = peer.run("logits", precision)
        if found is not None:
            got[f"PEFT {precision}"] = compare(found["logits"], want)
    return {"tokens": int(ids.size), "contenders": got}


def compare(got: np.ndarray, want: np.ndarray) -> dict[str, float]:
    """Of logits [m, vocab] with those in float64, row by row: KL(want || got) in nats."""
    kl, same, error, size = [], 0, 0.0, 0.0
    for g, w in zip(got.astype(np.float64), want):
        log_p, log_q = w - _lse(w), g - _lse(g)
        kl.append(float((np.exp(log_p) * (log_p - log_q)).sum()))
        same += int(g.argmax() == w.argmax())
        centred = w - w.mean()
        error += float(((g - g.mean() - centred) ** 2).sum())
        size += float((centred**2).sum())
    return {
        "kl_mean": float(np.mean(kl)),
        "kl_max": max(kl),
        "top1": same / len(kl),
        "rms": (error / size) ** 0.5,
    }


def _lse(x: np.ndarray) -> float:
    top = x.max()
    return float(top + np.log(np.exp(x - top).sum()))
