"""The families of models that can be read as ours: Llama's decoder, with what a family adds to it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig

from lckv.errors import UserError, first_line
from lckv.families.configs import as_auto_config, carried_over, turned_whole, windows
from lckv.families.tensors import (
    TENSORS,
    LazyTensors,
    ReadTensor,
    is_turned_whole,
    llama_tensors,
    our_tensors,
    read_tensors,
)
from lckv.families.unregistered import read_unregistered
from lckv.models.configuration_lckv import LCKVLlamaConfig
from lckv.models.parts.rotary import PARTIAL
from lckv.sharing.model_values import check_family
from lckv.utils.registry import Registry

FAMILIES: Registry[Callable[[PretrainedConfig], dict[str, Any]]] = Registry("family")
"""By transformers' `model_type`: what a family's configuration says in other words, or leaves unsaid.

What its class declares and is called as ours is carried over without being named, but no `partial_rotary_factor`:
transformers' decoders ignore it unless they are made for it, and then the function says `rope_parameters`. Tensors
that are not Llama's have an entry in [`TENSORS`]. Packages that are installed register families by an entry point of
the group `lckv.families`: the name is the `model_type`, the value a module that has these entries.
"""

ENTRY_POINTS = "lckv.families"


@dataclass(frozen=True)
class Reading:
    """How a model is read as one of ours.

    Attributes:
        config: its configuration.
        read: what becomes of its tensors; `None` if they are ours as they are.
    """

    config: LCKVLlamaConfig
    read: ReadTensor | None

    def tensors(self, stored: Mapping[str, Tensor]) -> LazyTensors:
        """Its tensors under our names, each made when it is looked up."""
        return read_tensors(stored, self.config, self.read or our_tensors)


def read_model(given: Mapping[str, Any] | PretrainedConfig, settings: Mapping[str, Any] | None = None) -> Reading:
    """Finds out how a model of any family is read as one of ours, every layer reading itself; ours as it is.

    Args:
        given: what `config.json` holds, or the configuration of a model that there is already.
        settings: what else is known of a model of a registered family, in our words.

    Raises:
        UserError: for a family that computes something else, or weights that are quantised; the message says what is
            allowed.
    """
    values = given.to_dict() if isinstance(given, PretrainedConfig) else given
    check_family(values)
    if values["model_type"] == LCKVLlamaConfig.model_type:
        own = {name: value for name, value in values.items() if name != "auto_map"}  # the code is ours, too
        return Reading(LCKVLlamaConfig.from_dict(own), None)
    _load_entry_point(values["model_type"])  # which may make the family known to transformers, too
    original = copy.deepcopy(given) if isinstance(given, PretrainedConfig) else as_auto_config(given)
    model_type = original.model_type  # not always the one in the file: Mistral's with `layer_types` is Ministral's
    _load_entry_point(model_type)
    if model_type not in FAMILIES:
        return Reading(*read_unregistered(original))
    arguments, said = carried_over(original) | dict(settings or {}), FAMILIES[model_type](original)
    if "rope_parameters" in arguments.keys() - said.keys():
        arguments["rope_parameters"] = turned_whole(arguments["rope_parameters"])
    config = LCKVLlamaConfig(**(arguments | said))
    if model_type in TENSORS:
        return Reading(config, TENSORS[model_type])
    return Reading(config, None if is_turned_whole(config) else llama_tensors)


@cache
def _load_entry_point(model_type: str) -> None:
    """Imports what an installed package has to say of a family.

    Raises:
        UserError: naming the entry point that cannot be imported.
    """
    for entry in entry_points(group=ENTRY_POINTS, name=model_type):
        try:
            entry.load()
        except Exception as error:  # whatever importing foreign code may end in
            raise UserError(
                f"the entry point {entry.name} = {entry.value} of the group {ENTRY_POINTS} cannot be imported: "
                f"{type(error).__name__}: {first_line(error)}"
            ) from error


@FAMILIES.register("llama")
def llama(config: PretrainedConfig) -> dict[str, Any]:
    """Llama 1, 2 and 3, SmolLM2 and all others that say so of themselves."""
    return {}


@FAMILIES.register("mistral")
def mistral(config: PretrainedConfig) -> dict[str, Any]:
    """Every layer has a window, or none has."""
    return windows(config, [config.sliding_window is not None] * config.num_hidden_layers)


@FAMILIES.register("qwen2")
def qwen2(config: PretrainedConfig) -> dict[str, Any]:
    """Qwen2 and 2.5: biases of queries, keys and values; windows, if any, from some layer on."""
    return {"attention_bias": True, "attention_output_bias": False} | windows(config)


@FAMILIES.register("qwen3")
def qwen3(config: PretrainedConfig) -> dict[str, Any]:
    """Queries and keys are normalised; windows as in Qwen2."""
    return {"use_qk_norm": True} | windows(config)


@FAMILIES.register("gpt2")
def gpt2(config: PretrainedConfig) -> dict[str, Any]:
    """Learned positions, norms with biases, and a plain MLP; dropout is left out."""
    return {
        "hidden_size": config.n_embd,
        "head_dim": config.n_embd // config.n_head,
        "intermediate_size": config.n_inner or 4 * config.n_embd,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "max_position_embeddings": config.n_positions,
        "hidden_act": config.activation_function,
        "rms_norm_eps": config.layer_norm_epsilon,
        "norm_type": "layer_norm",
        "gated_mlp": False,
        "attention_bias": True,
        "mlp_bias": True,
        "learned_positions": True,
        "attention_multiplier": None if config.scale_attn_weights else 1.0,
    }


@FAMILIES.register("gemma3_text")
def gemma3_text(config: PretrainedConfig) -> dict[str, Any]:
    """Norms in front and behind, scaled embeddings, and rotations by the kind of layer."""
    return {
        "hidden_act": config.hidden_activation,
        "use_qk_norm": True,
        "use_output_norms": True,
        "attention_multiplier": config.query_pre_attn_scalar**-0.5,
        "embedding_multiplier": config.hidden_size**0.5,
        "rope_layer_types": config.layer_types,
    } | windows(config)


@FAMILIES.register("stablelm")
def stablelm(config: PretrainedConfig) -> dict[str, Any]:
    """Norms with biases; a part of each head is rotated."""
    return {
        "rope_parameters": config.rope_parameters,
        "norm_type": "layer_norm",
        "rms_norm_eps": config.layer_norm_eps,
        "attention_bias": config.use_qkv_bias,
        "attention_output_bias": False,
    }


@FAMILIES.register("smollm3")
def smollm3(config: PretrainedConfig) -> dict[str, Any]:
    """Most layers rotate, some do not; these may have windows."""
    rotated = turned_whole(config.rope_parameters)
    unrotated = {"rope_type": "default", "rope_theta": rotated["rope_theta"], PARTIAL: 0.0}
    return {
        "rope_parameters": {"rotated": rotated, "unrotated": unrotated},
        "rope_layer_types": ["rotated" if is_rotated else "unrotated" for is_rotated in config.no_rope_layers],
    } | windows(config)


@FAMILIES.register("granite")
def granite(config: PretrainedConfig) -> dict[str, Any]:
    """Llama with multipliers, under the names that they have here."""
    return {}
