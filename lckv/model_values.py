"""What a model's `config.json` says of its family and its sharing pattern, as far as transformers is not needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lckv.errors import UserError, near_miss
from lckv.patterns import SharingPlan, build_layer_types, parse_layer_types

OURS = "lckv-llama"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Other families that can be read as ours; how, is registered in `lckv.models.families`."""


def check_family(values: Mapping[str, Any]) -> None:
    """Refuses models that cannot be read here.

    Args:
        values: what `config.json` holds.

    Raises:
        UserError: for another family, or weights that are quantised; the message says what is allowed.
    """
    model_type, allowed = values.get("model_type"), (OURS, *FAMILIES)
    if model_type not in allowed:
        raise UserError(
            f"is of model_type {model_type!r}; allowed are {', '.join(allowed)} (SmolLM2 and Llama 1 to 3 are llama)"
            f"{near_miss(str(model_type), allowed)}"
        )
    quantization = values.get("quantization_config")
    if method := quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization:
        raise UserError(f"its weights are quantised ({method}), which cannot be read here; take the original ones")


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
