"""The adapters as clients see them: by name and by llama.cpp's numbers, each key its own share.

Which adapters answer a request is decided here: those that it names, in any of three ways. What a
key may not use does not exist for it. Where adapters may be loaded from is a matter of the server's
start, not of who asks: a path outside of those folders is refused, be anything there or not.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pylora.adapters.own_tokenizer import has_own, tokenizer_for
from pylora.errors import ConfigError, PyloraError
from pylora.serving.adapters import AdapterInfo, Registry
from pylora.serving.request import UnknownAdapter
from pylora.web.keys import Key
from pylora.web.problem import Problem, malformed, unknown_model

if TYPE_CHECKING:
    from pylora.formats.base import Checkpoint
    from pylora.text.tokenizer import Tokenizer

Mix = tuple[tuple[str, float], ...]


class Shelf:
    """The registry of a server, and what HTTP adds to it. Threads may share it."""

    def __init__(
        self,
        base: str,
        registry: Registry,
        *,
        folders: Sequence[str | os.PathLike[str]] = (),
        tokenizer: Tokenizer | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        """`base`: the model's name. `folders`: adapters may be loaded from within these; the first
        is where relative paths begin. `checkpoint`: for adapters' own tokenizers."""
        self.base, self.registry = base, registry
        self.folders = [Path(f).resolve() for f in folders]
        self._tokenizer, self._checkpoint = tokenizer, checkpoint
        self._lock = threading.Lock()
        self._numbers: dict[str, int] = {}  # llama.cpp's ids: a name keeps its own
        self._scales: dict[str, float] = {}  # of requests that name no model
        self._own: dict[str, tuple[str, Tokenizer | None]] = {}  # name -> (digest, its tokenizer)

    # ---- what there is ------------------------------------------------------------------------

    def names(self, who: Key) -> list[str]:
        """Those that this key may use."""
        return [info.name for info in self.infos(who)]

    def infos(self, who: Key) -> list[AdapterInfo]:
        """What is known of them."""
        return [info for info in self.registry.list() if who.may(info.name)]

    def missing(self, who: Key, name: str) -> Problem:
        """The 404 of a name, the same for one that is not there and one that is not theirs."""
        return unknown_model(name, [self.base, *self.names(who)])

    def number(self, name: str) -> int:
        """llama.cpp's id of an adapter, which a name keeps when its content changes."""
        with self._lock:
            return self._numbers.setdefault(name, len(self._numbers))

    # ---- which answer a request ---------------------------------------------------------------

    def chosen(self, who: Key, body: Mapping[str, Any]) -> tuple[str, Mix]:
        """(the model's name in the answer, the adapters and their weights): by `model`, which is
        the base's name or an adapter's; by `adapters`; by llama.cpp's `lora`. Without any, the
        scales of POST /lora-adapters. Problem for a name that this key may not use."""
        model = body.get("model")
        names = set(self.names(who))
        if model is not None and model != self.base and model not in names:
            raise self.missing(who, model)
        if "adapters" in body and "lora" in body:
            raise malformed("adapters and lora both say which adapters answer; give one", "lora")
        if "adapters" in body:
            mix = tuple((a["name"], a.get("weight", 1.0)) for a in body["adapters"])
            where = "adapters"
        elif "lora" in body:
            mix, where = self._by_number(body["lora"], names), "lora"
        elif model is not None:
            mix, where = (((model, 1.0),) if model != self.base else ()), "model"
        else:
            with self._lock:
                mix = tuple((name, scale) for name, scale in self._scales.items() if scale)
            where = "model"
            mix = tuple(pair for pair in mix if pair[0] in self.registry)
        listed = [name for name, _ in mix]
        for name in listed:
            if name not in names:
                raise self.missing(who, name)
            if listed.count(name) > 1:
                raise malformed(f"{where} names {name!r} twice; give it one weight", where)
        if where in ("adapters", "lora") and model not in (None, self.base, *listed):
            raise malformed(
                f"model is the adapter {model!r}, and {where} does not name it; let model be "
                f"{self.base!r}, or leave it out",
                "model",
            )
        mix = tuple(pair for pair in mix if pair[1] != 0)
        return model or (mix[0][0] if len(mix) == 1 and mix[0][1] == 1 else self.base), mix

    def _by_number(self, scaled: Sequence[Mapping[str, Any]], names: set[str]) -> Mix:
        with self._lock:
            by_number = {n: name for name, n in self._numbers.items() if name in names}
        mix = []
        for one in scaled:
            name = by_number.get(one["id"])
            if name is None:
                raise malformed(
                    f"there is no adapter with the id {one['id']}; GET /lora-adapters lists them",
                    "lora",
                )
            mix.append((name, one["scale"]))
        return tuple(mix)

    def scales(self, who: Key) -> list[dict[str, Any]]:
        """llama.cpp's list: id, path and scale of each."""
        listed = []
        for info in self.infos(who):
            number = self.number(info.name)
            with self._lock:
                scale = self._scales.get(info.name, 0.0)
            path = str(info.directory or info.name) if who.manage else info.name
            listed.append({"id": number, "path": path, "scale": scale, "name": info.name,
                           "task_name": "", "prompt_prefix": ""})  # fmt: skip
        return listed

    def set_scales(self, who: Key, scaled: Sequence[Mapping[str, Any]]) -> None:
        """llama.cpp's: the scales of requests that name no model; who is not listed gets 0."""
        who.must_manage()
        names = set(self.names(who))
        for name in names:
            self.number(name)
        mix = dict(self._by_number(scaled, names))
        with self._lock:
            self._scales = mix

    def tokenizer(self, mix: Mix) -> Tokenizer | None:
        """The one that an adapter brings which answers alone; None: the model's."""
        if len(mix) != 1 or self._checkpoint is None:
            return None
        try:
            info = self.registry.get(mix[0][0])
        except UnknownAdapter:
            return None
        with self._lock:
            kept = self._own.get(info.name)
        if kept is not None and kept[0] == info.digest:
            return kept[1]
        own = None
        if info.directory is not None and has_own(info.directory):
            found, note = tokenizer_for(self._checkpoint, info.directory, self._tokenizer)
            own = found if note else None
        with self._lock:
            self._own[info.name] = (info.digest, own)
        return own

    # ---- at run time --------------------------------------------------------------------------

    def load(self, who: Key, body: Mapping[str, Any]) -> str:
        """vLLM's load_lora_adapter; returns what is said. Problem for a name that is taken, a path
        that is not allowed, or an adapter that cannot be used."""
        who.must_manage()
        name, replace = body["lora_name"], body.get("load_inplace", False)
        if name == self.base:
            raise malformed(
                f"{name!r} is the base model; give the adapter another name", "lora_name"
            )
        if name in self.registry and not replace:
            raise malformed(
                f"there is an adapter {name!r} already; unload it first, or say load_inplace: true",
                "lora_name",
            )
        folder = self._allowed(body["lora_path"])
        try:
            self.registry.load(name, folder, pinned=body.get("pinned", False), replace=replace)
        except ConfigError as error:
            raise malformed(str(error), "lora_name") from None
        except (PyloraError, OSError) as error:
            raise malformed(f"the adapter cannot be used: {error}", "lora_path") from None
        return f"Success: LoRA adapter '{name}' added successfully."

    def unload(self, who: Key, body: Mapping[str, Any]) -> str:
        """vLLM's unload_lora_adapter. Requests that run keep what they began with."""
        who.must_manage()
        name = body["lora_name"]
        if not who.may(name):
            raise self.missing(who, name)
        try:
            self.registry.unload(name)
        except UnknownAdapter:
            raise self.missing(who, name) from None
        with self._lock:
            self._scales.pop(name, None)
            self._own.pop(name, None)
        return f"Success: LoRA adapter '{name}' removed successfully."

    def _allowed(self, given: str) -> Path:
        """The folder that is meant, if it lies in one that adapters may be loaded from."""
        if not self.folders:
            raise Problem(
                403,
                "this server loads no adapters at run time: start it with --adapters DIR, or with "
                "--load-from DIR for the folder that holds them",
                param="lora_path",
                code="not_allowed",
                kind="permission_error",
            )
        try:
            path = (self.folders[0] / given).resolve()
            inside = any(path.is_relative_to(folder) for folder in self.folders)
        except (OSError, ValueError, RuntimeError):  # a zero in the name, a loop of links
            inside = False
        if not inside:
            raise Problem(
                403,
                "adapters are loaded from the folders that the server was started with "
                "(--adapters, --load-from), and this path is in none of them",
                param="lora_path",
                code="not_allowed",
                kind="permission_error",
            )
        return path
