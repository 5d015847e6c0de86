"""GPTQ: codes of 2, 3, 4 or 8 bits, a scale and a zero for each group of inputs.

    qweight   I32 [in x bits / 32, out], packed along the inputs
    qzeros    I32 [groups, out x bits / 32], packed along the outputs
    scales    [groups, out]
    g_idx     I32 [in]: the group of each input, in any order (desc_act); without it, in turn

A value is scale x (code - zero), rounded to the dtype of the scales: the bits of GPTQModel's
`dequantize_weight`. In the format "gptq" what is stored is the zero less one. It is added to the
packed words, as GPTQModel does, so that what its writer borrowed from a neighbour goes back there;
but to each number in 3 bits, some of which lie in two words.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pylora.formats.base import Array
from pylora.formats.quantized.packed import unpack, words_for
from pylora.formats.quantized.parts import FLOATS, Parts, Spec

ENDINGS = ("qweight", "qzeros", "scales", "g_idx")
BITS = (2, 3, 4, 8)
_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}  # one in each number of a word


def read(parts: Parts, bits: int, group: int, less_one: bool, ordered: bool, any_: bool) -> Spec:
    """The weight that these tensors are. Raises FileFormatError.

    bits, group: what config.json says, group -1 being all inputs. less_one: whether zeros are
    stored so. ordered: whether inputs are in the order of their groups, so that g_idx may be left
    out. any_: whether config.json has rules for single modules: then it is the shapes that count.
    """
    parts.check("qweight", ("i32",))
    parts.check("qzeros", ("i32",))
    dtype = parts.check("scales", FLOATS)
    for ending in ("qweight", "qzeros", "scales"):
        if len(parts.shape(ending)) != 2 or not all(parts.shape(ending)):
            parts.fail(ending, f"has shape {parts.shape(ending)}; expected a matrix")
    (words, d), (groups, _) = parts.shape("qweight"), parts.shape("scales")
    if "g_idx" in parts:
        if len(parts.shape("g_idx")) != 1:
            parts.fail("g_idx", f"has shape {parts.shape('g_idx')}; expected [in]")
        k = parts.shape("g_idx")[0]
        fitting = [b for b in BITS if words_for(k, b) == words]
    else:
        fitting = [b for b in BITS if words_for(d, b) == parts.shape("qzeros")[1]]
        fitting = [b for b in fitting if words * 32 % b == 0]
        k = words * 32 // fitting[0] if fitting else 0
    if bits not in fitting and not (any_ and fitting):
        parts.fail("qweight", f"has shape {(words, d)}, which is not one of codes of {bits} bits")
    bits = bits if bits in fitting else fitting[0]
    parts.check("scales", FLOATS, (groups, d))
    parts.check("qzeros", ("i32",), (groups, words_for(d, bits)))
    size = k if group == -1 else group
    if -(-k // size) != groups:
        size = -(-k // groups)
        if not any_ or -(-k // size) != groups:
            parts.fail("scales", f"has {groups} groups of {k} inputs, not groups of {group}")
    if "g_idx" not in parts and not ordered:
        parts.fail("qweight", "is in the order of activations (desc_act), and 'g_idx' is missing")

    def prepare() -> Callable[[int, int, int], Array]:
        index = np.arange(k) // size
        if "g_idx" in parts:
            index = parts.groups("g_idx", k, groups)
        codes, scales = parts.array("qweight"), np.ascontiguousarray(parts.floats("scales").T)
        packed = np.ascontiguousarray(parts.array("qzeros")).view("<u4")
        if less_one and bits != 3:
            packed = packed + np.uint32(_ONES[bits])
        zeros = unpack(packed, bits, d)
        if less_one and bits == 3:
            zeros = (zeros + np.uint8(1)) & np.uint8(7)
        zeros = np.ascontiguousarray(zeros.T)

        def rows(_: int, i: int, j: int) -> Array:
            turned = np.ascontiguousarray(codes[:, i:j].T)
            values: Array = unpack(turned, bits, k).astype(np.float32)
            values -= zeros[i:j, index]
            values *= scales[i:j, index]
            return values

        return rows

    return Spec((d, k), dtype, f"gptq-{bits}", prepare)
