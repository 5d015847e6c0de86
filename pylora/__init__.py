"""pylora: run, fine-tune, swap, merge and unmerge LoRA adapters without a deep-learning framework.

    import pylora

    model = pylora.load("SmolLM2.gguf", adapter="runs/tone", precision="bf16")
    print(model.chat("Who are you?"))
    for piece in model.generate("Once upon a time", stream=True, max_new_tokens=40):
        print(piece, end="", flush=True)

    model.train("data.jsonl", "runs/new", adapter="new", r=8, epochs=3)  # and uses it from then on
    model.adapters.use({"default": 0.5, "new": 0.5})  # several at once, weighted; None: the base
    print(model.score("The sky is blue.").perplexity)
    model.merge("merged")  # a Hugging Face directory; `pylora unmerge` takes it apart again

`help(pylora.load)` and `help(pylora.Model)` say more; at the terminal, `pylora --help` and
`pylora chat MODEL`. What goes wrong is a `pylora.PyloraError`, whose text says what to do.

The parts, each usable alone (docs/architecture.md shows how they fit):

    pylora.formats      open_checkpoint: GGUF files and Hugging Face directories
    pylora.text         tokenizers and chat templates
    pylora.model        Llama and its layers, on token ids
    pylora.adapters     LoraConfig, Plan, Adapter, AdapterPool; PEFT directories
    pylora.training     load_examples, TrainConfig, train
    pylora.generation   generate, stream, Sampling
    pylora.merging      merge and exact unmerge
    pylora.serving      Engine: many requests at once, each with its adapters
    pylora.web          Server: the same behind HTTP
    pylora.check        proofs of gradients and merging on a real model
    pylora.conformance  laws that test any implementation of LoRA
    pylora.reference    every operation, as the paper writes it
    pylora.backends     c, numpy, cuda, cupy: who computes; `pylora.use` chooses

Names are imported when first used, so that `import pylora` costs no more than NumPy.
"""

import _signal
import sys

# A command that is interrupted while it still imports ends without a traceback: until it listens
# (commands/signals.py), by the system's own rule. For those who import pylora nothing changes.
# _signal is part of the interpreter; the module signal would take its own time to import.
_argv = getattr(sys, "argv", None) or [""]
_command = sys.orig_argv[-len(_argv) :][:1] if _argv[0] == "-m" else _argv[:1]
if _command and _command[0].replace("\\", "/").rpartition("/")[2] in ("pylora", "pylora.exe"):
    if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
        _signal.signal(_signal.SIGINT, _signal.SIG_DFL)

import difflib
import importlib
from typing import TYPE_CHECKING, Any

from pylora.backends import use

if TYPE_CHECKING:
    from pylora.adapters.adapter import Adapter, parameters
    from pylora.adapters.combine import combine
    from pylora.adapters.loraconfig import LoraConfig
    from pylora.adapters.plan import Plan, resolve
    from pylora.adapters.pool import AdapterPool
    from pylora.errors import PyloraError
    from pylora.formats import open_checkpoint
    from pylora.front.load import generate, load, train
    from pylora.front.model import Model
    from pylora.merging.merge import merge_checkpoint, unmerge_checkpoint
    from pylora.model.attention import Attention
    from pylora.model.block import Block
    from pylora.model.config import LlamaConfig, ModuleSpec
    from pylora.model.embedding import Embedding
    from pylora.model.kvcache import KVCache
    from pylora.model.linear import DropKey, LoRAGrad, LoRALinear
    from pylora.model.llama import IGNORE, Llama
    from pylora.types import LoRA, Seqs
    from pylora.web.server import Server

__version__ = "0.1.0"

_HOME = {
    "Adapter": "adapters.adapter",
    "AdapterPool": "adapters.pool",
    "Attention": "model.attention",
    "Block": "model.block",
    "DropKey": "model.linear",
    "Embedding": "model.embedding",
    "IGNORE": "model.llama",
    "KVCache": "model.kvcache",
    "Llama": "model.llama",
    "LlamaConfig": "model.config",
    "LoRA": "types",
    "LoRAGrad": "model.linear",
    "LoRALinear": "model.linear",
    "LoraConfig": "adapters.loraconfig",
    "Model": "front.model",
    "ModuleSpec": "model.config",
    "Plan": "adapters.plan",
    "PyloraError": "errors",
    "Seqs": "types",
    "Server": "web.server",
    "combine": "adapters.combine",
    "generate": "front.load",
    "load": "front.load",
    "merge_checkpoint": "merging.merge",
    "open_checkpoint": "formats",
    "parameters": "adapters.adapter",
    "resolve": "adapters.plan",
    "train": "front.load",
    "unmerge_checkpoint": "merging.merge",
}

