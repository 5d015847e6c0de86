"""Where a base model lies: a path, or the id of one that the Hugging Face Hub's cache has.

Nothing is downloaded: a model that is not on this machine becomes a sentence that says where to get
it. Nothing is opened beyond what tells one kind of file from another; `open_checkpoint` reads.
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from pylora.errors import FileFormatError, WrongTypeError, describe
from pylora.files.bounded import read_json

# org/name, or a name alone; "..", "//" and the like are no ids.
_ID = re.compile(
    r"(?P<repo>(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*)"
    r"(?:@(?P<revision>[\w.-]+))?(?::(?P<tag>[\w.-]+)|/(?P<file>[\w./+-]+\.gguf))?"
)
_ENDINGS = (".gguf", ".safetensors", ".json", ".jsonl", ".bin", ".pt", ".pth", ".txt")  # of files
# Of a model in several files the first stands for all.
FURTHER_PART = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$")
_MAX_ID = 200  # characters; the Hub allows 96 in a name
_ADAPTER_CONFIG = "adapter_config.json"
_MAX_ADAPTER_CONFIG = 16 << 20  # bytes


def find_model(path_or_id: str | os.PathLike[str]) -> Path:
    """The file or directory of a base model, for `open_checkpoint`.

    `path_or_id` is a path that exists, or a Hub id whose model is in the Hub's cache:
    "org/name", "org/name@revision", and of a repository of GGUF files also "org/name/file.gguf" or
    "org/name:Q4_K_M". A path that exists wins. Raises FileFormatError for what is not there, saying
    where to get it, and for what is no base model, saying what it is; WrongTypeError for no path.
    """
    text = as_text(path_or_id, "a model")
    where = as_path(text)
    if os.path.isdir(where):
        _refuse_adapter(where)
        return where
    if os.path.exists(where):
        _refuse_file(where)
        return where
    found = in_hub_cache(text)
    if found is None:
        raise FileFormatError(not_there(text, where, "model"))
    if found.is_dir():
        _refuse_adapter(found)
        _refuse_partial(text, found)
    return found


def as_text(value: str | os.PathLike[str], what: str) -> str:
    """A path or an id as text. Raises WrongTypeError where it is neither, or empty."""
    if not isinstance(value, (str, os.PathLike)) or isinstance(os.fspath(value), bytes):
        raise WrongTypeError(
            f"{what} is named by the path of its file or folder, or by its Hub id, not by "
            f"{describe(value)}"
        )
    text = value if isinstance(value, str) else Path(value).as_posix()
    if not text.strip() or "\0" in text:
        raise FileFormatError(f"{text!r} names no file; give the path of {what}, or its Hub id")
    return text


def as_path(text: str) -> Path:
    """`text` as a path, ~ being the home folder."""
    return Path(os.path.expanduser(text))


def hub_cache() -> Path:
    """The folder in which huggingface_hub keeps what it has downloaded; it need not exist."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if folder := os.environ.get(variable):
            return Path(folder).expanduser()
    home = os.environ.get("HF_HOME")
    if not home:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        home = os.path.join(base, "huggingface")
    return Path(home).expanduser() / "hub"


def in_hub_cache(text: str) -> Path | None:
    """What a Hub id stands for in the cache: a snapshot's folder, or a GGUF file in it.

    None where `text` is no id, or where the cache does not have that repository or revision. Raises
    FileFormatError where the repository is there, but not the file that is asked for.
    """
    match = _ID.fullmatch(text)
    if match is None or ".." in text or len(match["repo"]) > _MAX_ID:
        return None
    folder = hub_cache() / ("models--" + match["repo"].replace("/", "--"))
    snapshot = _snapshot(folder, match["revision"])
    if snapshot is None:
        return None
    ggufs = sorted(
        gguf
        for gguf in snapshot.rglob("*.gguf")
        if gguf.is_file() and not FURTHER_PART.search(gguf.name)
    )
    file, tag = match["file"], match["tag"]
    if file is None and tag is None:
        if not ggufs or (snapshot / "config.json").is_file():
            return snapshot
        if len(ggufs) > 1:
            raise FileFormatError(
                f"{text}: the Hub's cache has {len(ggufs)} GGUF files of it; name one: "
                + ", ".join(f"{text}/{_inside(f, snapshot)}" for f in ggufs[:8])
            )
        return ggufs[0]
    if file is not None:
        chosen = [gguf for gguf in ggufs if _inside(gguf, snapshot) == file]
    else:
        ends = rf"(?<![A-Za-z0-9]){re.escape(tag)}(?![A-Za-z0-9_])"
        chosen = [gguf for gguf in ggufs if re.search(ends, gguf.stem, re.IGNORECASE)]
    if len(chosen) != 1:
        there = ", ".join(_inside(gguf, snapshot) for gguf in ggufs[:8]) or "no GGUF file"
        raise FileFormatError(
            f"{text}: {len(chosen) or 'none'} of the files that the Hub's cache has of "
            f"{match['repo']} fit {file or tag!r}; it has {there}; fetch others with "
            f"`hf download {match['repo']} FILE`"
        )
    return chosen[0]


