"""What may be changed in a piece of Python: each change is one that a person could have made.

`changes(tree, inside)` lists them, always in the same order; `changed(source, number)` is the
source's tree with one of them made. Changes that cannot matter are not among them: docstrings,
annotations, the texts of errors.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

_SWAPS: dict[type, tuple[type, ...]] = {
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Add, ast.Div),
    ast.Div: (ast.Mult,),
    ast.FloorDiv: (ast.Mult,),
    ast.Mod: (ast.FloorDiv,),
    ast.Pow: (ast.Mult,),
    ast.LShift: (ast.RShift,),
    ast.RShift: (ast.LShift,),
    ast.BitAnd: (ast.BitOr,),
    ast.BitOr: (ast.BitAnd,),
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.And: (ast.Or,),
    ast.Or: (ast.And,),
}
_NARROWER = {
    "float64": "float32",
    "float32": "float16",
    "int64": "int16",
    "uint32": "uint16",
    "longdouble": "float32",
}
_DROPPED = {"ascontiguousarray", "asarray", "abs", "astype", "copy", "sorted", "max", "min"}
_OTHER = {"zeros": "ones", "max": "min", "min": "max", "cos": "sin", "sin": "cos", "exp": "expm1"}


@dataclass
class Change:
    """One change: `make()` makes it in the tree that it belongs to."""

    kind: str
    where: str  # the function
    line: int
    text: str
    make: Callable[[], None]


def changes(tree: ast.AST, inside: frozenset[str]) -> Iterator[Change]:
    """All changes in the functions named in `inside`, in the order of the text."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name in inside:
            yield from _Function(node).all()


def changed(source: str, inside: frozenset[str], number: int) -> tuple[ast.Module, Change]:
    """The tree of the source with change `number` made."""
    tree = ast.parse(source)
    for i, change in enumerate(changes(tree, inside)):
        if i == number:
            before = change.text
            change.make()
            ast.fix_missing_locations(tree)
            change.text = before
            return tree, change
    raise IndexError(number)


class _Function:
    """The changes of one function."""

    def __init__(self, function: ast.FunctionDef) -> None:
        self.function = function
        self.parameters = [a.arg for a in function.args.args if a.arg not in ("self", "cls")]

    def all(self) -> Iterator[Change]:
        for parent, field, index, node in self._nodes(self.function):
            yield from self._of(parent, field, index, node)

    def _nodes(self, parent: ast.AST) -> Iterator[tuple[ast.AST, str, int | None, ast.AST]]:
        for field, value in ast.iter_fields(parent):
            if field in ("annotation", "returns", "args") and isinstance(
                parent, (ast.FunctionDef, ast.AnnAssign, ast.arg)
            ):
                continue
            items = enumerate(value) if isinstance(value, list) else [(None, value)]
            for index, node in items:
                if not isinstance(node, ast.AST) or isinstance(node, (ast.Raise, ast.JoinedStr)):
                    continue
                if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                    continue  # a docstring
                yield parent, field, index, node
                yield from self._nodes(node)

    def _of(
        self, parent: ast.AST, field: str, index: int | None, node: ast.AST
    ) -> Iterator[Change]:
        def put(new: ast.AST) -> Callable[[], None]:
            def make() -> None:
                if index is None:
                    setattr(parent, field, new)
                else:
                    getattr(parent, field)[index] = new

            return make

        def change(kind: str, text: str, make: Callable[[], None]) -> Change:
            line = getattr(node, "lineno", getattr(parent, "lineno", 0))
            return Change(kind, self.function.name, line, text, make)

        def other(kind: str, new: ast.AST) -> Change:
            return change(kind, f"{ast.unparse(node)} -> {ast.unparse(new)}", put(new))

        for swapped in _SWAPS.get(type(node), ()):
            text = f"{type(node).__name__} -> {swapped.__name__}"
            yield change("operator", text, put(swapped()))
        if isinstance(node, ast.BinOp):
            yield other("term dropped", node.left)
            if not isinstance(node.op, (ast.Div, ast.FloorDiv, ast.MatMult)):
                yield other("term dropped", node.right)
            if isinstance(node.op, (ast.MatMult, ast.Sub, ast.Div)):
                yield other("operands swapped", ast.BinOp(node.right, node.op, node.left))
        elif isinstance(node, ast.UnaryOp):
            yield other("sign or not dropped", node.operand)
        elif isinstance(node, ast.Constant):
            for value in _constants(node.value):
                yield other("constant", ast.Constant(value))
        elif isinstance(node, ast.IfExp):
            yield other("condition", node.body)
            yield other("condition", node.orelse)
        elif isinstance(node, ast.If):
            for value in (True, False):
                text = f"if {ast.unparse(node.test)} -> {value}"
                yield change("condition", text, self._test(node, ast.Constant(value)))
        elif isinstance(node, ast.Attribute):
            if node.attr in ("T", "real"):
                yield other("transposition", node.value)
            if node.attr in _NARROWER:
                yield other("dtype", ast.Attribute(node.value, _NARROWER[node.attr], node.ctx))
        elif isinstance(node, ast.Slice):
            yield from (other("slice", new) for new in _slices(node))
        elif isinstance(node, ast.Call):
            yield from (other("call", new) for new in _calls(node))
        elif isinstance(node, (ast.AugAssign, ast.Expr, ast.Assign)):
            yield from self._statement(node, other)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            if node.id in self.parameters and len(self.parameters) > 1:
                at = self.parameters.index(node.id)
                for step in (1, -1):
                    name = self.parameters[(at + step) % len(self.parameters)]
                    yield other("another argument", ast.Name(name, node.ctx))

    def _test(self, node: ast.If, value: ast.expr) -> Callable[[], None]:
        def make() -> None:
            node.test = value

        return make

    def _statement(
        self, node: ast.stmt, other: Callable[[str, ast.AST], Change]
    ) -> Iterator[Change]:
        if isinstance(node, ast.AugAssign):
            yield other("statement dropped", ast.Pass())
            yield other("operator", ast.Assign([node.target], node.value, lineno=node.lineno))
        elif isinstance(node, ast.Expr):
            yield other("statement dropped", ast.Pass())
        elif isinstance(node, ast.Assign):
            names = {n.id for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name)}
            used = {n.id for n in ast.walk(node.value) if isinstance(n, ast.Name)}
            store = any(isinstance(t, (ast.Attribute, ast.Subscript)) for t in node.targets)
            if names & used or store:  # what it had before stays: a stale value
                yield other("statement dropped", ast.Pass())


