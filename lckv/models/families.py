"""The families of models that can be read as ours: Llama's decoder, with what a family adds to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from lckv.model_values import check_family
from lckv.models.configuration_lckv import LCKVLlamaConfig
from lckv.patterns import join_layer_types
from lckv.registry import Registry

FAMILIES: Registry[Callable[[PretrainedConfig], dict[str, Any]]] = Registry("family")
"""By transformers' `model_type`: what a family's configuration says in other words, or leaves unsaid."""

_NOT_CARRIED_OVER = ("model_type", "architectures", "transformers_version", "layer_types", "sliding_window")


@FAMILIES.register("llama")
def llama(config: PretrainedConfig) -> dict[str, Any]:
    """Llama 1, 2 and 3, SmolLM2 and all others that say so of themselves."""
    return {}


@FAMILIES.register("mistral")
def mistral(config: PretrainedConfig) -> dict[str, Any]:
    """Every layer has a window, or none has."""
    return _windows(config, [config.sliding_window is not None] * config.num_hidden_layers)


@FAMILIES.register("qwen2")
def qwen2(config: PretrainedConfig) -> dict[str, Any]:
    """Qwen2 and 2.5: biases of queries, keys and values; windows, if any, from some layer on."""
    is_sliding = [kind == "sliding_attention" for kind in config.layer_types]
    return {"attention_bias": True, "attention_output_bias": False} | _windows(config, is_sliding)


@FAMILIES.register("qwen3")
def qwen3(config: PretrainedConfig) -> dict[str, Any]:
    """Queries and keys are normalised; windows as in Qwen2."""
    return {"use_qk_norm": True} | _windows(config, [kind == "sliding_attention" for kind in config.layer_types])


def read_config(values: Mapping[str, Any]) -> LCKVLlamaConfig:
    """Reads the configuration of any family as ours, every layer reading itself; ours is read as it is.

    Args:
        values: what `config.json` holds.

    Raises:
        UserError: for another family, or weights that are quantised; the message says what is allowed.
    """
    check_family(values)
    if values["model_type"] == LCKVLlamaConfig.model_type:
        return LCKVLlamaConfig.from_dict(dict(values))
    config = AutoConfig.for_model(**values)
    carried = {
        name: value
        for name, value in config.to_dict().items()
        if name in LCKVLlamaConfig.__dataclass_fields__ and name not in _NOT_CARRIED_OVER
    }
    return LCKVLlamaConfig(**(carried | FAMILIES[config.model_type](config)))


def _windows(config: PretrainedConfig, is_sliding: list[bool]) -> dict[str, Any]:
    """The pattern in which every layer reads itself, through its window if it has one."""
    if not any(is_sliding):
        return {}
    return {
        "layer_types": join_layer_types(range(len(is_sliding)), is_sliding),
        "sliding_window": config.sliding_window,
    }
