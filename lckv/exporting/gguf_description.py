"""Finds the architecture of llama.cpp that computes what a model does."""

from __future__ import annotations

from lckv.exporting.gguf_gemma4 import describe_gemma4
from lckv.exporting.gguf_llama import describe_llama
from lckv.exporting.gguf_plain import Description, check_finite, check_no_biases, check_parts, plain_weights
from lckv.exporting.gguf_reuse import find_reuse, is_llama
from lckv.exporting.gguf_silu import approximate_silu
from lckv.models import LCKVLlamaForCausalLM


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
