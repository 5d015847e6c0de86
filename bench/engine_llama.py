"""What llama.cpp does for the job it shares: a prompt and greedy tokens from the same file."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable
from typing import Any

import llama_cpp
import numpy as np


def versions() -> dict[str, str]:
    return {"llama_cpp_python": llama_cpp.__version__}


def gguf(precision: str, path: str, prompt: int, new: int) -> Callable[[], dict[str, float]]:
    """The file as it is, no adapter; the C calls alone, without the wrapper's bookkeeping."""
    threads = int(os.environ["OMP_NUM_THREADS"])
    model = llama_cpp.Llama(
        path,
        n_ctx=prompt + new + 8,
        n_batch=prompt,
        n_ubatch=prompt,
        n_threads=threads,
        n_threads_batch=threads,
        n_gpu_layers=0,
        verbose=False,
    )
    vocab = model.n_vocab()
    ids = np.random.default_rng(0).integers(0, vocab, prompt).tolist()

    def feed(tokens: list[int]) -> int:
        array = (ctypes.c_int32 * len(tokens))(*tokens)
        ctx = model.ctx  # through `model`, which must live as long as this function
        status = llama_cpp.llama_decode(ctx, llama_cpp.llama_batch_get_one(array, len(tokens)))
        assert status == 0, f"llama_decode gave {status}"
        logits = llama_cpp.llama_get_logits_ith(ctx, -1)
        return int(np.argmax(np.ctypeslib.as_array(logits, (vocab,))))

    def run() -> dict[str, float]:
        forget(model.ctx)
        began = time.perf_counter()
        token = feed(ids)
        middle = time.perf_counter()
        for _ in range(new):
            token = feed([token])
        return {"prefill": middle - began, "decode": time.perf_counter() - middle}

    return run


def forget(ctx: Any) -> None:
    if hasattr(llama_cpp, "llama_get_memory"):
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(ctx), True)
    else:  # older releases
        llama_cpp.llama_kv_self_clear(ctx)


JOBS: dict[str, Callable[..., Any]] = {"gguf": gguf}
