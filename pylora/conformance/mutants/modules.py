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


class _SharedModule(CorrectModule):
    """Merges where the weight lies: into the array that it was given, which others have too."""

    def merge(self) -> None:
        if self.lora is not None and self.merged is None:
            super().merge()
            self.write()

    def write(self) -> None:
        self.W[...] = self.merged

    def unmerge(self) -> None:
        if self.merged is not None and self.lora is not None:
            self.W[...] = self.maker.unmerge(self.merged, *self.lora, self.state)
            self.merged = self.state = None

    def detach(self) -> None:
        self.unmerge()
        super().detach()


@wrong(
    "merge-in-place-of-tied",
    "subtle",
    "Merging writes into the array that the module was given, which a tied module has as well.",
    "The head's weight is the embedding's: one merge, two changed modules.",
)
class MergeInPlace(Correct):
    def module(self, W: Array, bias: Array | None = None) -> CorrectModule:
        return _SharedModule(self, W, bias)


@wrong(
    "module-by-weight",
    "subtle",
    "Two modules over the same array are one: what is attached to one is attached to both.",
    "A table of modules by the address of their weight.",
)
class ModuleByWeight(Correct):
    def __init__(self) -> None:
        self.known: dict[int, CorrectModule] = {}
        self.kept: list[Array] = []

    def module(self, W: Array, bias: Array | None = None) -> CorrectModule:
        self.kept.append(W)
        return self.known.setdefault(id(W), CorrectModule(self, W, bias))


class _MergedTable(CorrectModule):
    """Looks merged weights up by the base weight."""

    def forward(self, x: Array) -> Array:
        merged = self.maker.table.get(id(self.W))  # type: ignore[attr-defined]
        if merged is not None and self.lora is None:
            return self.maker.base(x, merged, self.bias)
        return super().forward(x)

    def merge(self) -> None:
        super().merge()
        self.maker.table[id(self.W)] = self.merged  # type: ignore[attr-defined]

    def unmerge(self) -> None:
        self.maker.table.pop(id(self.W), None)  # type: ignore[attr-defined]
        super().unmerge()

    def detach(self) -> None:
        self.maker.table.pop(id(self.W), None)  # type: ignore[attr-defined]
        super().detach()


@wrong(
    "merged-by-weight",
    "subtle",
    "The merged weight is looked up by the base weight: a tied module finds it too.",
    "A cache of merged weights, shared by all layers.",
)
class MergedByWeight(Correct):
    def __init__(self) -> None:
        self.table: dict[int, Array | None] = {}

    def module(self, W: Array, bias: Array | None = None) -> CorrectModule:
        return _MergedTable(self, W, bias)
