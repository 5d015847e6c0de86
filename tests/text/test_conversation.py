"""What conversations teach: templates of every kind that people bring, and which ids are learnt."""

from __future__ import annotations

from typing import Any

import pytest
from conversation_samples import CHATML, OPENING, REWRITING
from tokenizer_samples import WHERE, K, byte_level, sentencepiece

from pylora.errors import DataError
from pylora.text.gguf_vocabulary import tokenizer_from_gguf
from pylora.text.tokenizer import Tokenizer


def tokenizer(template: str, **over: Any) -> Tokenizer:
    metadata = byte_level("smollm", **over) | {"tokenizer.chat_template": template}
    return tokenizer_from_gguf(WHERE, metadata, 300)


def turns(*contents: str) -> list[dict[str, Any]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


def learnt(k: Tokenizer, *args: Any, **options: Any) -> list[str]:
    """For each example, what of it is learnt."""
    made = k.conversation(*args, **options)
    return [
        k.decode([i for i, yes in zip(p.ids, p.trained) if yes], skip_special_tokens=False)
        for p in made.pieces
    ]


def shown(k: Tokenizer, *args: Any, **options: Any) -> list[str]:
    return [
        k.decode(p.ids, skip_special_tokens=False) for p in k.conversation(*args, **options).pieces
    ]


def test_turns_that_extend_each_other_are_one_example() -> None:
    k = tokenizer(CHATML)
    talk = turns("a", "b", "c", "d")
    made = k.conversation(talk)
    assert not made.rewritten and learnt(k, talk) == ["b<|im_end|>d<|im_end|>"]
    assert made.pieces[0].ids == k.encode(k.apply_chat(talk))  # as a server encodes it: whole


def test_turns_that_are_rewritten_are_an_example_each() -> None:
    k = tokenizer(REWRITING)
    talk = turns("a", "<think>\nx\n</think>\n\nb", "c", "<think>\ny\n</think>\n\nd")
    assert learnt(k, talk) == [
        "<think>\nx\n</think>\n\nb<|im_end|>",
        "<think>\ny\n</think>\n\nd<|im_end|>",
    ]
    made = k.conversation(talk)
    assert made.rewritten and made.hidden == 0
    for i, piece in zip((2, 4), made.pieces):
        text = k.decode(piece.ids, skip_special_tokens=False)
        assert text == k.apply_chat(talk[:i])
    plain = k.conversation(turns("a", "b", "c", "d"))  # without thinking it is rewritten as well
    assert len(plain.pieces) == 2


def test_a_loop_of_tool_calls_stays_together() -> None:
    k = tokenizer(REWRITING)
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": [1, "é"]}'}}
    talk = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "7", "tool_calls": None},
        {"role": "assistant", "content": "b"},
    ]
    first = '<think>\n\n</think>\n\n{"x": [1, "é"]}<|im_end|>'
    assert learnt(k, talk) == [f"{first}<think>\n\n</think>\n\nb<|im_end|>"]
    assert "None" not in shown(k, talk)[0]
    with pytest.raises(DataError, match=r"messages\[1\] has tool_calls"):
        tokenizer(CHATML).conversation(talk)


def test_arguments_reach_the_template() -> None:
    k = tokenizer(REWRITING)
    talk = turns("a", "b")
    assert learnt(k, talk) == ["<think>\n\n</think>\n\nb<|im_end|>"]
    assert learnt(k, talk, arguments={"enable_thinking": False}) == ["b<|im_end|>"]
    k.arguments["enable_thinking"] = False
    assert learnt(k, talk) == ["b<|im_end|>"]
    with pytest.raises(DataError, match="no argument 'enable_thinkin'.*'enable_thinking'"):
        k.conversation(talk, arguments={"enable_thinkin": False})
    with pytest.raises(DataError, match="'messages' is given by pylora"):
        k.conversation(talk, arguments={"messages": []})


def test_tools_and_documents_are_shown_or_refused() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    k = tokenizer("{{ tools | tojson }}{{ documents | tojson }}" + CHATML)
    text = shown(k, turns("a", "b"), tools=tools, documents=[{"text": "t"}])[0]
    assert text.startswith('[{"type": "function", "function": {"name": "f"}}][{"text": "t"}]')
    for what in ("tools", "documents"):
        with pytest.raises(DataError, match=f"there are {what}, but"):
            tokenizer(CHATML).conversation(turns("a", "b"), **{what: tools})
        assert shown(tokenizer(CHATML), turns("a", "b"), **{what: []})  # none is none
    k.tool_template = "T{{ tools[0].function.name }}" + CHATML
    assert shown(k, turns("a", "b"), tools=tools)[0].startswith("Tf<|im_start|>")


def test_tools_within_a_message_are_shown_or_refused() -> None:
    talk = [{"role": "system", "content": "s", "tools": [{"name": "f"}]}, *turns("a", "b")]
    with pytest.raises(DataError, match=r"messages\[0\] has tools, .* belong beside the messages"):
        tokenizer(CHATML).conversation(talk)
    knows = "{% if messages[0].tools %}T{{ messages[0].tools[0].name }}{% endif %}" + CHATML
    assert shown(tokenizer(knows), talk)[0].startswith("Tf<|im_start|>")


def test_a_turn_that_the_template_passes_over_is_refused() -> None:
    loop = "{% for m in messages if m.role in ('user', 'assistant', 'tool') %}"
    body = CHATML[CHATML.index("%}") + 2 :]
    talk = [{"role": "developer", "content": "d"}, *turns("a", "b")]
    with pytest.raises(DataError, match=r"messages\[0\] is not shown .* of the role 'developer'"):
        tokenizer(loop + body).conversation(talk)
    quoted = tokenizer((loop + body).replace("m.content", "(m.content | tojson)"))
    assert quoted.conversation(turns('say "a"', "b"))  # written in another way, but shown
    assert tokenizer(CHATML).conversation(talk)


