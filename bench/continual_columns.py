"""Progressive networks (Rusu et al. 2016): a column per task, fed by the frozen ones before it.

Column t is a whole network of its own, begun from the base. What enters its layer l (l >= 1) is its
own stream plus, for each earlier column j, that column's stream after layer l - 1 times V, which
begins as zero. Only the newest column and its V are trained; so no earlier task can change. The
paper's lateral adapters have a hidden layer; these are linear.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from continual_methods import Method, whole
from continual_tasks import ROW, Records

from pylora import Llama
from pylora.model.attention import positions
from pylora.model.linear import Grads
from pylora.types import AdamW, LoRA

Stream = list[np.ndarray]  # after the embedding and after each layer, [m, hidden]


class Column:
    """The change of every weight of one network, and the lateral matrices that feed it."""

    def __init__(self, model: Llama, earlier: int) -> None:
        self.change: dict[str, LoRA] = whole(model, model.modules)
        h, layers = model.config.hidden_size, len(model.blocks)
        self.V = np.zeros((earlier, layers, h, h), np.float32)  # V[:, 0] is not used: no layer -1

    @property
    def size(self) -> int:
        """Numbers that are trained."""
        return sum(lora.B.size for lora in self.change.values()) + self.V[:, 1:].size


class Progressive(Method):
    """Nothing is ever changed that a task was learned with; each task costs a network."""

    label = "progressive networks"
    knows_the_task = True
    rate = 1e-3

    def setup(self) -> None:
        self.columns: list[Column] = []

    def forward(self, column: int, batch: Records) -> tuple[Stream, list[Any]]:
        """The streams of one column, and what backward needs: of the embedding, then of each layer
        (its cache, and the earlier columns' streams that it was fed). Each column runs once."""
        streams: list[Stream] = []
        caches: list[Any] = []
        model, seqs = self.model, batch.seqs
        position = positions(seqs)
        for own in self.columns[: column + 1]:
            model.attach(own.change)
            rotations = model.rope.rotations(seqs, position)
            x, kept = model.embed_tokens.forward(batch.ids.reshape(-1))
            stream, caches = [x], [kept]
            for layer, block in enumerate(model.blocks):
                fed = [s[layer] for s in streams]
                if layer:
                    for j, other in enumerate(fed):
                        x = x + other @ own.V[j, layer]
                x, cache = block.forward(x, seqs, position=position, rotations=rotations)
                caches.append((cache, fed))
                stream.append(x)
            streams.append(stream)
        return streams[-1], caches

    def learn(self, task: int, train: Records) -> None:
        column = Column(self.model, task)
        self.columns.append(column)
        self.trained = column.size
        params: dict[Any, np.ndarray] = {p: lora.B for p, lora in column.change.items()}
        params["V"] = column.V
        moments = {k: (np.zeros_like(p), np.zeros_like(p)) for k, p in params.items()}
        for step in range(1, self.steps + 1):
            grads = self.gradients(task, self.batch(task, train))
            rate = self.rate * (1 - (step - 1) / self.steps)
            for key, param in params.items():
                if param.size:
                    self.model.ops.adamw_step(
                        param, grads[key], *moments[key], AdamW(lr=rate, step=step)
                    )
        self.kept.append(4 * column.size)

    def gradients(self, task: int, batch: Records) -> dict[Any, np.ndarray]:
        """Of the mean loss over the batch's answers, of the newest column's B and V."""
        model, column = self.model, self.columns[task]
        stream, caches = self.forward(task, batch)
        n = batch.rows.size
        weight = np.full(n, 1 / n, np.float32)
        grads: Grads = {}
        _, drows = model.head.loss(
            stream[-1][batch.rows], batch.answers.reshape(-1), weight, None, 0, True, grads
        )
        dx = np.zeros((len(batch) * ROW, model.config.hidden_size), np.float32)
        dx[batch.rows] = drows
        dV = np.zeros_like(column.V)
        for layer in range(len(model.blocks) - 1, -1, -1):
            cache, earlier = caches[layer + 1]
            dx = model.blocks[layer].backward(dx, cache, grads, need_dx=True)
            if layer:
                for j, e in enumerate(earlier):
                    dV[j, layer] = e.T @ dx
        model.embed_tokens.backward(dx, caches[0], grads)
        return {**{p: g.B for p, g in grads.items()}, "V": dV}

    def score(self, task: int, test: Records) -> float:
        """A task that has not come yet is answered by the newest column; before any, the base."""
        if not self.columns:
            self.model.attach({})
            logits, _ = self.model.forward(test.ids.reshape(-1), test.seqs, rows=test.rows)
        else:
            stream, _ = self.forward(min(task, len(self.columns) - 1), test)
            logits, _ = self.model.head.forward(stream[-1][test.rows], None)
        return float((logits.argmax(axis=1) == test.answers.reshape(-1)).mean())
