"""The plan: PEFT's matching, the rule behind each number, and errors for what matches nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest

from pylora.adapters.adapter import Adapter
from pylora.adapters.loraconfig import LoraConfig
from pylora.adapters.plan import PlanEntry, resolve
from pylora.errors import ConfigError, PlanError, PyloraError, UnsupportedError
from pylora.model.config import LlamaConfig, ModuleSpec

MODULES = LlamaConfig.tiny(num_hidden_layers=3).modules()
QWEN2 = LlamaConfig.tiny(model_type="qwen2", attention_bias=True).modules()


def plan(modules: Any = MODULES, **fields: Any) -> dict[str, PlanEntry]:
    fields.setdefault("target_modules", ["q_proj", "v_proj"])
    return {e.path: e for e in resolve(LoraConfig(**fields), modules)}


def q(i: int) -> str:
    return f"model.layers.{i}.self_attn.q_proj"


def test_list_entries_match_whole_names_after_a_dot() -> None:
    assert list(plan(target_modules=["layers.1.self_attn.q_proj"])) == [q(1)]
    assert list(plan(target_modules=[q(2)])) == [q(2)]
    assert list(plan()) == [p for p in MODULES if p.endswith((".q_proj", ".v_proj"))]


def test_all_linear_leaves_out_the_output_layer_and_the_embedding() -> None:
    want = [p for p, s in MODULES.items() if s.kind == "linear" and p != "lm_head"]
    assert (
        list(plan(target_modules="all-linear")) == want == list(plan(target_modules="ALL-Linear"))
    )


def test_a_string_is_a_regular_expression_for_the_whole_path() -> None:
    assert list(plan(target_modules=r".*\.[12]\..*q_proj")) == [q(1), q(2)]
    with pytest.raises(PlanError, match="matches no module path"):
        plan(target_modules="q_proj")


def test_embedding_and_head_can_be_targets() -> None:
    found = plan(target_modules=["embed_tokens", "lm_head"])
    embed, head = found["model.embed_tokens"], found["lm_head"]
    assert (embed.kind, embed.d, embed.k) == ("embedding", 24, 61)
    assert (head.kind, head.d, head.k) == ("linear", 61, 24)


def test_scale_and_the_rule_of_each_number() -> None:
    found = plan(
        r=4, lora_alpha=16, rank_pattern={r"layers\.0\..*": 2, "q_proj": 8}, alpha_pattern={q(1): 3}
    )
    first, second, third = found[q(0)], found[q(1)], found["model.layers.1.self_attn.v_proj"]
    assert (first.r, first.alpha, first.scale) == (2, 16, 8.0)
    assert first.rule_r == r"rank_pattern 'layers\\.0\\..*' (first of 2 that match)"
    assert (second.r, second.alpha, second.scale) == (8, 3, 3 / 8)
    assert second.rule_r == "rank_pattern 'q_proj'"
    assert second.rule_alpha == f"alpha_pattern '{q(1)}'"
    assert (third.r, third.rule_r) == (4, "default r")
    assert third.rule_alpha == "default lora_alpha"
    assert third.rule_scale == "alpha / r"
    assert third.rule_target == "target_modules 'v_proj'"


def test_rslora_divides_by_the_square_root_of_each_modules_own_rank() -> None:
    found = plan(r=4, lora_alpha=6, use_rslora=True, rank_pattern={q(0): 9})
    assert found[q(0)].scale == 6 / 3
    assert found[q(1)].scale == 6 / math.sqrt(4)
    assert "sqrt" in found[q(0)].rule_scale


def test_exclude_modules_by_name_and_by_expression() -> None:
    assert q(1) not in plan(exclude_modules=["layers.1.self_attn.q_proj"])
    assert list(plan(exclude_modules=r".*v_proj", target_modules=["q_proj"])) == [q(0), q(1), q(2)]


def test_layers_to_transform() -> None:
    names = ["q_proj"]
    assert list(plan(target_modules=names, layers_to_transform=1)) == [q(1)]
    assert list(plan(target_modules=names, layers_to_transform=[0, 2])) == [q(0), q(2)]
    both = plan(target_modules=names, layers_to_transform=[2], layers_pattern="layers")
    assert list(both) == [q(2)]
    assert both[q(2)].rule_target == "target_modules 'q_proj', layers_to_transform 2"
    # A whole path is chosen whatever the layers say, as in PEFT.
    assert list(plan(target_modules=[q(0), "q_proj"], layers_to_transform=[2])) == [q(0), q(2)]
    assert len(plan(target_modules=names, layers_to_transform=[])) == 3


def test_bias_marks_the_biases_that_the_adapter_replaces() -> None:
    config = LoraConfig(target_modules=["q_proj", "o_proj"], bias="lora_only")
    own = resolve(config, QWEN2)
    assert {e.path for e in own if e.base_bias} == {q(0), q(1)}
    assert own.bias_only == ()
    every = resolve(LoraConfig(target_modules=["q_proj"], bias="all"), QWEN2)
    assert [p for p, _ in every.bias_only] == [
        f"model.layers.{i}.self_attn.{n}_proj" for i in (0, 1) for n in "kv"
    ]
    assert every.num_parameters == sum(e.parameters for e in every) + 4 * 12


MATCHES_NOTHING = [
    ({"target_modules": ["q_prj"]}, "'q_prj' matches no module.*did you mean 'q_proj'"),
    ({"target_modules": ["proj"]}, "'proj' matches no module"),
    ({"target_modules": ["self_attn"]}, "'self_attn' matches no module"),
    ({"target_modules": ["q_proj", "wqkv"]}, "'wqkv'"),
    ({"target_modules": None}, "target_modules is not given"),
    ({"target_modules": []}, "target_modules is not given"),
    ({"exclude_modules": ["k_prj"]}, "exclude_modules: 'k_prj'"),
    ({"exclude_modules": "vision.*"}, "exclude_modules"),
    ({"exclude_modules": ["q_proj", "v_proj"]}, "no module is left"),
    ({"rank_pattern": {"^layers.0": 4}}, "rank_pattern key '.layers.0' matches none"),
    ({"rank_pattern": {"k_proj": 4}}, "rank_pattern key 'k_proj' matches none of the 6"),
    ({"alpha_pattern": {"mlp": 4}}, "alpha_pattern key 'mlp'"),
    ({"layers_to_transform": [3]}, "no layer 3; its layers are 0 to 2"),
    ({"layers_to_transform": [-1]}, "no layer -1"),
    ({"layers_to_transform": [0], "layers_pattern": ["h"]}, "layers_pattern .*'h'"),
    ({"target_modules": "("}, "not a regular expression"),
    ({"rank_pattern": {"*": 3}}, "not a regular expression"),
    ({"target_modules": r"(\w+)+x"}, "matches no module path"),
    ({"target_modules": r"(?:a|a)*x"}, "matches no module path"),
    ({"rank_pattern": {r"(q(_\w*)?){2,}": 2}}, "matches none"),
    ({"target_modules": ".*" * 20 + "x"}, "exponential"),
    ({"target_modules": "(.?){40}x"}, "exponential"),
    ({"target_modules": ".?" * 30 + "x"}, "exponential"),
    ({"target_modules": "(.|.a?)" * 30 + "x"}, "exponential"),
    ({"alpha_pattern": {".*" * 20 + "x": 2}}, "alpha_pattern key: .*exponential"),
    ({"rank_pattern": {"(?i)q_proj": 2}}, "rank_pattern key: '..i.q_proj' is not"),
    ({"rank_pattern": {"q_proj)|(v": 2}}, "rank_pattern key: 'q_proj.*' is not"),
]


@pytest.mark.parametrize(("fields", "message"), MATCHES_NOTHING)
def test_what_matches_nothing_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plan(**fields)


def test_ordinary_expressions_are_not_taken_for_hostile_ones() -> None:
    names = "self_attn|attention|attn|mlp|feed_forward|ffn|dense"
    for pattern in (
        r".*(?:self_attn|mlp).*(q_proj|v_proj)",
        r"model\.layers\.(\d+)\..*q_proj",
        rf"model\.layers\.({'|'.join(map(str, range(80)))})\.({names})\.(q|k|v|o)_proj",
        r"^(?!.*vision)(?=model).*?\.(?:layers|blocks)\.[0-9]{1,3}\..*?(q_proj|v_proj)",
        # what a well-known tool for fine-tuning writes
        rf"(?:.*?(?:language|text).*?(?:{names}).*?(?:q_proj|fc1|down_proj).*?)"
        rf"|(?:\bmodel\.layers\.[\d]{{1,}}\.(?:{names})\.(?:(?:q_proj|k_proj)))",
    ):
        assert plan(target_modules=pattern)


BAD_VALUES: list[tuple[dict[str, Any], str]] = [
    ({"r": 0}, "r = 0"),
    ({"r": -4}, "r = -4"),
    ({"r": 2.5}, "r = 2.5"),
    ({"r": True}, "r = True"),
    ({"r": 2**40}, "r = "),
    ({"lora_alpha": 0}, "lora_alpha = 0"),
    ({"lora_alpha": float("nan")}, "lora_alpha = nan"),
    ({"lora_alpha": 10**400}, "lora_alpha = 1000"),
    ({"lora_alpha": 1e300}, "lora_alpha = 1e.300"),  # infinite in float32
    ({"alpha_pattern": {"q_proj": 10**400}}, "alpha_pattern.'q_proj'. = 1000"),
    ({"lora_alpha": "16"}, "lora_alpha = '16'"),
    ({"rank_pattern": {"q_proj": 0}}, "rank_pattern.'q_proj'. = 0"),
    ({"alpha_pattern": {"q_proj": -1}}, "alpha_pattern.'q_proj'. = -1"),
    ({"rank_pattern": [1]}, "rank_pattern"),
    ({"lora_dropout": 1.0}, "lora_dropout = 1.0"),
    ({"bias": "some"}, "bias = 'some'"),
    ({"use_rslora": 1}, "use_rslora = 1"),
    ({"target_modules": ["q_proj", 3]}, "target_modules contains 3"),
    ({"target_modules": 7}, "target_modules = 7"),
    ({"target_modules": [""]}, "target_modules contains ''"),
    ({"layers_to_transform": "1"}, "layers_to_transform = '1'"),
    ({"layers_to_transform": [True]}, "layers_to_transform"),
    ({"layers_pattern": "layers"}, "without layers_to_transform"),
    ({"target_modules": "all-linear", "layers_to_transform": [0]}, "layers_to_transform needs"),
    ({"lora_bias": True, "init_lora_weights": "gaussian"}, "lora_bias"),
    ({"target_modules": "x" * 5000}, "longer than"),
    ({"use_dora": 1}, "use_dora = 1: expected true or false"),
    ({"use_dora": True, "lora_bias": True}, "use_dora = true does not go together with lora_bias"),
    ({"use_dora": True, "target_parameters": ["a"]}, "use_dora = true does not go together with"),
]


@pytest.mark.parametrize(("fields", "message"), BAD_VALUES)
def test_values_out_of_range_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(**fields)


UNSUPPORTED: list[tuple[str, Any]] = [
    ("alora_invocation_tokens", [1, 2]),
    ("layer_replication", [[0, 2], [1, 3]]),
    ("megatron_config", {"x": 1}),
    ("use_qalora", True),
    ("use_bdlora", {"nblocks": 2}),
    ("arrow_config", {"top_k": 3}),
    ("kasa_config", {"beta": 1.0}),
    ("velora_config", {"scale": 1.0}),
    ("monteclora_config", {"num_samples": 8}),
    ("init_lora_weights", "corda"),
    ("init_lora_weights", "loftq"),
    ("init_lora_weights", "lora_ga"),
    ("peft_type", "IA3"),
    ("some_field_of_the_future", {"on": True}),
]


@pytest.mark.parametrize(("name", "value"), UNSUPPORTED)
def test_fields_that_change_the_result_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(UnsupportedError, match=f"here.json: .*{name}"):
        LoraConfig.from_dict({"target_modules": ["q_proj"], name: value}, "here.json")


def test_fan_in_fan_out_is_for_modules_that_are_stored_transposed() -> None:
    config = LoraConfig.from_dict({"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True})
    modules = {f"transformer.h.0.attn.{n}": ModuleSpec("linear", 6, 4, True, True) for n in
               ("c_attn", "c_proj")}  # fmt: skip
    assert len(resolve(config, modules)) == 2
    with pytest.raises(UnsupportedError, match="fan_in_fan_out.*model.layers.0.self_attn.q_proj"):
        plan(fan_in_fan_out=True)


def test_fields_without_effect_and_empty_ones_are_read() -> None:
    fields = {
        "target_modules": ["q_proj"],
        "peft_version": "0.21.2",
        "auto_mapping": {"base_model_class": "LlamaForCausalLM"},
        "init_lora_weights": "eva",
        "eva_config": {"rho": 2.0},
        "megatron_core": "megatron.core",
        "use_dora": False,
        "layer_replication": None,
        "rank_pattern": None,
        "future": None,
    }
    assert LoraConfig.from_dict(fields).target_modules == ("q_proj",)


@pytest.mark.parametrize("how", ["pissa", "pissa_niter_4", "olora", "OLoRA"])
def test_a_beginning_that_takes_from_the_base_needs_the_base(how: str) -> None:
    with pytest.raises(UnsupportedError, match=f"init_lora_weights = '{how}'.*base=checkpoint"):
        plan(init_lora_weights=how)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([3, 3], "the token 3 twice"),
        ([-1], "expected token ids"),
        ([True], "expected token ids"),
        ("embed_tokens", "expected token ids"),
        ({"embed_tokens": []}, "expected token ids"),
        ({"embed_tokens": [1, 1]}, "twice"),
        ({"": [1]}, "non-empty"),
    ],
)
def test_token_indices_are_ids(value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoraConfig(target_modules=["q_proj"], trainable_token_indices=value)


def test_whole_modules_get_no_lora_and_begin_as_the_base() -> None:
    both = plan(target_modules=["q_proj", "v_proj"], modules_to_save=["1.self_attn.q_proj"])
    assert "model.layers.1.self_attn.q_proj" not in both
    assert len(both) == len(plan(target_modules=["q_proj", "v_proj"])) - 1
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"])
    with pytest.raises(ConfigError, match=r"modules_to_save = \('norm',\).*give whole=fresh_whole"):
        Adapter.init(resolve(config, MODULES), config)


def test_bias_on_an_embedding_and_adapters_of_tied_layers_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="ensure_weight_tying"):
        plan(target_modules=["embed_tokens"], ensure_weight_tying=True)
    with pytest.raises(UnsupportedError, match="model.embed_tokens: lora_bias"):
        plan(target_modules=["embed_tokens"], lora_bias=True)


def test_json_round_trip_keeps_every_field_and_the_order_of_patterns() -> None:
    config = LoraConfig(
        r=3,
        lora_alpha=7.5,
        target_modules=["v_proj", "q_proj"],
        rank_pattern={"z": 1, "a": 2},
        layers_to_transform=(1,),
        bias="all",
        use_rslora=True,
        task_type="CAUSAL_LM",
    )
    again = LoraConfig.from_json(config.to_json())
    assert again == config
    assert list(again.rank_pattern) == ["z", "a"]


@pytest.mark.parametrize("text", ["", "[]", "{", '{"r": 1, "r": 2}', "[" * 100_000, b"\xff\xfe"])
def test_json_that_is_no_config(text: str | bytes) -> None:
    with pytest.raises(PyloraError, match="cfg.json"):
        LoraConfig.from_json(text, "cfg.json")
