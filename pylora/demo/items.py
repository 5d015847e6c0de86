"""The demo's held-out items: read, answered by a model, and compared with what is expected.

The comparison is exact, character for character; there is no partial credit, and nothing in an
answer is repaired but the space around it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pylora.generation.generate import generate
from pylora.model.llama import Llama

DATA = Path(__file__).parent / "data" / "notation"
FIRST = ("∃Ψ", "Ψ⇒Δ")  # held-out items that are shown first

Items = list[dict[str, str]]  # each with "prompt" and "completion"


def read_items(count: int) -> Items:
    """The first `count` held-out items of the file, those of `FIRST` among them and in front."""
    lines = (DATA / "test.jsonl").read_text(encoding="utf-8").splitlines()
    items: Items = [json.loads(line) for line in lines]
    items.sort(key=lambda item: item["completion"].strip() not in FIRST)
    return items[:count]


def encode_prompts(tokenizer: Any, items: Items) -> list[list[int]]:
    """Token ids of each prompt, as training has them."""
    return [tokenizer.encode(item["prompt"], bos=tokenizer.add_bos) for item in items]


def answers(model: Llama, tokenizer: Any, items: Items) -> list[str]:
    """What the model says to each prompt, greedily: the first line that is not empty.

    It may use a few tokens more than the longest right answer has, so that a line break before the
    answer, or an unusual spelling, does not cut it off.
    """
    longest = max(len(tokenizer.encode(item["completion"])) for item in items)
    tokens = generate(
        model,
        encode_prompts(tokenizer, items),
        longest + 4,
        eos_ids=tokenizer.eos_ids,
        batch_size=50,
    )
    texts = (tokenizer.decode(ids).strip() for ids in tokens)
    return [text.splitlines()[0].strip() if text else "" for text in texts]


def exact_match(items: Items, texts: list[str]) -> float:
    """The share of items whose answer is the expected one, character for character."""
    right = sum(i["completion"].strip() == t for i, t in zip(items, texts, strict=True))
    return right / len(items)
