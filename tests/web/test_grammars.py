"""Answers that must have a form: whatever the model would say, they have it. Walked here by chance
alone, which is the worst model: any token that may come is as likely as any other."""

from __future__ import annotations

import json
import os
import random
import re
from typing import Any

import numpy as np
import pytest

pytest.importorskip("llguidance")
jsonschema = pytest.importorskip("jsonschema")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_model import write_tiny_model

from pylora.formats import open_checkpoint
from pylora.web.grammars import Form, Grammars, form_of
from pylora.web.problem import Problem

SCHEMAS = int(os.environ.get("PYLORA_SCHEMAS", "40"))  # the nightly run takes 1000
MOST = 3000  # tokens


@pytest.fixture(scope="module")
def grammars(tmp_path_factory: pytest.TempPathFactory) -> Grammars:
    folder = write_tiny_model(tmp_path_factory.mktemp("model"))
    with open_checkpoint(folder) as checkpoint:
        return Grammars(checkpoint.tokenizer(), checkpoint.config.vocab_size)


def bits(words: np.ndarray) -> np.ndarray:
    return np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))


def walk(grammars: Grammars, form: Form, seed: int) -> str | None:
    """An answer by chance; None where it did not end in time. Ends and quotes are favoured, so that
    texts and lists are short."""
    chance = random.Random(seed)
    mask, answer = grammars.mask(form), []
    ends = set(grammars.tokenizer.eos_ids)
    closing = {grammars.tokenizer.encode(c)[0] for c in '"]}'} | ends
    for _ in range(MOST):
        may = bits(mask.allowed(answer))
        assert len(may), f"nothing may come after {grammars.tokenizer.decode(answer)!r}"
        soon = [t for t in may if int(t) in closing]
        token = int(chance.choice(soon if soon and chance.random() < 0.5 else list(may)))
        if token in ends:
            return grammars.tokenizer.decode(answer)
        answer.append(token)
    return None


NAMES = st.sampled_from(["a", "b", "name", "größe", 'q"uote'])


def fields(required: dict[str, Any], **optional: Any) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({k: st.just(v) for k, v in required.items()}, optional=optional)


def closed(properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": sorted(properties)[:2],
        "additionalProperties": False,
    }


def schemas(depth: int = 3) -> st.SearchStrategy[dict[str, Any]]:
    """Schemas of the keywords that llguidance carries out; what it does not is refused (below)."""
    low, high = st.integers(-9, 0), st.integers(1, 99)
    leaf = st.one_of(
        fields({"type": "integer"}, minimum=low, maximum=high),
        fields({"type": "number"}),
        fields({"type": "string"}, maxLength=st.integers(2, 9), minLength=st.integers(0, 2)),
        fields({"type": "string", "pattern": "^[a-z]{1,4}$"}),
        st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"const": 3}]),
        st.sampled_from([{"enum": [1, "x", None]}, {"type": "string", "format": "date"}]),
        fields({"type": ["string", "null"]}),
    )
    if depth == 0:
        return leaf
    inner = schemas(depth - 1)
    sizes = {"maxItems": st.integers(1, 3), "minItems": st.integers(0, 1)}
    return st.one_of(
        leaf,
        st.fixed_dictionaries({"type": st.just("array"), "items": inner}, optional=sizes),
        st.dictionaries(NAMES, inner, max_size=3).map(closed),
        st.lists(inner, min_size=1, max_size=3).map(lambda some: {"anyOf": some}),
    )


