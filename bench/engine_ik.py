"""What ik_llama.cpp does for llama.cpp's jobs: a fork with faster products of quantized numbers.

Its Python package (ik-llama-cpp-python) wraps an older C interface, without adapters; those two
functions are declared here.
"""

from __future__ import annotations

import ctypes
import os
from importlib.metadata import version
from typing import Any

import engine_llama_jobs
import numpy as np
from ik_llama_cpp import _ctypes_api as C

THREADS = int(os.environ["OMP_NUM_THREADS"])
_init = C._lib.llama_lora_adapter_init
_init.argtypes, _init.restype = [ctypes.c_void_p, ctypes.c_char_p], ctypes.c_void_p
_set = C._lib.llama_lora_adapter_set
_set.argtypes, _set.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_float], ctypes.c_int32
_clear = C._lib.llama_lora_adapter_clear
_clear.argtypes, _clear.restype = [ctypes.c_void_p], None
_system = C._lib.llama_print_system_info
_system.argtypes, _system.restype = [], ctypes.c_char_p


def versions() -> dict[str, str]:
    return {"ik_llama_cpp_python": version("ik-llama-cpp-python")}


class Session:
    """A file, a context for prompt + new tokens, and adapters of it."""

    def __init__(
        self, path: str, size: int, batch: int, repack: bool = False, flash: bool = True
    ) -> None:
        C.llama_backend_init()
        settings = C.llama_model_default_params()
        settings.n_gpu_layers, settings.repack_tensors = 0, repack
        settings.use_mmap = not repack  # it repacks what it has copied
        self.model = C.llama_model_load_from_file(path.encode(), settings)
        if not self.model:
            raise RuntimeError(f"ik_llama.cpp does not take {path}")
        own = C.llama_context_default_params()
        own.n_ctx, own.n_batch, own.n_ubatch = size, batch, batch
        own.n_threads = own.n_threads_batch = THREADS
        own.flash_attn = flash
        self.ctx = C.llama_init_from_model(self.model, own)
        if not self.ctx:
            raise RuntimeError("ik_llama.cpp made no context")
        self.vocab = C.llama_vocab_n_tokens(C.llama_model_get_vocab(self.model))
        self.at = 0
        self.batch = C.llama_batch_init(max(batch, 1), 0, 1)

    def system(self) -> str:
        return " ".join(_system().decode().split())

    def feed(self, tokens: list[int]) -> int:
        b = self.batch
        b.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            b.token[i], b.pos[i], b.n_seq_id[i] = token, self.at + i, 1
            b.seq_id[i][0], b.logits[i] = 0, i == len(tokens) - 1
        self.at += len(tokens)
        status = C.llama_decode(self.ctx, b)
        if status:
            raise RuntimeError(f"llama_decode gave {status}")
        logits = C.llama_get_logits_ith(self.ctx, len(tokens) - 1)
        return int(np.argmax(np.ctypeslib.as_array(logits, (self.vocab,))))

    def forget(self) -> None:
        C.llama_kv_cache_clear(self.ctx)
        self.at = 0

    def load(self, adapter: str) -> Any:
        found = _init(self.model, adapter.encode())
        if not found:
            raise RuntimeError(f"ik_llama.cpp does not take the adapter {adapter}")
        return found

    def use(self, adapter: Any | None) -> None:
        _clear(self.ctx)
        if adapter is not None and _set(self.ctx, adapter, 1.0):
            raise RuntimeError("llama_lora_adapter_set failed")


JOBS = engine_llama_jobs.jobs(Session)
