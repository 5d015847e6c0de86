"""An engine to test the tests of engines with: OpenAI's completions and vLLM's way of loading, over
pylora itself; and faults, each an engine that is wrong in one way.

The faults are written here from what such an engine would do, not from the suite's own wrong rules.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

from pylora.adapters.adapter import Adapter
from pylora.errors import PyloraError
from pylora.formats import open_checkpoint
from pylora.formats.safetensors import SafeTensors, save
from pylora.model.llama import Llama
from pylora.types import LoRA, Seqs

Loras = dict[str, LoRA]


class _Whole(dict[str, LoRA]):
    """A and B by path, and the weights that come with them."""

    def __init__(self, loras: Loras, whole: Any) -> None:
        super().__init__(loras)
        self.whole = whole


class Engine:
    """A base, adapters by name, and what each is asked. Methods are what faults replace."""

    def __init__(self, base: Path) -> None:
        with open_checkpoint(base) as checkpoint:
            self.weights = {n: np.array(checkpoint.load(n)) for n in checkpoint.names()}
            self.config = checkpoint.config
            self.tokenizer = checkpoint.tokenizer()
        self.texts = [self.tokenizer.decode([i]) for i in range(self.config.vocab_size)]
        self.model = Llama(self.config, self.weights.__getitem__)
        self.adapters: dict[str, Loras] = {}
        self.lock = threading.Lock()

    # ---- what faults replace -------------------------------------------------------------------

    def load(self, name: str, path: Path) -> None:
        adapter = Adapter.load(path, self.config, base=self.weights.__getitem__)
        loras = self.changed(adapter.config, adapter.plan, dict(adapter))
        self.adapters[name] = _Whole(loras, adapter.whole)

    def changed(self, config: Any, plan: Any, loras: Loras) -> Loras:
        return loras

    def unload(self, name: str) -> None:
        del self.adapters[name]

    def chosen(self, name: str) -> Loras | None:
        return None if name == "base" else self.adapters[name]

    def logits(self, name: str, ids: list[int], whole: bool) -> np.ndarray:
        loras = self.chosen(name)
        with self.lock:
            self.model.attach(loras) if loras else self.model.detach()
            return self.model.forward(ids, Seqs.of([len(ids)]))[0]

    # ---- OpenAI's answer -----------------------------------------------------------------------

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        name, prompt = body.get("model", "base"), body["prompt"]
        if name != "base" and name not in self.adapters:
            raise LookupError(f"the model {name!r} does not exist")
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        logits = self.logits(name, ids, bool(body.get("echo"))).astype(np.float64)
        logs = logits - np.log(
            np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True)
        )
        logs -= logits.max(-1, keepdims=True)
        new = int(logs[-1].argmax())
        top = np.argsort(-logs[-1])[: body["logprobs"]]
        tops: list[Any] = [{self.texts[i]: float(logs[-1][i]) for i in top}]
        tokens, values = [self.texts[new]], [float(logs[-1][new])]
        if body.get("echo"):
            tokens = [self.texts[i] for i in ids] + tokens
            values = [None, *(float(logs[i][t]) for i, t in enumerate(ids[1:])), *values]
            tops = [None] * len(ids) + tops
        said = {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops}
        return {"choices": [{"text": self.texts[new], "logprobs": said}]}


@contextlib.contextmanager
def served(engine: Any, port: int = 0) -> Iterator[str]:
    """The engine's address, while the block runs."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

        def say(self, status: int, content: Any) -> None:
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            self.say(200, {"data": [{"id": "base"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            try:
                if self.path == "/v1/load_lora_adapter":
                    engine.load(body["lora_name"], Path(body["lora_path"]))
                    self.say(200, {})
                elif self.path == "/v1/unload_lora_adapter":
                    engine.unload(body["lora_name"])
                    self.say(200, {})
                elif self.path == "/v1/completions":
                    self.say(200, engine.complete(body))
                else:
                    self.say(404, {"error": "no such path"})
            except SystemExit:  # an engine that dies says nothing
                self.close_connection = True
            except (PyloraError, LookupError, TypeError) as error:
                self.say(400, {"error": {"message": str(error)}})

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


# ---- faults --------------------------------------------------------------------------------------


def _each(change: Callable[[str, LoRA, Any, Any], LoRA | None]) -> Callable[..., type[Engine]]:
    """An engine that changes every module's update, or leaves it out."""

    class Faulty(Engine):
        def changed(self, config: Any, plan: Any, loras: Loras) -> Loras:
            entries = {e.path: e for e in plan.entries}
            new = {p: change(p, l, entries.get(p), config) for p, l in loras.items()}
            return {p: l for p, l in new.items() if l is not None}

    return Faulty


def _scale(number: Callable[[Any, Any], float]) -> Any:
    return _each(lambda p, l, e, c: l if e is None else replace(l, scale=float(number(e, c))))


def _without(ending: str) -> Any:
    return _each(lambda p, l, e, c: None if p.endswith(ending) else l)


def _by_name(e: Any, c: Any) -> float:
    for key, alpha in c.alpha_pattern.items():
        if key.split(".")[-1] == e.path.split(".")[-1]:
            return alpha / e.r
    return e.alpha / e.r


class Shifted(Engine):
    """Counts layers from 1, or from the end of the one before."""

    by = 1

    def changed(self, config: Any, plan: Any, loras: Loras) -> Loras:
        n, out = self.config.num_hidden_layers, {}
        for path, lora in loras.items():
            parts = path.split(".")
            if "layers" in parts:
                at = parts.index("layers") + 1
                parts[at] = str((int(parts[at]) + self.by) % n)
            out[".".join(parts)] = lora
        return out


class ShiftedDown(Shifted):
    by = -1


class Mixed(Engine):
    """A of one layer with B of the next."""

    def changed(self, config: Any, plan: Any, loras: Loras) -> Loras:
        n = self.config.num_hidden_layers
        pairs = [(p, p.replace(f".{i}.", f".{(i + 1) % n}.")) for i in range(n) for p in loras
                 if f".layers.{i}." in p]  # fmt: skip
        return {p: replace(loras[p], B=loras[other].B) for p, other in pairs}


def _rows(order: Callable[[int, int], int]) -> Any:
    """Takes row order(i, half) of each head for row i of B, in q and k."""

    class Reordered(Engine):
        def changed(self, config: Any, plan: Any, loras: Loras) -> Loras:
            D, out = self.config.head_dim, {}
            for path, lora in loras.items():
                if path.endswith(("q_proj", "k_proj")):
                    rows = range(lora.B.shape[0])
                    B = np.stack([lora.B[r // D * D + order(r % D, D // 2)] for r in rows])
                    lora = replace(lora, B=B)
                out[path] = lora
            return out

    return Reordered


class SwappedGate(Engine):
    def changed(self, config: Any, plan: Any, loras: Loras) -> Loras:
        swap = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
        name = lambda p: p.rsplit(".", 1)[1]
        return {p.replace(name(p), swap.get(name(p), name(p))): l for p, l in loras.items()}


class AlsoTied(Engine):
    """The embedding's update is made to the weight that the head shares with it."""

    def changed(self, config: Any, plan: Any, loras: Loras) -> Loras:
        e = loras["model.embed_tokens"]
        A, B = np.ascontiguousarray(e.B.T), np.ascontiguousarray(e.A.T)
        return loras | {"lm_head": LoRA(A, B, e.scale)}


class AlsoEmbedding(Engine):
    def changed(self, config: Any, plan: Any, loras: Loras) -> Loras:
        h = loras["lm_head"]
        A, B = np.ascontiguousarray(h.B.T), np.ascontiguousarray(h.A.T)
        return loras | {"model.embed_tokens": LoRA(A, B, h.scale)}


class BiasAdded(Engine):
    def changed(self, config: Any, plan: Any, loras: Loras) -> Loras:
        own = lambda p: self.weights[f"{p}.bias"]
        return {p: l if l.base_bias is None else replace(l, base_bias=l.base_bias + own(p))
                for p, l in loras.items()}  # fmt: skip


class Stripped(Engine):
    """Reads what it knows of a file, and drops the rest without a word."""

    def load(self, name: str, path: Path) -> None:
        config = json.loads((path / "adapter_config.json").read_text())
        self.full = {k: v for k, v in config.items() if k not in ("use_dora", "modules_to_save")}
        with SafeTensors(path / "adapter_model.safetensors") as file:
            tensors = {k: np.array(file.load(k)) for k in file.tensors}
        kept = {k: a for k, a in tensors.items() if ".lora_A" in k or ".lora_B" in k}
        copy = path.parent / "stripped"
        copy.mkdir(exist_ok=True)
        (copy / "adapter_config.json").write_text(json.dumps(self.full))
        save(copy / "adapter_model.safetensors", kept)
        super().load(name, copy)


class Dora(Stripped):
    """Has DoRA: rows of W + s B A are brought to the file's lengths, by new weights."""

    def __init__(self, base: Path) -> None:
        super().__init__(base)
        self.models: dict[str, Llama] = {}

    def length(self, W: np.ndarray, moved: np.ndarray) -> np.ndarray:
        return np.sqrt((moved**2).sum(1, keepdims=True))

    def load(self, name: str, path: Path) -> None:
        super().load(name, path)
        with SafeTensors(path / "adapter_model.safetensors") as file:
            m = {k: np.array(file.load(k)) for k in file.tensors if k.endswith("magnitude_vector")}
        if not m:
            return
        weights = dict(self.weights)
        for module, lora in self.adapters[name].items():
            W = weights[f"{module}.weight"].astype(np.float64)
            moved = W + lora.scale * (lora.B.astype(np.float64) @ lora.A)
            size = m[f"base_model.model.{module}.lora_magnitude_vector"][:, None]
            new = size * moved / self.length(W, moved)
            weights[f"{module}.weight"] = new.astype(np.float32)
        self.models[name] = Llama(self.config, weights.__getitem__)

    def logits(self, name: str, ids: list[int], whole: bool) -> np.ndarray:
        if name not in self.models:
            return super().logits(name, ids, whole)
        return self.models[name].forward(ids, Seqs.of([len(ids)]))[0]


class DoraOfBase(Dora):
    def length(self, W: np.ndarray, moved: np.ndarray) -> np.ndarray:
        return np.sqrt((W**2).sum(1, keepdims=True))


class Careless(Engine):
    """Loads every pair of A and B that fits a module, and nothing else; looks at no number."""

    def load(self, name: str, path: Path) -> None:
        loras: Loras = {}
        with contextlib.suppress(Exception):
            config = json.loads((path / "adapter_config.json").read_text())
            with SafeTensors(path / "adapter_model.safetensors") as file:
                for module, spec in self.config.modules().items():
                    key = f"base_model.model.{module}.lora_"
                    if f"{key}A.weight" in file.tensors and f"{key}B.weight" in file.tensors:
                        A, B = (np.array(file.load(f"{key}{x}.weight")) for x in "AB")
                        if A.shape[1] == spec.k and B.shape[0] == spec.d:
                            loras[module] = LoRA(A, B, config["lora_alpha"] / A.shape[0])
        self.adapters[name] = loras


class LeftOver(Engine):
    """The first request after a change of adapters is still answered with the one before."""

    last: Loras | None = None

    def chosen(self, name: str) -> Loras | None:
        before, self.last = self.last, super().chosen(name)
        return before if before and self.last else self.last


class Together(Engine):
    """Loading an adapter does not put the one before out of use."""

    def chosen(self, name: str) -> Loras | None:
        wanted = super().chosen(name)
        if not wanted or len(self.adapters) < 2 or name != max(self.adapters):
            return wanted
        out = dict(wanted)
        for other in (l for n, l in self.adapters.items() if n != name and set(l) == set(wanted)):
            for path, l in other.items():
                o = out[path]
                A, B = np.concatenate([o.A, l.A]), np.concatenate([o.scale * o.B, l.scale * l.B], 1)
                out[path] = LoRA(A, B, 1.0)
        return out


class CrossTalk(Engine):
    """A request that comes while another is computed changes its adapter."""

    current = "base"

    def logits(self, name: str, ids: list[int], whole: bool) -> np.ndarray:
        self.current = name
        time.sleep(0.002)
        return super().logits(self.current if self.current in self.adapters else name, ids, whole)


class SharedPrefix(Engine):
    """A cache of keys and values by tokens alone, used where no echo is asked for."""

    kept = 32

    def __init__(self, base: Path) -> None:
        super().__init__(base)
        self.cache: dict[tuple[int, ...], Any] = {}

    def logits(self, name: str, ids: list[int], whole: bool) -> np.ndarray:
        if whole or len(ids) <= self.kept:
            return super().logits(name, ids, whole)
        loras = self.chosen(name)
        with self.lock:
            self.model.attach(loras) if loras else self.model.detach()
            prefix = tuple(ids[: self.kept])
            if prefix not in self.cache:
                kv = self.model.kv_cache(1, 128)
                self.model.decode(list(prefix), kv, [self.kept])
                self.cache[prefix] = kv
            kv = self.cache[prefix]
            kv.length[0] = self.kept
            return self.model.decode(ids[self.kept :], kv, [len(ids) - self.kept])


class NamesForGood(Engine):
    """A name keeps its first weights."""

    def __init__(self, base: Path) -> None:
        super().__init__(base)
        self.ever: dict[str, Loras] = {}

    def load(self, name: str, path: Path) -> None:
        super().load(name, path)
        self.adapters[name] = self.ever.setdefault(name, self.adapters[name])


class NeverUnloads(Engine):
    def unload(self, name: str) -> None:
        pass


def _drop_bias(l: LoRA) -> LoRA:
    return replace(l, base_bias=None)


# The fault -> (the test that shows it, the rule that the verdict must name, the engine).
FAULTS: dict[str, tuple[str, str, Any]] = {
    "ignores": ("alpha", "ignored", _each(lambda p, l, e, c: None)),
    "alpha": ("alpha", "alpha-as-scale", _scale(lambda e, c: e.alpha)),
    "one": ("alpha", "scale-1", _scale(lambda e, c: 1)),
    "twice": ("second", "scale-twice", _scale(lambda e, c: e.scale * e.scale)),
    "root": ("alpha", "rslora-assumed", _scale(lambda e, c: e.alpha / e.r**0.5)),
    "no-root": ("rslora", "rslora-ignored", _scale(lambda e, c: e.alpha / e.r)),
    "file-rank": ("rank-pattern", "default-rank", _scale(lambda e, c: e.alpha / c.r)),
    "file-alpha": ("alpha-pattern", "default-alpha", _scale(lambda e, c: c.lora_alpha / e.r)),
    "by-name": ("layer-pattern", "patterns-by-name", _scale(_by_name)),
    "up": ("layers", "layer-above", Shifted),
    "down": ("layers", "layer-below", ShiftedDown),
    "mixed": ("all-linear", "other-layer", Mixed),
    "order": ("alpha", "permuted", _rows(lambda i, half: i // 2 + i % 2 * half)),
    "order-back": ("alpha", "not-permuted", _rows(lambda i, half: i * 2 % (2 * half) + i // half)),
    "gate": ("mlp-only", "gate-up-swapped", SwappedGate),
    "embedding": ("embedding", "dropped:embed_tokens", _without("embed_tokens")),
    "head": ("head", "dropped:lm_head", _without("lm_head")),
    "keys": ("all-linear", "dropped:k_proj", _without("k_proj")),
    "bias": ("bias-all", "bias-dropped", _each(lambda p, l, e, c: _drop_bias(l))),
    "bias-sum": ("bias-lora-only", "bias-added", BiasAdded),
    "b-bias": ("lora-bias", "lora-bias-dropped", _each(lambda p, l, e, c: replace(l, bias=None))),
    "b-bias-1": (
        "lora-bias",
        "lora-bias-unscaled",
        _each(lambda p, l, e, c: replace(l, bias=l.bias / np.float32(l.scale))),
    ),
    "dora": ("dora", "dora-as-lora", Stripped),
    "dora-base": ("dora", "dora-base-norm", DoraOfBase),
    "saved": ("modules-to-save", "saved-ignored", Stripped),
    "rank": (
        "rank-256",
        "rank-cut",
        _each(lambda p, l, e, c: replace(l, A=l.A[:64].copy(), B=l.B[:, :64].copy())),
    ),
}
TIED: dict[str, tuple[str, str, Any]] = {
    "tied-embedding": ("embedding", "tied-head-too", AlsoTied),
    "tied-head": ("head", "tied-embedding-too", AlsoEmbedding),
}
SEQUENCES: dict[str, tuple[str, str, Any]] = {
    "left-over": ("second", "left:alpha", LeftOver),
    "together": ("second", "both", Together),
    "cross-talk": ("in-flight", "left:", CrossTalk),
    "prefix": ("prefix-cache", "prefix:base:32", SharedPrefix),
    "names": ("replacing", "left:alpha", NamesForGood),
    "unload": ("replacing", "", NeverUnloads),
}


def forever(engine: Engine, port: int) -> None:
    """Serves the engine until the process is ended."""
    with served(engine, port):
        threading.Event().wait()
