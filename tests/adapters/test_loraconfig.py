"""Settings as text: what is no JSON is refused. Fields and values: test_plan.py, test_peft.py."""

from __future__ import annotations

import pytest

from pylora.adapters.loraconfig import LoraConfig
from pylora.errors import ConfigError


@pytest.mark.parametrize("name", ["NaN", "Infinity", "-Infinity"])
def test_what_is_no_json_is_refused_in_fields_without_effect_too(name):
    with pytest.raises(ConfigError, match=f"{name} is no number in JSON"):
        LoraConfig.from_json(f'{{"target_modules": ["q_proj"], "revision": {name}}}')
