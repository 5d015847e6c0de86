"""What becomes of each field of a record: carried out, refused by name, or passed over.

A field that some trainer, template or server acts on is never dropped in silence. The names are
those of TRL, axolotl, LLaMA-Factory, OpenAI's fine-tuning files and Hugging Face's data sets. What
no tool acts on (ids, sources, scores) is passed over. docs/data.md shows these tables.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pylora.errors import ConfigError, DataError, WrongTypeError, describe

# field -> what it becomes. Several names in one line mean the same.
CARRIED: dict[str, str] = {
    "text": "trained whole",
    "prompt": "what comes before the completion; a text, or messages",
    "completion": "trained; a text, or messages of which the assistant's are trained",
    "messages": "a conversation, through the model's chat template",
    "conversations": "the same, as ShareGPT writes it (from, value) or as messages",
    "conversation": "the same",
    "instruction": "the user's turn (Alpaca)",
    "input": "the second part of the user's turn (Alpaca), a line below the instruction",
    "output": "the assistant's turn (Alpaca)",
    "history": "earlier turns of an Alpaca record: pairs of a user's and an assistant's text",
    "system": "the system message of a conversation",
    "tools": "given to the chat template; an array, or JSON text",
    "functions": "OpenAI's older form of tools",
    "documents": "given to the chat template",
    "chat_template_kwargs": "arguments of the chat template, such as enable_thinking",
}

_PREFERENCE = (
    "is for another objective: preferences (--objective dpo, kto, ...) or classes; see "
    "docs/objectives.md"
)
_TOKENS = "is of a record that is tokenized already; give the text itself"
_PICTURES = "cannot be trained on: pylora trains text"
_WEIGHT = (
    "would weigh the record or part of it; write records in proportion, or "
    "'train': false at an assistant's message that is not to be learnt"
)
_SERVER = "is an argument of a request, which changes nothing that is trained"
_THINKING = "belongs into the assistant's message, or into chat_template_kwargs"
_TEMPLATE = "is an argument of the chat template; put it into chat_template_kwargs"
_PLACE = (
    "has no place in this kind of record; say what it is with --fields, such as "
    "--fields prompt=question,completion=answer, or make it part of the prompt"
)

REFUSED: dict[str, str] = {
    **dict.fromkeys(
        "chosen rejected label completions kto_tag preferred_output non_preferred_output".split(),
        _PREFERENCE,
    ),
    **dict.fromkeys(
        "input_ids attention_mask labels token_type_ids position_ids assistant_masks "
        "completion_mask prompt_ids completion_ids seq_lengths segments".split(),
        _TOKENS,
    ),
    **dict.fromkeys("image images video videos audio audios".split(), _PICTURES),
    **dict.fromkeys(
        "weight weights sample_weight loss_weight mask loss_mask train".split(), _WEIGHT
    ),
    **dict.fromkeys(
        "parallel_tool_calls tool_choice response_format function_call reference_answer".split(),
        _SERVER,
    ),
    **dict.fromkeys("reasoning reasoning_content thinking".split(), _THINKING),
    **dict.fromkeys(
        "enable_thinking add_generation_prompt continue_final_message chat_template".split(),
        _TEMPLATE,
    ),
    **dict.fromkeys(
        "context suffix prefix system_prompt question answer query response".split(), _PLACE
    ),
}

# Fields of records of other objectives (training/objectives/), which may have other names, too.
OF_OBJECTIVES = frozenset("chosen rejected label labels".split())

# Names that are close to one above and mean another thing, which no tool acts on.
PASSED = frozenset("prompt_id prompt_source source metadata category id score".split())

# Of a message: what is carried out here. The template is given every other field that it may show.
MESSAGE: dict[str, str] = {
    "role": "user, assistant, system, developer or tool",
    "content": "a text, or a list of text parts",
    "tool_calls": "shown by the template; arguments that are JSON text are read",
    "function_call": "OpenAI's older form of tool_calls",
    "reasoning_content": "shown by the template",
    "thinking": "shown by the template",
    "name": "given to the template",
    "tool_call_id": "given to the template",
    "weight": "0 or 1 at the assistant's message: whether it is trained",
    "train": "true or false at the assistant's message: whether it is trained",
}
MESSAGE_REFUSED: dict[str, str] = {
    **dict.fromkeys(
        "train_detail training_detail training trainable train_on_turn loss_weight loss mask "
        "masked".split(),
        _WEIGHT,
    ),
    **dict.fromkeys("image images video videos audio audios".split(), _PICTURES),
    **dict.fromkeys("refusal annotations".split(), "cannot be said by a chat template"),
    **dict.fromkeys(
        "prefix partial prefill".split(), "is an argument of a request; make it part of the content"
    ),
}

ROLES = ("system", "developer", "user", "assistant", "tool")
ALIASES: dict[str, str] = {
    **dict.fromkeys("human".split(), "user"),
    **dict.fromkeys("gpt model bot ai chatgpt bing bard".split(), "assistant"),
    **dict.fromkeys("observation function function_response tool_response ipython".split(), "tool"),
}


@dataclass(frozen=True)
class Fields:
    """Names that a file of one's own form has for pylora's: `--fields prompt=question,-label`."""

    names: Mapping[str, str]  # pylora's field, or part of a message -> the file's
    roles: Mapping[str, str]  # the file's role -> pylora's
    dropped: frozenset[str]  # fields that are passed over knowingly

    @classmethod
    def parse(cls, text: str | None) -> Fields:
        """From "prompt=question,completion=answer,assistant=bot,-label". ConfigError for a name
        that means nothing."""
        names: dict[str, str] = {}
        roles: dict[str, str] = {}
        dropped: set[str] = set()
        if not isinstance(text, (str, type(None))):
            raise WrongTypeError(
                "fields takes a text, such as 'prompt=question,completion=answer,-label', not "
                f"{describe(text)}"
            )
        for part in filter(None, (p.strip() for p in (text or "").split(","))):
            ours, equals, theirs = (p.strip() for p in part.partition("="))
            if part.startswith("-") and not equals:
                dropped.add(part[1:].strip())
            elif not equals or not theirs:
                raise ConfigError(
                    f"fields: {part!r} is neither OURS=THEIRS, such as prompt=question, nor -NAME"
                )
            elif ours in ROLES:
                roles[theirs] = ours
            elif ours in CARRIED or ours in OF_OBJECTIVES or ours in ("role", "content"):
                names[ours] = theirs
            else:
                near = _near(ours, [*CARRIED, "role", "content", *ROLES])
                raise ConfigError(
                    f"fields: pylora has no field {ours!r}{near}; it has "
                    f"{', '.join([*CARRIED, 'role', 'content', *ROLES])}"
                )
        return cls(names, roles, frozenset(dropped))

    def rename(self, record: Mapping[str, Any], where: str) -> dict[str, Any]:
        """The record in pylora's names. DataError where two fields would have one name."""
        out = {k: v for k, v in record.items() if k not in self.dropped}
        for ours, theirs in self.names.items():
            if ours in ("role", "content") or ours == theirs:
                continue
            if theirs not in record and ours in out:
                raise DataError(f"{where}: there is no field {theirs!r}, which is to be {ours!r}")
            if ours in out and ours not in self.names.values():
                raise DataError(
                    f"{where}: {theirs!r} is to be {ours!r}, but the record has that field, too; "
                    f"drop it with -{ours}"
                )
        moved = {
            ours: record[theirs]
            for ours, theirs in self.names.items()
            if theirs in record and ours not in ("role", "content")
        }
        gone = {t for o, t in self.names.items() if o not in ("role", "content")}
        return {k: v for k, v in out.items() if k not in gone} | moved


