"""What a model's `config.json` says of its family, heads and sharing pattern, as far as transformers is not needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lckv.errors import UserError, check_whole_number
from lckv.sharing.patterns import SharingPlan, build_layer_types, parse_layer_types

OURS = "lckv-llama"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "gemma3_text", "stablelm", "smollm3", "granite")
"""Other families that can be read as ours; how, is registered in `lckv.families`."""

NORM_TYPES = ("rms_norm", "layer_norm")
"""What may normalise hidden states."""

_OTHER_MECHANISMS = {
    "kv_lora_rank": "keeps latents in the place of keys and values already (MLA)",
    "num_local_experts": "has experts in the place of its MLPs",
    "num_experts": "has experts in the place of its MLPs",
    "n_routed_experts": "has experts in the place of its MLPs",
}
"""What a configuration has that computes something else than our models do, whatever the family."""

_SETTINGS_OF_FAMILIES = {
    "gpt2": ("scale_attn_by_inverse_layer_idx", "add_cross_attention"),
    "gemma3_text": ("attn_logit_softcapping", "use_bidirectional_attention"),
    "stablelm": ("use_parallel_residual", "qk_layernorm"),
}
"""What a family may have and our models have not."""

_SIZES_OF_HEADS = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")


def check_family(values: Mapping[str, Any]) -> None:
    """Refuses models that cannot be read here, as far as that is known without transformers.

    A family that is not in [`FAMILIES`] may turn out to compute what Llama does; see `lckv.families.unregistered`.

    Args:
        values: what `config.json` holds.

    Raises:
        UserError: for a family with other mechanisms, weights that are quantised, or heads that do not fit together;
            the message says what is allowed.
    """
    model_type, allowed = values.get("model_type"), (OURS, *FAMILIES)
    other = next((name for name in _OTHER_MECHANISMS if values.get(name)), None)
    if not isinstance(model_type, str) or (model_type not in allowed and other is not None):
        reason = "" if other is None else f", which {_OTHER_MECHANISMS[other]}, as {other}={values[other]} says"
        raise UserError(
            f"is of model_type {model_type!r}{reason}; allowed are {', '.join(allowed)} (SmolLM2 and Llama 1 to 3 are "
            "llama), and what computes as Llama does"
        )
    if not values.get("is_causal", True):  # transformers' decoders look back and ahead then
        raise UserError(f"says is_causal={values['is_causal']}, which the models here do not have; allowed is True")
    for name in _SETTINGS_OF_FAMILIES.get(model_type, ()):
        if values.get(name):
            raise UserError(f"says {name}={values[name]}, which the models here do not have; allowed is none")
    quantization = values.get("quantization_config")
    if method := quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization:
        raise UserError(f"its weights are quantised ({method}), which cannot be read here; take the original ones")
    check_heads(values)


def check_heads(values: Mapping[str, Any], prefix: str = "") -> None:
    """Refuses heads that do not fit together, as far as their sizes are given.

    Args:
        values: the sizes under transformers' names.
        prefix: what stands before the names of keys.

    Raises:
        UserError: naming the sizes.
    """
    sizes = {name: values[name] for name in _SIZES_OF_HEADS if values.get(name) is not None}
    for name, size in sizes.items():
        check_whole_number(f"{prefix}{name}", size)
    hidden_size, heads, kv_heads, head_dim = map(sizes.get, _SIZES_OF_HEADS)
    if heads is None:
        return
    if hidden_size is not None and hidden_size % heads:
        raise UserError(
            f"{prefix}hidden_size={hidden_size}: is not divisible by {prefix}num_attention_heads={heads}; "
            f"nearest allowed is {max(1, round(hidden_size / heads)) * heads}"
        )
    name = f"{prefix}head_dim" if head_dim else f"{prefix}hidden_size / {prefix}num_attention_heads"
    width = head_dim or (hidden_size or 0) // heads
    if width % 2:
        raise UserError(f"{name}={width}: rotary positions need an even size")
    if kv_heads is not None and heads % kv_heads:
        raise UserError(
            f"{prefix}num_attention_heads={heads}: is not divisible by {prefix}num_key_value_heads={kv_heads}; "
            f"allowed are {', '.join(str(n) for n in range(1, heads + 1) if heads % n == 0)}"
        )


def stored_plan(values: Mapping[str, Any]) -> SharingPlan | None:
    """The sharing pattern in a `config.json`, other families' windows aside; `None` if it does not say.

    Raises:
        UserError: if its string is wrong.
    """
    num_layers = values.get("num_hidden_layers")
    if not isinstance(num_layers, int | None):
        return None
    if values.get("model_type") == OURS:
        for name in ("layer_types", "kv_sharing"):
            if isinstance(values.get(name), str):
                return parse_layer_types(values[name], num_layers)
    return None if num_layers is None else parse_layer_types(build_layer_types("llama", num_layers))
