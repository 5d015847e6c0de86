"""An adapter with a head of its own: PEFT's SEQ_CLS, for classes and numbers of whole texts.

The head is one matrix, `score` [classes, hidden], on the final norm's output at a text's last
token, as in transformers' ...ForSequenceClassification. On disk it is PEFT's directory with
task_type SEQ_CLS and modules_to_save ["classifier", "score"], which PEFT's
AutoPeftModelForSequenceClassification loads; classes.json beside it has the classes' names.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from pylora.adapters import peft
from pylora.adapters.adapter import Adapter, parameters
from pylora.adapters.locate import find_adapter
from pylora.adapters.loraconfig import LoraConfig
from pylora.adapters.plan import Plan, named_targets, resolve
from pylora.errors import FileFormatError, PlanError, UnsupportedError
from pylora.files.bounded import read_text
from pylora.files.whole import atomic_write
from pylora.formats.base import check_finite
from pylora.formats.safetensors import SafeTensors
from pylora.model.config import LlamaConfig, ModuleSpec
from pylora.model.through import through
from pylora.numbers import random
from pylora.training.objectives.pooled import PooledTop
from pylora.training.objectives.rows import laid_out
from pylora.types import Array, LoRA

CLASSES = "classes.json"
SCORE = "score.weight"
_KEY = f"base_model.model.{SCORE}"
_SAVED = ("classifier", "score")  # the names that PEFT itself looks for
_STD = 0.02  # of fresh heads, as transformers' initializer_range
_LIMIT = 16 << 20


class HeadedAdapter(Adapter):
    """An adapter and its head. `classes` has a name for each row of `score`; of a number there is
    one row, and no class."""

    def __init__(
        self,
        config: LoraConfig,
        plan: Plan,
        modules: Mapping[str, LoRA],
        score: Array,
        classes: Sequence[str] = (),
    ) -> None:
        super().__init__(config, plan, modules)
        self.score, self.classes = score, tuple(classes)
        if score.ndim != 2 or score.shape[0] != max(1, len(self.classes)):
            raise PlanError(
                f"{SCORE} has shape {list(score.shape)}, expected a row for each of "
                f"{len(self.classes)} classes"
            )

    @classmethod
    def fresh(
        cls,
        plan: Plan,
        config: LoraConfig,
        seed: int,
        hidden: int,
        classes: Sequence[str],
        base: peft.Load | None = None,
    ) -> HeadedAdapter:
        """A fresh adapter (`Adapter.init`), and a head drawn from N(0, 0.02²). UnsupportedError
        where the settings train other weights whole."""
        others = set(config.modules_to_save or ()) - set(_SAVED)
        if others or config.trainable_token_indices:
            raise UnsupportedError(
                f"an adapter with a head for classes trains that whole ({', '.join(_SAVED)}), and "
                f"no other weights of the base: {', '.join(sorted(others)) or 'rows of tables'}"
            )
        config = replace(config, modules_to_save=None)
        made = Adapter.init(plan, config, seed, base=base)
        shape = max(1, len(classes)), hidden
        score = random.normal(shape, _STD, seed=seed, stream=random.stream("init", "score"))
        return cls(made.config, plan, dict(made), score, classes)

    @property
    def beside(self) -> dict[str, Array]:
        """The arrays that are trained beside A and B."""
        return {SCORE: self.score}

    @property
    def num_parameters(self) -> int:
        return super().num_parameters + int(self.score.size)

    def digest(self) -> str:
        sha = hashlib.sha256(super().digest().encode())
        sha.update(f"{self.classes}".encode() + np.ascontiguousarray(self.score, "<f4").tobytes())
        return sha.hexdigest()

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes PEFT's directory, float32; loading it gives the same bits."""
        config = replace(
            named_targets(self.config, self.plan), task_type="SEQ_CLS", modules_to_save=_SAVED
        )
        peft.write(directory, config, {**parameters(self), _KEY: self.score})
        with atomic_write(os.path.join(directory, CLASSES)) as beside:
            beside.write_text(json.dumps(list(self.classes), ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(
        cls,
        directory: str | os.PathLike[str],
        modules: Mapping[str, ModuleSpec] | LlamaConfig,
        *,
        base: peft.Load | None = None,
    ) -> HeadedAdapter:
        """The adapter and head in a PEFT directory of task type SEQ_CLS. Without classes.json the
        classes are called "0", "1", ...; one row alone is a number. FileFormatError or PlanError
        for a directory that is none, or that holds other tensors."""
        modules = modules.modules() if isinstance(modules, LlamaConfig) else modules
        place = find_adapter(directory)
        config = replace(peft.read_config(place), modules_to_save=None)
        plan = resolve(config, modules)
        wanted = peft.tensor_names(plan)
        with SafeTensors(place / peft.WEIGHTS) as file:
            if _KEY not in file.tensors:
                raise FileFormatError(
                    f"{file.path}: there is no tensor {_KEY!r}: an adapter without a head for "
                    "classes or numbers"
                )
            odd = sorted(set(file.tensors) ^ {*wanted, _KEY})
            if odd:
                raise PlanError(f"{file.path}: {odd[0]!r} is missing or not expected")
            arrays = {key: _array(file, key) for key in file.tensors}
            for key, (_, _, shape) in wanted.items():
                if arrays[key].shape != shape:
                    raise PlanError(
                        f"{file.path}: tensor {key!r} has shape {arrays[key].shape}, "
                        f"expected {shape}"
                    )
            score = arrays.pop(_KEY)
        names = _names(place / CLASSES, score.shape[0])
        return cls(config, plan, peft.assemble(config, plan, arrays), score, names)

    def predict(self, model: Any, sequences: Sequence[Any]) -> np.ndarray:
        """Scores [n, classes] of texts as lists of token ids, float64; of a number [n, 1]. The
        adapter must be attached to `model`. A row does not depend on the others."""
        out = []
        for start in range(0, len(sequences), 8):
            some = [_Tokens(np.asarray(ids, np.int64)) for ids in sequences[start : start + 8]]
            ids, _, seqs, parts = laid_out(some, [s.ids for s in some])
            top = PooledTop([part.stop - 1 for part in parts], self.score)
            through(model, ids, seqs, top, grads=False)
            out.append(top.scores)
        return np.concatenate(out) if out else np.empty((0, self.score.shape[0]))


class _Tokens:
    def __init__(self, ids: np.ndarray) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return int(self.ids.size)


def _array(file: SafeTensors, key: str) -> Array:
    array = np.array(file.load(key), np.float32, order="C")
    return check_finite(array, f"{file.path}: tensor {key!r}")


def _names(file: Any, rows: int) -> list[str]:
    if not file.is_file():
        return [] if rows == 1 else [str(i) for i in range(rows)]
    try:
        found = json.loads(read_text(file, limit=_LIMIT))
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{file}: not JSON: {error}") from error
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise FileFormatError(f"{file}: expected a list of names")
    return found
