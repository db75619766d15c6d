"""Models whose layers all read themselves, without windows, as llama.cpp's Llama or Qwen3."""

from __future__ import annotations

from lckv.errors import UserError
from lckv.exporting.gguf_plain import (
    ROPE_DIVISORS,
    Description,
    Weights,
    check_no_biases,
    common_settings,
    find_rotation,
    named,
)
from lckv.gguf_weights import side_by_side
from lckv.models import LCKVLlamaConfig


def describe_llama(config: LCKVLlamaConfig, weights: Weights) -> Description:
    """A model as Llama, or as Qwen3 if it normalises queries and keys.

    Args:
        config: of the model.
        weights: as of a plain Llama, by our names.

    Raises:
        UserError: for what neither has.
    """
    architecture = "qwen3" if config.use_qk_norm else "llama"
    if config.final_logit_softcapping is not None:
        raise UserError(
            f"final_logit_softcapping={config.final_logit_softcapping}: llama.cpp's {architecture} has none"
        )
    if len(config.rotations) > 1:
        raise UserError(f"rope_layer_types: llama.cpp's {architecture} has one rotary embedding for all layers")
    rotation = find_rotation(config, next(iter(config.rotations)))
    divisors = {} if rotation.is_plain else {ROPE_DIVISORS: rotation.divisors}
    if architecture == "llama":
        weights = {name: side_by_side(tensor, name, config) for name, tensor in weights.items()}
    elif divisors:
        raise UserError("rope_parameters: llama.cpp's qwen3 scales no frequencies")
    else:
        check_no_biases(config, architecture)
    settings = common_settings(config) | {"rope.freq_base": rotation.theta}
    return Description(architecture, settings, named(architecture, weights) | divisors)
