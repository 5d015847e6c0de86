"""The embedding and the blocks, forward and backward: everything below the final norm.

Backward computes nothing below the lowest module that has an adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pylora.errors import PyloraError
from pylora.model.block import Block, BlockCache
from pylora.model.embedding import Embedding, EmbeddingCache
from pylora.model.linear import DropKey, Grads, Own
from pylora.model.noise import neftune
from pylora.model.rope import Rope
from pylora.ops.llama import LayerWeights
from pylora.ops.protocol import Packed
from pylora.types import Array, Rotation, Seqs, brief


@dataclass(eq=False)
class TrunkCache:
    """What backward needs of the embedding and the blocks; `blocks` is used up from its end."""

    __repr__ = brief

    seqs: Seqs
    position: np.ndarray
    rotations: tuple[Rotation, ...]
    drop: DropKey | None
    embedding: EmbeddingCache
    blocks: list[BlockCache | Array | None]  # an array is a block's input, to be run again


class Trunk:
    """A model's embedding and blocks, in their order. They belong to the model."""

    def __init__(
        self,
        embedding: Embedding,
        blocks: Sequence[Block],
        rope: Rope,
        multiplier: float = 1.0,
        positions: Packed = None,
    ) -> None:
        """`multiplier`: of what the embedding gives. `positions`: a packed table of learned ones,
        added to that."""
        self.embedding, self.blocks, self.rope = embedding, blocks, rope
        self.multiplier, self.positions = multiplier, positions
        self.own: Own | None = None  # of the positions, where they are trained

    @property
    def lowest(self) -> int:
        """The lowest layer with an adapter or a weight that is trained; -1: the embedding; number
        of layers: none of them."""
        if self.embedding.trained or self.own is not None:
            return -1
        trainable = (i for i, block in enumerate(self.blocks) if block.trainable)
        return next(trainable, len(self.blocks))

    def forward(
        self,
        ids: Array,
        seqs: Seqs,
        position: Array,
        drop: DropKey | None,
        lowest: int,
        recompute: bool,
    ) -> tuple[Array, TrunkCache]:
        """The residual stream after the last block [m, hidden]; caches of blocks >= `lowest`."""
        x, embedding = self.embedding.forward(ids)
        if self.multiplier != 1:
            x = x * x.dtype.type(self.multiplier)
        if self.positions is not None:
            x = x + self.embedding.ops.embedding_forward(position, self.positions)
        if drop is not None and drop.noise:
            noise = neftune(
                drop.noise, seqs, int(x.shape[1]), seed=drop.seed, step=drop.step, row0=drop.row0
            )
            x = x + self.embedding.ops.asarray(noise.astype(x.dtype, copy=False))
        rotations = self.rope.rotations(seqs, position)
        cache = TrunkCache(seqs, position, rotations, drop, embedding, [])
        for i, block in enumerate(self.blocks):
            y, one = block.forward(x, seqs, drop=drop, position=position, rotations=rotations)
            cache.blocks.append(None if i < lowest else x if recompute else one)
            del one
            x = y
        return x, cache

    def backward(self, dx: Array, cache: TrunkCache, grads: Grads) -> None:
        """dx is given away. Caches are dropped as they are used."""
        lowest = self.lowest
        kept = cache.blocks[max(lowest, 0) :]
        if len(cache.blocks) != len(self.blocks) or any(c is None for c in kept):
            raise PyloraError(
                "this cache was used by an earlier backward, or the adapter has changed since; "
                "run forward again"
            )
        del kept
        for i in range(len(self.blocks) - 1, max(lowest, 0) - 1, -1):
            block, one = self.blocks[i], cache.blocks.pop()
            if not isinstance(one, BlockCache):
                _, one = block.forward(
                    one, cache.seqs, drop=cache.drop, position=cache.position,
                    rotations=cache.rotations,
                )  # fmt: skip
            dx = block.backward(dx, one, grads, need_dx=i > lowest)
            del one
        if self.own is not None:
            size = int(self.positions.shape[0])
            self.own.add_rows(self.embedding.ops, grads, cache.position, dx, size)
        if lowest < 0 and self.multiplier != 1:
            dx = dx * dx.dtype.type(self.multiplier)
        self.embedding.backward(dx, cache.embedding, grads)

    def layer_weights(self) -> tuple[LayerWeights, ...]:
        """The weights of each block as a backend's whole-model operation takes them."""
        return tuple(block.layer_weights() for block in self.blocks)
