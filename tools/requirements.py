"""Prints what pyproject.toml says must be installed, one requirement a line: the dependencies
(`base`), those that a build needs (`build`), and the extras that are named.

    pip install $(python tools/requirements.py base plot)

So that what is needed can be fetched while the C core still compiles. Extras that name the project
itself ("all") are followed. Nothing is installed here.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

try:
    import tomllib
except ImportError:  # Python 3.10: pip brings one
    from pip._vendor import tomli as tomllib  # type: ignore[no-redef]

PROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def requirements(document: dict[str, Any], wanted: list[str]) -> list[str]:
    """The requirements of `wanted`, each once, in order. SystemExit for an unknown extra."""
    project = document["project"]
    extras = project["optional-dependencies"]
    groups = {"base": project["dependencies"], "build": document["build-system"]["requires"]}
    found: list[str] = []
    for name in wanted:
        if name not in groups and name not in extras:
            raise SystemExit(
                f"pyproject.toml has no extra '{name}'; it has base, build, {', '.join(extras)}"
            )
        for requirement in groups.get(name) or extras[name]:
            own = re.fullmatch(rf"{re.escape(project['name'])}\[(.+)\]", requirement)
            found += requirements(document, own[1].split(",")) if own else [requirement]
    return list(dict.fromkeys(found))


if __name__ == "__main__":
    print("\n".join(requirements(tomllib.loads(PROJECT.read_text("utf-8")), sys.argv[1:])))
