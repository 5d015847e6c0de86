"""Breaks the example ports in many ways, one at a time, and counts how many of the broken ones the
golden vectors notice.

    python tools/break_ports.py VECTORS [--port js|c] [--sample N] [--seed S] [--survivors]

A break is one change of one place of one file: those of port_breaks.py, which people make, and
those that the operators below make of every line: another number, operator, comparison, index or
rounding. A broken port that crashes, hangs or does not compile counts as noticed. What survives is
printed with --survivors; those that compute the same all the same are in port_breaks.py.
"""

from __future__ import annotations

import argparse
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from port_breaks import BY_HAND, SAME

ROOT = Path(__file__).resolve().parents[1]
PORTS = ROOT / "examples" / "ports"
FILES = {
    "js": ("lora.mjs", "several.mjs", "llama.mjs", "features.mjs", "plan.mjs"),
    "c": ("lora.c", "several.c", "random.c", "block.c", "training.c", "features.c"),
}
# Lines about memory: another size or status there is not another number.
MEMORY = re.compile(r"\b(malloc|calloc|take|exit|\w+_workspace|zeros)\(")
# (pattern, replacements): each match of each line gives a break for each replacement.
OPERATORS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r" \+ ", (" - ",)),
    (r" - ", (" + ",)),
    (r" \* ", (" / ",)),
    (r" / ", (" * ",)),
    (r" % ", (" * ",)),
    (r" <= ", (" < ",)),
    (r" < ", (" <= ",)),
    (r" >= ", (" > ",)),
    (r" > ", (" >= ",)),
    (r" === ", (" !== ",)),
    (r" == ", (" != ",)),
    (r" !== ", (" === ",)),
    (r" != ", (" == ",)),
    (r" && ", (" || ",)),
    (r" \|\| ", (" && ",)),
    (r" >>> ", (" << ",)),
    (r" \+= ", (" = ", " -= ")),
    (r"\?\? \w+", ("?? 2",)),
    (r"\bMath\.fround\(", ("(",)),
    (r"\(float\)", ("",)),
    (r"\bMath\.floor\(", ("Math.ceil(", "Math.round(")),
    (r"\bMath\.max\(", ("Math.min(",)),
    (r"\bMath\.min\(", ("Math.max(",)),
    (r"\bMath\.sqrt\(", ("(",)),
    (r"\bsqrt\(", ("(",)),
    (r"\bMath\.abs\(", ("(",)),
    (r"\bT\((\w[\w.]*)\)", (r"\1",)),
    (r"\bat\((\w[\w.]*), (\w+), (\w+)\)", (r"at(\1, \3, \2)",)),
    (r"\bdrop\((x|times\(L\.s, mul\(g, L\.A\)\)), d\)", (r"\1",)),
    (r"\?\.", (".",)),
    (r"\btrue\b", ("false",)),
    (r"\bfalse\b", ("true",)),
    (r"(?<![\w.\[{\"])0(?![\w.])", ("1",)),
    (r"(?<![\w.\"])([1-9]\d*)n?(?![\w.\]])", ("NEXT", "BEFORE")),
    (r"(?<![\w.])\d+\.\d+(?:e-?\d+)?", ("NEAR",)),
    (r"0x[0-9a-fA-F]{8}n?", ("NEXT",)),
)


@dataclass(frozen=True)
class Break:
    """One place of one file, as it is and as it becomes."""

    file: str
    line: int  # from 1; 0 for one that was written by hand
    before: str
    after: str
    what: str

    def applied(self, text: str) -> str:
        """The file's text with the break."""
        if not self.line:
            assert text.count(self.before) == 1, f"{self.file}: {self.before!r} is not there once"
            return text.replace(self.before, self.after)
        lines = text.split("\n")
        assert lines[self.line - 1] == self.before
        lines[self.line - 1] = self.after
        return "\n".join(lines)

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}" if self.line else self.file
        return f"{where} [{self.what}]\n    {self.before.strip()}\n    {self.after.strip()}"


def breaks(port: str, folder: Path = PORTS) -> list[Break]:
    """All breaks of a port, but for those that are known to compute the same."""
    out = [Break(f, 0, a, b, what) for f, a, b, what in BY_HAND if f in FILES[port]]
    for name in FILES[port]:
        if (folder / name).is_file():
            out += _generated(name, (folder / name).read_text(encoding="utf-8"))
    same = {(file, before, after) for file, before, after, _ in SAME}
    return [b for b in out if (b.file, b.before.strip(), b.after.strip()) not in same]


