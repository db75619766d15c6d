"""Finds the architecture of llama.cpp that computes what a model does: Llama's, Qwen3's or Gemma 4's."""

from __future__ import annotations

from lckv.errors import UserError
from lckv.exporting.gguf_gemma4 import describe_gemma4
from lckv.exporting.gguf_plain import (
    ROPE_DIVISORS,
    Description,
    Weights,
    check_finite,
    check_no_biases,
    check_parts,
    common_settings,
    find_rotation,
    named,
    plain_weights,
)
from lckv.exporting.gguf_reuse import find_reuse, is_llama
from lckv.exporting.gguf_silu import approximate_silu
from lckv.loading.gguf_weights import side_by_side
from lckv.models import LCKVLlamaConfig, LCKVLlamaForCausalLM


def describe(model: LCKVLlamaForCausalLM, *, approximates_silu: bool = False) -> Description:
    """A model in the words of an architecture of llama.cpp.

    Args:
        model: the model.
        approximates_silu: whether GELUs may stand for SiLU where no architecture has that.

    Raises:
        UserError: if none computes the same, naming the layer or the setting.
    """
    config, plan = model.config, model.config.sharing_plan
    check_parts(config)
    reuse = find_reuse(plan, config.sliding_window, config.max_position_embeddings)
    weights = plain_weights(model)
    check_finite(weights, "in the model")
    if is_llama(plan, reuse, config.hidden_act, approximates_silu=approximates_silu):
        return describe_llama(config, weights)
    check_no_biases(config, "gemma4")
    if approximates_silu:
        config, weights = approximate_silu(config, weights)
    return describe_gemma4(config, weights, reuse)


def describe_llama(config: LCKVLlamaConfig, weights: Weights) -> Description:
    """A model whose layers read themselves, without windows, as Llama; as Qwen3 if queries and keys are normalised."""
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
