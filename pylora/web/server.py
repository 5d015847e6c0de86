"""`pylora.Server`: a model, its adapters and the engine behind one HTTP port.

    with pylora.Server("SmolLM2.gguf", adapters="adapters/") as server:  # in a thread of its own
        print(server.url)
    pylora.Server(model).run()  # until Ctrl-C or SIGTERM

What is asked for is in routes.py, who may ask in keys.py. Ending is graceful: nothing new is taken
in, what is being answered ends within `grace` seconds, and what does not is handed back with an
error that says so (503), so that a balancer or the client asks elsewhere.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pylora.errors import ConfigError, FileFormatError, PyloraError, expect
from pylora.extras import need
from pylora.front.load import load
from pylora.front.model import Model
from pylora.generation.sampling import whole_number
from pylora.serving.adapters import Registry
from pylora.serving.engine import Engine
from pylora.serving.request import POOLINGS
from pylora.serving.watch import Watch
from pylora.web import log
from pylora.web.house import House
from pylora.web.keys import Keys
from pylora.web.limits import Limits
from pylora.web.metrics import Metrics
from pylora.web.shelf import Shelf

if TYPE_CHECKING:
    import socket

PORT = 8080
_ADAPTER_BYTES = 2 << 30
_BACKLOG = 2048
_SWITCH = 5e-4  # seconds that the engine's thread waits at most for one that reads a request


class Server:
    """One model behind one port. `start` and `close`, a with block, or `run`.

    Attributes: model, engine, registry (adapters at run time), url.
    """

    def __init__(
        self,
        model: Model | str | os.PathLike[str],
        *,
        adapters: str | os.PathLike[str] | None = None,
        named: Mapping[str, str | os.PathLike[str]] | None = None,
        load_from: Sequence[str | os.PathLike[str]] = (),
        precision: str = "fp32",
        name: str | None = None,
        host: str = "127.0.0.1",
        port: int = PORT,
        api_key: str | Sequence[str] = (),
        api_keys: str | os.PathLike[str] | None = None,
        context: int | None = None,
        max_tokens: int | None = None,
        timeout: float | None = None,
        max_body: int = 8 << 20,
        max_batch: int = 32,
        queue: int = 256,
        kv_bytes: int | None = None,
        prefill_chunk: int = 512,
        most_adapters: int | None = None,
        adapter_bytes: int = _ADAPTER_BYTES,
        grace: float = 30.0,
        cors: Sequence[str] = (),
        page: bool = True,
        pooling: str | None = None,
        tls: dict[str, Any] | None = None,
    ) -> None:
        """model: one that is loaded, which stays open, or a path, which is loaded in `precision`.

        adapters: a folder whose subfolders are adapters, which is watched; named: name -> PEFT
        folder of others; load_from: folders from which more may be loaded at run time. name: what
        the model is called; default: its file's name. api_key: keys that may do everything;
        api_keys: a file of keys (pylora.web.keys). context: tokens of a prompt and its answer
        together, at most the model's; max_tokens: of an answer; timeout: seconds for one; max_body:
        bytes of a request. max_batch requests are computed together, `queue` more may wait.
        kv_bytes: memory for keys and values. most_adapters, adapter_bytes: how many are ready at a
        time; the rest are read when they are asked for. cors: origins whose pages may ask. pooling:
        "last" or "mean", how the rows of a text become an embedding; None: there are none. tls:
        uvicorn's settings (ssl_keyfile, ...).

        Raises what loading raises, ConfigError for settings out of range, FileFormatError for a
        folder that is not there, MissingExtraError without the extra "serve".
        """
        for package in ("starlette", "uvicorn", "llguidance", "prometheus_client"):
            need(package)
        whole_number("port", port, 0)
        if port > 65535:
            raise ConfigError(f"port must be at most 65535, got {port}")
        for setting, value in (("max_body", max_body), ("adapter_bytes", adapter_bytes)):
            whole_number(setting, value, 1)
        for setting, some in (("context", context), ("max_tokens", max_tokens)):
            if some is not None:
                whole_number(setting, some, 1)
        for setting, seconds in (("grace", grace), ("timeout", timeout)):
            if seconds is not None and not 0 <= seconds <= 86400:
                raise ConfigError(f"{setting} must be from 0 to 86400 seconds, got {seconds!r}")
        if pooling is not None and pooling not in POOLINGS:
            raise ConfigError(f"pooling must be {' or '.join(POOLINGS)}, got {pooling!r:.100}")
        keys = Keys.of((api_key,) if isinstance(api_key, str) else api_key, api_keys)
        folders = [Path(f) for f in ([adapters] if adapters is not None else []) + list(load_from)]
        for one in folders:
            if not one.is_dir():
                raise FileFormatError(f"{one} is no folder; adapters are its subfolders")
        self._owns = not isinstance(model, Model)
        self.model = model if isinstance(model, Model) else load(model, precision=precision)
        self.host, self.port, self.grace = host, port, float(grace)
        self._cors, self._page, self._tls = tuple(cors), page, dict(tls or {})
        self._watch: Watch | None = None
        self._http: Any = None
        self._thread: threading.Thread | None = None
        self._socket: socket.socket | None = None
        self._ended = False
        try:
            self._open(
                name, folders, keys, Limits(context or 0, max_tokens, timeout, max_body), max_batch,
                queue, kv_bytes, prefill_chunk, most_adapters, adapter_bytes, pooling,
            )  # fmt: skip
            for known, adapter in self.model.adapters.items():
                self.registry.add(known, adapter)
            for known, folder in (named or {}).items():
                self.registry.load(known, folder)
            if adapters is not None:
                self._watch = Watch(self.registry, adapters)
        except BaseException:
            self._shut()
            raise

    def _open(
        self,
        name: str | None,
        folders: Sequence[Path],
        keys: Keys,
        limits: Limits,
        max_batch: int,
        queue: int,
        kv_bytes: int | None,
        prefill_chunk: int,
        most_adapters: int | None,
        adapter_bytes: int,
        pooling: str | None,
    ) -> None:
        """The engine, and what requests are handled with."""
        import pylora

        model, llama = self.model, self.model.llama
        tokenizer = model.tokenizer
        base = model.checkpoint.path.name.removesuffix(".gguf") if name is None else name
        expect("name", base, "Server(name=...)")
        self.registry = Registry(
            llama, most=most_adapters, most_bytes=adapter_bytes, base=model.checkpoint.load
        )
        metrics = Metrics()
        self.engine = Engine(
            llama, self.registry, kv_bytes=kv_bytes, max_batch=max_batch, queue_limit=queue,
            prefill_chunk=prefill_chunk, on_step=metrics.step,
        )  # fmt: skip
        metrics.watch(self.engine)
        most = self.engine.most_tokens
        if limits.context > most:
            raise ConfigError(
                f"context is {limits.context}, but the model and the memory for keys and values "
                f"(kv_bytes) allow {most} tokens"
            )
        shelf = Shelf(
            base, self.registry, folders=folders, tokenizer=tokenizer, checkpoint=model.checkpoint
        )
        self.house = House(
            self.engine, shelf, tokenizer, llama.config.vocab_size,
            replace(limits, context=limits.context or most), keys, metrics,
            precision=llama.computes,
            pooling=pooling,
            fingerprint=f"pylora-{pylora.__version__}-{llama.computes}-{llama.ops.name}",
        )  # fmt: skip
        _ = self.house.grammars.vocabulary  # before anybody waits for it

    def __repr__(self) -> str:
        where = self.url if self._socket is not None else "not listening"
        return f"Server({self.house.shelf.base}, {len(self.registry.list())} adapters, {where})"

    @property
    def url(self) -> str:
        """Where it listens. PyloraError before it does."""
        if self._socket is None:
            raise PyloraError("this server does not listen yet; call start() or run()")
        host, port = self._socket.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        return f"{'https' if self._tls.get('ssl_certfile') else 'http'}://{shown}:{port}"

    @property
    def unread(self) -> dict[str, str]:
        """Subfolders of `adapters` that cannot be used, and why."""
        return dict(self._watch.errors) if self._watch is not None else {}

    # ---- running ------------------------------------------------------------------------------

    def run(self) -> None:
        """Serves until SIGINT, SIGTERM or `close` of another thread, and then ends gracefully.
        ConfigError where the port cannot be had."""
        self._listen()
        told = {"url": self.url, "model": self.house.shelf.base, "precision": self.house.precision,
                "adapters": len(self.registry.list())}  # fmt: skip
        log.logger.info("listening", extra={"fields": told})
        interval = sys.getswitchinterval()
        sys.setswitchinterval(_SWITCH)  # the process is the server's
        try:
            asyncio.run(self._http.serve(sockets=[self._socket]))
        finally:
            sys.setswitchinterval(interval)
            self._shut()

    def start(self) -> Server:
        """Serves in a thread of its own; returns when it listens. Signals are left alone."""
        self._listen()
        began = self._http.began

        def serve() -> None:
            try:
                asyncio.run(self._http.serve(sockets=[self._socket]))
            finally:
                began.set()

        self._thread = threading.Thread(target=serve, name="pylora-http", daemon=True)
        self._thread.start()
        began.wait()
        return self

    def close(self, grace: float | None = None) -> None:
        """Ends it: what is being answered may go on for `grace` seconds. Closing twice is fine."""
        if self._http is not None:
            self._http.grace = self.grace if grace is None else float(grace)
            self._http.end()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._http is None or not self._http.running:
            self._shut()

    def __enter__(self) -> Server:
        return self if self._thread is not None else self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(0.0 if kind is not None else None)

    def _listen(self) -> None:
        from pylora.web.app import application
        from pylora.web.listen import Http, bound, settings

        if self._ended or self._socket is not None:
            raise PyloraError("a server is started once; make another")
        app = application(self.house, self._cors, self._page)
        config = settings(app, self._tls)
        self._socket = bound(self.host, self.port, _BACKLOG)
        self._http = Http(config, self.house, self.grace)

    def _shut(self) -> None:
        """Everything that is left. Does nothing the second time."""
        if self._ended:
            return
        self._ended = True
        if self._watch is not None:
            self._watch.close()
        if hasattr(self, "house"):
            self.house.close()
        if hasattr(self, "engine"):
            self.engine.close(finish=False)
        if self._socket is not None:
            self._socket.close()
        if self._owns:
            self.model.close()
