"""Wrong implementations by the thousand: correct ones, perturbed by rule, and what the laws say.

    operators.py   what may be changed in Python source: operators, constants, arguments, statements
    python.py      the kit's own implementation and its reference with one such change
    native.py      the C reference with one change, compiled
    triggers.py    a method that is right below a size, in another dtype, before the nth call, ...
    ways.py        how its result is wrong then
    corpus.py      inputs that no law draws, on which a change must show to count as one
    judge.py       killed, equivalent, within the bounds, or alive

`tools/mutation.py` runs them and prints the rate of each kind.
"""
