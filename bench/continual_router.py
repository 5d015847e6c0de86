"""Which task is a prompt of? A router for adapters that learns nothing: the nearest mean.

    python bench/continual_router.py [MODEL.gguf] [--seeds 3] [--known 64]

A LoRA per task forgets nothing, but somebody has to say which task a prompt belongs to. Here the
frozen base says it: a task's mark is the mean of its `known` training prompts, each as the base's
residual stream at its last token, of length one; a prompt goes to the task whose mark makes the
least angle with it. Tasks and records are those of continual_smollm.py. Prints how many held-out
prompts find their task.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

from continual_smollm import TASKS, Items

from pylora import Llama, open_checkpoint
from pylora.demo.fetch import SMOLLM2, cache_folder
from pylora.demo.items import encode_prompts
from pylora.model.through import through
from pylora.types import Seqs

AT_ONCE = 64


class Last:
    """Keeps the residual stream of each sequence's last token."""

    def __init__(self, ends: np.ndarray) -> None:
        self.ends, self.rows = ends, np.empty(0)

    def forward(self, model: Any, x: Any, drop: Any) -> None:
        """float64 [sequences, hidden], each row of length one."""
        rows = np.asarray(x)[self.ends].astype(np.float64)
        self.rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)

    def backward(self, *_: Any) -> None:
        """Nothing is trained."""


def marks(model: Llama, tokenizer: Any, items: Items) -> np.ndarray:
    """One row a prompt [n, hidden]."""
    out = []
    for at in range(0, len(items), AT_ONCE):
        prompts = encode_prompts(tokenizer, items[at : at + AT_ONCE])
        lengths = [len(p) for p in prompts]
        last = Last(np.cumsum(lengths) - 1)
        through(model, np.concatenate(prompts), Seqs.of(lengths), last, grads=False)
        out.append(last.rows)
    return np.concatenate(out)


def main() -> int:
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    default = cache_folder() / SMOLLM2.name
    p.add_argument("model", nargs="?", type=Path, default=default)
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--known", type=int, nargs="+", default=[1, 4, 16, 64])
    a = p.parse_args()
    with open_checkpoint(a.model) as checkpoint:
        tokenizer = checkpoint.tokenizer()
        model = Llama.from_checkpoint(checkpoint, precision="auto")
    model.detach()
    for known in a.known:
        right = asked = 0
        for seed in range(a.seeds):
            items = {name: make(seed) for name, make in TASKS.items()}
            centres = np.stack([marks(model, tokenizer, train[:known]).mean(0)
                                for train, _ in items.values()])  # fmt: skip
            centres /= np.linalg.norm(centres, axis=1, keepdims=True)
            for task, (_, test) in enumerate(items.values()):
                chosen = (marks(model, tokenizer, test) @ centres.T).argmax(axis=1)
                right, asked = right + int((chosen == task).sum()), asked + len(test)
        print(f"{known:3d} known prompts a task: {right} of {asked} find their task", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
