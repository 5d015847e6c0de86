"""What OpenVINO GenAI does for a GGUF file: it makes a graph of its own of it, with activations in
8 bits by groups and keys and values in 8 bits, as it comes.

Seconds are its own (`perf_metrics`): the first token ends the prefill.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import openvino
import openvino_genai
from engine_llama_jobs import Job


def versions() -> dict[str, str]:
    return {"openvino_genai": openvino_genai.get_version()}


def gguf(precision: str, path: str, prompt: int, new: int, model: str = "") -> Job:
    """The file, no adapter; greedy."""
    threads = int(os.environ["OMP_NUM_THREADS"])
    pipe = openvino_genai.LLMPipeline(path, "CPU", INFERENCE_NUM_THREADS=threads)
    settings = openvino_genai.GenerationConfig()
    settings.max_new_tokens, settings.ignore_eos, settings.do_sample = new + 1, True, False
    size = len(pipe.get_tokenizer().get_vocab())
    rng = np.random.default_rng(0)

    def run() -> dict[str, float]:
        # Another prompt each time: it keeps what it has computed of one, and would not again.
        ids = rng.integers(0, size, (1, prompt))
        mask = openvino.Tensor(np.ones_like(ids))
        given = openvino_genai.TokenizedInputs(openvino.Tensor(ids), mask)
        found = pipe.generate(given, settings).perf_metrics
        first = found.get_ttft().mean / 1e3
        return {"prefill": first, "decode": found.get_generate_duration().mean / 1e3 - first}

    return Job(run)


JOBS: dict[str, Callable[..., Any]] = {"gguf": gguf}