def check(record: Mapping[str, Any], where: str, known: bool = True) -> None:
    """DataError for a field that some tool acts on and pylora does not, or that is misspelt.

    `known`: the record has a form that is known; else what it has may be that form's own names."""
    for name, value in record.items():
        if value is None or name in CARRIED or name in PASSED:
            continue
        if name in REFUSED and (known or REFUSED[name] != _PLACE):
            raise DataError(
                f"{where}: the field {name!r} {REFUSED[name]}; to train without it, say so: "
                f"--fields=-{name}"
            )
        near = difflib.get_close_matches(name.lower(), [*CARRIED, *REFUSED], 1, 0.85)
        if near and name not in REFUSED:
            raise DataError(
                f"{where}: there is no field {name!r}; did you mean {near[0]!r}? If it is to be "
                f"passed over, say so: --fields=-{name}"
            )


def check_message(message: Mapping[str, Any], place: str) -> None:
    """The same for a message's fields."""
    for name, value in message.items():
        if value is None or name in MESSAGE:
            continue
        if name in MESSAGE_REFUSED:
            raise DataError(f"{place}: the field {name!r} {MESSAGE_REFUSED[name]}")
        near = difflib.get_close_matches(name.lower(), list(MESSAGE), 1, 0.85)
        if near:
            raise DataError(f"{place}: there is no field {name!r}; did you mean {near[0]!r}?")


def role_of(name: str, fields: Fields, place: str) -> str:
    """pylora's name of a role. DataError for one that is unknown."""
    role = fields.roles.get(name) or ALIASES.get(name.lower(), name.lower())
    if role not in ROLES:
        raise DataError(
            f"{place}: the role {name!r} is none of {', '.join(ROLES)}"
            f"{_near(name, [*ROLES, *ALIASES])}; name it with --fields, such as "
            f"--fields assistant={name}"
        )
    return role


def _near(name: str, known: list[str]) -> str:
    found = difflib.get_close_matches(name.lower(), known, 1)
    return f" (did you mean {found[0]!r}?)" if found else ""