def test_a_prompt_that_opens_thinking() -> None:
    k = tokenizer(OPENING)
    assert learnt(k, turns("a", "b")) == ["b<|im_end|>"]
    # The turn begins like the opening that it does not have.
    assert learnt(k, turns("a", "<thanks")) == ["<thanks<|im_end|>"]
    calls = OPENING.replace("}}<|im_end|>", "}}{% if m.tool_calls %}<tool>{% endif %}<|im_end|>")
    call = [{"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}]
    assert learnt(tokenizer(calls), turns("a") + call) == ["<tool><|im_end|>"]
    hidden = k.conversation(turns("a", "<think>\nbecause\n</think>b"))
    assert hidden.hidden == 1  # the template does not show it, which has to be said
    assert k.conversation(turns("a", "b", "c", "d")).hidden == 0


def test_a_first_turn_by_the_assistant() -> None:
    talk = [{"role": "assistant", "content": "Hello"}, *turns("a", "b")]
    for template in (CHATML, OPENING):
        k = tokenizer(template)
        assert learnt(k, talk) == ["Hello<|im_end|>b<|im_end|>"]
    asked = "{% if messages | selectattr('role', 'equalto', 'user') | list | length == 0 %}"
    asked += "{{ raise_exception('no question') }}{% endif %}"
    assert learnt(tokenizer(asked + CHATML), talk) == ["Hello<|im_end|>b<|im_end|>"]
    with pytest.raises(DataError, match="no question"):
        tokenizer(asked + CHATML).conversation(talk[:1])
    strict = "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}"
    with pytest.raises(DataError, match="user first"):
        tokenizer(strict + CHATML).conversation(talk)


def test_content_in_parts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}, "c"]
    talk = [{"role": "user", "content": parts}, {"role": "assistant", "content": [parts[0]]}]
    assert shown(tokenizer(CHATML), talk)[0].startswith("<|im_start|>user\na\nb\nc<|im_end|>")
    inner = "{% for p in m.content %}[{{ p.text }}]{% endfor %}"
    k = tokenizer(CHATML.replace("{{ m.content }}", inner))
    assert "user\n[a][b][c]<|im_end|>" in shown(k, talk)[0]
    assert "user\n[x]<|im_end|>" in shown(k, turns("x", "y"))[0]  # a template for lists alone
    for bad in ({"type": "image_url", "image_url": "x"}, 7, {"type": "text"}):
        with pytest.raises(DataError, match=r"messages\[0\].content\[0\]"):
            k.conversation([{"role": "user", "content": [bad]}, *turns("a", "b")[1:]])


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_by_any_name(name: str) -> None:
    talk = turns("a", "b")
    talk[1][name] = "why"
    assert learnt(tokenizer(REWRITING), talk) == ["<think>\nwhy\n</think>\n\nb<|im_end|>"]
    assert tokenizer(CHATML).conversation(talk).hidden == 1


def test_generation_marks_say_what_is_learnt() -> None:
    marked = CHATML.replace(
        "{{ m.content }}<|im_end|>",
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
        "{% else %}{{ m.content }}<|im_end|>{% endif %}",
    )
    k = tokenizer(marked)
    assert learnt(k, turns("a", "b", "c", "d")) == ["b<|im_end|>d<|im_end|>"]
    assert "\ufdd0" not in shown(k, turns("a", "b"))[0]
    with pytest.raises(DataError, match=r"U\+FDD0"):
        k.conversation(turns("a\ufdd0", "b"))


def test_which_turns_are_learnt_can_be_said() -> None:
    k = tokenizer(CHATML)
    talk = turns("a", "b", "c", "d")
    assert learnt(k, talk, trained=[False, False, False, True]) == ["d<|im_end|>"]
    for flags, message in (
        ([True] * 4, r"messages\[0\] is to be trained"),
        ([False] * 4, "nothing to learn"),
        ([True], "1 flags"),
    ):
        with pytest.raises(DataError, match=message):
            k.conversation(talk, trained=flags)
    with pytest.raises(DataError, match="no assistant turn"):
        k.conversation([{"role": "user", "content": "a"}])


def test_a_turn_that_is_left_open_gets_its_end() -> None:
    k = tokenizer("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
                  "{% if add_generation_prompt %}assistant: {% endif %}")  # fmt: skip
    assert learnt(k, turns("a", "b")) == ["b\n<|im_end|>"]


def test_the_date_is_fixed_and_can_be_given() -> None:
    k = tokenizer("{{ strftime_now('%d %B %Y') }}" + CHATML)
    assert k.apply_chat(turns("a")).startswith("26 July 2024<")
    assert k.apply_chat(turns("a"), arguments={"strftime_now": "2026-11-30"})[:5] == "30 No"
    with pytest.raises(DataError, match="YYYY-MM-DD"):
        k.apply_chat(turns("a"), arguments={"strftime_now": "tomorrow"})


def test_a_conversation_is_encoded_whole_by_sentencepiece() -> None:
    metadata = sentencepiece() | {
        "tokenizer.chat_template": "{% for m in messages %}{{ m.role[0] }} {{ m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% else %} {% endif %}{% endfor %}"
        "{% if add_generation_prompt %}a{% endif %}"
    }
    k = tokenizer_from_gguf(WHERE, metadata, 300)
    talk = turns("hello", "hello")
    piece = k.conversation(talk).pieces[0]
    assert piece.ids == [k.bos_id, *k.encode("u hello a hello</s>")]  # llama.cpp adds the start
    names = metadata[K + "tokens"]
    assert [names[i] for i, yes in zip(piece.ids, piece.trained) if yes] == ["▁hello", "</s>"]
