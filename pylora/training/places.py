"""What lies where in a run's folder, and whether a run can be begun in one. Nothing is written."""

from __future__ import annotations

import os
from pathlib import Path

from pylora.errors import ConfigError
from pylora.training import checkpoint

LOG, ADAPTER = "log.jsonl", "adapter"


def check_out_dir(
    out_dir: str | os.PathLike[str], *, resume: bool = False, overwrite: bool = False
) -> None:
    """ConfigError unless a run can be begun (or, with `resume`, continued) in this directory.

    What `train` asks itself; to be asked before a model is loaded. Nothing is read or written.
    """
    where = Path(out_dir)
    if resume and overwrite:
        raise ConfigError("resume continues the run in out_dir, overwrite removes it: choose one")
    found = checkpoint.checkpoints(where)
    if resume and not found:
        there = "there is no such directory" if not where.exists() else "it has no checkpoint"
        raise ConfigError(f"{where}: {there} to resume from; start the run without resume")
    if resume or overwrite:
        return
    if found or (where / LOG).exists():
        raise ConfigError(
            f"{where} already holds a training run; resume it, overwrite it, or give another "
            "directory"
        )
    if (where / ADAPTER).exists():
        raise ConfigError(
            f"{where / ADAPTER} is there already, and would be replaced; overwrite it, or give "
            "another directory"
        )