@settings(
    max_examples=SCHEMAS, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
@given(schema=schemas(), seed=st.integers(0, 99))
def test_an_answer_always_parses_and_fits(grammars: Grammars, schema: Any, seed: int) -> None:
    answer = walk(grammars, Form("json", json.dumps(schema), "response_format"), seed)
    if answer is not None:
        jsonschema.validate(json.loads(answer), schema)


# Keywords in any company: contradictions, what llguidance does not carry out, what is no schema.
ANY = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(
            ["string", "integer", "number", "boolean", "null", "array", "object", "thing", ["null"]]
        ),
        "minimum": st.integers(-5, 5),
        "maximum": st.integers(-5, 50),
        "multipleOf": st.sampled_from([1, 2, 0.5]),
        "minLength": st.integers(0, 3),
        "maxLength": st.integers(0, 9),
        "pattern": st.sampled_from(["^a*$", "b", "(c", "^[0-9]{2}$"]),
        "uniqueItems": st.booleans(),
        "minItems": st.integers(0, 2),
        "maxItems": st.integers(0, 4),
        "items": st.sampled_from([True, {"type": "integer"}, {"type": "nothing"}, False]),
        "required": st.lists(st.sampled_from(["a", "b"]), max_size=2, unique=True),
        "additionalProperties": st.sampled_from([True, False, {"type": "boolean"}]),
        "properties": st.sampled_from([{}, {"a": {"type": "integer"}}, {"a": False}]),
        "not": st.sampled_from([{}, {"type": "string"}]),
        "enum": st.lists(st.sampled_from([1, "x", None, [1], {"a": 1}]), max_size=3),
        "$ref": st.sampled_from(["#", "#/nowhere", "http://example.org/x.json"]),
    },
)


@settings(
    max_examples=SCHEMAS, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
@given(schema=ANY)
def test_any_schema_at_all_is_carried_out_or_refused_with_a_sentence(
    grammars: Grammars, schema: Any
) -> None:
    try:
        form = form_of({"guided_json": schema})
        assert form is not None
        answer = walk(grammars, form, 0)
    except Problem as problem:
        assert problem.status == 400 and problem.param == "guided_json" and len(str(problem)) > 20
        return
    if answer is not None:  # a part that no answer comes to may be no schema: it is not looked at
        jsonschema.Draft202012Validator(schema).validate(json.loads(answer))


@pytest.mark.parametrize(
    ("form", "fits"),
    [
        (Form("regex", "[ab]{3}c?", "guided_regex"), "[ab]{3}c?"),
        (Form("choice", '["yes", "no"]', "guided_choice"), "yes|no"),
        (Form("grammar", 'root ::= "x" y\ny ::= [0-9]+', "grammar"), "x[0-9]+"),
        (Form("grammar", 'start: "x" Y\nY: /[0-9]+/', "grammar"), "x[0-9]+"),
        (Form("lark", 'start: "<" %json {"type": "integer"} ">"', "t"), "<-?[0-9]+>"),
    ],
)
def test_other_forms(grammars: Grammars, form: Form, fits: str) -> None:
    for seed in range(3):
        answer = walk(grammars, form, seed)
        assert answer is not None and re.fullmatch(fits, answer), answer


@pytest.mark.parametrize(
    "body",
    [
        {"guided_regex": "(a"},
        {"guided_grammar": "root ::= ("},
        {"guided_json": {"type": "objekt"}},
        {"guided_json": "{"},
        {"guided_json": "3"},
        {"guided_json": False},
        {"guided_json": {"type": "string", "not": {}}},
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "regex"}},
        {"guided_regex": "a", "guided_choice": ["a"]},
        {"guided_regex": "a" * (2 << 20)},
        {"guided_json": {"type": "integer", "minimum": 5, "maximum": 4}},
    ],
)
def test_what_cannot_be_carried_out_is_refused_by_name(
    grammars: Grammars, body: dict[str, Any]
) -> None:
    with pytest.raises(Problem) as refused:
        form = form_of(body)
        assert form is not None
        grammars.mask(form)
    assert refused.value.status == 400 and refused.value.param in str(refused.value)


def test_a_giant_is_given_up_with_a_sentence(grammars: Grammars) -> None:
    form = Form("regex", "(((((a{1000}){1000}){1000}){1000}){1000})", "guided_regex")
    with pytest.raises(Problem, match="guided_regex: it is too complex"):
        walk(grammars, form, 0)


def test_two_answers_of_one_form_do_not_disturb_each_other(grammars: Grammars) -> None:
    form = Form("regex", "ab|cd", "guided_regex")
    one, other = grammars.mask(form), grammars.mask(form)
    a, c = (grammars.tokenizer.encode(x)[0] for x in "ac")
    one.allowed([a])
    assert c in bits(other.allowed([]))
