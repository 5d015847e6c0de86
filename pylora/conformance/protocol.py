"""What the kit asks of a LoRA implementation: a name and `forward`; everything else is optional.

An implementation is an object, or a class that is made without arguments. A method that it has is
a capability that is tested; one that it lacks (or that is None) is reported as not tested. Arrays
in and out are NumPy arrays of one of `dtypes` (bfloat16 is `ml_dtypes.bfloat16`); an adapter
converts. Letters: m tokens, k inputs, d outputs, r rank; a size may be 0 but for r, d and k >= 1.

    name: str                                            # of the report; default: the class's name
    dtypes: tuple[str, ...] = ("float32",)               # of "float64", "float32", "bfloat16",
                     "float16", and "complex128" (forward only: complex step)
    file_format: str = ""                                # "peft" if save and load use PEFT's layout
    thread_safe: bool = False                            # several threads at once may call it
    bitwise: bool = False                                # promises that the bits of a row of a
                     result depend on that row alone: not on the batch, its neighbours or threads
    exact_unmerge: bool = False                          # promises that unmerge gives back each bit
    bits: bool = False                                   # promises what spec.md marks **bits**
    attention_options: tuple[str, ...] = ()              # of "window", "interleaved", "scale": the
                     fields of AttentionShape that attention, decoder and block heed
    precision: str = "fp32"                              # how W is stored and multiplied: "fp32x3",
                     "bf16", "int8", "int4", "int8a8", "int4a8", "blocks": bounds/moves.py;
                     needs `stored`

    forward(x [m,k], W [d,k], A [r,k], B [d,r], scale, bias=None) -> y [m,d]          the only must
    base(x, W, bias=None) -> y [m,d]                                     the module without adapter
    stored(W) -> W [d,k]                                 the weight's values as they are stored
    backward(dy [m,d], x, W, A, B, scale) -> (dx, dA, dB)    or (dx, dA, dB, dW), dW None or zeros
    loss_gradients(batches, W, A, B, scale) -> (dA, dB)      batches: list of (x, target [m,d],
                     counted [m] bool); of the mean over ALL counted rows of |y - target|² / 2
    scaling(alpha, r, use_rslora) -> float
    init(d, k, r, seed, method) -> (A, B)                    method "kaiming" or "gaussian", and
                     "false" (B random too, for tests) if the attribute init_methods names it
    initial(kind, path, d, k, r, seed, method, lora_bias) -> (A, B, bias of B, or None)    of the
                     module at this path; kind "linear" or "embedding" (d is hidden, k vocab)
    merge(W, A, B, scale) -> W'  or  (W', state)             state: whatever unmerge needs
    unmerge(W', A, B, scale, state=None) -> W
    forward_stacked(x, W, adapters, bias=None) -> y          adapters: list of (A, B, scale), all on
    forward_mixed(x, W, adapters, rows, bias=None) -> y      row i uses adapters[rows[i]]; -1: none
    dropout_forward(x, W, A, B, scale, p, seed) -> y         the mask is that of (seed, x.shape)
    dropout_backward(dy, x, W, A, B, scale, p, seed) -> (dx, dA, dB)
    module(W, bias=None) -> object with forward(x), attach(A, B, scale), detach(), and optionally
                     merge(), unmerge(), weight() -> the base weight as it is now [d,k]
    save(directory, adapters, config)     adapters: {path: (A, B)}; config: PEFT's fields (r,
                     lora_alpha, target_modules, use_rslora, rank_pattern, alpha_pattern)
    load(directory, modules) -> {path: (A, B, scale)}        modules: {path: (d, k)}; raises where
                     the files and the modules do not fit each other
    save_biases(directory, adapters, biases, config)         config has bias "all" or "lora_only",
                     biases: {path: [d]} of adapted modules and, with "all", of others
    load_biases(directory, modules) -> {path: [d]}           the biases that the file replaces;
                     every module has one of its own
    plan(config, modules) -> {path: (r, alpha, scale)}       raises for what matches nothing;
                     modules[path] is None of a module that cannot take LoRA
    attention(x [m,hidden], weights, adapters, shape) -> y [m,hidden]
                     weights: {"q_proj": W, "k_proj", "v_proj", "o_proj"}; adapters: {name: (A, B,
                     scale)} of some of them; shape: AttentionShape
    attention_backward(dy, x, weights, adapters, shape) -> (dx, {name: (dA, dB)})
    decoder(weights, shape) -> object      shape.lengths is (); weights and shape as in attention
        .extend(x [m,hidden], runs, adapters) -> y       runs: [(sequence, rows), ...] says whose
                     new rows lie one behind the other in x; a sequence is an int, new or continued;
                     a run may have 0 rows. adapters: one {name: (A, B, scale)} for each run
        .drop(sequence), .truncate(sequence, length)     optional: forgets all, all but the first
    layer(x, weights, adapters, shape, eps, order) -> y      a block of another LayerOrder
    block(x, weights, adapters, shape, eps) -> y             spec A-1; weights also has gate_proj,
                     up_proj, down_proj, norm1 [hidden] and norm2, adapters any of the seven
    backward_mixed(dy, x, W, adapters, rows) -> (dx, [(dA, dB), ...])     of forward_mixed; one pair
                     for each adapter, zeros where no row uses it
    bias_forward(x, W, A, B, bias_B, scale, bias=None) -> y  with lora_bias: bias_B [d] is B's
    bias_backward(dy, x, W, A, B, bias_B, scale) -> (dx, dA, dB, dbias_B)
    bias_merge(W, bias, A, B, bias_B, scale) -> (W', bias')  bias [d] or None; bias' [d]
    bias_mixed(x, W, adapters, rows, bias=None) -> y         adapters: list of (A, B, bias_B, scale)
    bias_stacked(x, W, adapters, bias=None) -> y             the same, all on
    embedding_forward(ids [m], W [vocab,hidden], A [r,vocab], B [hidden,r], scale) -> y [m,hidden]
    embedding_backward(dy, ids, W, A, B, scale) -> (dA, dB)
    embedding_merge(W, A, B, scale) -> W'
    embedding_init(vocab, hidden, r, seed, random) -> (A, B) random: init_lora_weights=False
    embedding_dropout(ids, W, A, B, scale, p, seed) -> y [m,hidden]       while it trains
    embed(ids, W, A, B, scale, multiplier, position [m], P) -> y          with P [n,hidden], where
                     there is one, the positions' rows are added
    dropout_mask(shape, p, seed, path, step, row0=0) -> kept [m,k] bool   of a module, from 1 on
                     counted step, and where the rows start in the whole batch
    dora_norm(W, A, B, scale) -> n [d]                       the lengths of the rows of W + s B A
    dora_forward(x, W, A, B, m [d], scale, bias=None) -> y   with m / n on what is multiplied
    dora_backward(dy, x, W, A, B, m, scale) -> (dx, dA, dB, dm)       n is held
    dora_merge(W, A, B, m, scale) -> (W', state);  dora_unmerge(W', A, B, m, scale, state) -> W
    rms_norm(x, w, eps) -> y
    swiglu(gate, up) -> y;  swiglu_backward(dy, gate, up) -> (dgate, dup)
    rope(x [m,heads*D], position [m], head_dim, theta, layout, inverse) -> y
    rope_part(x, position, head_dim, rotary_dim, theta, layout, inverse) -> y     the first numbers
    rope_frequencies(rotary_dim, theta, scaling, length, trained) -> (radians [rotary_dim/2],
                     factor of cos and sin)   scaling: config.json's, with rope_type and factor
    layer_norm(x, w, b, eps) -> y;  layer_norm_backward(dy, x, w, eps) -> dx      b may be None
    activation(kind, x, up) -> y;  activation_backward(kind, dy, x, up) -> (dx, dup)    up and dup
                     may be None; kind: "silu", "gelu_tanh", "gelu_erf" or "relu2"
    soft_cap(x, multiplier, cap) -> y;  soft_cap_backward(dy, x, multiplier, cap) -> dx    0: none
    experts(logits [m,n], k, normalize) -> weights [m,n]     0 where not chosen
    cross_entropy(logits, labels) -> (nll [m], dlogits)      -100: not counted; of the mean
    adamw(p, g, m, v, settings) -> (p, m, v)                 settings: pylora.types.AdamW
    clip(grads, limit) -> grads                              a list of arrays
    adapter_step(params, grads, lr, weight_decay, lora_plus_ratio) -> params     the first step of
                     AdamW of {"A": ..., "B": ..., "bias": bias_B}; the usual betas and eps
    set_num_threads(n)

A seed is 0 .. 2⁶⁴ - 1; one that is not taken in full, from 2³¹ on, must be refused, not cut off.
An implementation may be given strided, negatively strided and read-only arrays and must not write
to them. It may raise for what it does not take; the report then says so and goes on.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pylora.conformance.bounds.moves import PRECISIONS
from pylora.errors import ConfigError
from pylora.types import Array

LoraTriple = tuple[Array, Array, float]  # (A [r,k], B [d,r], scale)


@dataclass(frozen=True)
class AttentionShape:
    """Causal attention over sequences that lie one behind the other in the rows of x.

    Rotary embedding, position 0 at each sequence's first row. heads % kv_heads == 0; head_dim is
    even; sum(lengths) == m. The last three are at their defaults unless `attention_options` of the
    implementation names them.
    """

    heads: int
    kv_heads: int
    head_dim: int
    lengths: tuple[int, ...]
    rope_theta: float = 10000.0
    window: int = 0  # of the keys up to its own a token sees the last so many; 0: all
    rope_layout: str = "half"  # or "interleaved"
    scale: float | None = None  # of the scores, > 0; None: 1 / sqrt(head_dim)


@dataclass(frozen=True)
class LayerOrder:
    """What families of models do otherwise than A-1 says: spec A-21, A-22, A-26, A-28.

    Weights beside the seven projections: norm1, and what of norm2, norm3 (behind attention), norm4
    (behind the feed-forward part), q_norm and k_norm the order has.
    """

    norms: str = "before"  # the sublayers; "behind" them (norm3, norm4), or "both"
    parallel: bool = False  # both sublayers read x; without norm2 both read norm1's
    qk_norm: str = ""  # "head": RMSNorm of each head of q and k, w [head_dim]; "whole": of the row
    multiplier: float = 1.0  # of what a sublayer adds
    plus_one: bool = False  # norms multiply by 1 + w


class Implementation(Protocol):
    """The one method that an implementation must have; the file's header lists the others."""

    name: str

    def forward(
        self, x: Array, W: Array, A: Array, B: Array, scale: float, bias: Array | None = None
    ) -> Array:
        """y = x Wᵀ + bias + scale x Aᵀ Bᵀ, [m,d] in the dtype of x."""


