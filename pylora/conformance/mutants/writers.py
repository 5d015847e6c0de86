"""Writers of adapter files that lose numbers or settings, or leave a half-written folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pylora.conformance.correct.plain import Correct
from pylora.conformance.mutants.files import (
    CONFIG,
    WEIGHTS,
    Tensors,
    read,
    rewritten,
)
from pylora.conformance.mutants.registry import wrong
from pylora.types import Array

Modules = Mapping[str, tuple[int, int]]
Pairs = Mapping[str, tuple[Array, Array]]


class Writing(Correct):
    """Changes what is saved."""

    def written(self, config: dict[str, Any], t: Tensors) -> tuple[dict[str, Any], Tensors]:
        return config, t

    def save(self, directory: str, adapters: Pairs, config: dict[str, Any]) -> None:
        super().save(directory, adapters, config)
        rewritten(directory, self.written)


@wrong(
    "write-keys-sorted",
    "subtle",
    "Pattern keys are written in the alphabet's order, so that another one decides.",
    "json.dumps(sort_keys=True), as PEFT's save_pretrained has it.",
)
class KeysSorted(Writing):
    def written(self, config: dict[str, Any], t: Tensors) -> tuple[dict[str, Any], Tensors]:
        return json.loads(json.dumps(config, sort_keys=True)), t


@wrong(
    "write-alpha-two-digits",
    "subtle",
    "lora_alpha is written with two digits behind the point.",
    "A formatted number in the settings.",
)
class AlphaTwoDigits(Writing):
    def written(self, config: dict[str, Any], t: Tensors) -> tuple[dict[str, Any], Tensors]:
        return {**config, "lora_alpha": round(config["lora_alpha"], 2)}, t


@wrong(
    "write-rslora-as-alpha",
    "subtle",
    "rsLoRA is written as an alpha of alpha sqrt(r): right for modules of rank r alone.",
    "Readers that do not know rsLoRA.",
)
class RsloraAsAlpha(Writing):
    def written(self, config: dict[str, Any], t: Tensors) -> tuple[dict[str, Any], Tensors]:
        if config.get("use_rslora"):
            alpha = config["lora_alpha"] * config["r"] ** 0.5
            config = {**config, "lora_alpha": alpha, "use_rslora": False}
        return config, t


@wrong(
    "write-subnormals-flushed",
    "subtle",
    "Subnormal numbers are written as zeros.",
    "A file in 16 bits is made on the way, and widened again where it fits.",
)
class WriteFlushed(Writing):
    def written(self, config: dict[str, Any], t: Tensors) -> tuple[dict[str, Any], Tensors]:
        return config, {n: np.where(np.abs(a) < 2.0**-126, a * 0, a) for n, a in t.items()}


@wrong(
    "write-memory-order",
    "subtle",
    "An array that lies by columns is written as it lies.",
    "The buffer is written, and the shape beside it.",
)
class MemoryOrder(Correct):
    def save(self, directory: str, adapters: Pairs, config: dict[str, Any]) -> None:
        def lies(a: Array) -> Array:
            ordered = a.flags.f_contiguous and not a.flags.c_contiguous
            return a.ravel(order="K").reshape(a.shape) if ordered else a

        super().save(directory, {p: (lies(A), lies(B)) for p, (A, B) in adapters.items()}, config)


@wrong(
    "write-adds-to-older",
    "subtle",
    "Tensors of an older adapter in the same directory are kept in the file.",
    "The state is updated, not replaced.",
)
class AddsToOlder(Correct):
    def save(self, directory: str, adapters: Pairs, config: dict[str, Any]) -> None:
        try:
            older = read(directory)[1]
        except (OSError, ValueError, KeyError):
            older = {}
        super().save(directory, adapters, config)
        rewritten(directory, lambda c, t: (c, {**older, **t}))


@wrong(
    "write-settings-of-older",
    "subtle",
    "Where there are settings already they stay.",
    "exist_ok: the run's folder has been made before.",
)
class SettingsOfOlder(Correct):
    def save(self, directory: str, adapters: Pairs, config: dict[str, Any]) -> None:
        file = Path(directory, CONFIG)
        older = file.read_bytes() if file.is_file() else None
        super().save(directory, adapters, config)
        if older is not None:
            file.write_bytes(older)


@wrong(
    "write-settings-first",
    "subtle",
    "Settings are written before arrays are looked at: a save that fails leaves new ones with old "
    "arrays.",
    "The order in which one thinks of them.",
)
class SettingsFirst(Correct):
    def save(self, directory: str, adapters: Pairs, config: dict[str, Any]) -> None:
        if Path(directory).is_dir():
            doubled = {**config, "lora_alpha": 2 * config["lora_alpha"]}
            Path(directory, CONFIG).write_text(json.dumps({"peft_type": "LORA", **doubled}))
        super().save(directory, adapters, config)


@wrong(
    "write-deletes-first",
    "subtle",
    "The older file is deleted before the new one is written.",
    "rmtree, mkdir, save.",
)
class DeletesFirst(Correct):
    def save(self, directory: str, adapters: Pairs, config: dict[str, Any]) -> None:
        Path(directory, WEIGHTS).unlink(missing_ok=True)
        super().save(directory, adapters, config)


@wrong(
    "write-misfit-accepted",
    "subtle",
    "An array that does not fit is cut to size.",
    "The shapes of the settings are believed.",
)
class MisfitAccepted(Correct):
    def save(self, directory: str, adapters: Pairs, config: dict[str, Any]) -> None:
        cut = {}
        for path, (A, B) in adapters.items():
            fits = isinstance(B, np.ndarray) and A.ndim == B.ndim == 2
            n = min(A.shape[0], B.shape[1]) if fits else 0
            cut[path] = (A[:n], B[:, :n]) if fits else (A, B)
        super().save(directory, cut, config)


@wrong(
    "write-temporary-left",
    "subtle",
    "A save that fails leaves its temporary folder beside the adapter.",
    "No finally.",
)
class TemporaryLeft(Correct):
    def save(self, directory: str, adapters: Pairs, config: dict[str, Any]) -> None:
        beside = Path(f"{directory}.tmp")
        beside.mkdir(parents=True, exist_ok=True)
        super().save(directory, adapters, config)
        beside.rmdir()
