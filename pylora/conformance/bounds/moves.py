"""What a precision of the frozen weight adds to the bounds of layer.py.

The laws' W is the weight as it is stored (`stored` of the protocol), so a precision is what a
product rounds of its other factor, and nothing else (csrc/pylora.h, pylora_packed):

    fp32        nothing
    fp32x3      x = x1 + x2 + e and W likewise, in bfloat16; x1 W1 + x1 W2 + x2 W1, of dy W too
    bf16        x and dy, and A and B in h = x Aᵀ and g = dy B, are rounded to bfloat16
    int8, int4  x, in x Wᵀ alone, is rounded to 16-bit integers: a scale max|x| / 32639 for each row
                and group of 32. Sums within a group are exact
    int8a8, int4a8   the same with 127 for 32639
    blocks      as int8 and int4; the weight is in blocks of up to 256 inputs that a file has, with
                two numbers that scales and minimums of 16 or 32 inputs are multiples of

A factor that is moved by at most E moves a product of magnitudes by what the same product of
|x| + E is larger: these functions say E. They are moves of the inputs, before any rounding of the
sums, which layer.py counts as it always does, at the moved inputs. u is 2⁻⁸, the unit roundoff of
bfloat16, so E = u |x| (Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., thm 2.2);
what is below the normal numbers is in the floors of layer.py.
"""

from __future__ import annotations

import numpy as np

from pylora.conformance.bounds.ops import gamma, unit
from pylora.numbers.precision import QUANTIZED, weights_of
from pylora.types import Array

PRECISIONS = ("fp32", "fp32x3", "bf16", "int8", "int4", "int8a8", "int4a8", "blocks")
INTEGERS = (*QUANTIZED, "blocks")  # those that round x to integers
GROUP = 32  # inputs that share a scale, of x and of W
BLOCK = 256  # inputs of the widest blocks of a file
STEPS = 32639  # of a scale: the largest |x| of the group; 127 * 257
STEPS8 = 127  # where x has 8 bits
INTEGER_SUM = 8  # roundings from a group's integer sums to its share of y: see `roundings`


def exact(precision: str) -> bool:
    """Whether products of small integers are exact in it."""
    return precision not in INTEGERS


def of_x(X: Array, precision: str) -> Array:
    """E of x in x Wᵀ, from X = |x| [m,k]."""
    if precision == "bf16":
        return unit("bf16") * X
    if precision == "fp32x3":
        return _three_products() * X
    if precision in INTEGERS:
        return _integers(X, steps(precision))
    return np.zeros_like(X)


def of_dy(D: Array, precision: str) -> Array:
    """E of dy in dy W, from D = |dy| [m,d]."""
    return np.zeros_like(D) if precision in INTEGERS else of_x(D, precision)


def of_low(a: Array, precision: str) -> Array:
    """E of x, dy, A and B in the products with an adapter."""
    return unit("bf16") * a if precision == "bf16" else np.zeros_like(a)


def roundings(precision: str) -> int:
    """Roundings of a term of x Wᵀ beside those of a sum of k terms. Integers: both integer sums of
    a group to float32, the product of the scales of x and W, its product with the sum, Q4_1's
    minimum times the scale of x and that times the sum of x, their sum, and that of the stored
    value, which the float32 in the oracle's W has lost."""
    return 0 if exact(precision) else INTEGER_SUM


def size(W: Array, precision: str) -> Array:
    """Magnitudes of what a weight's values are sums of, from |W| [d,k]: int4 stores each as a code
    times a scale and a minimum, which is one of the group's values. Blocks: a minimum is no number
    of the group's, but one that is rounded to a 15th of the block's largest or less; so that it is
    no larger than twice the block's largest number."""
    if precision == "blocks":
        return W + 4 * _group_max(W, BLOCK)
    if weights_of(precision) != "int4":
        return W
    return W + 2 * _group_max(W)


def stored(W: Array, precision: str) -> Array:
    """How far a stored value may be from W [d,k]: half a step of the precision's own format.

    int8 (Q8_0): the step is max|W| / 127, int4 (Q4_1): (max - min) / 15, of a group of 32 that may
    be filled up with zeros. Scale and minimum are float16: a code of c steps is off by c times what
    rounding the scale lost. The quotients are float32: code + 1/2 is reached by 4 roundings."""
    W = np.asarray(W, np.float64)
    if precision == "bf16":
        return unit("bf16") * np.abs(W) + 2.0**-134  # half of bfloat16's smallest subnormal number
    if precision == "fp32x3":  # two halves where the machine has tiles, else all of it
        return unit("bf16") ** 2 * np.abs(W) + 2.0**-134
    if precision not in INTEGERS:
        return np.zeros_like(W)
    if (
        precision == "blocks"
    ):  # four codes in the coarsest; numbers of 127 * 32 times float16's least
        return _group_max(np.abs(W), BLOCK) / 2 + 2.0**-12
    if weights_of(precision) == "int8":
        most, top, low = 127, _group_max(np.abs(W)), np.zeros_like(W)
    else:
        most, top, low = 15, np.maximum(_group_max(W), 0.0), np.maximum(_group_max(-W), 0.0)
    step, half = (top + low) / most, 2.0**-25  # half of float16's smallest subnormal number
    scale, minimum = unit("f16") * step + half, unit("f16") * low + half * (low > 0)
    rounding = gamma(5) * (most * step + low)
    return step / 2 + most * scale + minimum + rounding


def _three_products() -> float:
    """x = x1 + x2 + e with |e| <= u² |x| and |x2| <= u (1 + u) |x|, W likewise. What is summed is
    (x - e)(W - f) - x2 W2, off by ((1 + u²)² - 1 + u² (1 + u)²) |x||W|."""
    u = unit("bf16")
    return (1 + u * u) ** 2 - 1 + u * u * (1 + u) ** 2


def steps(precision: str) -> int:
    """Of a scale of x, in a quantized precision."""
    return STEPS if precision == weights_of(precision) else STEPS8


def _integers(X: Array, most: int) -> Array:
    """Half a step, and 3 roundings of `most` steps: the scale, its reciprocal, the product."""
    return _group_max(X) / most * (0.5 + most * gamma(3)) * (1 + gamma(2))


def _group_max(a: Array, group: int = GROUP) -> Array:
    """The largest of each group of columns, at each of them; the last group may be shorter."""
    a = np.asarray(a)
    if not a.size:
        return a.copy()
    starts = np.arange(0, a.shape[1], group)
    tops = np.maximum.reduceat(a, starts, axis=1)
    return np.repeat(tops, group, axis=1)[:, : a.shape[1]]
