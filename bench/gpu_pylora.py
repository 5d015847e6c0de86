"""What pylora does for each job of bench/gpu.py, through the public interface."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gpu_shapes as shapes
import numpy as np

import pylora
from pylora import backends
from pylora.adapters.pool import AdapterPool
from pylora.model.decoder import Batch
from pylora.training.config import TrainConfig
from pylora.training.optimizer import Optimizer, gradients, trainable
from pylora.types import LoRA, Seqs

Job = Callable[[], Any]


class Engine:
    def __init__(self, backend: str) -> None:
        self.ops: Any = backends.get(backend)

    def versions(self) -> dict[str, str]:
        found = {"pylora": pylora.__version__, "backend": self.ops.name}
        if self.ops.xp is not np:
            found["cupy"] = self.ops.xp.__version__
        return found

    def _normal(self, *shape: int, scale: float = 1.0) -> Any:
        """float32, drawn where the backend computes."""
        a = self.ops.xp.random.default_rng(0).standard_normal(shape, dtype=np.float32)
        a *= np.float32(scale)
        return a

    # ---- one linear ---------------------------------------------------------------------------

    def linear(self, width: int, rank: int, tokens: int, backward: bool) -> Job:
        ops = self.ops
        kind = ops.activation_dtype("bf16")
        W = ops.pack(self._normal(width, width, scale=width**-0.5), "bf16")
        A, B = self._normal(rank, width, scale=width**-0.5), self._normal(width, rank, scale=0.01)
        lora = LoRA(A, B, 2.0)
        x, dy = (ops.cast(self._normal(tokens, width), kind) for _ in range(2))
        if not backward:
            return lambda: ops.lora_forward(x, W, None, lora, dtype=kind)

        def both() -> None:
            _, h = ops.lora_forward(x, W, None, lora, dtype=kind)
            ops.lora_backward(dy, x, h, W, lora, dtype=kind)

        return both

    def merge(self, part: str, width: int, rank: int, precision: str) -> Job:
        ops, xp = self.ops, self.ops.xp
        W = self._normal(width, width, scale=width**-0.5)
        dtype = {"bf16": "bf16", "fp32": "f32"}[precision]
        if precision == "bf16":
            W = (W.view(xp.uint32) >> 16).astype(xp.uint16)
        A, B = self._normal(rank, width, scale=width**-0.5), self._normal(width, rank, scale=0.01)
        lora = LoRA(A, B, 2.0)
        if part == "merge":
            changed = W.copy()  # in place, as PEFT does it
            return lambda: ops.merge_in_place(changed, lora, dtype)
        merged, residue = ops.merge(W, lora, dtype)
        return lambda: ops.unmerge(merged, lora, residue, dtype)

    # ---- the model ----------------------------------------------------------------------------

    def _model(self, layers: int) -> Any:
        config = pylora.LlamaConfig(
            model_type="llama", head_dim=shapes.HEAD_DIM,
            **{**shapes.GEOMETRY, "num_hidden_layers": layers},
        )  # fmt: skip
        sizes = config.tensors()

        def weights(name: str) -> Any:
            shape = sizes[name]
            if len(shape) == 1:
                return np.ones(shape, np.float32)
            return self.ops.pack(self._normal(*shape, scale=shape[1] ** -0.5), "bf16")

        return pylora.Llama(config, weights, backend=self.ops, precision="bf16")

    def _adapter(self, model: Any, seed: int = 0) -> Any:
        lora = pylora.LoraConfig(
            r=shapes.RANK, lora_alpha=2 * shapes.RANK, target_modules=shapes.TARGETS,
            init_lora_weights=False,
        )  # fmt: skip
        return pylora.Adapter.init(pylora.resolve(lora, model.config.modules()), lora, seed=seed)

    def step(self, batch: int, length: int, recompute: bool) -> Job:
        model = self._model(shapes.GEOMETRY["num_hidden_layers"])
        adapter = self._adapter(model)
        model.attach(adapter)
        parameters = trainable(model.placed)
        config = TrainConfig(steps=1, learning_rate=shapes.LEARNING_RATE)
        optimizer = Optimizer(model.ops, parameters, config)
        ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (batch, length))
        labels = np.full_like(ids, pylora.IGNORE)
        labels[:, :-1] = ids[:, 1:]
        tokens, wanted, seqs = ids.reshape(-1), labels.reshape(-1), Seqs.of([length] * batch)
        at = {"step": 0}

        def once() -> None:
            at["step"] += 1
            _, grads = model.loss(tokens, wanted, seqs, recompute=recompute)
            found = gradients(grads, parameters)
            optimizer.update(found, 0.0, at["step"], shapes.LEARNING_RATE)

        return once

    def decode(self, rows: int, prompt: int, layers: int, adapters: int) -> Job:
        model = self._model(layers)
        pool, one = AdapterPool(model), self._adapter(model)
        for i in range(adapters):
            pool.add(f"a{i}", one)  # a copy
        names = sorted(f"a{i % adapters}" for i in range(rows))
        packed = [pool.packed(name) for name in names]
        kv = model.kv_cache(slots=rows, capacity=2 * prompt)
        slots = np.arange(rows)
        ids = np.random.default_rng(0).integers(0, model.config.vocab_size, rows * prompt)
        Batch(model, kv, [prompt] * rows, slots, packed).forward(ids)
        batch = Batch(model, kv, [1] * rows, slots, packed)
        token = [5] * rows

        def once() -> None:  # the same step each time: its cost does not drift with the length
            batch.forward(token)

        return once
