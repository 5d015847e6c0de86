"""Modules with state: attach, detach, merge and unmerge in any order."""

from __future__ import annotations

from pylora.conformance.correct.plain import Correct, CorrectModule
from pylora.conformance.mutants.registry import wrong
from pylora.types import Array


def merged(module: CorrectModule) -> Array:
    """The weight that merging the attached adapter gives."""
    assert module.lora is not None
    result = module.maker.merge(module.W, *module.lora)
    return result[0] if isinstance(result, tuple) else result


class _DetachLeavesMerged(CorrectModule):
    def detach(self) -> None:
        if self.merged is not None:
            self.W = self.merged
        super().detach()


@wrong(
    "detach-leaves-merged-weight",
    "subtle",
    "Detaching a merged adapter leaves the merged weight behind.",
    "The adapter's tensors go, and with them the only way back.",
    "huggingface/peft#3498",
)
class DetachLeavesMerged(Correct):
    def module(self, W: Array, bias: Array | None = None) -> CorrectModule:
        return _DetachLeavesMerged(self, W, bias)


class _DetachDrifts(CorrectModule):
    """Attaching merges in place, detaching subtracts."""

    def attach(self, A: Array, B: Array, scale: float) -> None:
        super().attach(A, B, scale)
        self.W = merged(self)

    def detach(self) -> None:
        if self.lora is not None:
            A, B, scale = self.lora
            widen = self.maker.widen
            delta = scale * (widen(B) @ widen(A))
            self.W = (widen(self.W) - delta).astype(self.W.dtype)
        super().detach()

    def forward(self, x: Array) -> Array:
        return self.maker.base(x, self.W, self.bias)


@wrong(
    "detach-drifts",
    "subtle",
    "Attaching is merging and detaching is subtracting: the base is not quite restored.",
    "Swapping adapters by adding and subtracting, a few bits of W at a time.",
)
class DetachDrifts(Correct):
    def module(self, W: Array, bias: Array | None = None) -> CorrectModule:
        return _DetachDrifts(self, W, bias)


class _AttachMutatesW(CorrectModule):
    def attach(self, A: Array, B: Array, scale: float) -> None:
        super().attach(A, B, scale)
        if self.W.flags.writeable:
            self.W[...] = merged(self)

    def forward(self, x: Array) -> Array:
        return self.maker.base(x, self.W, self.bias)

    def weight(self) -> Array:
        return self.W


@wrong(
    "attach-writes-to-w",
    "gross",
    "Attaching adds the update to the caller's W in place.",
    "One base is shared by many modules; all of them have the adapter now.",
)
class AttachMutatesW(Correct):
    def module(self, W: Array, bias: Array | None = None) -> CorrectModule:
        return _AttachMutatesW(self, W, bias)


class _AttachKeepsOld(CorrectModule):
    def attach(self, A: Array, B: Array, scale: float) -> None:
        if self.lora is None:
            super().attach(A, B, scale)


@wrong(
    "attach-keeps-the-old",
    "subtle",
    "A second attach is ignored while an adapter is attached.",
    "`if not loaded: load()`; the second name serves the first adapter.",
)
class AttachKeepsOld(Correct):
    def module(self, W: Array, bias: Array | None = None) -> CorrectModule:
        return _AttachKeepsOld(self, W, bias)


class _MergesAgain(CorrectModule):
    def merge(self) -> None:
        if self.lora is not None and self.merged is not None:
            result = self.maker.merge(self.merged, *self.lora)
            self.merged = result[0] if isinstance(result, tuple) else result
        else:
            super().merge()


@wrong(
    "merge-again-adds-again",
    "subtle",
    "merge() of what is merged adds the update once more.",
    "No record of what is merged; saving merges implicitly, so two calls are common.",
    "huggingface/peft#1355",
)
class MergesAgain(Correct):
    def module(self, W: Array, bias: Array | None = None) -> CorrectModule:
        return _MergesAgain(self, W, bias)


class _MergedAndActive(CorrectModule):
    def forward(self, x: Array) -> Array:
        if self.merged is not None and self.lora is not None:
            return self.maker.forward(x, self.merged, *self.lora, self.bias)
        return super().forward(x)


@wrong(
    "merged-and-active",
    "gross",
    "After merge() the adapter is still applied: it counts twice.",
    "The flag that turns the adapter's branch off belongs to another object.",
)
class MergedAndActive(Correct):
    def module(self, W: Array, bias: Array | None = None) -> CorrectModule:
        return _MergedAndActive(self, W, bias)


class _UnmergeDropsAdapter(CorrectModule):
    def unmerge(self) -> None:
        was = self.merged is not None
        super().unmerge()
        if was:
            self.lora = None


@wrong(
    "unmerge-drops-adapter",
    "subtle",
    "After unmerge() the adapter is no longer active.",
    "unmerge and unload share their code.",
)
class UnmergeDropsAdapter(Correct):
    def module(self, W: Array, bias: Array | None = None) -> CorrectModule:
        return _UnmergeDropsAdapter(self, W, bias)


class _UnmergeWithoutMerge(CorrectModule):
    def unmerge(self) -> None:
        if self.merged is None and self.lora is not None:
            A, B, scale = self.lora
            result = self.maker.merge(self.W, A, B, -scale)
            self.W = result[0] if isinstance(result, tuple) else result
        else:
            super().unmerge()


@wrong(
    "unmerge-what-is-not-merged",
    "subtle",
    "unmerge() subtracts the update although nothing was merged.",
    "A context that always unmerges on leaving.",
)
class UnmergeWithoutMerge(Correct):
    def module(self, W: Array, bias: Array | None = None) -> CorrectModule:
        return _UnmergeWithoutMerge(self, W, bias)


class _MergeForgetsBias(CorrectModule):
    def forward(self, x: Array) -> Array:
        if self.merged is not None:
            return self.maker.base(x, self.merged)
        return super().forward(x)


@wrong(
    "merged-module-loses-bias",
    "gross",
    "A merged module has no bias.",
    "Merging builds a new linear layer and copies the weight.",
)
class MergeForgetsBias(Correct):
    def module(self, W: Array, bias: Array | None = None) -> CorrectModule:
        return _MergeForgetsBias(self, W, bias)
