"""Initial values."""

from __future__ import annotations

import math

from pylora.conformance.correct.plain import Correct
from pylora.conformance.mutants.registry import wrong
from pylora.numbers import random
from pylora.types import Array


@wrong(
    "init-b-random",
    "gross",
    "B starts random too: a fresh adapter changes the model.",
    "Both factors go through the same initialisation.",
    "mflux-community/mflux#739",
)
class BRandom(Correct):
    def init(self, d: int, k: int, r: int, seed: int, method: str) -> tuple[Array, Array]:
        A, _ = super().init(d, k, r, seed, method)
        stream = random.stream("init", "module", "B")
        return A, random.uniform((d, r), 1 / math.sqrt(r), seed=seed, stream=stream)


@wrong(
    "init-a-zero",
    "subtle",
    "A is zero as B is: nothing changes, and nothing ever will, since both gradients are zero.",
    "An adapter's slot is cleared and used again.",
    "NovaSky-AI/SkyRL#852",
)
class AZero(Correct):
    def init(self, d: int, k: int, r: int, seed: int, method: str) -> tuple[Array, Array]:
        A, B = super().init(d, k, r, seed, method)
        return A * 0, B


@wrong(
    "init-factors-swapped",
    "gross",
    "A is zero and B is random. The start is still the base.",
    "Embeddings are initialised that way round, and one function served both.",
)
class FactorsSwapped(Correct):
    def init(self, d: int, k: int, r: int, seed: int, method: str) -> tuple[Array, Array]:
        A, _ = super().init(d, k, r, seed, method)
        stream = random.stream("init", "module", "B")
        return A * 0, random.uniform((d, r), 1 / math.sqrt(r), seed=seed, stream=stream)


@wrong(
    "init-gaussian-one-over-sqrt-r",
    "subtle",
    '"gaussian" has the standard deviation 1 / sqrt(r), not 1 / r.',
    "1 / sqrt of something is what initialisation is elsewhere.",
)
class GaussianSqrt(Correct):
    def init(self, d: int, k: int, r: int, seed: int, method: str) -> tuple[Array, Array]:
        A, B = super().init(d, k, r, seed, method)
        return (A * A.dtype.type(math.sqrt(r)) if method == "gaussian" else A), B


@wrong(
    "init-kaiming-gain",
    "subtle",
    "Kaiming-uniform with a = 0: the bound is sqrt(6 / k), not 1 / sqrt(k).",
    "The function's default is for ReLU; LoRA passes a = sqrt(5).",
)
class KaimingGain(Correct):
    def init(self, d: int, k: int, r: int, seed: int, method: str) -> tuple[Array, Array]:
        A, B = super().init(d, k, r, seed, method)
        return (A if method == "gaussian" else A * A.dtype.type(math.sqrt(6))), B


@wrong(
    "init-kaiming-fan-out",
    "subtle",
    "The bound of A is 1 / sqrt(r): the fan of the wrong axis.",
    "fan_in of a matrix that is stored transposed.",
)
class KaimingFanOut(Correct):
    def init(self, d: int, k: int, r: int, seed: int, method: str) -> tuple[Array, Array]:
        A, B = super().init(d, k, r, seed, method)
        return (A if method == "gaussian" else A * A.dtype.type(math.sqrt(k / r))), B


@wrong(
    "init-seed-ignored",
    "subtle",
    "The seed changes nothing.",
    "The generator is made before the seed is set.",
)
class SeedIgnored(Correct):
    def init(self, d: int, k: int, r: int, seed: int, method: str) -> tuple[Array, Array]:
        return super().init(d, k, r, 0, method)


@wrong(
    "init-not-reproducible",
    "subtle",
    "The same seed gives other values each time.",
    "A global generator that every call moves on.",
)
class NotReproducible(Correct):
    calls = 0

    def init(self, d: int, k: int, r: int, seed: int, method: str) -> tuple[Array, Array]:
        self.calls += 1
        return super().init(d, k, r, seed + self.calls, method)
