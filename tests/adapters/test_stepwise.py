"""The matcher that counts its steps finds what Python's finds, and gives up on what explodes."""

from __future__ import annotations

import re
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pylora.adapters.patterns import compiled
from pylora.adapters.stepwise import Stepwise
from pylora.errors import PlanError

PATHS = [
    "model.embed_tokens",
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.mlp.down_proj",
    "model.layers.10.self_attn.v_proj",
    "lm_head",
]
atoms = st.sampled_from(
    [
        *"a.b_1",
        r"\.",
        r"\w",
        r"\d",
        r"[^.]",
        "[a-c_]",
        "q_proj",
        "layers",
        "(?i:A)",
        r"\b",
        "^",
        "$",
    ]
)
repeats = st.sampled_from(["", "", "*", "+", "?", "*?", "+?", "??", "{2}", "{1,3}", "{0,2}?"])


def grow(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    group = st.sampled_from(["(%s)", "(?:%s)", "(?=%s)", "(?!%s)", "(?P<n>%s)"])
    return (
        st.builds(lambda a, b: a + b, inner, inner)
        | st.builds(lambda a, b: f"(?:{a}|{b})", inner, inner)
        | st.builds(lambda g, a, r: g % a + r, group, inner, repeats)
    )


patterns = st.recursive(st.builds(lambda a, r: a + r, atoms, repeats), grow, max_leaves=6)


@settings(max_examples=300)
@given(patterns, st.sampled_from(PATHS) | st.text("ab._1q\n", max_size=8))
def test_it_finds_what_python_finds(pattern: str, text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            want = re.compile(pattern)
        except re.error:
            return
    got = Stepwise(pattern, "test")
    for method in ("match", "fullmatch"):
        theirs = getattr(want, method)(text)
        try:
            ours = getattr(got, method)(text)
        except PlanError:
            continue
        assert (ours is None) == (theirs is None), (pattern, text, method)
        if theirs is not None and ours is not None:
            assert ours[0] == theirs[0]
            if "n" in want.groupindex and pattern.count("(") == 1:
                assert ours["n"] == theirs["n"]


@pytest.mark.parametrize(
    ("pattern", "chosen"),
    [
        (r"(\w+\.)+(q_proj|v_proj)", [PATHS[1], PATHS[3]]),
        (r"(.*\.)*q_proj", [PATHS[1]]),
        (r"model(\.\w+)*\.(self_attn|mlp)\.(\w+_)+proj", PATHS[1:4]),
        (r"(model|layers|\d+|self_attn|[qv]_proj|\.)+", [PATHS[1], PATHS[3]]),
        (r"^(?:model\.)?(?:layers\.(?:\d+)\.)*(?:.*_)*head$", [PATHS[4]]),
    ],
)
def test_harmless_patterns_that_look_dangerous_are_carried_out(
    pattern: str, chosen: list[str]
) -> None:
    found = [path for path in PATHS if compiled(pattern, "target_modules").fullmatch(path)]
    assert found == chosen == [path for path in PATHS if re.fullmatch(pattern, path)]


@pytest.mark.parametrize(
    "pattern", [r"(\w+\w+)+!", r"((a|_|\w)*)*!", r"(.*)*(.*)*(.*)*x!", r"(?:(\w|\.)+)+\d!"]
)
def test_what_explodes_is_an_error_that_names_it(pattern: str) -> None:
    with pytest.raises(PlanError, match="target_modules: .*exponential time"):
        compiled(pattern, "target_modules").fullmatch("a" * 40)
