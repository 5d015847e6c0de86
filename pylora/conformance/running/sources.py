"""The source of the oracle's formulas, as it stands in a counterexample's program."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

PREFIX = "exact_"  # of a formula's name in the program, where `merged` may be a variable


def name_of(function: Callable[..., Any]) -> str:
    """The formula's name in the program."""
    return PREFIX + str(inspect.unwrap(function).__name__)


class Sources:
    """Functions, each after those that it calls."""

    def __init__(self, imports: set[str]) -> None:
        self.imports, self.texts = imports, dict[str, str]()

    def add(self, function: Callable[..., Any]) -> str:
        """Its name, after its source and what it needs were written."""
        original = inspect.unwrap(function)
        name = name_of(function) if original is not function else original.__name__
        if name in self.texts:
            return name
        self.texts[name] = ""  # a function may call itself
        tree = ast.parse(textwrap.dedent(inspect.getsource(original))).body[0]
        assert isinstance(tree, ast.FunctionDef)
        bare = _Bare(lambda n: self._global(original, n)).visit(tree)
        bare.name = name
        del self.texts[name]  # so that it comes after what it calls
        self.texts[name] = ast.unparse(ast.fix_missing_locations(bare))
        return name

    def _global(self, function: Any, name: str) -> str:
        """What the function's global of this name is called in the program."""
        value = function.__globals__.get(name)
        if inspect.isfunction(value):
            return self.add(value)
        if inspect.ismodule(value):
            alias = "" if value.__name__ == name else f" as {name}"
            self.imports.add(f"import {value.__name__}{alias}")
        elif isinstance(value, (int, float, str)):
            self.texts[name] = f"{name} = {value!r}"
        return name


class _Bare(ast.NodeTransformer):
    """Without decorators and annotations; globals under their names in the program."""

    def __init__(self, rename: Callable[[str], str]) -> None:
        self.rename = rename

    def visit_FunctionDef(self, node: ast.FunctionDef) -> Any:
        node.decorator_list, node.returns = [], None
        if isinstance(node.body[0], ast.Expr) and isinstance(node.body[0].value, ast.Constant):
            said = str(node.body[0].value.value).strip().split("\n")[0]
            node.body[0].value.value = said
        return self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> Any:
        node.annotation = None
        return node

    def visit_Name(self, node: ast.Name) -> Any:
        node.id = self.rename(node.id) if isinstance(node.ctx, ast.Load) else node.id
        return node
