"""The demo's last part: the adapter merged into the weights, compared, and taken out exactly.

All in memory: a merged model on disk would be half a gigabyte that nobody asked for (that is what
`pylora merge` is for). The merged weights stand in for a second model's, which is let go again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from pylora.adapter import Adapter
from pylora.errors import PyloraError
from pylora.generate import generate
from pylora.model import Llama
from pylora.types import Seqs

_NEW_TOKENS = 16


@dataclass(frozen=True)
class MergeReport:
    """What merging did and what taking it out again cost."""

    max_abs_difference: float  # of the logits, merged against base plus adapter
    max_abs_logit: float  # the largest logit, to compare with
    greedy_agreement: float  # share of prompts with the same greedy text
    modules_restored: int  # weights that unmerge gave back bit for bit, by SHA-256
    residue_share: float  # share of merged elements that plain subtraction would not give back
    residue_bytes: int  # what keeping those costs
    base_bytes: int  # the whole base model in float32

    def rows(self) -> Iterator[tuple[str, str]]:
        """Name and value of each figure, for a table."""
        yield "largest difference of a logit", f"{self.max_abs_difference:.2e}"
        yield "largest logit", f"{self.max_abs_logit:.1f}"
        yield "same greedy text", f"{self.greedy_agreement:.1%}"
        yield "weights restored bit for bit by unmerge", f"{self.modules_restored}"
        yield "elements that subtraction would lose", f"{self.residue_share:.2%}"
        yield "bytes that keep them", f"{self.residue_bytes:,}"


def compare_merged(
    checkpoint: Any, model: Llama, adapter: Adapter, prompts: list[list[int]]
) -> MergeReport:
    """Merges `adapter` (attached to `model`) into the checkpoint's weights, and unmerges it.

    Raises PyloraError if a weight does not come back bit for bit.
    """
    merged: dict[str, np.ndarray] = {}
    lost = elements = residue_bytes = 0
    for path, lora in adapter.items():
        name = f"{path}.weight"
        W = np.ascontiguousarray(checkpoint.load(name))
        merged[name], residue = model.ops.merge(W, lora)
        back = model.ops.unmerge(merged[name], lora, residue)
        if _digest(back) != _digest(W):
            raise PyloraError(f"{name}: unmerge did not give the original weight back")
        lost += residue.position.size
        elements += W.size
        residue_bytes += residue.position.nbytes + residue.bits.nbytes

    def weights(name: str) -> np.ndarray:
        return merged.pop(name) if name in merged else np.asarray(checkpoint.load(name))

    apart = _outputs(model, prompts)
    together = _outputs(Llama(model.config, weights, backend=model.ops), prompts)
    same = sum(a == b for a, b in zip(apart[1], together[1], strict=True))
    return MergeReport(
        max_abs_difference=float(np.abs(apart[0] - together[0]).max()),
        max_abs_logit=float(np.abs(apart[0]).max()),
        greedy_agreement=same / len(prompts),
        modules_restored=len(adapter),
        residue_share=lost / elements,
        residue_bytes=residue_bytes,
        base_bytes=4 * model.config.num_parameters,
    )


def _outputs(model: Llama, prompts: list[list[int]]) -> tuple[np.ndarray, list[list[int]]]:
    """The logits after every token of every prompt, and the greedy continuations."""
    ids = np.concatenate([np.asarray(prompt, np.int64) for prompt in prompts])
    logits, _ = model.forward(ids, Seqs.of([len(prompt) for prompt in prompts]))
    return model.ops.to_numpy(logits), generate(model, prompts, _NEW_TOKENS)


def _digest(array: np.ndarray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(array).data).digest()
