"""The life of a module: adapters attached, merged, replaced and written to, in any order."""

from __future__ import annotations

from typing import Any, ClassVar

from pylora.conformance.correct.plain import Correct, CorrectModule
from pylora.conformance.mutants.registry import wrong
from pylora.types import Array


class _AttachKeepsMerged(CorrectModule):
    def attach(self, A: Array, B: Array, scale: float) -> None:
        self.lora = A, B, scale


@wrong(
    "attach-keeps-what-is-merged",
    "subtle",
    "What is attached while another adapter is merged does not count: the merged one answers.",
    "The kit's own module had this fault, and no law asked.",
)
class AttachKeepsMerged(Correct):
    def module(self, W: Array, bias: Array | None = None) -> CorrectModule:
        return _AttachKeepsMerged(self, W, bias)


class _UnmergesWhatIsAttached(CorrectModule):
    def attach(self, A: Array, B: Array, scale: float) -> None:
        self.lora = A, B, scale
        if self.merged is not None:
            self.W, self.merged = self.merged, None


@wrong(
    "attach-makes-the-merge-stay",
    "subtle",
    "Attaching while another adapter is merged takes the merged weight for the base.",
    "Whatever the weight is now is what the new adapter is put beside.",
)
class AttachMakesMergeStay(Correct):
    def module(self, W: Array, bias: Array | None = None) -> CorrectModule:
        return _UnmergesWhatIsAttached(self, W, bias)


class _UnmergesAnother(CorrectModule):
    """merge in place of the weight, and unmerge by what is attached then."""

    def attach(self, A: Array, B: Array, scale: float) -> None:
        self.lora = A, B, scale

    def unmerge(self) -> None:
        if self.merged is not None and self.lora is not None:
            A, B, s = self.lora
            self.W = self.maker.merge(self.merged, A, B, -s)[0]
            self.merged = self.state = None


@wrong(
    "unmerge-takes-out-the-attached",
    "subtle",
    "unmerge takes out the adapter that is attached now, not the one that was merged.",
    "The record of what is merged is a flag, and not an adapter.",
)
class UnmergesAnother(Correct):
    def module(self, W: Array, bias: Array | None = None) -> CorrectModule:
        return _UnmergesAnother(self, W, bias)


class _UnmergesByReference(CorrectModule):
    def merge(self) -> None:
        super().merge()
        if self.lora is not None and self.merged is not None:
            self.inside = self.lora


@wrong(
    "unmerge-by-reference",
    "subtle",
    "What is merged is remembered by reference: written to since, another update is taken out.",
    "An optimizer's step while the weights are merged for an evaluation.",
)
class UnmergesByReference(Correct):
    def module(self, W: Array, bias: Array | None = None) -> CorrectModule:
        return _UnmergesByReference(self, W, bias)


class _KnownById(CorrectModule):
    known: tuple[int, int] | None = None

    def attach(self, A: Array, B: Array, scale: float) -> None:
        if self.known == (id(A), id(B)):
            return
        super().attach(A.copy(), B.copy(), scale)
        self.known, self.alive = (id(A), id(B)), (A, B)

    def detach(self) -> None:
        super().detach()
        self.known = None


@wrong(
    "attach-again-is-skipped",
    "subtle",
    "Attaching arrays that are attached already does nothing, though they or s changed.",
    "`if adapter is self.adapter: return`; the trainer's own arrays are always the same ones.",
)
class AttachAgainSkipped(Correct):
    def module(self, W: Array, bias: Array | None = None) -> CorrectModule:
        return _KnownById(self, W, bias)


class _Shared(CorrectModule):
    everyone: ClassVar[list[Any]] = []

    def __init__(self, maker: Correct, W: Array, bias: Array | None) -> None:
        super().__init__(maker, W, bias)
        self.everyone[:] = [m for m in self.everyone if m.W is W][-3:] + [self]

    def merge(self) -> None:
        super().merge()
        for other in self.everyone:
            if other is not self and other.W is self.W and self.merged is not None:
                other.W = self.merged


@wrong(
    "merge-reaches-the-other-module",
    "subtle",
    "Merging a module reaches another that was made of the same weight.",
    "Tied weights are one buffer; the base model answers with an adapter.",
)
class MergeReachesOther(Correct):
    def module(self, W: Array, bias: Array | None = None) -> CorrectModule:
        return _Shared(self, W, bias)


class _OneScale(CorrectModule):
    scale: ClassVar[dict[str, float]] = {}

    def attach(self, A: Array, B: Array, scale: float) -> None:
        super().attach(A, B, scale)
        self.scale["now"] = scale

    def forward(self, x: Array) -> Array:
        if self.lora is not None and self.merged is None:
            return self.maker.forward(x, self.W, *self.lora[:2], self.scale["now"], self.bias)
        return super().forward(x)


@wrong(
    "scale-of-the-class",
    "subtle",
    "The scale is the class's: a module has that of whichever adapter was attached last.",
    "A class attribute that was meant as a default.",
)
class ScaleOfTheClass(Correct):
    def module(self, W: Array, bias: Array | None = None) -> CorrectModule:
        return _OneScale(self, W, bias)


class _RefusedHalfway(CorrectModule):
    def attach(self, A: Array, B: Array, scale: float) -> None:
        if self.lora is not None:
            self.lora = A, B, self.lora[2]
            raise ValueError("an adapter is attached; detach it first")
        super().attach(A, B, scale)


@wrong(
    "refused-halfway",
    "subtle",
    "attach beside an attached adapter is refused after its arrays were taken over.",
    "The check comes after the assignment.",
)
class RefusedHalfway(Correct):
    def module(self, W: Array, bias: Array | None = None) -> CorrectModule:
        return _RefusedHalfway(self, W, bias)


class _DetachForgetsToUnmerge(CorrectModule):
    times = 0

    def merge(self) -> None:
        super().merge()
        self.times += self.merged is not None

    def detach(self) -> None:
        if self.times > 1 and self.merged is not None:
            self.W = self.merged
        super().detach()


@wrong(
    "second-merge-stays",
    "subtle",
    "A merge after a merge and unmerge is not undone by detach.",
    "The backup is taken at the first merge alone, and given up by the first unmerge.",
)
class SecondMergeStays(Correct):
    def module(self, W: Array, bias: Array | None = None) -> CorrectModule:
        return _DetachForgetsToUnmerge(self, W, bias)


class _WeightIsAView(CorrectModule):
    def weight(self) -> Array:
        return self.W


@wrong(
    "weight-is-the-base-while-merged",
    "subtle",
    "weight() of a merged module is the base's.",
    "Saving a merged model writes the weight that was loaded.",
)
class WeightIsBase(Correct):
    def module(self, W: Array, bias: Array | None = None) -> CorrectModule:
        return _WeightIsAView(self, W, bias)
