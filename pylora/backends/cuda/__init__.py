"""The CUDA backend: the operations of `pylora.reference.Reference` on libpylora_cuda.

Arrays are CuPy's, or any that has __cuda_array_interface__; work is queued on CuPy's current
stream, and outputs and workspaces come from its memory pool. Index arrays of the host are checked
and copied to the device; those of the device are taken as they are, and a kernel that meets one out
of range says so at the next copy to the host. Nothing here waits for the device but that copy.

Each group of operations is a module here; the backend on the C core has the same. Importing this
package loads no library and looks for no GPU; making the backend does.
"""

from __future__ import annotations

from pylora.backends.cuda.attention import Attention
from pylora.backends.cuda.features import FeatureOps
from pylora.backends.cuda.linear import Linear
from pylora.backends.cuda.llama import CudaLlama
from pylora.backends.cuda.loss import Loss
from pylora.backends.cuda.merging import Merging
from pylora.backends.cuda.optimizer import Optimizer
from pylora.backends.cuda.precision import Precision
from pylora.backends.cuda.random import Random
from pylora.backends.cuda.rows import Rows
from pylora.backends.cuda.steps import CudaSteps
from pylora.ops.composed import Composed
from pylora.ops.llama import LlamaOp, LlamaWeights
from pylora.ops.plain import Plain
from pylora.ops.repeat import Repeated


class CudaBackend(
    Linear, Attention, Rows, Loss, Optimizer, Random, Merging, Precision, FeatureOps, Plain
):
    """The compiled CUDA library. `Reference`'s docstrings specify every operation."""

    def repeated(self) -> Repeated:
        return CudaSteps(self)

    def llama(self, weights: LlamaWeights) -> LlamaOp:
        return CudaLlama(self, weights) if weights.plain else Composed(self, weights)
