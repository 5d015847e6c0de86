"""The demo's held-out items: read, answered by a model, and compared with what is expected.

The comparison is exact, character for character; there is no partial credit, and nothing in an
answer is repaired but the space around it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pylora.generation.generate import generate
from pylora.model.llama import Llama

DATA = Path(__file__).parent / "data" / "notation"
FIRST = ("∃Ψ", "Ψ⇒Δ")  # held-out items that are shown first; what the project began with leads

BATCH = 50  # prompts that are answered at once
Items = list[dict[str, str]]  # each with "prompt" and "completion"


def read_items(split: str, count: int | None = None) -> Items:
    """The first `count` items of a split ("test", "validation"), those of `FIRST` leading."""
    lines = (DATA / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    items: Items = [json.loads(line) for line in lines]
    order = {completion: i for i, completion in enumerate(FIRST)}
    items.sort(key=lambda item: order.get(expected(item), len(order)))
    return items[:count]


def expected(item: dict[str, str]) -> str:
    """The one right answer."""
    return item["completion"].strip()


def statement(item: dict[str, str]) -> str:
    """What is asked, without the sign that asks for the answer."""
    return item["prompt"].rsplit(" ", 1)[0]


def encode_prompts(tokenizer: Any, items: Items) -> list[list[int]]:
    """Token ids of each prompt, as training has them."""
    return [tokenizer.encode(item["prompt"], bos=tokenizer.add_bos) for item in items]


def answers(
    model: Llama, tokenizer: Any, items: Items, note: Callable[[str], None] = lambda text: None
) -> list[str]:
    """What the model says to each prompt, greedily: the first line that is not empty.

    It may use a few tokens more than the longest right answer has, so that a line break before the
    answer, or an unusual spelling, does not cut it off. `note` hears how many are answered.
    """
    longest = max(len(tokenizer.encode(item["completion"])) for item in items)
    prompts = encode_prompts(tokenizer, items)
    tokens: list[list[int]] = []
    for at in range(0, len(prompts), BATCH):
        some = prompts[at : at + BATCH]
        tokens += generate(model, some, longest + 4, eos_ids=tokenizer.eos_ids, batch_size=BATCH)
        note(f"{len(tokens)} of {len(items)}")
    texts = (tokenizer.decode(ids).strip() for ids in tokens)
    return [text.splitlines()[0].strip() if text else "" for text in texts]


def right(item: dict[str, str], text: str) -> bool:
    """Whether an answer is the expected one, character for character."""
    return expected(item) == text


def exact_match(items: Items, texts: list[str]) -> float:
    """The share of items whose answer is right."""
    return sum(right(i, t) for i, t in zip(items, texts, strict=True)) / len(items)
