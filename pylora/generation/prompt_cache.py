"""The keys and values of one conversation, kept from one answer to the next.

A turn's prompt begins with what was computed already: the earlier turns. Only what is new is run.
The answers have the bits of computing everything again, since rows do not depend on their
neighbours; where a backend does not promise that (`ops.bitwise`), nothing is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pylora.errors import ConfigError, expect
from pylora.model.kvcache import KVCache
from pylora.model.llama import Llama

_SMALLEST = 256  # tokens of room; it doubles as the conversation grows


class PromptCache:
    """What `generate(..., cache=...)` has computed of one sequence, for one prompt at a time.

    `ids` are the tokens whose keys and values are kept. A prompt that goes another way than they
    do, or that another adapter answers, is computed anew from where it differs.
    """

    def __init__(self, model: Llama) -> None:
        """For this model. Memory is taken when it is used, and given back by `clear`."""
        expect("model", model, "PromptCache")
        self.model = model
        self.clear()

    def __repr__(self) -> str:
        room = 0 if self._kv is None else self._kv.capacity
        return f"PromptCache({len(self.ids)} tokens, room for {room})"

    def clear(self) -> None:
        """Forgets everything."""
        self.ids: list[int] = []
        self._kv: KVCache | None = None
        self._adapter: Any = None

    def check(self, model: Llama, prompts: int) -> None:
        """ConfigError unless this cache can serve that call."""
        if model is not self.model:
            raise ConfigError("this cache was made for another model; make one for this model")
        if prompts != 1:
            raise ConfigError(f"a cache holds one sequence, so it takes one prompt, not {prompts}")

    def begin(self, prompt: Sequence[int], room: int, adapter: Any) -> tuple[KVCache, int]:
        """The keys and values, with room for `room` tokens, and how many of `prompt` they have.

        The last token is always left to run: its logits are what comes next.
        """
        kept = 0
        if self._kv is not None and adapter is self._adapter and room <= self._kv.capacity:
            most = min(len(self.ids), len(prompt) - 1)
            while kept < most and self.ids[kept] == prompt[kept]:
                kept += 1
        if not self.model.ops.bitwise:
            kept = 0
        if self._kv is None or room > self._kv.capacity:
            size = _SMALLEST
            while size < room:
                size *= 2
            most = self.model.config.max_position_embeddings
            self._kv = None  # before the larger one is made
            self._kv = self.model.kv_cache(1, min(size, most))
        self._kv.length[0] = kept
        self._adapter, self.ids = adapter, list(self.ids[:kept])
        return self._kv, kept
