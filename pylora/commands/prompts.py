"""What `pylora generate` is asked: adapters with and without a name, and a file of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pylora.errors import ConfigError, DataError
from pylora.training.reading import read_records, type_name
from pylora.training.records import string


def adapter_folders(options: Sequence[str]) -> dict[str | None, Path]:
    """`--adapter DIR` or `--adapter NAME=DIR`, any number of times: folder by name.

    At most one has no name. A folder that exists is one, whatever its name contains.
    """
    folders: dict[str | None, Path] = {}
    for option in options:
        if not option:
            raise ConfigError("--adapter is empty; is a shell variable not set?")
        name, sign, folder = option.partition("=")
        key = name if sign and not Path(option).is_dir() else None
        if key == "" or (key is not None and not folder):
            raise ConfigError(f"--adapter {option!r}: write NAME=DIR, or the directory alone")
        if key in folders:
            what = "without a name" if key is None else f"named {key!r}"
            raise ConfigError(f"two adapters {what}; write --adapter NAME=DIR with a name for each")
        folders[key] = Path(option if key is None else folder)
    return folders


@dataclass(frozen=True)
class Asked:
    """One prompt and the adapter that is to answer it; None: the base model."""

    text: str
    adapter: str | None


def asked_of(
    folders: dict[str | None, Path], *, prompt: str | None, prompts: Path | None
) -> list[Asked]:
    """One prompt with the only adapter, or those of a file. ConfigError for an adapter that none
    of them would use."""
    if prompts is None:
        if len(folders) > 1:
            raise ConfigError("one prompt takes one --adapter; give several with --prompts FILE")
        return [Asked(prompt or "", next((name or "" for name in folders), None))]
    asked = read_prompts(prompts, folders)
    used = {a.adapter for a in asked}
    for name, folder in folders.items():
        if (name or "") not in used:
            what = f"the adapter {name!r}" if name else f"the adapter without a name, {folder}"
            raise ConfigError(f"{prompts}: no line uses {what}; leave it out, or name it in a line")
    return asked


def read_prompts(path: Path, folders: dict[str | None, Path]) -> list[Asked]:
    """Lines {"prompt": text, "adapter": name}. Without "adapter" the one without a name answers,
    or the base where each has one; null is the base. DataError names the line."""
    asked = []
    for where, record in read_records(path):
        unknown = sorted(set(record) - {"prompt", "adapter"})
        if unknown:
            raise DataError(
                f"{where}: a line has 'prompt' and may have 'adapter'; this one has {unknown[0]!r}"
            )
        adapter = None
        if "adapter" in record:
            adapter = record["adapter"]
            if adapter is not None and not isinstance(adapter, str):
                raise DataError(
                    f"{where}: the field 'adapter' must be a name or null, not {type_name(adapter)}"
                )
            if adapter is not None and adapter not in folders:
                names = ", ".join(sorted(n for n in folders if n)) or "none"
                raise DataError(
                    f"{where}: no adapter is named {adapter!r} (there is {names}); give it with "
                    f"--adapter {adapter}=DIR"
                )
        elif None in folders:
            adapter = ""
        asked.append(Asked(string(record, "prompt", where), adapter))
    if not asked:
        raise DataError(f"{path}: there are no prompts in it")
    return asked
