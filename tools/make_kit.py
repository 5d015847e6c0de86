"""Writes the conformance kit as a package of its own, `pylora_conformance`: pure Python, no engine.

    python tools/make_kit.py FOLDER

The kit and what it imports of pylora, which is all in Python, are copied with other names, so that
the package can lie beside pylora itself in one environment: no file belongs to two distributions.

    pylora.conformance.*       pylora_conformance.*
    pylora.<other wing>.*      pylora_conformance.engine.*

`conformance/setup.py` calls this where the distribution pylora-conformance is built. What is copied
is found by reading imports; a module of the engine's compiled parts is never followed.
"""

from __future__ import annotations

import ast
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KIT, NAME, ENGINE = "pylora.conformance", "pylora_conformance", "pylora_conformance.engine"
# Who computes is NumPy alone; the command line is the kit's own.
LEFT_OUT = ("pylora.backends.c", "pylora.backends.cuda", "pylora.backends.cupy", "pylora.commands")


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Every module of the package under its name in pylora, with its file."""
    found: dict[str, Path] = {}
    todo = [_name(file, root) for file in sorted((root / "pylora" / "conformance").rglob("*.py"))]
    while todo:
        name = todo.pop()
        file = _file(name, root)
        if name in found or file is None or _left_out(name) or name == "pylora":
            continue
        found[name] = file
        todo += _imports(file, everywhere=name.startswith(KIT))
        todo += [name.rsplit(".", n)[0] for n in range(1, name.count(".") + 1)]
    return dict(sorted(found.items()))


def renamed(text: str, wings: set[str]) -> str:
    """The source with every name of the package exchanged."""
    text = re.sub(r"\bpylora\.conformance\b", NAME, text)
    text = re.sub(rf"\bpylora\.(?=(?:{'|'.join(sorted(wings))})\b)", f"{ENGINE}.", text)
    return re.sub(r"^(\s*)from pylora import\b", rf"\1from {ENGINE} import", text, flags=re.M)


def make(folder: Path, root: Path = ROOT) -> list[str]:
    """Writes folder/pylora_conformance, in the place of an older one; returns the modules' names in
    it."""
    target, found = folder / NAME, modules(root)
    shutil.rmtree(target, ignore_errors=True)
    wings = {name.split(".")[1] for name in found} - {"conformance"}
    names = []
    for name, file in found.items():
        new = renamed(name, wings)
        out = folder.joinpath(*new.split("."))
        out = out / "__init__.py" if file.name == "__init__.py" else out.with_suffix(".py")
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(renamed(file.read_text(encoding="utf-8"), wings), encoding="utf-8")
        names.append(new)
    engine = target / "engine" / "__init__.py"
    engine.write_text('"""What the kit uses of pylora: formulas, settings, files. No API."""\n')
    (target / "py.typed").write_text("")
    return [*names, ENGINE]


def _imports(file: Path, everywhere: bool) -> Iterator[str]:
    """What a file imports of pylora: of the kit also inside functions, of others when imported."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    nodes = ast.walk(tree) if everywhere else _outside(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("pylora."))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "pylora":
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _outside(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when the module is imported."""
    for node in ast.iter_child_nodes(tree):
        checked = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if not checked and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node
            yield from _outside(node)


def _left_out(name: str) -> bool:
    return any(name == n or name.startswith(n + ".") for n in LEFT_OUT)


def _file(name: str, root: Path) -> Path | None:
    path = root.joinpath(*name.split("."))
    files = (path.with_suffix(".py"), path / "__init__.py")
    return next((file for file in files if file.is_file()), None)


def _name(file: Path, root: Path) -> str:
    parts = file.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


if __name__ == "__main__":
    print("\n".join(make(Path(sys.argv[1]))))
