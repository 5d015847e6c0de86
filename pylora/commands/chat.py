"""`pylora chat`: a conversation at the terminal, or of the lines of a pipe.

Answers go to stdout as they come, everything else to stderr. Lines that begin with "/" are
commands, which `Chat` carries out; it knows no typer. Nothing is written to disk.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pylora.commands.app import (
    ADAPTER_NAMES,
    MAKE,
    NEW_TOKENS,
    DrawSeed,
    MinP,
    Model,
    Penalty,
    Precision,
    Temperature,
    TopK,
    TopP,
    command,
)
from pylora.commands.prompts import adapter_folders
from pylora.commands.template import (
    TemplateArgs,
    say_notes,
    template_arguments,
    use_template,
)
from pylora.errors import ConfigError, PyloraError

if TYPE_CHECKING:
    from pylora.front.model import Model as Loaded

_BASE = ("none", "base")  # what names the model without an adapter


@command(
    MAKE,
    "pylora chat SmolLM2.gguf",
    "pylora chat SmolLM2.gguf --adapter runs/tone --system 'Be brief.'",
)
def chat(
    model: Model,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            *ADAPTER_NAMES, metavar="[NAME=]DIR",
            help="PEFT folder or run, by name, repeatedly; the first one answers",
        ),
    ] = None,
    system: Annotated[
        str | None,
        typer.Option("--system", "--system-prompt", metavar="TEXT", help="system message"),
    ] = None,
    template_arg: TemplateArgs = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(*NEW_TOKENS, metavar="N", help="most tokens of an answer; default: 512"),
    ] = None,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    seed: DrawSeed = 0,
    precision: Precision = None,
) -> None:  # fmt: skip
    """Talk with a model; /help shows what can be changed on the way, Ctrl-C stops an answer.

    Where standard input is a pipe or a file, each of its lines is a message or a command.
    """
    from pylora.front.load import DEFAULT_NAME, load
    from pylora.generation.sampling import Sampling, whole_number

    Sampling(temperature, top_k, top_p, min_p, repetition_penalty)  # before the model is loaded
    if max_new_tokens is not None:
        whole_number("--max-new-tokens", max_new_tokens, 1)
    folders = {name or DEFAULT_NAME: path for name, path in adapter_folders(adapter or ()).items()}
    for name in folders:
        if name in _BASE:
            raise ConfigError(f"--adapter {name}=...: that name means the base model; take another")
    with load(model, dict(folders), precision=precision) as loaded:
        use_template(loaded.tokenizer, template_arg)
        say_notes(loaded.tokenizer)
        for name, own in loaded.adapters.tokenizers.items():
            own.arguments |= template_arguments(template_arg)
            print(f"note: adapter {name}: {own.notes[-1]}", file=sys.stderr)
        if folders:
            loaded.adapters.use(next(iter(folders)))
        talk = Chat(
            loaded,
            system,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
        )
        terminal = sys.stdin.isatty()
        if terminal:
            talk.say(f"{loaded!r}\n/help shows what can be done, /quit ends")
        failed = talk.run(_typed(talk) if terminal else iter(sys.stdin))
    if failed and not terminal:
        raise SystemExit(1)


def _typed(talk: Chat) -> Iterator[str]:
    """Lines that are typed, with editing and history where the system has readline."""
    try:
        import readline  # noqa: F401  (input() uses it once it is imported)
    except ImportError:
        pass
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt as stop:
            _only_ctrl_c(stop)
            talk.say("\n/quit or Ctrl-D ends")


def _only_ctrl_c(stop: KeyboardInterrupt) -> None:
    """Ctrl-C stops an answer; a request to end the process (SIGTERM, SIGHUP) is not for that."""
    if getattr(stop, "code", 130) != 130:
        raise stop


class Chat:
    """A conversation with a loaded model: its turns so far, and the commands that change it."""

    def __init__(self, model: Loaded, system: str | None = None, **settings: Any) -> None:
        """settings: those of `Model.chat`."""
        self.model, self.system, self.settings = model, system, settings
        self.messages: list[dict[str, str]] = []
        self.commands: dict[str, tuple[str, Callable[[str], None]]] = {
            "adapter": ("NAME ...: these answer from now on; none: the base model", self._adapter),
            "weight": ("NAME NUMBER: how much an adapter counts; 0: not at all", self._weight),
            "system": ("TEXT: the system message; without a text there is none", self._system),
            "reset": ("forget the conversation", self._reset),
            "help": ("this list", self._help),
            "quit": ("end; Ctrl-D does it too", self._quit),
        }
        self._ended = False

    def say(self, text: str) -> None:
        """What is no answer goes to stderr, so that stdout has the answers alone."""
        print(text, file=sys.stderr, flush=True)

    def run(self, lines: Iterator[str]) -> int:
        """Takes lines until they end or /quit comes; returns how many could not be done."""
        failed = 0
        for line in lines:
            try:
                self.take(line)
            except PyloraError as error:
                failed += 1
                self.say(f"pylora: {error}")
            if self._ended:
                break
        return failed

    def take(self, line: str) -> None:
        """One line: a command, a message, or (blank) nothing. "//" begins a message with "/"."""
        text = line.strip()
        if text.startswith("/") and not text.startswith("//"):
            name, _, rest = text[1:].partition(" ")
            self._command(name.lower(), rest.strip())
        elif text:
            self._message(text[1:] if text.startswith("//") else text)

    def _message(self, text: str) -> None:
        """Prints the answer as it comes. Ctrl-C ends it; what was said by then counts as said."""
        asked = {"role": "user", "content": text}
        answer = ""
        try:
            pieces = self.model.chat(
                [*self.messages, asked], system=self.system, stream=True, **self.settings
            )
            for piece in pieces:
                answer += piece
                print(piece, end="", flush=True)
        except KeyboardInterrupt as stop:
            _only_ctrl_c(stop)
            self.say("\n(stopped)" if answer else "(stopped)")
        if answer:
            print(flush=True)
            self.messages += [asked, {"role": "assistant", "content": answer}]

    # ---- commands -----------------------------------------------------------------------------

    def _command(self, name: str, rest: str) -> None:
        name = {"exit": "quit", "q": "quit", "?": "help", "adapters": "adapter"}.get(name, name)
        if name not in self.commands:
            close = difflib.get_close_matches(name, self.commands, n=1)
            hint = f"did you mean /{close[0]}?" if close else "/help lists them"
            raise ConfigError(
                f"there is no command /{name}; {hint} (a message that begins with / is written //)"
            )
        self.commands[name][1](rest)

    def _adapter(self, rest: str) -> None:
        adapters = self.model.adapters
        names = rest.replace(",", " ").split()
        if len(names) == 1 and names[0] in _BASE:
            adapters.use(None)
        elif names:
            adapters.use(*names)
        self._in_use()

    def _weight(self, rest: str) -> None:
        name, _, number = rest.rpartition(" ")
        try:
            weight = float(number)
        except ValueError:
            weight = float("nan")
        if not name or weight != weight:
            raise ConfigError(
                f"/weight {rest}: write a name and a number, such as /weight tone 0.5"
            )
        weights = {**self.model.adapters.weights, name.strip(): weight}
        if weight == 0 and name.strip() in self.model.adapters:
            del weights[name.strip()]
        self.model.adapters.use(weights or None)
        self._in_use()

    def _in_use(self) -> None:
        adapters = self.model.adapters
        if not adapters:
            self.say("there is no adapter; give them at the start: --adapter NAME=DIR")
            return
        used = adapters.weights
        for name in adapters:
            mark = f"answers, weight {used[name]:g}" if name in used else "not in use"
            self.say(f"  {name}: {mark}")
        if not used:
            self.say("the base model answers")

    def _system(self, rest: str) -> None:
        self.system = rest or None
        self.say("system message set" if rest else "no system message")

    def _reset(self, rest: str) -> None:
        self.messages.clear()
        self.say("the conversation begins anew")

    def _help(self, rest: str) -> None:
        for name, (text, _) in self.commands.items():
            self.say(f"  /{name} {text}")
        self.say("Ctrl-C stops an answer; a message that begins with / is written //")

    def _quit(self, rest: str) -> None:
        self._ended = True