<<<<<<< HEAD
def _constants(value: object) -> list[Any]:
=======
def _constants(value: object) -> list[bool | int | float]:
>>>>>>> main
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, (int, float)):
        near: list[bool | int | float] = [value + 1, value - 1, 0 * value, -value]
        return [v for i, v in enumerate(near) if v != value and v not in near[:i]]
    return []


def _slices(node: ast.Slice) -> Iterator[ast.AST]:
    one = ast.Constant(1)
    if node.lower is not None:
        yield ast.Slice(None, node.upper, node.step)
        yield ast.Slice(ast.BinOp(node.lower, ast.Add(), one), node.upper, node.step)
    if node.upper is not None:
        yield ast.Slice(node.lower, None, node.step)
        yield ast.Slice(node.lower, ast.BinOp(node.upper, ast.Sub(), one), node.step)
    if node.step is not None:
        yield ast.Slice(node.lower, node.upper, None)


def _calls(node: ast.Call) -> Iterator[ast.AST]:
    name = getattr(node.func, "attr", getattr(node.func, "id", ""))
    if len(node.args) > 1:
        swapped = [node.args[1], node.args[0], *node.args[2:]]
        yield ast.Call(node.func, swapped, node.keywords)
    if node.keywords:
        yield ast.Call(node.func, node.args, node.keywords[:-1])
    if name in _DROPPED and isinstance(node.func, ast.Attribute):
        inner = node.func.value
        if name in ("astype", "copy"):
            yield inner
        elif node.args:
            yield node.args[0]
    elif name in _DROPPED and node.args:
        yield node.args[0]
    if name in _OTHER and isinstance(node.func, ast.Attribute):
        func = ast.Attribute(node.func.value, _OTHER[name], node.func.ctx)
        yield ast.Call(func, node.args, node.keywords)
    if name == "range" and len(node.args) == 1:
        less = ast.BinOp(node.args[0], ast.Sub(), ast.Constant(1))
        yield ast.Call(node.func, [less], [])
        yield ast.Call(node.func, [ast.Constant(1), node.args[0]], [])
