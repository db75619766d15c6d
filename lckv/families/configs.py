"""Configurations of other families in our words, as far as they are alike."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from lckv.errors import UserError, near_miss
from lckv.models.configuration_lckv import LCKVLlamaConfig
from lckv.models.parts.rotary import PARTIAL
from lckv.sharing.model_values import FAMILIES, OURS
from lckv.sharing.patterns import join_layer_types

_ALWAYS_READ = ("head_dim",)  # declared or not, by transformers' decoders
_NOT_CARRIED_OVER = ("model_type", "architectures", "transformers_version", "layer_types", "sliding_window")


def as_auto_config(values: Mapping[str, Any]) -> PretrainedConfig:
    """What transformers' `AutoConfig` makes of a `config.json`; `model_type` alone does not say of which class it is.

    Raises:
        UserError: if transformers has no such family.
    """
    model_type = values["model_type"]
    if model_type not in CONFIG_MAPPING:
        hint = near_miss(model_type, (OURS, *FAMILIES)).replace(";", ",").rstrip("?")
        raise no_family(model_type, f"transformers has no such family{hint}")
    with TemporaryDirectory() as folder:  # its rules are applied to files only
        Path(folder, "config.json").write_text(json.dumps(dict(values), default=str), encoding="utf-8")
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    config.name_or_path = ""
    return config


def no_family(model_type: str, reason: str) -> UserError:
    """Says that a family cannot be read, and why."""
    return UserError(
        f"is of model_type {model_type!r}; allowed are {', '.join((OURS, *FAMILIES))}, and what computes as Llama "
        f"does, which this does not: {reason}; lckv.families.FAMILIES.register({model_type!r}) adds a family"
    )


def carried_over(config: PretrainedConfig) -> dict[str, Any]:
    """What a configuration says under our names; what its class does not declare means nothing to its model."""
    declared = {*type(config).__dataclass_fields__, *inspect.signature(type(config)).parameters, *_ALWAYS_READ}
    return {
        name: value
        for name, value in config.to_dict().items()
        if name in declared and name in LCKVLlamaConfig.__dataclass_fields__ and name not in _NOT_CARRIED_OVER
    }


def turned_whole(rope_parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Rotations of a family that knows no `partial_rotary_factor`, for all layers or for each kind.

    Raises:
        UserError: if it comes with a scaling of frequencies, which all families have, and all scalings take it.
    """
    if any(isinstance(value, Mapping) for value in rope_parameters.values()):
        return {label: turned_whole(parameters) for label, parameters in rope_parameters.items()}
    kind, part = rope_parameters.get("rope_type", "default"), rope_parameters.get(PARTIAL, 1.0)
    if kind != "default" and part != 1.0:
        raise UserError(f"says {PARTIAL}={part} with rope_type={kind}, which its family does not have; allowed is 1.0")
    return {name: value for name, value in rope_parameters.items() if name != PARTIAL}


def windows(config: PretrainedConfig, is_sliding: list[bool] | None = None) -> dict[str, Any]:
    """The pattern in which every layer reads itself, through its window if it has one.

    Args:
        config: which says how long windows are.
        is_sliding: for every layer, whether it has one; `None`: as the configuration says of each.

    Raises:
        UserError: if it does not say how long they are; transformers' models cannot be run then.
    """
    if is_sliding is None:
        is_sliding = [kind == "sliding_attention" for kind in config.layer_types]
    if not any(is_sliding):
        return {}
    if config.sliding_window is None:
        why = ", as use_sliding_window=False says" if getattr(config, "use_sliding_window", True) is False else ""
        raise UserError(f"has layers with windows (sliding_attention in layer_types), but no sliding_window{why}")
    return {
        "layer_types": join_layer_types(range(len(is_sliding)), is_sliding),
        "sliding_window": config.sliding_window,
    }


__all__ = ["as_auto_config", "carried_over", "no_family", "turned_whole", "windows"]
