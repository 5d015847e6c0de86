"""Ways to learn one task after another on one base, all of pylora's own forward and backward.

A weight W that is trained whole is W + B A with A the identity, which stays: the gradient of B is
then that of W, formed by the same backward that LoRA uses, and the base itself is never written.
What each method keeps from task to task is in `kept`; what it trains, in `trained`.

EWC: Kirkpatrick et al. 2017, eq. 3 (one penalty, whose anchor and Fisher information are added up
over the tasks); replay: Rolnick et al. 2019, stored records mixed into each batch, half and half;
freezing: the layers below are as the first task left them; heads: a frozen encoder and a head per
task (shared-private). Progressive networks are in continual_columns.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import numpy as np
from continual_tasks import Records, joined

from pylora import Adapter, Llama, LoraConfig, resolve
from pylora.model.embedding import Embedding
from pylora.types import AdamW, LoRA

BATCH = 32


def whole(model: Llama, paths: Iterable[str]) -> dict[str, LoRA]:
    """An adapter that can become any change of these modules' weights, and is none yet."""
    out = {}
    for path in paths:
        module = model.modules[path]
        k, d = (
            (module.vocab, module.hidden) if isinstance(module, Embedding) else (module.k, module.d)  # type: ignore[union-attr]
        )
        out[path] = LoRA(np.eye(k, dtype=np.float32), np.zeros((d, k), np.float32), 1.0)
    return out


def low_rank(
    model: Llama, rank: int, seed: int, targets: Any = "all-linear", alpha: float | None = None
) -> Adapter:
    """A fresh LoRA, zero at first."""
    config = LoraConfig(r=rank, lora_alpha=alpha or 2 * rank, target_modules=targets)
    return Adapter.init(resolve(config, model.config.modules()), config, seed=seed)


class Training:
    """AdamW on some arrays of one adapter: B alone of whole weights, A and B of LoRA."""

    def __init__(self, model: Any, adapter: Any, names: tuple[str, ...], rate: float) -> None:
        self.model, self.adapter, self.names, self.rate = model, adapter, names, rate
        self.step = 0
        self.moments = {
            (path, n): (np.zeros_like(getattr(lora, n)), np.zeros_like(getattr(lora, n)))
            for path, lora in adapter.items()
            for n in names
        }

    def parameters(self) -> dict[tuple[str, str], np.ndarray]:
        """The arrays that are trained."""
        return {(p, n): getattr(self.adapter[p], n) for p, n in self.moments}

    def update(self, grads: dict[tuple[str, str], np.ndarray], steps: int) -> None:
        """One step; the rate falls to zero in a straight line over `steps`."""
        self.step += 1
        rate = self.rate * (1 - (self.step - 1) / steps)
        for key, param in self.parameters().items():
            m, v = self.moments[key]
            self.model.ops.adamw_step(param, grads[key], m, v, AdamW(lr=rate, step=self.step))


def gradients(model: Llama, batch: Records, names: tuple[str, ...]) -> dict[Any, np.ndarray]:
    """The gradients of the mean loss over the batch's answers, of each array by (path, name)."""
    labels = np.full(batch.ids.size, -100)
    labels[batch.rows] = batch.answers.reshape(-1)
    _, grads = model.loss(batch.ids.reshape(-1), labels, batch.seqs)
    assert grads is not None
    return {(path, n): getattr(g, n) for path, g in grads.items() for n in names}


def accuracy(model: Llama, test: Records) -> float:
    """The share of answers that are the likeliest token."""
    logits, _ = model.forward(test.ids.reshape(-1), test.seqs, rows=test.rows)
    return float((logits.argmax(axis=1) == test.answers.reshape(-1)).mean())


class Method(ABC):
    """One way of learning. `learn` is called for each task in turn, `score` at any time."""

    label = ""
    knows_the_task = False  # whether `score` may use which task it is

    def __init__(self, model: Llama, seed: int, steps: int) -> None:
        self.model, self.seed, self.steps = model, seed, steps
        self.rng = np.random.default_rng([seed, 99])
        self.trained = 0  # numbers, for the newest task
        self.kept: list[int] = []  # bytes added by each task, the base not counted
        self.setup()

    def setup(self) -> None:
        """What exists before the first task: nothing, where a method does not say otherwise."""
        return

    def batch(self, task: int, train: Records) -> Records:
        """The next records to learn from."""
        return train.take(self.rng.integers(0, len(train), BATCH))

    @abstractmethod
    def learn(self, task: int, train: Records) -> None:
        """Learns task number `task` from its records."""

    @abstractmethod
    def score(self, task: int, test: Records) -> float:
        """Accuracy on task number `task`, with what has been learned up to now."""

    def fit(self, training: Training, task: int, train: Records) -> None:
        """`steps` updates."""
        self.model.attach(training.adapter)
        self.trained = sum(a.size for a in training.parameters().values())
        for _ in range(self.steps):
            grads = gradients(self.model, self.batch(task, train), training.names)
            self.adjust(grads, training)
            training.update(grads, self.steps)

    def adjust(self, grads: dict[Any, np.ndarray], training: Training) -> None:
        """What a method adds to the gradients: nothing, as a rule."""
        return


