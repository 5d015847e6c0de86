"""The kit's own implementation, with one change in its source or in that of the reference."""

from __future__ import annotations

import ast
import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pylora import reference
from pylora.conformance.correct import adapted, attending, families, layers, plain, training
from pylora.conformance.perturb.operators import changed, changes
from pylora.ops import formulas, merge

# Functions that only hand over, or that the kit does not ask for, are left alone.
_OF_PLAIN = frozenset(
    "forward base backward loss_gradients scaling init drop dropout_forward dropout_backward merge "
    "unmerge forward_stacked forward_mixed module attach detach weight".split()
)
_OF_REFERENCE = frozenset(
    "_rows lora_forward lora_backward rope _spans "
    "_heads attention_forward attention_backward dropout rms_norm_forward swiglu_forward "
    "swiglu_backward cross_entropy_forward cross_entropy_backward cross_entropy adamw_step "
    "sum_squares embedding_forward embedding_backward".split()
)
_OF_MERGE = frozenset("merge unmerge _delta _away _moved _wide _narrow _bits".split())
_OF_ATTENDING = frozenset(
    "attention attention_backward back _attend project _project _positions _attn _turned decoder "
    "block extend one positions attend length drop truncate".split()
)
_OF_ADAPTED = frozenset(
    "backward_mixed _gradients _update bias_forward _bias bias_backward bias_merge bias_mixed "
    "bias_stacked embedding_forward embedding_backward embedding_merge embedding_init "
    "dropout_mask embed".split()
)
_OF_FORMULAS = frozenset(
    "layer_norm_forward layer_norm_backward activation_forward activation_backward _activation "
    "_normal soft_cap_forward soft_cap_backward capped _sigmoid".split()
)
_OF_TRAINING = frozenset(
    "rms_norm swiglu swiglu_backward rope cross_entropy adamw clip scaled rates "
    "adapter_step".split()
)
_OF_FAMILIES = frozenset(
    "layer_norm layer_norm_backward activation activation_backward soft_cap soft_cap_backward "
    "rope_part experts".split()
)
_OF_LAYERS = frozenset("layer attention forward added normed ordered_attention of_heads".split())
_SOURCES: dict[str, tuple[Any, frozenset[str]]] = {
    "plain": (plain, _OF_PLAIN),
    "attending": (attending, _OF_ATTENDING),
    "adapted": (adapted, _OF_ADAPTED),
    "families": (families, _OF_FAMILIES),
    "training": (training, _OF_TRAINING),
    "layers": (layers, _OF_LAYERS),
    "formulas": (formulas, _OF_FORMULAS),
    "reference": (reference, _OF_REFERENCE),
    "merge": (merge, _OF_MERGE),
}
_MIXINS = {
    "attending": "Attending",
    "adapted": "Adapted",
    "families": "Families",
    "training": "Training",
    "layers": "Layers",
}


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
        part = {"formulas": "Formulas", "merge": "Merge"}.get(name)
        if part is not None:
            made.ops = type("Reference", (module.__dict__[part], reference.Reference), {})()
        else:
            made.ops = module.__dict__["Reference"]()
        return made

    return make
