"""How an engine is given its adapters: vLLM's way, llama.cpp's, a name, a field, a restart.

`use` makes an adapter ready and returns what a request must hold to be answered with it. Whether
the answers are right is not looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import PurePath
from typing import Any

from pylora.conformance.engines.http import EngineError, Http, Refusal
from pylora.conformance.engines.process import Server
from pylora.errors import ConfigError

Body = Mapping[str, Any]


class NotHere(EngineError):
    """The adapter cannot be tried: the engine was started without it."""


class Loading:
    """What all ways have in common. `form`: which files it takes; `mixes`: whether requests with
    several adapters may be in flight; `renames`: whether a name can be given to other weights."""

    form, mixes, renames = "peft", True, False

    def __init__(self, server: Server) -> None:
        self.server = server
        self.base = ""

    def open(self, base: str, adapters: list[str]) -> Http:
        """The engine with a base (a path) and no adapter in use. `adapters`: files it will get."""
        self.base = base
        return self.server.up(base)

    def plain(self) -> Body:
        """What a request to the base alone holds."""
        return {}

    def use(self, name: str, path: str) -> Body:
        """Makes the adapter ready under a name. Refusal where the engine will not have it."""
        raise NotImplementedError

    def drop(self, name: str) -> None:
        """Takes an adapter away again."""

    def http(self) -> Http:
        """Where to ask now."""
        assert self.server.http is not None
        return self.server.http


def base_model(http: Http) -> str | None:
    """The engine's own name of its base, if it lists one."""
    try:
        listed = http.get("/v1/models")["data"]
        roots = [m["id"] for m in listed if not m.get("parent")] or [m["id"] for m in listed]
        return str(roots[0])
    except (EngineError, KeyError, IndexError, TypeError, AttributeError):
        return None


class Vllm(Loading):
    """vLLM's and SGLang's: an adapter is loaded by path under a name, and is then a `model`."""

    renames = True
    _LOAD, _UNLOAD = "load_lora_adapter", "unload_lora_adapter"

    def __init__(self, server: Server) -> None:
        super().__init__(server)
        self._prefix = "/v1/"
        self._model: str | None = None
        self.loaded: set[str] = set()

    def open(self, base: str, adapters: list[str]) -> Http:
        http = super().open(base, adapters)
        self._model, self.loaded = base_model(http), set()
        return http

    def plain(self) -> Body:
        return {} if self._model is None else {"model": self._model}

    def use(self, name: str, path: str) -> Body:
        if name not in self.loaded:
            self._post(self._LOAD, {"lora_name": name, "lora_path": path})
            self.loaded.add(name)
        # SGLang chooses by `lora_path`, which is the name there; vLLM ignores it.
        return {"model": name, "lora_path": name} if self._prefix == "/" else {"model": name}

    def drop(self, name: str) -> None:
        self.loaded.discard(name)
        self._post(self._UNLOAD, {"lora_name": name})

    def _post(self, what: str, body: Body) -> None:
        try:
            self.http().post(self._prefix + what, body)
        except Refusal as refusal:
            if refusal.status not in (404, 405) or self._prefix == "/" or self.loaded:
                raise
            self._prefix = "/"
            try:
                self.http().post(self._prefix + what, body)
            except Refusal as second:
                if second.status in (404, 405):
                    self._prefix = "/v1/"
                    raise NotHere(
                        f"{self.http()} has no {what}; is it started so that it loads adapters "
                        "(vLLM: VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora)?"
                    ) from None
                raise


class LlamaCpp(Loading):
    """llama-server's: adapters are named when it starts; a request says the scale of each."""

    form = "gguf"

    def open(self, base: str, adapters: list[str]) -> Http:
        self.base = base
        http = self.server.up(base, loras=adapters)
        self._ids = {
            PurePath(a["path"]).parts[-4:]: int(a["id"]) for a in http.get("/lora-adapters")
        }
        return http

    def plain(self) -> Body:
        return {"lora": [{"id": i, "scale": 0.0} for i in self._ids.values()]}

    def use(self, name: str, path: str) -> Body:
        number = self._ids.get(PurePath(path).parts[-4:])
        if number is None:
            raise NotHere(f"the engine was started without --lora {path}")
        return {"lora": [{"id": number, "scale": 1.0}]}


class LlamaCppGlobal(LlamaCpp):
    """The same, with the scales of the whole server set before each request."""

    mixes = False

    def _set(self, wanted: int | None) -> Body:
        scales = [{"id": i, "scale": float(i == wanted)} for i in self._ids.values()]
        self.http().post("/lora-adapters", scales)
        return {}

    def plain(self) -> Body:
        return self._set(None)

    def use(self, name: str, path: str) -> Body:
        super().use(name, path)
        return self._set(self._ids[PurePath(path).parts[-4:]])


class ModelName(Loading):
    """Adapters that the engine has under names already: the name is the request's `model`."""

    def __init__(self, server: Server, template: str = "{name}") -> None:
        super().__init__(server)
        self.template = template

    def open(self, base: str, adapters: list[str]) -> Http:
        http = super().open(base, adapters)
        self._model = base_model(http)
        return http

    def plain(self) -> Body:
        return {} if self._model is None else {"model": self._model}

    def use(self, name: str, path: str) -> Body:
        return {"model": self.template.replace("{name}", name).replace("{path}", path)}


class Field(Loading):
    """mlx_lm.server's: each request holds the path of its adapter, in the field `adapters`."""

    form = "mlx"

    def plain(self) -> Body:
        return {"model": "default_model"}

    def use(self, name: str, path: str) -> Body:
        # A name that the server does not know is a path for it: so the base is named, too.
        return {"model": self.base, "adapters": path}


class Restart(Loading):
    """One adapter for the life of a process: the engine is started anew for each."""

    mixes = False

    def plain(self) -> Body:
        self.server.up(self.base)
        return {}

    def use(self, name: str, path: str) -> Body:
        self.server.up(self.base, path)
        return {}


WAYS: dict[str, Callable[[Server], Loading]] = {
    "vllm": Vllm,
    "llama.cpp": LlamaCpp,
    "llama.cpp-global": LlamaCppGlobal,
    "model-name": ModelName,
    "mlx": Field,
    "command": Restart,
}


def loading(way: str, server: Server, form: str | None) -> Loading:
    """The way of this name. ConfigError for an unknown one, or one that the server cannot have."""
    if way not in WAYS:
        raise ConfigError(
            f"there is no way {way!r} of loading adapters; there are {', '.join(WAYS)}"
        )
    if way == "command" and (server.template is None or "{adapter}" not in server.template):
        raise ConfigError("adapters by command need --restart with {adapter} in the command")
    found = WAYS[way](server)
    if form is not None:
        if form not in ("peft", "gguf", "mlx"):
            raise ConfigError(f"there is no form {form!r}; there are peft, gguf, mlx")
        found.form = form
    return found
