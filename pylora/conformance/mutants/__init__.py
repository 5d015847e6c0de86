"""Wrong implementations of LoRA: the kit is worth what it finds wrong.

Each is the correct one (`pylora.conformance.correct.plain`) with as little changed as the bug
needs, and each is a bug that a real project had or could have. A law that kills none of them is of
no use; one that they all pass shows a hole in the laws. `mutants()` lists them, in the order of the
docs.
"""

from __future__ import annotations

from pylora.conformance.mutants import (
    attention,
    batches,
    beginnings,
    biases,
    caches,
    containers,
    dropouts,
    embeddings,
    families,
    files,
    gradients,
    halves,
    initial,
    inputs,
    keeping,
    limits,
    linear,
    lives,
    masks,
    matching,
    merging,
    mixed_gradients,
    module_streams,
    modules,
    numerics,
    operations,
    orders,
    others,
    paths,
    plans,
    precisions,
    randoms,
    readers,
    scales,
    settings,
    slots,
    special,
    special_parts,
    streams,
    weighted,
    windows,
    writers,
)
from pylora.conformance.mutants.registry import REGISTRY, Mutant

__all__ = ["GROUPS", "Mutant", "mutants"]

GROUPS = (
    scales,
    linear,
    numerics,
    special,
    special_parts,
    precisions,
    inputs,
    gradients,
    dropouts,
    streams,
    initial,
    randoms,
    merging,
    module_streams,
    modules,
    lives,
    batches,
    keeping,
    slots,
    plans,
    matching,
    settings,
    files,
    containers,
    readers,
    writers,
    attention,
    mixed_gradients,
    biases,
    embeddings,
    masks,
    windows,
    caches,
    halves,
    operations,
    families,
    orders,
    beginnings,
    others,
    limits,
    paths,
    weighted,
)


def mutants() -> tuple[Mutant, ...]:
    """All of them, group by group (importing a group's module has registered its mutants)."""
    order = [group.__name__ for group in GROUPS]
    return tuple(sorted(REGISTRY.values(), key=lambda m: order.index(m.group)))
