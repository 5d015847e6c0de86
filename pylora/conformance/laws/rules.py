"""The oracle of plans: statements T-1 to T-9, S-1 and S-2 of the specification, written out.

    Rules(config, modules).plan()   {path: (r, alpha, scale)}, or Refused with the reason

Each rule is a method, so that a mutant can have another one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

Planned = dict[str, tuple[int, float, float]]
PATTERNS = ("rank_pattern", "alpha_pattern")


@lru_cache(maxsize=10_000)  # re keeps 512, which are too few for the patterns of a run
def expression(pattern: str) -> re.Pattern[str]:
    """The compiled pattern; Refused for one that is none."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise Refused(f"{pattern!r} is no regular expression: {error}") from None


class Refused(Exception):
    """The settings are not to be accepted; the text says why."""


class Rules:
    """Settings and the modules of a model, {path: (d, k)}."""

    def __init__(self, config: Mapping[str, Any], modules: Mapping[str, tuple[int, int]]) -> None:
        self.config, self.modules = config, modules

    def plan(self) -> Planned:
        """Each adapted module with its rank, alpha and scale."""
        self.check()
        chosen = [path for path in self.modules if self.chosen(path)]
        if not chosen:
            raise Refused("no module is left")
        for name in PATTERNS:
            for key in self.config.get(name) or {}:
                if not any(self.pattern_matches(key, path) for path in chosen):
                    raise Refused(f"{name} {key!r} matches no target")
        out: Planned = {}
        for path in chosen:
            r = self.value("rank_pattern", path, self.config["r"])
            alpha = self.value("alpha_pattern", path, self.config["lora_alpha"])
            out[path] = r, alpha, self.scale(r, alpha)
        return out

    def scale(self, r: int, alpha: float) -> float:
        """S-1."""
        return alpha / (math.sqrt(r) if self.config.get("use_rslora") else r)

    # ---- T-1 to T-5 ---------------------------------------------------------------------------

    def chosen(self, path: str) -> bool:
        """Whether this module is adapted."""
        target = self.config["target_modules"]
        if self.excluded(path):
            return False
        if isinstance(target, str):
            if target.lower() == "all-linear":
                return self.linear(path)
            return self.whole(target, path)
        if path in target:
            return True
        if not any(self.ends(path, name) for name in target):
            return False
        layers = self.config.get("layers_to_transform")
        if layers is None or layers == []:
            return True
        return self.layer(path) in ([layers] if isinstance(layers, int) else layers)

    def linear(self, path: str) -> bool:
        """Whether "all-linear" means it."""
        return path != "lm_head"

    def excluded(self, path: str) -> bool:
        """T-3."""
        names = self.config.get("exclude_modules")
        if not names:
            return False
        if isinstance(names, str):
            return self.whole(names, path)
        return any(path == name or self.ends(path, name) for name in names)

    def ends(self, path: str, name: str) -> bool:
        """T-1: the last parts of the path are the name's."""
        return path.endswith("." + name)

    def whole(self, pattern: str, path: str) -> bool:
        """T-2."""
        return expression(pattern).fullmatch(path) is not None

    def layer(self, path: str) -> int | None:
        """T-4: the number behind the first `.<name>.`, or behind a layers_pattern."""
        patterns = self.config.get("layers_pattern")
        if not patterns:
            found = expression(r".*?\.[^.]*\.(\d+)\.").match(path)
            return int(found[1]) if found else None
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            found = expression(rf"(?:^|.*?\.){pattern}\.(\d+)\.").match(path)
            if found:
                return int(found[1])
        return None

    def pattern_matches(self, key: str, path: str) -> bool:
        """T-5: the key matches the whole path or what follows one of its dots."""
        return expression(rf"(?:.*\.)?(?:{key})").fullmatch(path) is not None

    def value(self, name: str, path: str, default: Any) -> Any:
        """T-5: of the first key that matches."""
        for key, value in (self.config.get(name) or {}).items():
            if self.pattern_matches(key, path):
                return value
        return default

    # ---- T-6 ----------------------------------------------------------------------------------

    def check(self) -> None:
        """Refused for a name that matches nothing."""
        for field in ("target_modules", "exclude_modules"):
            names = self.config.get(field)
            if isinstance(names, str):
                word = field == "target_modules" and names.lower() == "all-linear"
                if names and not word and not any(self.whole(names, p) for p in self.modules):
                    raise Refused(f"{field} {names!r} matches no module")
                continue
            for name in names or ():
                if not any(path == name or path.endswith("." + name) for path in self.modules):
                    raise Refused(f"{field} {name!r} names no module")
        layers = self.config.get("layers_to_transform")
        if layers is None or layers == []:
            return
        there = {self.layer(path) for path in self.modules}
        for layer in [layers] if isinstance(layers, int) else layers:
            if layer not in there:
                raise Refused(f"there is no layer {layer}")