class Module(Protocol):
    """A module with state, as frameworks have them."""

    def forward(self, x: Array) -> Array: ...
    def attach(self, A: Array, B: Array, scale: float) -> None: ...
    def detach(self) -> None: ...


METHODS = (
    "forward",
    "base",
    "stored",
    "backward",
    "loss_gradients",
    "scaling",
    "init",
    "initial",
    "merge",
    "unmerge",
    "forward_stacked",
    "forward_mixed",
    "dropout_forward",
    "dropout_backward",
    "module",
    "save",
    "load",
    "save_biases",
    "load_biases",
    "plan",
    "attention",
    "attention_backward",
    "decoder",
    "block",
    "layer",
    "backward_mixed",
    "bias_forward",
    "bias_backward",
    "bias_merge",
    "bias_mixed",
    "bias_stacked",
    "embedding_forward",
    "embedding_backward",
    "embedding_merge",
    "embedding_init",
    "embedding_dropout",
    "embed",
    "dropout_mask",
    "dora_norm",
    "dora_forward",
    "dora_backward",
    "dora_merge",
    "dora_unmerge",
    "rms_norm",
    "swiglu",
    "swiglu_backward",
    "rope",
    "rope_part",
    "rope_frequencies",
    "layer_norm",
    "layer_norm_backward",
    "activation",
    "activation_backward",
    "soft_cap",
    "soft_cap_backward",
    "experts",
    "cross_entropy",
    "adamw",
    "clip",
    "adapter_step",
    "set_num_threads",
)
PROMISES = ("thread_safe", "bitwise", "exact_unmerge", "bits")
DTYPES = ("float32", "float64", "bfloat16", "float16", "complex128")
ATTENTION_OPTIONS = ("window", "interleaved", "scale")