__all__ = [
    "IGNORE",
    "Adapter",
    "AdapterPool",
    "Attention",
    "Block",
    "DropKey",
    "Embedding",
    "KVCache",
    "Llama",
    "LlamaConfig",
    "LoRA",
    "LoRAGrad",
    "LoRALinear",
    "LoraConfig",
    "Model",
    "ModuleSpec",
    "Plan",
    "PyloraError",
    "Seqs",
    "Server",
    "__version__",
    "build_info",
    "combine",
    "generate",
    "load",
    "merge_checkpoint",
    "open_checkpoint",
    "parameters",
    "resolve",
    "set_num_threads",
    "train",
    "unmerge_checkpoint",
    "use",
]


_WINGS = frozenset(
    "adapters backends check conformance errors files formats front generation merging model "
    "numbers ops reference serving text training types web".split()
)
# What the same things are called elsewhere, and what people try.
_MEANT = {
    "from_pretrained": "load",
    "AutoModelForCausalLM": "load",
    "AutoPeftModelForCausalLM": "load",
    "AutoTokenizer": "load(path).tokenizer",
    "PeftModel": "load(path, adapter=...)",
    "get_peft_model": "load(path).train(data)",
    "LoraModel": "Model",
    "Trainer": "load(path).train(data)",
    "SFTTrainer": "load(path).train(data)",
    "TrainConfig": "training.config.TrainConfig",
    "load_examples": "training.examples.load_examples",
    "Tokenizer": "text.tokenizer.Tokenizer",
    "chat": "load(path).chat(message)",
    "merge": "load(path, adapter=...).merge(out)",
    "unmerge": "unmerge_checkpoint(merged, out)",
    "plan": "load(path).plan()",
    "score": "load(path).score(text)",
    "stream_generate": "load(path).generate(text, stream=True)",
    "info": "build_info()",
    "set_backend": "use(backend)",
}


def __getattr__(name: str) -> Any:
    if name in _WINGS:
        return importlib.import_module(f"pylora.{name}")
    if name not in _HOME:
        close = difflib.get_close_matches(name, __all__, n=1)
        meant = _MEANT.get(name) or next(iter(close), "")
        hint = f"; did you mean pylora.{meant}?" if meant and not name.startswith("_") else ""
        raise AttributeError(f"module 'pylora' has no attribute {name!r}{hint}")
    value = getattr(importlib.import_module(f"pylora.{_HOME[name]}"), name)
    globals()[name] = value  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


def build_info() -> dict[str, Any]:
    """What computes here: versions, backends, and the core's instruction sets and threads.

    `backend` is the one in use; "isa", "isas" and "num_threads" are there where the C core is.
    "precisions" are those that the backend computes as such here (pylora.numbers.precision).
    """
    import platform

    import numpy

    from pylora import backends
    from pylora.numbers.precision import PRECISIONS

    names = backends.available()
    info: dict[str, Any] = {
        "pylora": __version__,
        "python": platform.python_version(),
        "numpy": numpy.__version__,
        "machine": platform.machine(),
        "processor": _processor(),
        "system": platform.system(),
        "backend": backends.get().name,
        "backends": list(names),
    }
    info["precisions"] = [p for p in PRECISIONS if _computes(backends.get(), p)]
    if "c" in names:
        core: Any = backends.get("c")
        info |= {"isa": core.isa, "isas": core.isas(), "num_threads": core.num_threads}
    return info


def set_num_threads(n: int) -> None:
    """Threads that one operation uses, 1 to 256, for the whole process. It changes no bit of any
    result. BackendError where the backend in use has none of its own (numpy, cupy)."""
    from pylora import backends
    from pylora.errors import BackendError

    ops: Any = backends.get()
    if not hasattr(ops, "set_num_threads"):
        raise BackendError(f"the {ops.name} backend has no threads of its own to set")
    ops.set_num_threads(n)


def _computes(ops: Any, precision: str) -> bool:
    """Whether a backend computes in this precision, and in no other in its place."""
    from pylora.errors import PyloraError

    try:
        return bool(ops.computes(precision) == precision)
    except PyloraError:
        return False


def _processor() -> str:
    """What the machine calls its processor."""
    import platform

    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as info:
            models = (line for line in info if line.startswith("model name"))
            names = [line.split(":", 1)[1].strip() for line in models]
    except OSError:  # not Linux
        names = []
    return names[0] if names else platform.processor() or platform.machine()
