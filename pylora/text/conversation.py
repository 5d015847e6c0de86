"""What a conversation teaches: token ids, and which of them are the assistant's.

The whole rendered text is encoded at once, as a server does it, and the assistant's part is found
in its characters: from the end of the generation prompt to the token that ends the turn, or what
the template itself marks with {% generation %}. A token with any character of it counts.

Templates that change earlier turns when later ones follow (those that strip earlier thinking) never
show two turns of the assistant as they were generated in one text. Then a conversation becomes
several examples: each trained turn stands once, in the text that the template gave when it was the
last turn. Turns whose texts do extend each other, as those of a loop of tool calls, stay together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

from pylora.errors import DataError

_MARK = "kqxzvj"  # stands for a turn's content where the text before it is looked for
_LONG = 16  # characters that stand in a text by no accident
_END_OF_THINKING = "</think>"


@dataclass(frozen=True)
class Piece:
    """One sequence: ids, and for each whether it is to be learnt."""

    ids: list[int]
    trained: list[bool]


@dataclass(frozen=True)
class Conversation:
    """What a conversation becomes."""

    pieces: list[Piece]
    hidden: int  # trained turns with thinking that the template does not show

    @property
    def rewritten(self) -> bool:
        """Whether the template changes earlier turns, so that one sequence was not enough."""
        return len(self.pieces) > 1


@dataclass(frozen=True)
class _Turn:
    """A trained turn as the template shows it when it is the last."""

    text: str
    begin: int  # its first and last character
    end: int
    marked: bool  # the template says so with {% generation %}
    last: bool  # nothing follows in the conversation


def conversation(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    *,
    trained: Sequence[bool] | None = None,
    **options: Any,
) -> Conversation:
    """The examples in `messages`. trained, for each message: whether it is to be learnt (only the
    assistant's can be); None: all of the assistant's. options: as for `Tokenizer.render`.

    Raises DataError if there is nothing to learn, or if the assistant's part cannot be told apart.
    """
    wanted = [message.get("role") == "assistant" for message in messages]
    if trained is not None:
        if len(trained) != len(messages):
            raise DataError(f"there are {len(messages)} messages but {len(trained)} flags")
        odd = [i for i, (yes, can) in enumerate(zip(trained, wanted)) if yes and not can]
        if odd:
            raise DataError(
                f"messages[{odd[0]}] is to be trained, but its role is "
                f"{str(messages[odd[0]].get('role'))[:40]!r}; only the assistant's turns are learnt"
            )
        wanted = [bool(flag) for flag in trained]
    turns = [_turn(tokenizer, messages, i, options) for i, yes in enumerate(wanted) if yes]
    if not turns:
        raise DataError("the messages have no assistant turn to train, so nothing to learn")
    _no_turn_is_lost(tokenizer, messages[: _indices(wanted)[-1] + 1], turns[-1].text, options)
    groups: list[list[_Turn]] = []
    for turn in turns:
        if groups and turn.text.startswith(groups[-1][-1].text):
            groups[-1].append(turn)
        else:
            groups.append([turn])
    hidden = sum(_hides(messages[i], t.text) for i, t in zip(_indices(wanted), turns))
    pieces = [_piece(tokenizer, g, closed=g is groups[-1] and not g[-1].last) for g in groups]
    return Conversation(pieces, hidden)


def _no_turn_is_lost(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], text: str, options: dict[str, Any]
) -> None:
    """DataError for a message that `text`, their whole conversation, does not show: some templates
    pass over roles that they do not know. What an assistant said may be left out (thinking)."""
    for i, message in enumerate(messages):
        content = message.get("content")
        if message.get("role") == "assistant" or not isinstance(content, str):
            continue
        said = content.strip()
        if not said or (len(said) > _LONG and said in text):  # a short one may be in any text
            continue
        other = [*messages[:i], {**message, "content": _MARK}, *messages[i + 1 :]]
        try:  # the template may write it in another way, such as with JSON's escapes
            lost = _MARK not in tokenizer.render(other, **options).text
        except DataError:
            continue
        if lost:
            raise DataError(
                f"messages[{i}] is not shown by the chat template, which has no place for a "
                f"message of the role {str(message.get('role'))[:40]!r} there; take it out, or "
                "give it a role that the template shows"
            )


def _indices(wanted: Sequence[bool]) -> list[int]:
    return [i for i, yes in enumerate(wanted) if yes]


def _turn(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], i: int, options: dict[str, Any]
) -> _Turn:
    last = i + 1 == len(messages)
    try:
        shown = tokenizer.render(messages[: i + 1], **options)
    except DataError as error:
        turn = None if last else _within(tokenizer, messages, i, options)
        if turn is None:
            raise error
        return turn
    text = shown.text
    if shown.generated:
        begin, end = shown.generated[-1]
        return _Turn(text, begin, end, True, last)
    begin = _begin(tokenizer, messages, i, text, options)
    return _Turn(text, begin, len(text), False, last)


def _within(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], i: int, options: dict[str, Any]
) -> _Turn | None:
    """Turn i in the whole conversation, for a template that refuses what ends with it (a first turn
    by the assistant, without a question). Found by rendering another content there."""
    other = {"role": "assistant", "content": _MARK}
    try:
        whole = tokenizer.render(messages, **options).text
        marked = tokenizer.render([*messages[:i], other, *messages[i + 1 :]], **options).text
    except DataError:
        return None
    head, found, tail = marked.partition(_MARK)
    if not (found and whole.startswith(head) and whole.endswith(tail)):
        return None
    ids, spans = tokenizer.encode_spans(tail)
    close = spans[0][1] if ids and ids[0] in tokenizer.eos_ids else 0
    end = len(whole) - len(tail) + close
    return _Turn(whole[:end], len(head), end, False, False)


def _begin(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    i: int,
    text: str,
    options: dict[str, Any],
) -> int:
    """Where turn i begins in `text`, the conversation up to it: behind the generation prompt."""
    if i == 0:  # templates have no text for no messages, so the prompt is taken from others
        user = [{"role": "user", "content": _MARK}]
        plain = tokenizer.render(user, **options).text
        opening = tokenizer.render(user, True, **options).text.removeprefix(plain)
        if opening and opening in text:
            return text.index(opening) + len(opening)
        return _head(tokenizer, messages, i, text, options)
    prompt = tokenizer.render(messages[:i], True, **options).text
    if text.startswith(prompt):
        return len(prompt)
    # The prompt opens something that this turn does not have, such as <think>: what both share is
    # the prompt. It must reach beyond the turns before, or those would be learnt, too.
    before = tokenizer.render(messages[:i], **options).text
    shared = _outside(prompt, len(commonprefix([prompt, text])))
    if prompt.startswith(before) and shared >= len(before):
        return min(shared, _head(tokenizer, messages, i, text, options, shared))
    return _head(tokenizer, messages, i, text, options)


def _outside(prompt: str, end: int) -> int:
    """`end`, or where the tag begins that it stands in: <think> and <tool_call> share a "<t"."""
    for opening, closing in ("<>", "[]"):
        at = prompt.rfind(opening, 0, end)
        if at >= 0 and closing not in prompt[at:end]:
            end = at
    return end


def _head(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    i: int,
    text: str,
    options: dict[str, Any],
    instead: int | None = None,
) -> int:
    """The characters before the content of turn i, found by rendering another content there."""
    other = {"role": "assistant", "content": _MARK}
    try:
        marked = tokenizer.render([*messages[:i], other], **options).text
    except DataError:
        marked = ""
    head, found, _ = marked.partition(_MARK)
    if found and text.startswith(head):
        return len(head)
    if found and instead is None:
        # The mark may stand behind something that the template adds to a turn without thinking.
        shared = len(commonprefix([head, text]))
        before = tokenizer.render(messages[:i], **options).text if i else ""
        if shared >= len(before) and head.startswith(before):
            return shared
    if instead is not None:
        return instead
    raise DataError(
        f"the chat template changes earlier turns when messages[{i}] follows, so the assistant's "
        "part of the text cannot be told apart; give prompt and completion instead"
    )


def _hides(message: Mapping[str, Any], text: str) -> bool:
    """Whether the turn has thinking that `text` does not show."""
    content = message.get("content")
    said = [message.get(key) for key in ("reasoning_content", "thinking", "reasoning")]
    if isinstance(content, str) and _END_OF_THINKING in content:
        said.append(content.split(_END_OF_THINKING)[0].split("<think>")[-1])
    return any(isinstance(s, str) and s.strip() and s.strip() not in text for s in said)


def _piece(tokenizer: Any, turns: Sequence[_Turn], closed: bool) -> Piece:
    """The sequence of some turns. closed: messages follow that say where the last turn ended."""
    ids, spans = tokenizer.encode_spans(turns[-1].text, bos=tokenizer.bos_in_chat)
    trained = [False] * len(ids)
    for turn in turns:
        inside = [
            t for t, (begin, end) in enumerate(spans) if begin < turn.end and end > turn.begin
        ]
        # What a template puts behind the end of a turn, such as a line break, is not generated.
        ends = [t for t in inside if ids[t] in tokenizer.eos_ids]
        stop = ends[-1] if ends and not turn.marked else len(ids)
        for t in inside:
            trained[t] = t <= stop
        if turn is turns[-1] and not (ends or turn.marked or closed) and tokenizer.eos_ids:
            ids.append(tokenizer.eos_ids[0])  # the template leaves the last turn open
            trained.append(True)
    return Piece(ids, trained)