def capabilities(implementation: Any) -> frozenset[str]:
    """The names in METHODS that it has, "float64" and the like for each of its dtypes, "peft_files"
    where it reads and writes PEFT's files, "attention_window" and the like for its attention's
    options, and each of PROMISES that it makes."""
    found = {name for name in METHODS if callable(getattr(implementation, name, None))}
    found |= {str(d) for d in getattr(implementation, "dtypes", ("float32",))}
    if getattr(implementation, "file_format", "") == "peft":
        found.add("peft_files")
    found |= {f"attention_{o}" for o in getattr(implementation, "attention_options", ())}
    found |= {p for p in PROMISES if getattr(implementation, p, False) is True}
    return frozenset(found)


def instantiate(implementation: Any) -> Any:
    """The object itself, or one of the class."""
    return implementation() if isinstance(implementation, type) else implementation


def name_of(implementation: Any) -> str:
    """Its `name`, else its class's."""
    name = getattr(implementation, "name", None)
    return name if isinstance(name, str) else type(implementation).__name__


def _imported(path: str, module: str) -> Any:
    """The module; ConfigError if it does not exist or cannot be imported."""
    try:
        return importlib.import_module(module)
    except Exception as error:  # a module that is the user's own may raise anything
        absent = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
        if absent and f"{module}.".startswith(f"{absent}."):
            hint = "its folder must be the current one or on PYTHONPATH"
            if "/" in module or module.endswith(".py"):
                hint = "write it as in an import: package.module, without a folder or .py"
            raise ConfigError(f"{path}: there is no module {module!r}; {hint}") from error
        said = f"importing {module} raised {type(error).__name__}: {error}"
        raise ConfigError(f"{path}: {said}") from error


