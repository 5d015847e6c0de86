"""The families that are supported: by Hugging Face's model_type, each a page of data beside this.

To add one: a file here with a value of `Family`, its name in the list below; docs/architecture.md
says what else.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from pylora.errors import UnsupportedError
from pylora.model.families.cohere import COHERE, COHERE2
from pylora.model.families.ernie import ERNIE45
from pylora.model.families.exaone import EXAONE4
from pylora.model.families.family import Family
from pylora.model.families.gemma import GEMMA, GEMMA2, GEMMA3
from pylora.model.families.glm import GLM, GLM4
from pylora.model.families.gpt2 import GPT2
from pylora.model.families.gpt_neox import GPT_NEOX
from pylora.model.families.granite import GRANITE, GRANITE_HYBRID
from pylora.model.families.llama import LLAMA
from pylora.model.families.mistral import MINISTRAL, MINISTRAL3, MISTRAL
from pylora.model.families.moe import MIXTRAL, OLMOE, QWEN3_MOE
from pylora.model.families.nemotron import ARCEE, NEMOTRON
from pylora.model.families.olmo import OLMO2, OLMO3
from pylora.model.families.phi3 import PHI3
from pylora.model.families.qwen import QWEN2, QWEN3
from pylora.model.families.seed_oss import SEED_OSS
from pylora.model.families.smollm3 import SMOLLM3
from pylora.model.families.stablelm import STABLELM
from pylora.model.families.starcoder2 import STARCODER2

_LIST = (
    LLAMA, MISTRAL, MINISTRAL, MINISTRAL3, QWEN2, QWEN3, GEMMA, GEMMA2, GEMMA3, PHI3, SMOLLM3,
    GRANITE, GRANITE_HYBRID, OLMO2, OLMO3, GPT2, MIXTRAL, QWEN3_MOE, OLMOE, COHERE, COHERE2,
    STABLELM, STARCODER2, GPT_NEOX, EXAONE4, NEMOTRON, ARCEE, SEED_OSS, ERNIE45, GLM, GLM4,
)  # fmt: skip
ALL: Mapping[str, Family] = {family.model_type: family for family in _LIST}
PAGE = "docs/architecture.md"
# Other names of their text parts: those of multimodal models.
ALSO: Mapping[str, Family] = {name: family for family in _LIST for name in family.also}


def of(model_type: object) -> Family:
    """The family of a model_type. UnsupportedError that names the nearest one for any other."""
    if isinstance(model_type, str) and (model_type in ALL or model_type in ALSO):
        return ALL.get(model_type) or ALSO[model_type]
    close: list[str] = []
    if isinstance(model_type, str):
        close = difflib.get_close_matches(model_type.lower(), ALL, n=1, cutoff=0.5)
    nearest = f"the nearest that is supported is {close[0]!r}; " if close else ""
    raise UnsupportedError(
        f"config.json: model_type is {model_type!r:.80}, which is not supported; {nearest}"
        f'supported are {", ".join(ALL)}; "Add a family" in {PAGE} says how to add one'
    )
