"""The kit's own implementation, with one change in its source or in that of the reference."""

from __future__ import annotations

import ast
import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pylora import reference
from pylora.conformance.correct import adapted, attending, plain
from pylora.conformance.perturb.operators import changed, changes

# Functions that only hand over, or that the kit does not ask for, are left alone.
_OF_PLAIN = frozenset(
    "forward base backward loss_gradients scaling init drop dropout_forward dropout_backward merge "
    "unmerge forward_stacked forward_mixed module attach detach weight".split()
)
_OF_REFERENCE = frozenset(
    "_rows lora_forward lora_backward _delta merge unmerge _moved _wide _narrow _bits rope _spans "
    "_heads attention_forward attention_backward dropout rms_norm_forward swiglu_forward "
    "swiglu_backward _sigmoid cross_entropy_forward cross_entropy_backward".split()
)
_OF_ATTENDING = frozenset(
    "attention attention_backward back _attend project _project _positions _attn _turned decoder "
    "block extend one positions attend length drop truncate".split()
)
_OF_ADAPTED = frozenset(
    "backward_mixed _gradients _update bias_forward _bias bias_backward bias_merge bias_mixed "
    "bias_stacked embedding_forward embedding_backward embedding_merge embedding_init "
    "dropout_mask".split()
)
_SOURCES: dict[str, tuple[Any, frozenset[str]]] = {
    "plain": (plain, _OF_PLAIN),
    "attending": (attending, _OF_ATTENDING),
    "adapted": (adapted, _OF_ADAPTED),
    "reference": (reference, _OF_REFERENCE),
}
_MIXINS = {"attending": "Attending", "adapted": "Adapted"}


@dataclass(frozen=True)
class Mutant:
    """A wrong implementation: `make()` gives one, fresh. `methods`: of the protocol, where its
    change can be met; empty where that is not known."""

    id: str
    kind: str
    text: str
    make: Callable[[], Any]
    methods: frozenset[str] = frozenset()
    original: Callable[[], Any] = plain.Correct  # what it was made from


def mutants() -> list[Mutant]:
    """All of them."""
    found = []
    for name, (module, inside) in _SOURCES.items():
        source = inspect.getsource(module)
        for number, change in enumerate(changes(ast.parse(source), inside)):
            text = f"{name}.py:{change.line} {change.where}: {change.text}"
            made = _maker(name, source, inside, number)
            found.append(Mutant(f"{name}-{number}", f"source: {change.kind}", text, made))
    return found


def _maker(name: str, source: str, inside: frozenset[str], number: int) -> Callable[[], Any]:
    def make() -> Any:
        tree, _ = changed(source, inside, number)
        module = types.ModuleType(f"perturbed_{name}_{number}")
        module.__dict__["__name__"] = _SOURCES[name][0].__name__
        exec(compile(tree, f"<{name} {number}>", "exec"), module.__dict__)
        if name == "plain":
            return module.__dict__["Correct"]()
        if name in _MIXINS:  # found before the one that Correct has
            mixin = module.__dict__[_MIXINS[name]]
            return type("Correct", (mixin, plain.Correct), {})()
        made = plain.Correct()
        made.ops = module.__dict__["Reference"]()
        return made

    return make