class Full(Method):
    """Every matrix is trained on, task after task."""

    label = "full fine-tuning"
    rate = 1e-3

    def setup(self) -> None:
        self.adapter = whole(self.model, self.model.modules)

    def paths(self, task: int) -> list[str]:
        """The modules that this task trains."""
        return list(self.model.modules)

    def learn(self, task: int, train: Records) -> None:
        for path, lora in self.adapter.items():
            self.model.modules[path].lora = lora
        own = {path: self.adapter[path] for path in self.paths(task)}
        self.train(task, train, own)
        # One set of weights serves all tasks: it is kept once.
        self.kept.append(4 * self.trained if task == 0 else 0)

    def train(self, task: int, train: Records, own: dict[str, LoRA]) -> None:
        """The others stay attached, as they are."""
        training = Training(self.model, self.adapter, ("B",), self.rate)
        training.moments = {k: v for k, v in training.moments.items() if k[0] in own}
        self.fit(training, task, train)

    def score(self, task: int, test: Records) -> float:
        self.model.attach(self.adapter)
        return accuracy(self.model, test)


class Freeze(Full):
    """The first task trains all; the later ones the last layer and the head."""

    label = "freezing"

    def paths(self, task: int) -> list[str]:
        if task == 0:
            return super().paths(task)
        last = f"layers.{len(self.model.blocks) - 1}."
        return [p for p in self.model.modules if last in p or p == "lm_head"]


class Ewc(Full):
    """Full fine-tuning with a spring at each weight, as stiff as the weight mattered."""

    label = "EWC"
    strength = 3e4
    samples = 64  # records whose gradients are squared, one by one

    def setup(self) -> None:
        super().setup()
        self.fisher: dict[Any, np.ndarray] = {}  # sum over tasks of F
        self.anchored: dict[Any, np.ndarray] = {}  # sum over tasks of F theta

    def learn(self, task: int, train: Records) -> None:
        super().learn(task, train)
        training = Training(self.model, self.adapter, ("B",), self.rate)
        for i in self.rng.integers(0, len(train), self.samples):
            grads = gradients(self.model, train.take(np.array([i])), ("B",))
            for key, param in training.parameters().items():
                f = grads[key] ** 2 / np.float32(self.samples)
                self.fisher[key] = self.fisher.get(key, np.float32(0)) + f
                self.anchored[key] = self.anchored.get(key, np.float32(0)) + f * param
        if task == 0:
            self.kept[-1] += 8 * self.trained

    def adjust(self, grads: dict[Any, np.ndarray], training: Training) -> None:
        for key, param in training.parameters().items():
            if key in self.fisher:
                pull = self.fisher[key] * param - self.anchored[key]
                grads[key] = grads[key] + np.float32(self.strength) * pull


class Replay(Full):
    """Full fine-tuning; from the second task on, half of each batch is stored records."""

    label = "experience replay"
    stored = 50  # records of each task

    def setup(self) -> None:
        super().setup()
        self.buffer: list[Records] = []

    def batch(self, task: int, train: Records) -> Records:
        new = super().batch(task, train)
        if not self.buffer:
            return new
        old = joined(self.buffer)
        half = np.arange(BATCH // 2)
        return joined([new.take(half), old.take(self.rng.integers(0, len(old), BATCH // 2))])

    def learn(self, task: int, train: Records) -> None:
        super().learn(task, train)
        self.buffer.append(train.take(np.arange(self.stored)))
        self.kept[-1] += self.buffer[-1].nbytes


class Heads(Method):
    """A frozen encoder that all share, and a head of its own for each task."""

    label = "shared encoder, private heads"
    knows_the_task = True
    rate = 3e-3

    def setup(self) -> None:
        self.adapters: list[Any] = []

    def fresh(self, task: int) -> tuple[Any, tuple[str, ...]]:
        """What a new task trains: an adapter, and which of its arrays."""
        return whole(self.model, ["lm_head"]), ("B",)

    def learn(self, task: int, train: Records) -> None:
        adapter, names = self.fresh(task)
        self.fit(Training(self.model, adapter, names, self.rate), task, train)
        self.adapters.append(adapter)
        self.kept.append(4 * self.trained)

    def score(self, task: int, test: Records) -> float:
        """A task that has not come yet is answered by the base."""
        self.model.attach(self.adapters[task] if task < len(self.adapters) else {})
        return accuracy(self.model, test)


class LoraPerTask(Heads):
    """A LoRA for each task on one frozen base."""

    label = "LoRA per task"
    rank, targets = 8, "all-linear"
    rate = 1e-2

    def fresh(self, task: int) -> tuple[Any, tuple[str, ...]]:
        return low_rank(self.model, self.rank, self.seed + task, self.targets), ("A", "B")


class LoraInARow(Method):
    """One LoRA that is trained on, task after task: what LoRA alone does not prevent."""

    label = "one LoRA for all"
    rate = 1e-2

    def setup(self) -> None:
        self.adapter = low_rank(self.model, LoraPerTask.rank, self.seed)

    def learn(self, task: int, train: Records) -> None:
        self.fit(Training(self.model, self.adapter, ("A", "B"), self.rate), task, train)
        self.kept.append(4 * self.trained if task == 0 else 0)

    def score(self, task: int, test: Records) -> float:
        self.model.attach(self.adapter)
        return accuracy(self.model, test)
