"""The tokenizer and chat template that lie beside an adapter, as trainers save them.

An adapter is used with what it was trained with: where its directory has a tokenizer or a template
of its own, that counts, if its tokens have the ids that the base model's have. Nothing is written
here, and no tokenizer is made but by pylora.text.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path

from pylora.adapters.locate import find_adapter
from pylora.adapters.peft import WEIGHTS
from pylora.errors import PlanError
from pylora.formats.base import Checkpoint
from pylora.formats.safetensors import SafeTensors
from pylora.model.config import LlamaConfig
from pylora.text.tokenizer import Tokenizer, chat_templates, tokenizer_from_directory

TOKENIZER, TEMPLATE = "tokenizer.json", "chat_template.jinja"


def has_own(adapter_dir: str | os.PathLike[str]) -> bool:
    """Whether an adapter's directory has a tokenizer or a chat template."""
    folder = Path(adapter_dir)
    return (folder / TOKENIZER).is_file() or "default" in chat_templates(folder)


def tokenizer_for(
    checkpoint: Checkpoint,
    adapter_dir: str | os.PathLike[str] | None,
    base: Tokenizer | None = None,
) -> tuple[Tokenizer, str | None]:
    """The tokenizer to use with an adapter, and a sentence where it is not the base model's.

    `base` is that one, where it was made already; it is not changed. Raises PlanError where the
    adapter's tokenizer gives a token another id than the base model's, or one beyond the model's
    vocabulary: such an adapter was trained on another model. An adapter may bring a vocabulary of
    another size: then that counts.
    """
    base = checkpoint.tokenizer() if base is None else base
    if adapter_dir is None or not has_own(adapter_dir):
        return base, None
    folder = Path(adapter_dir)
    if not (folder / TOKENIZER).is_file():
        template = chat_templates(folder)["default"]
        if template == base.chat_template:
            return base, None
        used = copy.copy(base)
        used.chat_template, used.arguments = template, dict(base.arguments)
        files = [folder / name for name in (TEMPLATE, "tokenizer_config.json")]
        file = next((file for file in files if file.is_file()), folder)
        return used, f"the adapter's own chat template is used ({file})"
    own = tokenizer_from_directory(folder)
    _compare(base, own, vocabulary_of(folder, checkpoint.config), folder)
    if own.chat_template is None:
        own.chat_template = base.chat_template
    same = own.chat_template == base.chat_template and own.eos_ids == base.eos_ids
    same = same and _vocabulary(own) == _vocabulary(base) and own.add_bos == base.add_bos
    return own, None if same else f"the adapter's own tokenizer is used ({folder / TOKENIZER})"


def tokenizer_of(checkpoint: Checkpoint, adapters: Sequence[str | os.PathLike[str]]) -> Tokenizer:
    """The tokenizer for a model with these adapters: one adapter's own, or the base model's.

    Its `notes` say what lies beside the weights and is used or not. Several adapters share the
    base model's tokenizer: one that has its own is named there. Errors: see `tokenizer_for`.
    """
    tokenizer, notes = checkpoint.tokenizer(), list(checkpoint.notes)
    for folder in map(find_adapter, adapters):
        own, note = tokenizer_for(checkpoint, folder, tokenizer)
        if len(adapters) == 1:
            tokenizer = own
            notes += [note] if note else []
        elif note:
            notes.append(
                f"the adapter {folder} has a tokenizer or chat template of its own, which is not "
                "used: several adapters share the base model's"
            )
    tokenizer.notes += tuple(notes)
    return tokenizer


def vocabulary_of(folder: Path, config: LlamaConfig) -> int:
    """How many tokens the model has with the adapter in a PEFT directory: rows of the tables that
    the file has whole, or the base model's."""
    file = folder / WEIGHTS
    if not file.is_file():
        return config.vocab_size
    with SafeTensors(file) as tensors:
        shapes = [tensors.shape(key) for key in tensors.tensors if _is_table(key, config)]
    sizes = [shape[0] for shape in shapes if len(shape) == 2 and shape[0]]
    return sizes[0] if len(set(sizes)) == 1 else config.vocab_size


def _is_table(key: str, config: LlamaConfig) -> bool:
    """Whether a tensor of a file is a whole embedding or head, under any name that it may have."""
    leaves = {config.names.embedding.rpartition(".")[2], config.names.head.rpartition(".")[2]}
    parts = key.split(".")
    return ".lora_" not in key and parts[-1] == "weight" and bool(leaves & set(parts[-4:-1]))


def _compare(base: Tokenizer, own: Tokenizer, vocab_size: int, folder: Path) -> None:
    where = f"{folder / TOKENIZER}"
    known_ids = _vocabulary(base)
    for token, number in _vocabulary(own).items():
        known = known_ids.get(token)
        if known is not None and known != number:
            raise PlanError(
                f"{where}: the token {token!r} has id {number}, but the base model's tokenizer "
                f"gives it {known}; this adapter was trained on another model"
            )
        if number >= vocab_size:
            raise PlanError(
                f"{where}: the token {token!r} has id {number}, beyond the model's vocabulary of "
                f"{vocab_size}: the adapter was trained on a model with more tokens"
            )


def _vocabulary(tokenizer: Tokenizer) -> dict[str, int]:
    return dict(tokenizer._backend.get_vocab(with_added_tokens=True))
