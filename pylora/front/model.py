"""`pylora.Model`: a base model with its tokenizer and its adapters, as one object.

    model = pylora.load("SmolLM2.gguf", adapter="runs/tone")
    print(model.chat("Who are you?"))

A thin face: each method is a few lines on the part that does it (pylora/generation, training,
merging, adapters), and the parts stay usable alone; `model.llama`, `model.tokenizer` and
`model.checkpoint` are they. Nothing is computed here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, overload

from pylora.adapters.adapter import Adapter
from pylora.adapters.own_tokenizer import tokenizer_of
from pylora.adapters.plan import Plan, resolve
from pylora.adapters.pool import AdapterPool
from pylora.errors import (
    ConfigError,
    PyloraError,
    expect,
    kind_of,
)
from pylora.formats.base import Checkpoint
from pylora.front import fit
from pylora.front.adapters import ACTIVE, Active, Adapters, Choice, read_adapter
from pylora.front.score import Score, score_of
from pylora.front.speak import (
    Conversation,
    Message,
    begin,
    conversations_of,
    known_settings,
    pieces,
    prompts_of,
)
from pylora.front.speak import text_streams as streams_of
from pylora.generation.prompt_cache import PromptCache
from pylora.generation.sampling import Sampling
from pylora.merging.merge import MergeReport, merge_adapter
from pylora.model.llama import Llama

if TYPE_CHECKING:
    from pylora.text.tokenizer import Tokenizer
    from pylora.training.train import TrainResult

Chosen = Choice | Active | Sequence[Choice]  # of a call: one for all its prompts, or one for each


class Model:
    """A base model, its tokenizer and its adapters. Made by `pylora.load`; a context manager.

    Attributes:
        adapters: name -> Adapter; `add`, `use`, `weights`, `remove` (pylora.front.adapters)
        tokenizer: encode, decode, apply_chat
        config: the model's LlamaConfig
        llama: the part that computes, on token ids
        checkpoint: the open file, which is only read
    """

    def __init__(self, checkpoint: Checkpoint, llama: Llama) -> None:
        """Of an open checkpoint, which `close` closes, and the Llama that was made of it."""
        expect("checkpoint", checkpoint, "Model")
        expect("model", llama, "Model")
        self.checkpoint, self.config = checkpoint, llama.config
        self._llama: Llama | None = llama
        self.adapters = Adapters(AdapterPool(llama), self._read)
        self._spare: list[PromptCache] = []  # the last conversation's, while nobody uses it

    def __repr__(self) -> str:
        if self._llama is None:
            return f"Model({self.checkpoint.path.name}, closed)"
        c, used = self.config, self.adapters.weights
        said = ", ".join(n if w == 1 else f"{w:g} {n}" for n, w in used.items())
        return (
            f"Model({self.checkpoint.path.name}: {c.model_type}, {c.num_hidden_layers} layers, "
            f"{c.num_parameters:,} parameters in {self.llama.computes} on "
            f"{self.llama.ops.name}, {f'adapter {said}' if said else 'no adapter in use'})"
        )

    def _read(self, path: str | os.PathLike[str]) -> tuple[Adapter, Tokenizer | None]:
        return read_adapter(self.checkpoint, path)

    @property
    def llama(self) -> Llama:
        """The part that computes. Raises PyloraError when the model is closed."""
        if self._llama is None:
            raise PyloraError("this model is closed; load it again with pylora.load")
        return self._llama

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The base model's, read when it is first needed; `notes` say what is odd in its files. An
        adapter's own is in `adapters.tokenizers`. MissingExtraError where its libraries are not
        installed."""
        return tokenizer_of(self.checkpoint, ())

    # ---- text ---------------------------------------------------------------------------------

    @overload
    def generate(self, prompt: str, *, stream: Literal[False] = ..., **settings: Any) -> str: ...
    @overload
    def generate(
        self, prompt: Sequence[str], *, stream: Literal[False] = ..., **settings: Any
    ) -> list[str]: ...
    @overload
    def generate(self, prompt: str, *, stream: Literal[True], **settings: Any) -> Iterator[str]: ...
    @overload
    def generate(
        self, prompt: Sequence[str], *, stream: Literal[True], **settings: Any
    ) -> Iterator[tuple[int, str]]: ...
    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop: str | Sequence[str] | None = None,
        stream: bool = False,
        adapter: Chosen = ACTIVE,
        batch_size: int = 32,
        **others: Any,
    ) -> str | list[str] | Iterator[str] | Iterator[tuple[int, str]]:
        """The text that the model continues `prompt` with; of a list of texts, a list.

        max_new_tokens: at most this many; default 512, or as many as the model's positions leave.
        temperature 0 takes the likeliest token; else one is drawn, as top_k, top_p, min_p and
        repetition_penalty say (transformers' meanings, `pylora.generation.sampling.Sampling`), by
        `seed` alone. stop: a text, or several, that ends the answer; it is not part of it.

        stream: an iterator in place of the text: pieces of text as they come, or of a list
        (number of the prompt, piece). Joined they are what stream=False gives.

        adapter: a name, {name: weight, ...}, or None for the base, for this call; of a list of
        prompts also a list, one for each. Default: the ones in use (`adapters.use`).

        Prompts of a list are computed together, `batch_size` at a time, and no answer depends on
        the others. Raises WrongTypeError for what is no text, ConfigError for a setting out of
        range or of another name (`others`: there are none) or a prompt too long for the model,
        DataError for an empty one.
        """
        known_settings("generate", others)
        texts, single = prompts_of(prompt)
        choices = self._choices(adapter, len(texts))
        ids = [begin(self._tokenizer(c), t) for c, t in zip(choices, texts, strict=True)]
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
        answer: str | list[str] | Iterator[str] | Iterator[tuple[int, str]] = self._answer(
            ids, single, max_new_tokens, sampling, seed, stop, stream, choices, batch_size
        )
        return answer

    @overload
    def chat(
        self,
        messages: str | Message | Conversation,
        *,
        stream: Literal[False] = ...,
        **settings: Any,
    ) -> str: ...
    @overload
    def chat(
        self, messages: Sequence[Conversation], *, stream: Literal[False] = ..., **settings: Any
    ) -> list[str]: ...
    @overload
    def chat(
        self, messages: str | Message | Conversation, *, stream: Literal[True], **settings: Any
    ) -> Iterator[str]: ...
    @overload
    def chat(
        self, messages: Sequence[Conversation], *, stream: Literal[True], **settings: Any
    ) -> Iterator[tuple[int, str]]: ...
    def chat(
        self,
        messages: str | Message | Conversation | Sequence[str] | Sequence[Conversation],
        *,
        system: str | None = None,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
        template_args: Mapping[str, Any] | None = None,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop: str | Sequence[str] | None = None,
        stream: bool = False,
        adapter: Chosen = ACTIVE,
        batch_size: int = 32,
        **others: Any,
    ) -> str | list[str] | Iterator[str] | Iterator[tuple[int, str]]:
        """The model's answer, through its chat template.

        messages: a text, which is one user's message; a message {"role": ..., "content": ...}, or
        the list of them that a conversation is; a list of texts or of conversations is answered
        with a list. system: a message that goes first. tools, documents, template_args (such as
        {"enable_thinking": False}): what the template is to show, and its variables. The other
        settings are `generate`'s.

        A conversation that goes on where the last one ended is not computed again, with the same
        bits as if it were. Answers may be made in several threads, or taken in turns from several
        streams. Raises DataError where the model has no chat template.
        """
        known_settings("chat", others)
        talks, single = conversations_of(messages, system)
        choices = self._choices(adapter, len(talks))
        tokenizers = [self._tokenizer(choice) for choice in choices]
        more: dict[str, Any] = {"tools": tools, "documents": documents, "arguments": template_args}
        ids = [
            k.encode_chat(k.apply_chat(talk, add_generation_prompt=True, **more))
            for k, talk in zip(tokenizers, talks, strict=True)
        ]
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
        answer: str | list[str] | Iterator[str] | Iterator[tuple[int, str]] = self._answer(
            ids, single, max_new_tokens, sampling, seed, stop, stream, choices, batch_size
        )
        return answer

    def _answer(
        self,
        ids: list[list[int]],
        single: bool,
        max_new_tokens: int | None,
        sampling: Sampling,
        seed: int,
        stop: str | Sequence[str] | None,
        stream: bool,
        choices: Sequence[Choice | Active],
        batch_size: int,
    ) -> Any:
        tokenizers = [self._tokenizer(choice) for choice in choices]
        texts = streams_of(tokenizers, ids, stop)
        names = [self.adapters.named(choice) for choice in choices]
        cache = PromptCache(self.llama) if single else None
        if single and self._spare:
            with suppress(IndexError):  # another thread was quicker
                cache = self._spare.pop()
        try:
            come = pieces(
                self.adapters.pool,
                ids,
                texts,
                max_new_tokens=max_new_tokens,
                sampling=sampling,
                seed=seed,
                batch_size=batch_size,
                names=names,
                cache=cache,
            )
        except PyloraError:
            self._give_back(cache)
            raise
        come = self._ending(come, cache)
        if stream:
            return (text for _, text in come) if single else come
        for _ in come:
            pass
        return texts[0].text if single else [text.text for text in texts]

    def _ending(
        self, come: Iterator[tuple[int, str]], cache: PromptCache | None
    ) -> Iterator[tuple[int, str]]:
        """`come`; a cache belongs to one answer at a time, and is given back at its end."""
        try:
            yield from come
        finally:
            self._give_back(cache)

    def _give_back(self, cache: PromptCache | None) -> None:
        if cache is not None and self._llama is not None:
            self._spare[:] = [cache]

    def _tokenizer(self, choice: Choice | Active) -> Tokenizer:
        """That of the adapter, where it has one, else the model's."""
        return self.adapters.tokenizer(choice) or self.tokenizer

    def _choices(self, adapter: Chosen, n: int) -> list[Choice | Active]:
        """Each prompt's adapter."""
        _ = self.llama  # that it is open
        if isinstance(adapter, (list, tuple)):
            if len(adapter) != n:
                raise ConfigError(
                    f"{n} prompts need a list of {n} adapters, or one for all, got {len(adapter)}; "
                    "for a sum of several give {name: weight, ...}"
                )
            return list(adapter)
        one: Any = adapter
        self.adapters.named(one)  # also where there is no prompt that would ask for it
        return [one] * n

    @overload
    def score(  # type: ignore[overload-overlap]
        self, text: str, *, adapter: Choice | Active = ...
    ) -> Score: ...
    @overload
    def score(self, text: Sequence[str], *, adapter: Choice | Active = ...) -> list[Score]: ...
    def score(self, text: Any, *, adapter: Choice | Active = ACTIVE) -> Score | list[Score]:
        """How likely the model finds a text: the log probability of each token, and the perplexity.

        Of a list of texts, a list. Raises WrongTypeError for what is no text, DataError for a text
        without a token.
        """
        if isinstance(text, (list, tuple)) and kind_of(text) != "ids":
            return [self.score(one, adapter=adapter) for one in text]
        expect("text", text, "score")
        adapted = self.adapters.adapter(adapter)
        return score_of(self.llama, self._tokenizer(adapter), adapted, text)

    # ---- adapters, training, merging ----------------------------------------------------------

    def plan(self, adapter: str | None = None, **lora: Any) -> Plan:
        """Which modules an adapter touches, with r, alpha, scale and the rule behind each.

        Of the adapter of this name; or of a new one with these settings (r, lora_alpha,
        target_modules, ...: `LoraConfig.fresh`), as `train` would make it. Raises PlanError for a
        target that matches nothing, ConfigError for a setting that does not exist.
        """
        if adapter is not None:
            if lora:
                raise ConfigError(
                    f"adapter {adapter!r} has its settings; leave out {', '.join(lora)}"
                )
            return self.adapters[adapter].plan
        return resolve(fit.lora_config(lora), self.config.modules())

    def train(
        self,
        data: Any,
        out: str | os.PathLike[str] | None = None,
        *,
        adapter: str = "default",
        **settings: Any,
    ) -> TrainResult:
        """Fine-tunes the adapter of this name, a new one or one that is there, and then uses it.

        data: a JSONL file's path, a list of records such as {"prompt": ..., "completion": ...},
        {"messages": [...]} or {"text": ...}, or Examples. out: the folder of the run, which gets
        adapter/ (PEFT), a log and checkpoints; None: nothing is written.

        settings: those of the adapter (r, lora_alpha, target_modules, lora_dropout, use_rslora,
        ...: `LoraConfig.fresh`; lora_alpha is 2 r by default), those of the run (learning_rate,
        epochs, steps, batch_size, warmup_steps, seed, ...: `TrainConfig`), and eval_data,
        max_length, truncate, fields, template_args (those of `load_examples`), on_step, resume,
        overwrite. A name that is none of these is a ConfigError that suggests one. A warning says
        what was converted in the records.

        Ctrl-C ends the run after the step, with a checkpoint if there is `out`. Raises what
        `pylora.training.train.train` raises.
        """
        own = self.adapters.tokenizers.get(adapter) if isinstance(adapter, str) else None
        parts = fit.Parts(self.llama, self.checkpoint, own or self.tokenizer, self.adapters)
        return fit.train(parts, data, out, adapter, settings)

    def merge(
        self,
        out: str | os.PathLike[str],
        *,
        adapter: Choice | Active = ACTIVE,
        dtype: str | None = None,
    ) -> MergeReport:
        """Writes the base with the adapter merged into it: a Hugging Face directory that
        transformers loads, and that `pylora unmerge` takes apart again bit for bit.

        dtype: "f32", "f16" or "bf16"; default: as the base is stored. Raises ConfigError where no
        adapter is in use, and for an `out` that holds something else.
        """
        expect("path", out, "merge")
        return merge_adapter(
            self.checkpoint, self._some(adapter), out, dtype=dtype, backend=self.llama.ops
        )

    def save(self, directory: str | os.PathLike[str], *, adapter: Choice | Active = ACTIVE) -> None:
        """Writes the adapter in use as a PEFT directory; of several in use, their weighted sum."""
        expect("path", directory, "save")
        self._some(adapter).save(directory)

    def _some(self, choice: Choice | Active) -> Adapter:
        adapter = self.adapters.adapter(choice)
        if adapter is None:
            there = ", ".join(self.adapters)
            how = (
                f"adapters.use(name) chooses one of {there}"
                if there
                else ("adapters.add(name, path) adds one, adapters.use(name) chooses it")
            )
            raise ConfigError(f"no adapter is in use; {how}")
        return adapter

    # ---- the end ------------------------------------------------------------------------------

    def close(self) -> None:
        """Gives the memory back and closes the file. Closing twice is fine."""
        self._llama = None
        self._spare.clear()
        self.adapters.pool.close()
        self.checkpoint.close()

    def __enter__(self) -> Model:
        _ = self.llama
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
