"""What is changed in a source: each change is another program, and nothing else changes."""

from __future__ import annotations

import ast

import pytest

from pylora.conformance.perturb.operators import changed, changes

SOURCE = '''
def f(x, W, scale=1):
    """Not changed: 1 + 1."""
    y = x @ W.T
    if scale > 0:
        y = y + scale * x[1:, 0].astype(np.float64)
    y += 1
    return sorted(y, key=len)

def g(a):
    return a + 1
'''
INSIDE = frozenset({"f"})


def texts():
    return [(c.kind, c.text) for c in changes(ast.parse(SOURCE), INSIDE)]


def test_every_kind_of_change_is_there():
    kinds = {kind for kind, _ in texts()}
    assert kinds >= {
        "operator",
        "constant",
        "term dropped",
        "operands swapped",
        "condition",
        "transposition",
        "dtype",
        "slice",
        "call",
        "statement dropped",
        "another argument",
    }


@pytest.mark.parametrize(
    "kind, text",
    [
        ("operands swapped", "x @ W.T -> W.T @ x"),
        ("transposition", "W.T -> W"),
        ("operator", "Gt -> GtE"),
        ("condition", "if scale > 0 -> False"),
        ("dtype", "np.float64 -> np.float32"),
        ("slice", "1: -> 1 + 1:"),
        ("statement dropped", "y += 1 -> pass"),
        ("another argument", "x -> W"),
        ("constant", "1 -> -1"),
    ],
)
def test_a_change_says_what_it_is(kind, text):
    assert (kind, text) in texts()


def test_each_change_makes_another_program_and_leaves_the_rest():
    whole = ast.unparse(ast.parse(SOURCE))
    seen = set()
    for number in range(len(texts())):
        tree, change = changed(SOURCE, INSIDE, number)
        text = ast.unparse(tree)
        assert text != whole, change.text
        assert text.endswith("def g(a):\n    return a + 1") and "Not changed: 1 + 1." in text
        compile(tree, "changed", "exec")
        seen.add(text)
    assert len(seen) > 0.8 * len(texts())  # two ways lead to one program now and then
    with pytest.raises(IndexError):
        changed(SOURCE, INSIDE, len(texts()))
