"""Tokens that end a turn or a text, known by what they are called.

Files often name only one end of sequence, while the turns of their chat template end with another
token. llama.cpp (src/llama-vocab.cpp) stops at tokens of these names whatever the metadata say;
the lists and the exceptions are its.
"""

from __future__ import annotations

from collections.abc import Mapping

END_OF_TURN = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>",
    "<EOT>", "_<EOT>", "[EOT]", "<｜end▁of▁sentence｜>", "<end_of_utterance>",
)  # fmt: skip
END_OF_MESSAGE = ("<|eom_id|>",)
# What fills and parts a file of code. They end a text, too; the first found of each kind counts.
FILL_IN: dict[str, tuple[str, ...]] = {
    "fim_pre": (
        "<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>",
        "<|code_prefix|>", "<|prefix|>",
    ),
    "fim_suf": (
        "<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>",
        "<|code_suffix|>", "<|suffix|>",
    ),
    "fim_mid": (
        "<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>",
        "<|code_middle|>", "<|middle|>",
    ),
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}  # fmt: skip
FILL_IN_ENDS = ("fim_pad", "fim_rep", "fim_sep")
ENDS = frozenset(
    (
        *END_OF_TURN, *END_OF_MESSAGE, "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "</s>",
        "[EOS]", "<eos>", "<turn|>", "<|tool_response>", "[e~[",
    )
)  # fmt: skip
# Marks of gpt-oss's format that are always shown.
SHOWN = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")


def ending(names: Mapping[str, int]) -> dict[str, int]:
    """Those of `names` (token: id) that end a turn or a text, by id."""
    found = {name: i for name, i in sorted(names.items(), key=lambda n: n[1]) if name in ENDS}
    for name in not_ending(found):
        del found[name]
    return found


def not_ending(found: Mapping[str, int]) -> list[str]:
    """Which of the ends `found` are none, for the others that stand beside them."""
    none = []
    calls = "<|call|>" in found or "<|calls|>" in found
    if "<|end|>" in found and calls and ("<|return|>" in found or "<|flush|>" in found):
        none.append("<|end|>")  # of gpt-oss and solar-open: it ends a message within a turn
    if "</s>" in found and ("<|tool_response>" in found or "<|plamo:eos|>" in found):
        none.append("</s>")  # of gemma4 and plamo: a tag of HTML
    return none
