"""A Hugging Face directory with a tiny random model and a tokenizer, made in a moment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from pylora.demo import fetch
from pylora.formats.safetensors import save
from pylora.model.config import LlamaConfig
from pylora.model.llama import random_weights

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DATA = Path(fetch.__file__).parent / "data" / "notation"


def write_tiny_model(folder: Path, **over: Any) -> Path:
    """Writes the model to `folder` and returns it; `over` are fields of LlamaConfig.tiny."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    special = ["<|unused|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(DATA / "train.jsonl")], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>", "chat_template": CHAT}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))

    size = tokenizer.get_vocab_size()
    fields = {"vocab_size": size, "bos_token_id": 1, "eos_token_ids": (2,)} | over
    config = LlamaConfig.tiny(**fields)
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    weights = random_weights(config)
    tensors: dict[str, np.ndarray] = {name: weights(name) for name in config.tensors()}
    save(folder / "model.safetensors", tensors, {"format": "pt"})
    return folder
