"""A model's logits on real text: how far each precision's distributions are from float64's."""

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
    """Writes the model's float32 weights as a Hugging Face directory for the peers, once."""
    from pylora.formats.hfdir import write_config, write_weights

    target = folder / "model"
    if target.exists():
        return
    target.mkdir()
    with open_checkpoint(model) as checkpoint:
        specs = {name: (checkpoint.shape(name), "f32") for name in checkpoint.names()}
        write_config(target, checkpoint.config, specs)
        write_weights(target, specs, checkpoint.load)


def measure(
    precisions: list[str], model: Path, texts: dict[str, str], quick: bool, peer: Any
) -> dict[str, Any]:
    """{text: {"tokens", "contenders": {contender: what `compare` gives}}}."""
    count = 128 if quick else 512
    with open_checkpoint(model) as checkpoint:
        tokenizer = checkpoint.tokenizer()
        ids = {
            kind: np.asarray(tokenizer.encode(text, bos=tokenizer.add_bos)[:count])
            for kind, text in texts.items()
        }
        config = checkpoint.config
        exact = pylora.Llama(
            config, lambda name: checkpoint.load(name).astype(np.float64), backend=Exact()
        )
        want = {kind: exact.forward(some)[0] for kind, some in ids.items()}
        del exact
        got: dict[str, Any] = {
            kind: {"tokens": int(some.size), "contenders": {}} for kind, some in ids.items()
        }

        def add(name: str, kind: str, logits: np.ndarray) -> None:
            found = got[kind]["contenders"][name] = compare(logits, want[kind])
            print(f"  {kind}, {name}: {found}", flush=True)

        for precision in precisions:
            kw = {} if precision == "fp32" else {"precision": precision}
            llama = pylora.Llama.from_checkpoint(checkpoint, backend="c", **kw)
            for kind, some in ids.items():
                add(f"pylora {precision}", kind, llama.forward(some)[0])
            del llama
    if peer.python is None:
        return got
    shared_weights(model, peer.folder)
    np.savez(peer.folder / "logits.npz", **ids)
    (peer.folder / "gguf.txt").write_text(str(Path(model).resolve()))
    for job, precision, name in (
        ("logits", "fp32", "PEFT fp32"),
        ("logits", "bf16", "PEFT bf16"),
        ("llama", "fp32", "llama.cpp, the file"),
    ):
        found = peer.run(job, precision)
        for kind in ids if found is not None else ():
            add(name, kind, found[kind])
    return got


def compare(got: np.ndarray, want: np.ndarray) -> dict[str, float]:
    """Of logits [m, vocab] with those in float64, row by row: KL(want || got) in nats,
    the share of equal top tokens, and the differences of the logits: largest, mean, relative."""
    kl, same, error, size, largest, total = [], 0, 0.0, 0.0, 0.0, 0.0
    for g, w in zip(got.astype(np.float64), want):
        log_p, log_q = w - _lse(w), g - _lse(g)
        kl.append(float((np.exp(log_p) * (log_p - log_q)).sum()))
        gap = np.abs(g - w)
        largest, total = max(largest, float(gap.max())), total + float(gap.mean())
        same += int(g.argmax() == w.argmax())
        centred = w - w.mean()
        error += float(((g - g.mean() - centred) ** 2).sum())
        size += float((centred**2).sum())
    return {
        "kl_mean": float(np.mean(kl)),
        "kl_max": max(kl),
        "top1": same / len(kl),
        "max": largest,
        "mean": total / len(kl),
        "rms": (error / size) ** 0.5,
    }


def _lse(x: np.ndarray) -> float:
    top = x.max()
    return float(top + np.log(np.exp(x - top).sum()))
