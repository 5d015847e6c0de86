"""Settings of a `config.json` that change the result: which values say that nothing is asked for.

A family that does not know a setting refuses any other value of it, by name: what a file asks for
and nobody does is never passed over in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pylora.errors import UnsupportedError

_OFF = (None, False)
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "alibi": _OFF,
    "attention_multiplier": (None,),
    "attn_logit_softcapping": (None, 0),
    "attn_temperature_tuning": (None, False, 0),
    "clip_qkv": (None,),
    "embedding_multiplier": (None, 1),
    "final_logit_softcapping": (None, 0),
    "kv_lora_rank": (None,),
    "logit_scale": (None, 1),
    "logits_scaling": (None, 1),
    "mlp_only_layers": (None, []),
    "moe_intermediate_size": (None,),
    "multi_query": _OFF,
    "n_routed_experts": (None, 0),
    "n_shared_experts": (None, 0),
    "no_rope_layers": (None,),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "num_nextn_predict_layers": (None, 0),
    "parallel_attn": _OFF,
    "partial_rotary_factor": (None, 1),
    "qk_layernorm": _OFF,
    "query_pre_attn_scalar": (None,),
    "quantization_config": (None,),
    "residual_multiplier": (None, 1),
    "rotary_pct": (None, 1),
    "rope_local_base_freq": (None,),
    "scale_attn_by_inverse_layer_idx": _OFF,
    "shared_intermediate_size": (None, 0),
    "shared_expert_intermediate_size": (None, 0),
    "use_bidirectional_attention": _OFF,
    "use_parallel_residual": _OFF,
    "use_qk_norm": _OFF,
}


def refuse_unknown(settings: Mapping[str, Any], knows: frozenset[str], title: str) -> None:
    """UnsupportedError for a setting that changes the result and that the family does not know."""
    for key, neutral in NEUTRAL.items():
        if key in knows or key not in settings:
            continue
        value = settings[key]
        if not any(value == n and isinstance(value, bool) == isinstance(n, bool) for n in neutral):
            if key == "quantization_config":
                raise UnsupportedError(
                    "config.json: quantization_config is set; use unquantized weights"
                )
            raise UnsupportedError(
                f"config.json: {key} is {value!r:.80}, and a {title} model has no such feature here"
            )