def find(path: str) -> Any:
    """What "package.module:Name" names, made if it is a class. ConfigError if there is no such."""
    module, colon, name = path.partition(":")
    if not colon or not module or not name:
        raise ConfigError(f"{path!r} does not name an implementation; write package.module:Class")
    found, where = _imported(path, module), module
    for part in name.split("."):
        if not hasattr(found, part):
            inside = getattr(found, "__dict__", {}).items()
            has = ", ".join(n for n, v in inside if callable(getattr(v, "forward", None)))
            also = f"; what has a method forward there: {has}" if has else ""
            raise ConfigError(f"{path}: {where} has no {part!r}{also}")
        found, where = getattr(found, part), f"{where}.{part}"
    try:
        made = instantiate(found)
    except Exception as error:  # the user's own code: whatever it raises, the sentence names it
        said = f"{path}() raised {type(error).__name__}: {error}"
        raise ConfigError(f"{said}; the class is made without arguments") from error
    if not callable(getattr(made, "forward", None)):
        raise ConfigError(f"{path} has no method forward(x, W, A, B, scale, bias=None)")
    return made


def precision_of(implementation: Any) -> str:
    """Its `precision`, "fp32" if it has none."""
    return str(getattr(implementation, "precision", "fp32"))


def problems_of(implementation: Any) -> list[str]:
    """Sentences about what the object says of itself and cannot be so."""
    said: list[str] = []
    dtypes: Sequence[Any] = getattr(implementation, "dtypes", ("float32",))
    for dtype in dtypes:
        if dtype not in DTYPES:
            said.append(f"dtypes names {dtype!r}; known are {', '.join(DTYPES)}")
    for option in getattr(implementation, "attention_options", ()):
        if option not in ATTENTION_OPTIONS:
            known = ", ".join(ATTENTION_OPTIONS)
            said.append(f"attention_options names {option!r}; known are {known}")
    precision = precision_of(implementation)
    if precision not in PRECISIONS:
        said.append(f"precision is {precision!r}; known are {', '.join(PRECISIONS)}")
    elif precision != "fp32" and "stored" not in capabilities(implementation):
        said.append(f"precision is {precision!r}, but there is no stored(W) to compare with")
    for name in METHODS:
        value = getattr(implementation, name, None)
        if value is not None and not callable(value):
            said.append(f"{name} is {type(value).__name__}, not a method")
    return said


Adapters = Mapping[str, LoraTriple]
