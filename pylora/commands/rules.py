"""Which option of a verb needs, excludes or replaces another: one table, held by every verb.

What is typed is carried out or refused by name. An option that would change nothing beside the
others that were given stands here, and `check` refuses it before anything is read; every other one
reaches the function that does the work (tests/commands/test_options.py walks over all of them).
A default never clashes: only what was typed counts, and `--no-x` is typed but asks for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from operator import eq, ne
from typing import Any

from pylora.training.schedule import named

ROOT = ""  # the name under which options before the verb stand; the verb is their "verb"


@dataclass(frozen=True)
class Needs:
    """`option` has a meaning only where `other` has such a value."""

    option: str
    other: str
    why: str
    has: Callable[[Any], bool] = lambda value: value not in (None, False, [], ())

    def broken(self, given: Collection[str], values: Mapping[str, Any]) -> bool:
        """Whether the command line breaks the rule."""
        return self.option in given and not self.has(values[self.other])

    def text(self, name: Callable[[str], str], values: Mapping[str, Any]) -> str:
        """The sentence about it."""
        return f"{name(self.option)} needs {name(self.other)}: {self.why}"


@dataclass(frozen=True)
class Excludes:
    """`option` and `other` cannot both be meant. With `when` the value of `other` counts, typed or
    not; without it only whether it was typed."""

    option: str
    other: str
    why: str
    when: Callable[[Any], bool] | None = None

    def broken(self, given: Collection[str], values: Mapping[str, Any]) -> bool:
        """Whether the command line breaks the rule."""
        there = self.other in given if self.when is None else self.when(values[self.other])
        return self.option in given and there

    def text(self, name: Callable[[str], str], values: Mapping[str, Any]) -> str:
        """The sentence about it."""
        value = values[self.other]
        shown = f" {value}" if isinstance(value, str) and self.other != "verb" else ""
        shown = shown if self.when is not None else ""
        return f"{name(self.option)} cannot be used with {name(self.other)}{shown}: {self.why}"


@dataclass(frozen=True)
class OneOf:
    """Exactly one of these, or (with `at_least`) one or more, must be given."""

    options: tuple[str, ...]
    what: str
    at_least: bool = False

    def broken(self, given: Collection[str], values: Mapping[str, Any]) -> bool:
        """Whether the command line breaks the rule."""
        count = sum(option in given for option in self.options)
        return count < 1 if self.at_least else count != 1

    def text(self, name: Callable[[str], str], values: Mapping[str, Any]) -> str:
        """The sentence about it."""
        listed = " or ".join(name(option) for option in self.options)
        return f"give {'' if self.at_least else 'either '}{listed}: {self.what}"


Rule = Needs | Excludes | OneOf

_DRAWN = "the likeliest token is taken at temperature 0, and nothing is drawn"
_FILE = "the file says what the adapter is; change it there, or leave {} out"
_BACKEND = "this verb computes with NumPy alone (or nothing at all)"
_DRAWS = ("top_k", "top_p", "min_p", "seed")
_SHAPE = ("rank", "alpha", "targets", "rslora")  # of plan, too
_WHOLE = ("modules_to_save", "trainable_token_indices")
_LIST = "--list tests nothing"
_ASKED = "an engine or a converter is asked what its suite holds"
_ENGINES = ("engine", "restart")
_ENGINE = (
    *_ENGINES, "convert", "adapters_by", "precision", "form", "api_key", "timeout", "bases",
    "tests",
)  # fmt: skip
_TEACHES, _DISTILLS = ("teacher", "teacher_adapter", "top_k"), partial(eq, "distill")
_RUNS = (  # what only a run has
    "learning_rate", "epochs", "schedule", "warmup", "floor", "decay_steps", "cycles",
    "rank_dropout", "eval_data", "save_every", "save_minutes", "keep", "log_every", "resume",
    "report_to",
)  # fmt: skip
_HUNT = "the kit's own wrong implementations are tried with every law"


def _falls_by(schedule: str) -> Callable[[Any], bool]:
    return lambda value: named(value) == schedule


def _on(flag: bool) -> bool:
    return flag is True


def _warm(temperature: float) -> bool:
    return temperature > 0


RULES: dict[str, tuple[Rule, ...]] = {
    ROOT: (
        *(
            Excludes("backend", "verb", _BACKEND, partial(eq, verb))
            for verb in ("plan", "convert", "inspect", "suite", "vectors", "conformance")
        ),
        Excludes("backend", "verb", "weights are packed for c, the backend", partial(eq, "pack")),
    ),
    "train": (
        *(
            Excludes(o, "adapter_config", _FILE.format("the file"))
            for o in (*_SHAPE, *_WHOLE, "dora", "dropout")
        ),
        *(
            Excludes(o, "start", "the adapter that it starts from says so")
            for o in (*_SHAPE, *_WHOLE, "dora", "dropout", "init", "adapter_config")
        ),
        Excludes("steps", "epochs", "each says how long to train"),
        Excludes("resume", "overwrite", "continue the run in OUT, or replace it"),
        Excludes(
            "batch_size",
            "packing",
            "packed batches are filled up to --max-tokens",
            lambda v: v is True,
        ),
        Needs("packing", "max_tokens", "the number of tokens to fill up to"),
        Needs("truncate", "max_length", "the number of tokens to cut to"),
        Excludes(
            "patience", "best_by", "what gets no better is not looked at", lambda v: v == "last"
        ),
        *(
            Needs(o, "eval_data", "a file to evaluate on")
            for o in ("eval_every", "metric", "sample", "best_by", "patience")
        ),
        *(Needs(o, "objective", "it is for distill", _DISTILLS) for o in _TEACHES),
        Needs("classes", "objective", "it is for classify", partial(eq, "classify")),
        *(
            Excludes(o, "find_lr", "it tries rates, trains nothing and keeps nothing", _on)
            for o in _RUNS
        ),
        Needs(
            "decay_steps",
            "schedule",
            "it is for warmup_stable_decay",
            _falls_by("warmup_stable_decay"),
        ),
        Needs(
            "cycles",
            "schedule",
            "it is for cosine_with_restarts",
            _falls_by("cosine_with_restarts"),
        ),
        Excludes("label_smoothing_factor", "objective", "it is for sft", partial(ne, "sft")),
        Excludes(
            "floor", "schedule", "a constant rate has no lower end", lambda v: v == "constant"
        ),
    ),
    "generate": (
        OneOf(("prompt", "prompts"), "a text, - for standard input, or a file of prompts"),
        Needs("system", "chat", "it is a message of a conversation"),
        Needs("template_arg", "chat", "it is for the chat template"),
        *(Needs(o, "temperature", _DRAWN, _warm) for o in _DRAWS),
    ),
    "merge": (
        Excludes("dtype", "to", "--type says what a GGUF file holds"),
        Needs("type_", "to", "it is the type of a GGUF file"),
        Needs("dry", "to", "it says what a GGUF file's type leaves of the adapter"),
        Needs("every", "to", "the report of a GGUF file has a line for each module"),
        OneOf(("out", "to"), "a folder for a Hugging Face model, or one GGUF file"),
    ),
    "chat": tuple(Needs(o, "temperature", _DRAWN, _warm) for o in _DRAWS),
    "pack": (
        OneOf(("out", "verify"), "a folder to write, or a look at MODEL, which is packed"),
        Needs("out", "precision", "what the model will run in, such as int4"),
        Excludes("precision", "verify", "MODEL is packed in the one that it is packed in"),
    ),
    "plan": (
        *(Excludes(o, "adapter", _FILE.format("ADAPTER")) for o in (*_SHAPE, *_WHOLE)),
        Excludes("every", "as_json", "--json has an object for every module anyway"),
        *(
            Excludes(o, "as_json", "--json has the modules, and says nothing of memory")
            for o in ("batch_size", "length", "accumulation", "recompute", "optimizer", "precision")
        ),
    ),
    "inspect": (
        OneOf(("adapter", "numbers"), "an adapter to inspect, or the known figures", at_least=True),
        Needs("model", "adapter", "the adapter that is checked against the model"),
        Needs("picture", "adapter", "the adapter to draw"),
        Needs("every", "adapter", "the adapter whose modules are shown"),
    ),
    "demo": (),
    "vectors": (
        *(
            Needs(o, "port", "it is a report about a port")
            for o in ("as_json", "badge", "markdown")
        ),
        OneOf(("out", "port"), "a folder to write vectors to, or what a port computed"),
    ),
    "conformance": (
        *(Excludes("convert", o, "an engine is tested, or a converter") for o in _ENGINES),
        Excludes("engine", "restart", "an engine runs already, or is started"),
        *(
            Excludes(o, "convert", "a converter is asked nothing")
            for o in ("adapters_by", "precision", "api_key")
        ),
        Needs("patience", "restart", "an engine that is started"),
        *(Needs(o, "suite", "what is asked, and what is right") for o in _ENGINE),
        OneOf(("implementation", "as_list", "mutants", "suite"), "what is tested, or shown"),
        *(Excludes(o, "suite", _ASKED) for o in ("law", "examples", "profile", "seed")),
        Excludes("examples", "profile", "a profile is a number of examples"),
        Excludes("law", "mutants", _HUNT),
        *(Excludes(o, "mutants", _HUNT) for o in ("examples", "profile", "junit", "as_json")),
        *(
            Excludes(o, "as_list", _LIST)
            for o in ("examples", "profile", "seed", "junit", "as_json")
        ),
    ),
}


def check(
    verb: str, given: Collection[str], values: Mapping[str, Any], name: Callable[[str], str]
) -> str | None:
    """The sentence about the first rule of the verb that is broken, None if all are kept.

    given: the parameters that were typed and ask for something; values: those of all parameters;
    name: how a parameter is called on the command line.
    """
    for rule in RULES.get(verb, ()):
        if rule.broken(given, values):
            return rule.text(name, values)
    return None
