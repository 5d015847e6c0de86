"""The demo's last part: the adapter merged into the weights, compared, and taken out exactly.

All in memory: a merged model on disk would be half a gigabyte that nobody asked for (that is what
`pylora merge` is for). One model stands at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from pylora.adapters.adapter import Adapter
from pylora.errors import PyloraError
from pylora.formats import Checkpoint
from pylora.generation.generate import generate
from pylora.model.llama import Llama
from pylora.ops.protocol import Backend
from pylora.types import Seqs

_NEW_TOKENS = 16


@dataclass(frozen=True)
class MergeCheck:
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


@dataclass(frozen=True, eq=False)
class Outputs:
    """What a model makes of some prompts."""

    logits: np.ndarray  # after every token of every prompt [tokens, vocab]
    texts: list[list[int]]  # the greedy continuations


def outputs(model: Llama, prompts: list[list[int]]) -> Outputs:
    """Runs the prompts, one behind the other, and continues each."""
    ids = np.concatenate([np.asarray(prompt, np.int64) for prompt in prompts])
    logits, _ = model.forward(ids, Seqs.of([len(prompt) for prompt in prompts]))
    return Outputs(model.ops.to_numpy(logits), generate(model, prompts, _NEW_TOKENS))


def compare_merged(
    checkpoint: Checkpoint,
    adapter: Adapter,
    prompts: list[list[int]],
    apart: Outputs,
    ops: Backend,
    precision: str = "fp32",
    note: Callable[[str], None] = lambda text: None,
) -> MergeCheck:
    """Merges `adapter` into the checkpoint's weights, and unmerges it.

    apart: the outputs of the base with the adapter beside it. That model is not needed here, so
    that its memory can be free while the merged one stands. `note` hears how far it is. Raises
    PyloraError if a weight does not come back bit for bit.
    """
    restored: set[str] = set()
    lost = elements = residue_bytes = 0

    def weights(name: str) -> np.ndarray:
        """As the model is built, weight by weight: only one is here twice at any time."""
        nonlocal lost, elements, residue_bytes
        W = np.ascontiguousarray(checkpoint.load(name))
        path = name.removesuffix(".weight")
        if path == name or path not in adapter:
            return W
        merged: np.ndarray
        merged, residue = ops.merge(W, adapter[path])
        if _digest(ops.unmerge(merged, adapter[path], residue)) != _digest(W):
            raise PyloraError(f"{name}: unmerge did not give the original weight back")
        if path not in restored:
            restored.add(path)
            lost += residue.position.size
            elements += W.size
            residue_bytes += residue.position.nbytes + residue.bits.nbytes
            note(f"{len(restored)} of {len(adapter)} modules")
        return merged

    together = outputs(Llama(checkpoint.config, weights, backend=ops, precision=precision), prompts)
    if len(restored) != len(adapter):
        raise PyloraError(f"{len(adapter) - len(restored)} modules of the adapter were not merged")
    same = sum(a == b for a, b in zip(apart.texts, together.texts, strict=True))
    return MergeCheck(
        max_abs_difference=float(np.abs(apart.logits - together.logits).max()),
        max_abs_logit=float(np.abs(apart.logits).max()),
        greedy_agreement=same / len(prompts),
        modules_restored=len(restored),
        residue_share=lost / elements,
        residue_bytes=residue_bytes,
        base_bytes=4 * checkpoint.config.num_parameters,
    )


def _digest(array: np.ndarray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(array).data).digest()
