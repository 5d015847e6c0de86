"""Which elements a module drops."""

from __future__ import annotations

import numpy as np

from pylora.conformance.correct.plain import Correct
from pylora.conformance.mutants.registry import wrong
from pylora.types import Array

Shape = tuple[int, int]


@wrong(
    "mask-without-the-path",
    "gross",
    "All modules drop the same elements.",
    "The generator is seeded with the step alone.",
)
class WithoutPath(Correct):
    def dropout_mask(
        self, shape: Shape, p: float, seed: int, path: str, step: int, row0: int = 0
    ) -> Array:
        return super().dropout_mask(shape, p, seed, "module", step, row0)


@wrong(
    "mask-of-the-last-name",
    "subtle",
    "Modules of the same name in different layers share a mask.",
    "The key is made of the module's own name, without its parents'.",
)
class LastName(Correct):
    def dropout_mask(
        self, shape: Shape, p: float, seed: int, path: str, step: int, row0: int = 0
    ) -> Array:
        return super().dropout_mask(shape, p, seed, path.split(".")[-1], step, row0)


@wrong(
    "mask-of-the-letters",
    "subtle",
    "Paths of the same letters share a mask.",
    "The key is the sum of the path's bytes: q_proj and proj_q are the same.",
)
class Letters(Correct):
    def dropout_mask(
        self, shape: Shape, p: float, seed: int, path: str, step: int, row0: int = 0
    ) -> Array:
        return super().dropout_mask(shape, p, seed, "".join(sorted(path)), step, row0)


@wrong(
    "mask-path-runs-into-step",
    "subtle",
    "Path and step are joined without anything between: q_proj1 at step 2 is q_proj at step 12.",
    "An f-string.",
)
class PathRunsIntoStep(Correct):
    def dropout_mask(
        self, shape: Shape, p: float, seed: int, path: str, step: int, row0: int = 0
    ) -> Array:
        return super().dropout_mask(shape, p, seed, f"{path}{step}", 1, row0)


@wrong(
    "mask-without-the-step",
    "gross",
    "The same elements are dropped at every step.",
    "The mask is made when the module is.",
)
class WithoutStep(Correct):
    def dropout_mask(
        self, shape: Shape, p: float, seed: int, path: str, step: int, row0: int = 0
    ) -> Array:
        return super().dropout_mask(shape, p, seed, path, 1, row0)


@wrong(
    "mask-step-in-8-bits",
    "subtle",
    "The masks repeat after 256 steps.",
    "The step is packed into a byte of the key.",
)
class StepInEightBits(Correct):
    def dropout_mask(
        self, shape: Shape, p: float, seed: int, path: str, step: int, row0: int = 0
    ) -> Array:
        return super().dropout_mask(shape, p, seed, path, step % 256, row0)


@wrong(
    "mask-step-in-32-bits",
    "subtle",
    "The step is cut to 32 bits.",
    "A counter of rows, not of steps, gets there within a day.",
)
class StepIn32Bits(Correct):
    def dropout_mask(
        self, shape: Shape, p: float, seed: int, path: str, step: int, row0: int = 0
    ) -> Array:
        return super().dropout_mask(shape, p, seed, path, step % 2**32, row0)


@wrong(
    "mask-seed-in-32-bits",
    "subtle",
    "The seed is cut to 32 bits.",
    "The generator's seed is an int.",
)
class SeedIn32Bits(Correct):
    def dropout_mask(
        self, shape: Shape, p: float, seed: int, path: str, step: int, row0: int = 0
    ) -> Array:
        return super().dropout_mask(shape, p, seed % 2**32, path, step, row0)


@wrong(
    "mask-shifted-by-the-step",
    "subtle",
    "The next step's mask is this step's, moved by a row.",
    "One stream for all steps, read on from the step's number.",
)
class ShiftedByStep(Correct):
    def dropout_mask(
        self, shape: Shape, p: float, seed: int, path: str, step: int, row0: int = 0
    ) -> Array:
        return super().dropout_mask(shape, p, seed, path, 1, row0 + step)


@wrong(
    "mask-parts-start-anew",
    "subtle",
    "Each part of a batch draws from the start.",
    "Gradient accumulation changes what is dropped.",
)
class PartsStartAnew(Correct):
    def dropout_mask(
        self, shape: Shape, p: float, seed: int, path: str, step: int, row0: int = 0
    ) -> Array:
        return super().dropout_mask(shape, p, seed, path, step, 0)


@wrong(
    "mask-row0-counts-elements",
    "subtle",
    "row0 is taken for a number of elements.",
    "The offset of the counter is not multiplied by the width.",
)
class Row0CountsElements(Correct):
    def dropout_mask(
        self, shape: Shape, p: float, seed: int, path: str, step: int, row0: int = 0
    ) -> Array:
        m, k = shape
        more = -(-row0 // k)
        whole = super().dropout_mask((m + more, k), p, seed, path, step, 0).reshape(-1)
        return whole[row0 : row0 + m * k].reshape(shape)


@wrong(
    "mask-steps-from-0",
    "subtle",
    "Steps are counted from 0.",
    "range(steps).",
)
class StepsFromZero(Correct):
    def dropout_mask(
        self, shape: Shape, p: float, seed: int, path: str, step: int, row0: int = 0
    ) -> Array:
        return super().dropout_mask(shape, p, seed, path, step - 1, row0)


@wrong(
    "mask-p-in-8-bits",
    "subtle",
    "p is rounded to 256ths: 0.1 is 0.102.",
    "One random byte for each element is cheaper than a word.",
)
class PInEightBits(Correct):
    def dropout_mask(
        self, shape: Shape, p: float, seed: int, path: str, step: int, row0: int = 0
    ) -> Array:
        return super().dropout_mask(shape, round(p * 256) / 256, seed, path, step, row0)


@wrong(
    "mask-of-the-path-before",
    "subtle",
    "A module's mask depends on which module drew before it.",
    "One generator for all, in the order of the calls.",
)
class OrderOfCalls(Correct):
    def __init__(self) -> None:
        self.calls = 0

    def dropout_mask(
        self, shape: Shape, p: float, seed: int, path: str, step: int, row0: int = 0
    ) -> Array:
        self.calls += 1
        mask = super().dropout_mask(shape, p, seed, path, step + self.calls, row0)
        return np.asarray(mask)
