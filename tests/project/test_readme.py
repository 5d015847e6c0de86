"""The Python in README.md and docs/ runs as printed, and the files that pages point to exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


def blocks() -> list[tuple[str, str]]:
    return [
        (f"{page.name}:{page.read_text(encoding='utf-8')[: m.start()].count(chr(10)) + 1}", m[1])
        for page in PAGES
        for m in BLOCK.finditer(page.read_text(encoding="utf-8"))
    ]


@pytest.mark.parametrize("where, source", blocks(), ids=[where for where, _ in blocks()])
def test_python_block_runs(where: str, source: str, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-X", "utf8", "-c", source],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
    )
    if result.returncode and "pylora.errors.FetchError" in result.stderr:
        pytest.skip("needs the demo's model: from the cache, or from the network")
    assert result.returncode == 0, f"{where}\n{result.stdout}\n{result.stderr}"


def test_the_readme_has_an_example() -> None:
    lengths = [source.count("\n") for where, source in blocks() if where.startswith("README")]
    assert lengths and min(lengths) <= 12, "the README shows an example of about ten lines"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_point_to_files(page: Path) -> None:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
