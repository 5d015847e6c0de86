"""The linear module's forward pass: which matrix is which, and where the bias goes."""

from __future__ import annotations

from pylora.conformance.correct.plain import Correct
from pylora.conformance.mutants.registry import wrong
from pylora.types import Array


@wrong(
    "a-stored-transposed",
    "gross",
    "A is read as [k, r] although it is stored [r, k].",
    "MLX stores lora_a transposed; a converter that only renames keys keeps its order.",
)
class AStoredTransposed(Correct):
    def forward(
        self, x: Array, W: Array, A: Array, B: Array, scale: float, bias: Array | None = None
    ) -> Array:
        return super().forward(x, W, A.reshape(A.shape[::-1]).T, B, scale, bias)


@wrong(
    "roles-swapped-where-square",
    "subtle",
    "Where d = k, A and B change places.",
    "B and A are told apart by their shapes, which say nothing in a square module.",
)
class RolesSwapped(Correct):
    def forward(
        self, x: Array, W: Array, A: Array, B: Array, scale: float, bias: Array | None = None
    ) -> Array:
        if A.shape[1] == B.shape[0]:
            A, B = B.T, A.T
        return super().forward(x, W, A, B, scale, bias)


@wrong(
    "adapter-after-base",
    "subtle",
    "Where d = k, the adapter is given the base's output (bias and all) instead of x.",
    "Adapters before LoRA sat behind the layer, not beside it.",
)
class AdapterAfterBase(Correct):
    def forward(
        self, x: Array, W: Array, A: Array, B: Array, scale: float, bias: Array | None = None
    ) -> Array:
        if W.shape[0] != W.shape[1]:
            return super().forward(x, W, A, B, scale, bias)
        y = self.base(x, W, bias)
        return (self.widen(y) + self.widen(super().forward(y, W * 0, A, B, scale))).astype(x.dtype)


@wrong(
    "bias-scaled",
    "gross",
    "The base's bias is added before the adapter's scale, and scaled with it.",
    "base.bias and the bias of B go through the same code.",
)
class BiasScaled(Correct):
    def forward(
        self, x: Array, W: Array, A: Array, B: Array, scale: float, bias: Array | None = None
    ) -> Array:
        if bias is not None:
            bias = (self.widen(bias) * self.widen(bias).dtype.type(scale)).astype(bias.dtype)
        return super().forward(x, W, A, B, scale, bias)


@wrong(
    "bias-dropped-with-adapter",
    "gross",
    "With an adapter the base's bias is left out.",
    "The adapter's branch multiplies by the weight itself instead of calling the base layer.",
)
class BiasDropped(Correct):
    def forward(
        self, x: Array, W: Array, A: Array, B: Array, scale: float, bias: Array | None = None
    ) -> Array:
        return super().forward(x, W, A, B, scale)


@wrong(
    "bias-twice",
    "gross",
    "The base's bias is added by the base layer and by its wrapper.",
    "Base layers return their output with the bias in it; the fused kernel takes the bias again.",
)
class BiasTwice(Correct):
    def forward(
        self, x: Array, W: Array, A: Array, B: Array, scale: float, bias: Array | None = None
    ) -> Array:
        return super().forward(x, W, A, B, scale, None if bias is None else bias + bias)


@wrong(
    "rank-truncated",
    "subtle",
    "Of a rank above min(d, k) only min(d, k) rows are used.",
    "Buffers were sized for the rank that a matrix can have, not for the adapter's.",
)
class RankTruncated(Correct):
    def forward(
        self, x: Array, W: Array, A: Array, B: Array, scale: float, bias: Array | None = None
    ) -> Array:
        r = min(W.shape)
        return super().forward(x, W, A[:r], B[:, :r], scale, bias)


@wrong(
    "rank-padded-scale",
    "subtle",
    "Ranks are padded to a multiple of 4 and the scale is corrected by the padded rank.",
    "A kernel wants ranks that fill its registers; alpha / r is then taken of what it sees.",
)
class RankPaddedScale(Correct):
    def forward(
        self, x: Array, W: Array, A: Array, B: Array, scale: float, bias: Array | None = None
    ) -> Array:
        r = A.shape[0]
        return super().forward(x, W, A, B, scale * r / (-(-r // 4) * 4), bias)
