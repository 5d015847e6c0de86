"""The GGUF files that are compared on, and LoRA adapters for them in llama.cpp's format.

Gemma 3's and Qwen2.5's Q4_K_M are what people download. SmolLM2's comes as Q4_1 alone; Q4_0, Q8_0
and Q4_K_M are made of it by llama.cpp's own quantizer, once, into the cache folder: which blocks a
tensor gets there is llama.cpp's choice, the values are good enough to be multiplied.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from setting import ALPHA

KINDS = {"Q4_0": 2, "Q8_0": 7, "Q4_K_M": 15}  # llama.cpp's numbers of them (llama_ftype)
SOURCES = {"smollm2-135m": "smollm2", "gemma3-270m": "gemma", "qwen2.5-0.5b": "qwen"}
AS_THEY_COME = {"smollm2-135m": "Q4_1", "gemma3-270m": "Q4_K_M", "qwen2.5-0.5b": "Q4_K_M"}
LINEAR = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


@dataclass(frozen=True)
class File:
    """A model's file: a name of setting.GEOMETRIES, and the kind that llama.cpp calls it."""

    model: str
    kind: str
    path: Path

    def read_bytes(self) -> int:
        """Of it, what is read for each token: all but an embedding beside a head of its own."""
        from pylora.formats.gguf_split import read_gguf

        tensors = read_gguf(self.path).tensors
        total = self.path.stat().st_size
        if "output.weight" in tensors:
            unread = tensors["token_embd.weight"]
            total -= unread.end - unread.start
        return total


def get(model: str, kind: str, llama_python: str | None, say: Any = print) -> File:
    """The file, fetched or made. Raises PyloraError or RuntimeError saying why it is not there."""
    from pylora.demo.fetch import MODELS, cache_folder, fetch

    source = fetch(MODELS[SOURCES[model]], say=say)
    if kind == AS_THEY_COME[model]:
        return File(model, kind, source)
    if llama_python is None:
        raise RuntimeError(f"{kind} is made by llama.cpp's quantizer, and there is no llama.cpp")
    path = cache_folder() / "bench" / f"{model}.{kind}.gguf"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            command = [llama_python, str(Path(__file__).resolve()), str(source), str(made), kind]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                why = (done.stderr.strip() or "no reason given").splitlines()[-1]
                raise RuntimeError(f"llama.cpp made no {kind} of {source.name}: {why}")
            os.replace(made, path)
    return File(model, kind, path)


def quantize(source: str, target: str, kind: str) -> None:
    """By llama.cpp, in the interpreter that has it."""
    import llama_cpp

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread, settings.allow_requantize = KINDS[kind], 2, True
    status = llama_cpp.llama_model_quantize(source.encode(), target.encode(), settings)
    if status:
        raise SystemExit(f"llama_model_quantize gave {status}")


def write_adapter(file: File, rank: int, path: Path) -> Path:
    """A LoRA adapter of random numbers on all linear modules, as llama.cpp reads one."""
    import gguf

    from pylora.formats.gguf_split import read_gguf

    header, rng = read_gguf(file.path), np.random.default_rng(rank)
    writer = gguf.GGUFWriter(str(path), header.metadata["general.architecture"])
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(ALPHA))
    for name, tensor in header.tensors.items():
        if name.startswith("blk.") and name.split(".")[2] in LINEAR and name.endswith(".weight"):
            d, k = tensor.shape
            A = rng.standard_normal((rank, k), np.float32) / np.float32(np.sqrt(k))
            B = rng.standard_normal((d, rank), np.float32) * np.float32(0.01)
            writer.add_tensor(f"{name}.lora_a", A)
            writer.add_tensor(f"{name}.lora_b", B)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


if __name__ == "__main__":
    quantize(*sys.argv[1:])