def _inside(file: Path, folder: Path) -> str:
    return file.relative_to(folder).as_posix()


def _snapshot(folder: Path, revision: str | None) -> Path | None:
    """The folder of a revision: a branch or tag by what refs/ says, or a commit."""
    snapshots = folder / "snapshots"
    if not snapshots.is_dir():
        return None
    ref = folder / "refs" / (revision or "main")
    if ref.is_file() and ref.stat().st_size < 200:
        commit = ref.read_text(encoding="utf-8", errors="replace").strip()
    elif revision is not None:
        commit = revision
    else:  # downloaded by commit: which one is meant is clear where there is one
        commits = [entry.name for entry in snapshots.iterdir() if entry.is_dir()]
        commit = commits[0] if len(commits) == 1 else ""
    found = snapshots / commit
    return found if re.fullmatch(r"[\w-]+", commit) and found.is_dir() else None


def not_there(text: str, where: Path, what: str) -> str:
    """The sentence for a path that does not exist and an id that the cache does not have."""
    start = f"{text}: there is no such file or directory"
    match = _ID.fullmatch(text)
    repository = match["repo"] if match else ""
    likely = repository.count("/") == 1 and not os.path.isdir(where.parent)
    if likely and where.suffix.lower() not in _ENDINGS:
        return (
            f"{start}, and the Hugging Face Hub's cache ({hub_cache()}) has no {what} of that "
            f"name; fetch it with `hf download {repository}` (pip install huggingface_hub), or "
            f"from https://huggingface.co/{repository}, and give its folder"
        )
    try:
        names = [entry.name for entry in where.parent.iterdir()]
    except OSError:
        names = []
    close = difflib.get_close_matches(where.name, names, n=1)
    if close:
        return f"{start}; did you mean {where.parent / close[0]}?"
    if not os.path.isdir(where.parent):
        return f"{start} (nor is there the folder {where.parent})"
    return start


def _refuse_adapter(folder: Path) -> None:
    """FileFormatError for a folder that holds an adapter and no base model."""
    if (folder / "config.json").exists() or any(folder.glob("*.gguf")):
        return
    for place in (folder, folder / "adapter"):
        if (place / _ADAPTER_CONFIG).is_file():
            kind = "an adapter," if place == folder else "a training run, with its adapter,"
            raise FileFormatError(
                f"{folder} is {kind} not a base model; give the base model here"
                f"{_its_base(place)}, and {place} as the adapter"
            )


def _its_base(place: Path) -> str:
    """Which model an adapter says that it was made for."""
    try:
        base = read_json(place / _ADAPTER_CONFIG, limit=_MAX_ADAPTER_CONFIG).get(
            "base_model_name_or_path"
        )
    except FileFormatError:
        return ""
    return f" (it was made for {base[:200]!r})" if isinstance(base, str) and base else ""


def _refuse_file(file: Path) -> None:
    """FileFormatError for a file that is part of a model or an adapter, or another thing."""
    name, ending = file.name, file.suffix.lower()
    if name in (_ADAPTER_CONFIG, "adapter_model.safetensors", "adapter_model.bin"):
        raise FileFormatError(
            f"{file} belongs to an adapter; give the base model here, and the folder "
            f"{file.parent} as the adapter"
        )
    if ending in (".bin", ".pt", ".pth", ".ckpt"):
        raise FileFormatError(
            f"{file} is a pickle by its name, which can run code when it is loaded, so pylora does "
            "not read it; give a GGUF file, or a Hugging Face folder with safetensors weights"
        )
    if ending in (".json", ".jsonl", ".txt", ".md", ".csv", ".py"):
        advice = f"; give its folder, {file.parent}" if name == "config.json" else ""
        raise FileFormatError(
            f"{file} is no model: a base model is a GGUF file, or a Hugging Face folder with "
            f"config.json and safetensors weights{advice}"
        )


def _refuse_partial(text: str, snapshot: Path) -> None:
    """FileFormatError where the cache has a repository's small files and none of its weights."""
    if not any(snapshot.glob("*.safetensors")) and not any(snapshot.glob("*.gguf")):
        repository = re.split("[@:]", text)[0]
        raise FileFormatError(
            f"{text}: the Hub's cache ({snapshot}) has none of its weights (safetensors or GGUF); "
            f"fetch them with `hf download {repository}`"
        )