def _generated(name: str, text: str) -> Iterator[Break]:
    for number, line in enumerate(text.split("\n"), 1):
        code = _code(line)
        if MEMORY.search(code) and not name.endswith(".mjs"):
            continue
        if not code.strip() or code.lstrip().startswith(("import ", "#", "*", "/*", "//")):
            continue
        for pattern, replacements in OPERATORS:
            for match in re.finditer(pattern, code):
                for replacement in replacements:
                    new = _replaced(match, replacement)
                    if new is None or new == match[0]:
                        continue
                    after = line[: match.start()] + new + line[match.end() :]
                    yield Break(name, number, line, after, f"{match[0]!r} to {new!r}")


def _code(line: str) -> str:
    """The line with its comment and texts blanked, at the same length."""
    line = re.sub(r"//.*$|/\*.*?(\*/|$)", lambda m: " " * len(m[0]), line)
    return re.sub(r"\"[^\"]*\"", lambda m: '"' + "_" * (len(m[0]) - 2) + '"', line)


def _replaced(match: re.Match[str], how: str) -> str | None:
    if how in ("NEXT", "BEFORE"):
        text = match[0]
        big, digits = text.endswith("n"), text.removesuffix("n")
        value = int(digits, 0) + (1 if how == "NEXT" else -1)
        return (hex(value) if digits.startswith("0x") else str(value)) + "n" * big
    if how == "NEAR":  # by about a millionth
        return repr(float(match[0]) * (1 + 2.0**-20))
    return match.expand(how)


# ---- running -------------------------------------------------------------------------------------


class JavaScript:
    """Runs check.mjs beside the broken file."""

    def __init__(self, folder: Path, work: Path) -> None:
        self.work = work
        for file in folder.glob("*.mjs"):
            shutil.copy(file, work)

    def survives(self, b: Break, vectors: Path) -> bool:
        file = self.work / b.file
        good = file.read_text(encoding="utf-8")
        file.write_text(b.applied(good), encoding="utf-8")
        try:
            return _runs(["node", str(self.work / "check.mjs"), str(vectors)])
        finally:
            file.write_text(good, encoding="utf-8")


class C:
    """Compiles the broken file alone, and links it with the others."""

    def __init__(self, folder: Path, work: Path, core: Path) -> None:
        self.folder, self.work, self.core = folder, work, core
        self.include = folder.parents[1] / "csrc"
        for name in [f.name for f in folder.glob("*.c")]:
            if not self._compile(folder / name, work / f"{name}.o"):
                raise SystemExit(f"{name} does not compile")
        self._compile(self.include / "reference.c", work / "reference.c.o")

    def _compile(self, source: Path, target: Path) -> bool:
        flags = [
            "-std=c11",
            "-ffp-contract=off",
            "-O1",
            "-w",
            f"-I{self.include}",
            f"-I{self.folder}",
        ]
        return _runs(["cc", *flags, "-c", str(source), "-o", str(target)])

    def survives(self, b: Break, vectors: Path) -> bool:
        source, target = self.work / b.file, self.work / f"{b.file}.o"
        good = target.read_bytes()
        source.write_text(b.applied((self.folder / b.file).read_text(encoding="utf-8")))
        try:
            if not self._compile(source, target):
                return False
            program = self.work / "check"
            objects = sorted(str(o) for o in self.work.glob("*.o"))
            _runs(["cc", *objects, str(self.core), "-o", str(program), "-lm", "-pthread"])
            return _runs([str(program), str(vectors)])
        finally:
            target.write_bytes(good)


def _runs(command: Sequence[str]) -> bool:
    try:
        done = subprocess.run(command, capture_output=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def survivors(
    port: str,
    vectors: Path,
    some: Sequence[Break],
    folder: Path = PORTS,
    core: Path = ROOT / "build" / "make" / "core" / "libpylora.a",
) -> list[Break]:
    """The breaks that the vectors do not notice."""
    with tempfile.TemporaryDirectory() as work:
        runner = JavaScript(folder, Path(work)) if port == "js" else C(folder, Path(work), core)
        return [b for b in some if runner.survives(b, vectors)]


def sample(port: str, n: int, seed: int) -> list[Break]:
    """n breaks, drawn from a seed."""
    found = breaks(port)
    return random.Random(seed).sample(found, min(n, len(found)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("vectors", type=Path)
    parser.add_argument("--port", choices=FILES, default="js")
    parser.add_argument("--sample", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--survivors", action="store_true")
    parser.add_argument("--ports", type=Path, default=PORTS, help="other sources of the ports")
    args = parser.parse_args()
    some = breaks(args.port, args.ports)
    if args.sample:
        some = random.Random(args.seed).sample(some, min(args.sample, len(some)))
    left = survivors(args.port, args.vectors, some, args.ports)
    for b in left if args.survivors else ():
        print(b)
    hand = [sum(not b.line for b in found) for found in (some, left)]
    print(
        f"{args.port}: {len(some) - len(left)} of {len(some)} broken ports are noticed "
        f"({hand[0] - hand[1]} of {hand[0]} that were written by hand)"
    )


if __name__ == "__main__":
    main()
