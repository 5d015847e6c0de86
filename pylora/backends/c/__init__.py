"""The C backend: the operations of `pylora.reference.Reference` on the compiled core, in float32
and bfloat16.

Inputs may have any strides; a row whose elements do not lie side by side is copied first. The
interpreter lock is released while the core works. Each group of operations is a module here; the
backend on CUDA has the same.
"""

from __future__ import annotations

from pylora.backends.c.attention import Attention
from pylora.backends.c.features import FeatureOps
from pylora.backends.c.linear import Linear
from pylora.backends.c.llama import CLlama
from pylora.backends.c.loss import Loss
from pylora.backends.c.merging import Merging
from pylora.backends.c.optimizer import Optimizer
from pylora.backends.c.precision import Precision
from pylora.backends.c.random import Random
from pylora.backends.c.rows import Rows
from pylora.ops.llama import LlamaOp, LlamaWeights
from pylora.ops.plain import Plain


class CBackend(
    Linear, Attention, Rows, Loss, Optimizer, Random, Merging, Precision, FeatureOps, Plain
):
    """The compiled core. `Reference`'s docstrings are the specification of every operation."""

    def llama(self, weights: LlamaWeights) -> LlamaOp:
        return CLlama(weights, self, self._scratch)
