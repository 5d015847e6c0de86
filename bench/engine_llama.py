"""What llama.cpp does for the jobs it shares: a prompt and greedy tokens from the same file.

The C calls alone, without the wrapper's bookkeeping, in one context of the size that is needed.
"""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any

import engine_llama_jobs
import llama_cpp
import numpy as np

THREADS = int(os.environ["OMP_NUM_THREADS"])
ERROR = 4  # ggml_log_level


@llama_cpp.llama_log_callback
def _quiet(level: int, text: bytes, _: Any) -> None:
    """Errors alone: each tensor of an adapter has a line of its own otherwise."""
    if level == ERROR:
        print(text.decode(errors="replace"), end="", file=sys.stderr, flush=True)


def versions() -> dict[str, str]:
    return {"llama_cpp_python": llama_cpp.__version__}


class Session:
    """A file, a context for prompt + new tokens, and adapters of it."""

    def __init__(self, path: str, size: int, batch: int, flash: bool = False) -> None:
        self.model = llama_cpp.Llama(
            path,
            n_ctx=size,
            n_batch=batch,
            n_ubatch=batch,
            n_threads=THREADS,
            n_threads_batch=THREADS,
            n_gpu_layers=0,
            flash_attn=flash,
            verbose=False,
        )
        llama_cpp.llama_log_set(_quiet, ctypes.c_void_p(0))
        self.vocab = self.model.n_vocab()

    def system(self) -> str:
        """The instructions that it was built for."""
        return " ".join(llama_cpp.llama_print_system_info().decode().split())

    def feed(self, tokens: list[int]) -> int:
        array = (ctypes.c_int32 * len(tokens))(*tokens)
        ctx = self.model.ctx  # through `model`, which must live as long as this object
        status = llama_cpp.llama_decode(ctx, llama_cpp.llama_batch_get_one(array, len(tokens)))
        if status:
            raise RuntimeError(f"llama_decode gave {status}")
        logits = llama_cpp.llama_get_logits_ith(ctx, -1)
        return int(np.argmax(np.ctypeslib.as_array(logits, (self.vocab,))))

    def forget(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.model.ctx), True)

    def load(self, adapter: str) -> Any:
        found = llama_cpp.llama_adapter_lora_init(self.model.model, adapter.encode())
        if not found:
            raise RuntimeError(f"llama.cpp does not take the adapter {adapter}")
        return found

    def use(self, adapter: Any | None) -> None:
        n = 0 if adapter is None else 1
        some = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter)
        status = llama_cpp.llama_set_adapters_lora(self.model.ctx, some, n, (ctypes.c_float * 1)(1))
        if status:
            raise RuntimeError(f"llama_set_adapters_lora gave {status}")


JOBS = engine_llama_jobs.jobs(Session)
