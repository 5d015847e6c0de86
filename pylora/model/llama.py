"""The whole model: embedding, blocks, final norm, head; its loss and the gradients of an adapter.

The base weights are packed once and never written. An adapter is attached by reference: training
that writes its arrays is seen by the next forward, and no copy exists. Backward computes nothing
below the lowest module that has an adapter.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from pylora import backends
from pylora.errors import ShapeError, UnsupportedError, expect, wrong_type
from pylora.model.attach import GRADS, Module, bring_back, check_fits, computed, place
from pylora.model.attention import positions
from pylora.model.block import Block
from pylora.model.config import LlamaConfig
from pylora.model.decoder import Batch, operation_weights, pack_attached
from pylora.model.embedding import Embedding
from pylora.model.head import Head, HeadCache
from pylora.model.inputs import row_numbers, row_weights, token_ids, whole_seqs
from pylora.model.kvcache import KVCache
from pylora.model.linear import DropKey, Grads, LoRAGrad, LoRALinear, is_packed
from pylora.model.mixed import Mixed
from pylora.model.rope import Rope
from pylora.model.trunk import Trunk, TrunkCache
from pylora.model.weights import (
    Weights,
    checked_weights,
    norm_of,
    random_weights,
    remembering,
    source_of,
    weight_bytes,
)
from pylora.model.whole import check_whole, whole_of
from pylora.model.with_whole import HasWhole
from pylora.numbers.precision import AUTO, QUANTIZED, Stored, check_precision, describe, fastest
from pylora.ops.llama import LlamaOp
from pylora.ops.protocol import Backend
from pylora.reference import IGNORE
from pylora.types import Array, LoRA, Seqs, brief

__all__ = ["IGNORE", "DropKey", "Grads", "Llama", "LoRAGrad", "ModelCache", "random_weights"]


@dataclass(eq=False)
class ModelCache:
    """What `Llama.backward` needs of one `Llama.forward`; good for one backward."""

    __repr__ = brief

    trunk: TrunkCache
    head: HeadCache
    rows: Array | None  # those that the head saw; None: all


class Llama(HasWhole):
    """A Llama-type causal language model (see `LlamaConfig`) with frozen weights."""

    def __init__(
        self,
        config: LlamaConfig,
        weights: Weights,
        *,
        backend: str | Backend | None = None,
        precision: str = "fp32",
        like: Llama | None = None,
    ) -> None:
        """`weights(name)` gives each tensor of `config.tensors()` in Hugging Face layout; a matrix
        may be one that the backend has packed already.

        It is called once for each tensor, which is packed as `precision` says (precision.py) and
        let go before the next is asked for, so memory peaks near one copy.
        ShapeError names a tensor that does not fit, ConfigError a precision that does not exist.
        `like`: the model whose packed weights most of these are; it is then of the same dtype.
        """
        expect("model configuration", config, "Llama(config, weights)")
        if not callable(weights):
            wrong_type(
                "Llama(config, weights)",
                "a function from a tensor's name to its array",
                weights,
                "of a file: Llama.from_checkpoint(open_checkpoint(path)); of a dict: weights.get",
            )
        self.config, self.ops = config, backends.get(backend)
        self.precision = check_precision(precision)
        if like is None:
            self.ops.check_room(weight_bytes(config, self.computes))
        self.vectors: dict[str, np.ndarray] = {}  # the tensors that are not packed
        checked = remembering(config, checked_weights(config, weights), self.vectors)
        names = config.names
        embedding = checked(f"{names.embedding}.weight")
        if like is not None:
            self.dtype: np.dtype = like.dtype
        elif is_packed(embedding) or isinstance(embedding, Stored):
            self.dtype = np.dtype(np.float32)
        else:
            embedding = self.ops.asarray(embedding)
            self.dtype = embedding.dtype
        self.embed_tokens = Embedding(names.embedding, embedding, ops=self.ops, precision=precision)
        del embedding
        positions = None
        if config.learned_positions:
            positions = checked(f"{names.positions}.weight")
            positions = positions if is_packed(positions) else self.ops.pack(positions)
        self.rope = Rope(config, np.empty(0, self.dtype).real.dtype, ops=self.ops)
        self.blocks = [
            Block(config, i, checked, self.rope, ops=self.ops, precision=precision)
            for i in range(config.num_hidden_layers)
        ]
        self.norm = norm_of(config, checked, names.norm, self.ops)
        tied = config.tie_word_embeddings  # one packed weight then serves both
        head = self.embed_tokens.W if tied else checked(f"{names.head}.weight")
        self.lm_head = LoRALinear(names.head, head, ops=self.ops, precision=precision)
        self.activation_dtype: Any = self.ops.activation_dtype(precision)
        self.trunk = Trunk(
            self.embed_tokens, self.blocks, self.rope, config.embedding_multiplier, positions
        )
        self.head = Head(
            self.norm, self.lm_head, self.activation_dtype, self.ops,
            config.logit_multiplier, config.logit_softcap,
        )  # fmt: skip
        self.modules: dict[str, Module] = {names.embedding: self.embed_tokens}
        self.modules |= {p.path: p for block in self.blocks for p in block.linears}
        self.modules[names.head] = self.lm_head
        self.whole, self._home, self.trained = None, None, None
        self._adapter: Mapping[str, LoRA] | None = None
        self._steps = self.ops.repeated()
        self.placed: dict[str, LoRA] = {}  # its arrays, where the backend computes
        self.stored_as: dict[str, int] | None = None  # {"q4_1": 210, ...}, of a checkpoint

    @classmethod
    def random(
        cls,
        config: LlamaConfig,
        seed: int = 0,
        *,
        backend: str | Backend | None = None,
        dtype: Any = np.float32,
        precision: str = "fp32",
    ) -> Llama:
        """A model with the weights of `random_weights(config, seed, dtype)`."""
        expect("model configuration", config, "Llama.random(config)")
        weights = random_weights(config, seed, dtype)
        return cls(config, weights, backend=backend, precision=precision)

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Any,
        backend: str | Backend | None = None,
        precision: str | None = None,
    ) -> Llama:
        """From an open `pylora.formats` checkpoint: a GGUF file, a Hugging Face directory, or a
        packed model, whose weights stay in its file.

        What the file stores in a way that `precision` can multiply is taken as it is; see
        `pylora.model.weights.FromCheckpoint`. `stored_as` then counts the model's matrices by kind.
        "auto" is what trains fastest on this machine; None is fp32, or what a model is packed in.
        """
        expect("checkpoint", checkpoint, "Llama.from_checkpoint")
        packed_as, ops = getattr(checkpoint, "packed_as", None), backends.get(backend)
        if precision is None or (precision == AUTO and packed_as):
            precision = packed_as or "fp32"
        elif precision == AUTO:
            precision = fastest(ops.name, getattr(ops, "isa", None))
        weights = source_of(checkpoint, ops, check_precision(precision))
        model = cls(checkpoint.config, weights, backend=ops, precision=precision)
        model.stored_as = weights.stored_as
        return model

    def __repr__(self) -> str:
        c, n = self.config, len(self._adapter or ())
        return (
            f"Llama({c.model_type}, {c.num_hidden_layers} layers, hidden {c.hidden_size}, "
            f"vocabulary {c.vocab_size}, {c.num_parameters:,} parameters in {self.computes} on "
            f"{self.ops.name}, {f'adapter on {n} modules' if n else 'no adapter'})"
        )

    @property
    def computes(self) -> str:
        """The precision in use: `precision`, but for what this machine cannot do ("fp32x3" is
        strict "fp32" without AMX)."""
        return self.ops.computes(self.precision)

    @property
    def precision_report(self) -> str:
        """Both in words, as every report states them; and how a file's blocks are kept, where
        that is not what the precision's name says."""
        said = describe(self.precision, self.computes)
        kinds = {k: n for k, n in (self.stored_as or {}).items() if k != "f32"}
        if self.precision not in QUANTIZED or not kinds:
            return said
        return f"{said} ({', '.join(f'{n} matrices as {k.upper()}' for k, n in kinds.items())})"

    # ---- adapters -----------------------------------------------------------------------------

    @property
    def adapter(self) -> Mapping[str, LoRA] | None:
        """The adapter that is attached, or None."""
        return self._adapter

    def attach(self, adapter: Mapping[str, LoRA]) -> None:
        """Attaches an adapter by reference, in place of any that is there.

        Where the backend has a memory of its own (a GPU) it gets copies of the host's arrays, in
        `placed`: training changes those, and `collect` brings them back.

        An adapter that brings weights whole (`Adapter.whole`) makes this the model that has them,
        its `config` and `modules` included, until another is attached. They are packed in the
        model's precision now; `refresh` does that again.

        Raises PlanError naming a module that the model does not have or an array that does not
        fit, DtypeError for arrays of another dtype than the model's; then nothing has changed.
        """
        self.check(adapter)
        self._train_whole(new=self._become(whole_of(adapter)))
        placed = {path: place(lora, self.ops) for path, lora in adapter.items()}
        for path, module in self.modules.items():
            module.lora = placed.get(path)
        self._steps.clear()
        self._adapter, self.placed = adapter, placed

    def collect(self) -> None:
        """Brings the attached adapter's numbers back into its own arrays, where they are copies."""
        for path, placed in self.placed.items():
            bring_back(placed, (self._adapter or {})[path], self.ops)
        if self.trained is not None:
            self.trained.collect(self.ops)

    def check(self, adapter: Mapping[str, LoRA]) -> None:
        """Raises what `attach` would for an adapter that does not fit; changes nothing."""
        expect("adapter", adapter, "attach(adapter)")
        whole, config = whole_of(adapter), self._at_home("config")
        if whole is None or whole is self.whole:
            check_fits(adapter, self.modules, self.dtype)
            return
        self._refuse_second()
        sizes = check_whole(config, whole).modules()
        check_fits(adapter, self._at_home("modules"), self.dtype, sizes)

    def load(self, name: str) -> np.ndarray:
        """A module's weight or bias as it is computed with, which a precision may have rounded: in
        float32, by its tensor's name. KeyError for another."""
        return computed(self.modules, name, self.ops)

    def detach(self) -> None:
        """Takes the adapter away; the model is the base again, bit for bit."""
        self.attach({})
        self._adapter = None

    # ---- logits -------------------------------------------------------------------------------

    def forward(
        self,
        ids: Any,
        seqs: Seqs | None = None,
        *,
        drop: DropKey | None = None,
        recompute: bool = False,
        rows: Any = None,
    ) -> tuple[Array, ModelCache]:
        """ids int64 [m] -> logits [m, vocab], or of the given rows only; and the cache.

        `seqs` says where sequences begin (default: one). `recompute` keeps only each block's input
        and runs the block again in backward (gradient checkpointing): same bits, less memory.
        """
        ids = token_ids(ids, self.config.vocab_size)
        seqs = whole_seqs(seqs, ids.size)
        if rows is not None:
            rows = row_numbers(rows, ids.size)
            if drop is not None and self.head.has_dropout:
                raise UnsupportedError("`rows` with dropout on lm_head; ask for all rows instead")
        position = self.ops.xp.asarray(positions(seqs))
        x, trunk = self.trunk.forward(ids, seqs, position, drop, self.trunk.lowest, recompute)
        rows = None if rows is None else self.ops.xp.asarray(rows)
        x = x if rows is None else x[rows]
        logits, head = self.head.forward(x, drop)
        return logits, ModelCache(trunk, head, rows)

    def backward(self, dlogits: Array, cache: ModelCache) -> Grads:
        """dlogits, shaped like the logits -> the gradient of each module that has an adapter."""
        expect("forward's cache", cache, "backward(dlogits, cache)")
        expect("array", dlogits, "backward(dlogits, cache)")
        expected = (cache.head.x.shape[0], self.config.vocab_size)
        if tuple(dlogits.shape) != expected:
            raise ShapeError(f"dlogits has shape {list(dlogits.shape)}, expected {list(expected)}")
        grads: Grads = {}
        need_dx = self.trunk.lowest < len(self.blocks)
        dx = self.head.backward(dlogits, cache.head, grads, need_dx)
        if dx is not None:
            if cache.rows is not None:
                all_rows = self.ops.zeros((cache.trunk.position.size, dx.shape[1]), dx.dtype)
                self.ops.xp.add.at(all_rows, cache.rows, dx)
                dx = all_rows
            self.trunk.backward(dx, cache.trunk, grads)
        return grads

    # ---- loss ---------------------------------------------------------------------------------

    def loss(
        self,
        ids: Any,
        labels: Any,
        seqs: Seqs | None = None,
        *,
        weight: Any = None,
        drop: DropKey | None = None,
        grads: bool = True,
        recompute: bool = False,
        smoothing: float = 0.0,
    ) -> tuple[Array, Grads | None]:
        """Negative log likelihood of each row's label [m], and the adapter's gradients.

        labels[i] is the token that row i must predict (already shifted); IGNORE (-100) is not
        counted and gives 0. The gradient is that of sum_i weight[i] * nll[i]; `weight` is an array
        [m], a number, or None for 1 / number of labels. With `smoothing` that much of each label is
        spread evenly over all tokens (`Head.loss`). The head runs in chunks of rows, on rows with a
        label only, so that no [m, vocab] array exists.
        """
        ids = token_ids(ids, self.config.vocab_size)
        labels = token_ids(labels, self.config.vocab_size, labels=True)
        if labels.shape != ids.shape:
            raise ShapeError(f"{labels.size} labels for {ids.size} ids; give one label to each id")
        seqs = whole_seqs(seqs, ids.size)
        counted = np.flatnonzero(labels != IGNORE)
        weight = row_weights(weight, ids.size, counted.size, self.dtype)
        # Dropout is keyed by row number, so with dropout on the head its rows stay consecutive.
        whole = drop is not None and self.head.has_dropout
        rows = np.arange(ids.size) if whole else counted
        arrays = ids, positions(seqs), rows, labels[rows], weight[rows]

        def work(arrays: Sequence[Array], seqs: Seqs) -> dict[Any, Array]:
            return self._loss(arrays, seqs, drop, grads, recompute, smoothing)

        plain = grads and not smoothing and not (drop is not None and drop.noise)
        key = self._repeats(rows.size, drop, recompute) if plain else None
        found = self._steps.run(key, arrays, seqs, work)
        nll = found.pop("nll")
        if not grads:
            return nll, None
        out: Grads = {}
        for path in dict.fromkeys(path for path, _ in found):
            out[path] = LoRAGrad(*(found.get((path, name)) for name in GRADS))
        return nll, out

    def _repeats(self, n: int, drop: DropKey | None, recompute: bool) -> Hashable:
        """What a step's gradients depend on besides the numbers in its arrays; None where they
        depend on more, or where layers look at numbers: biases, lengths, an embedding's."""
        loras = tuple(module.lora for module in self.modules.values())
        some = [lora for lora in loras if lora is not None]
        plain = all(lora.bias is lora.base_bias is lora.magnitude is None for lora in some)
        dropped = drop is not None and any(lora.dropout for lora in some)
        # In chunks of rows the head's gradient is added up by the array library.
        added = self.lm_head.lora is not None and n > self.ops.head_rows
        looks = self.rope.by_length or self.config.experts > 0  # at lengths, at numbers
        if not some or not n or not plain or dropped or added or looks:
            return None
        if self.embed_tokens.lora is not None or self.trained:
            return None
        return *loras, recompute

    def _loss(
        self,
        arrays: Sequence[Array],
        seqs: Seqs,
        drop: DropKey | None,
        grads: bool,
        recompute: bool,
        smoothing: float,
    ) -> dict[Any, Array]:
        """The nll [m] by the name "nll", and gradients by (path, name).

        `arrays`: ids and position [m]; rows, labels and weight [n], of the rows that count. Nothing
        is known here but their shapes, so that a GPU can record what is done and repeat it.
        """
        ids, position, rows, labels, weight = arrays
        ops, m, n, step = self.ops, ids.size, rows.size, self.ops.head_rows
        lowest = self.trunk.lowest if grads else len(self.blocks)
        x, trunk = self.trunk.forward(ids, seqs, position, drop, lowest, recompute)
        make = ops.empty if n == m else ops.zeros
        nll = make((m, 1), self.dtype)
        dx = make(x.shape, self.dtype) if lowest < len(self.blocks) else None
        out: Grads = {}
        for a in range(0, max(n, 1), step):
            b = min(a + step, n)
            some = x[a:b] if n == m else ops.take_rows(x, rows[a:b])
            nll_some, dx_some = self.head.loss(
                some, labels[a:b], weight[a:b] if grads else None, drop, a, dx is not None, out,
                smoothing,
            )  # fmt: skip
            ops.put_rows(nll, rows[a:b], nll_some.reshape(-1, 1))
            if dx is not None:
                ops.put_rows(dx, rows[a:b], dx_some)
            del some, dx_some
        if grads and dx is not None:
            del x
            self.trunk.backward(dx, trunk, out)
        found: dict[Any, Array] = {"nll": nll.reshape(m)}
        for path, grad in out.items():
            each = {name: getattr(grad, name) for name in GRADS}
            found |= {(path, name): a for name, a in each.items() if a is not None}
        return found

    # ---- decoding -----------------------------------------------------------------------------

    def kv_cache(self, slots: int, capacity: int) -> KVCache:
        """An empty KV cache for `slots` sequences of up to `capacity` tokens."""
        dtype = self.dtype if self.activation_dtype is None else self.activation_dtype
        return KVCache(self.config, slots, capacity, ops=self.ops, dtype=dtype)

    def decode(self, ids: Any, kv: KVCache, lengths: Sequence[int], slots: Any = None) -> Array:
        """Appends lengths[i] new tokens to the sequence in slot slots[i] (default: every slot).

        ids int64 [sum(lengths)], one sequence behind the other -> logits of the last token of each
        [len(lengths), vocab]: the same bits as `forward` of the whole sequence. A prompt and a
        single next token are the same call, and may be mixed.
        """
        expect("KV cache", kv, "decode(ids, kv, lengths)")
        ids = token_ids(ids, self.config.vocab_size)
        slots = np.asarray(np.arange(kv.slots) if slots is None else slots, np.int64)
        adapter = pack_attached(self)
        return Batch(self, kv, lengths, slots, [adapter] * slots.size).forward(ids)

    @cached_property
    def op(self) -> LlamaOp:
        """The model as its backend's whole-model operation, which decoding runs on."""
        return self.ops.llama(operation_weights(self))

    @cached_property
    def mixed(self) -> Mixed:
        """The operation of steps in which adapters bring weights of their own."""
        return Mixed(self.op, self.ops)

    @cached_property
    def numbers(self) -> dict[str, int]:
        """Module path -> its number in the operation; the embedding has none."""
        paths = [p.path for block in self.blocks for p in block.numbered]
        return {path: i for i, path in enumerate([*paths, self.lm_head.path])}
