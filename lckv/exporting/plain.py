"""Models that share nothing, as those of transformers' own families that compute the same from the same tensors."""

from __future__ import annotations

from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lckv.errors import UserError
from lckv.families import TENSORS, read_model
from lckv.models import LCKVLlamaConfig
from lckv.sharing.model_values import FAMILIES

_WITHOUT_MEANING = (
    *("forward_passes", "backward_passes", "converge_tolerance", "use_sequential"),  # where no layer reads upward
    *("layer_types", "architectures", "dtype", "transformers_version", "use_cache", "auto_map"),
)


def plain_config(config: LCKVLlamaConfig) -> PretrainedConfig | None:
    """The configuration of a family of transformers' own that is the same model; `None` if no family can say it.

    A family can if what it is told is read back as `config`: how it is read, `lckv.families` knows.
    """
    if config.rope_layer_types is not None:  # families have other words for it
        return None
    for family in FAMILIES:
        if family in TENSORS:  # which are not named as ours
            continue
        try:
            written = _written_as(family, config)
            reading = read_model(written)
        except (UserError, StrictDataclassError):  # what it is told means nothing there
            continue
        if reading.read is None and _meaning(reading.config) == _meaning(config):
            written.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]]
            return written
    return None


def _written_as(family: str, config: LCKVLlamaConfig) -> PretrainedConfig:
    """What of a configuration a family can say, its windows included."""
    family_class = CONFIG_MAPPING[family]
    is_sliding = config.sharing_plan.is_sliding
    said = {name: value for name, value in _spelt_out(config).items() if name not in _WITHOUT_MEANING}
    said |= {
        "layer_types": ["sliding_attention" if slides else "full_attention" for slides in is_sliding],
        "sliding_window": config.sliding_window if any(is_sliding) else None,
        "use_sliding_window": any(is_sliding),
    }
    declared = {*family_class.__dataclass_fields__, "head_dim"}  # which is read, declared or not
    return family_class(**{name: value for name, value in said.items() if name in declared})


def _meaning(config: LCKVLlamaConfig) -> dict[str, Any]:
    """What a configuration says of what its model computes."""
    values = {name: value for name, value in _spelt_out(config).items() if name not in _WITHOUT_MEANING}
    if not config.sharing_plan.has_windows:
        del values["sliding_window"]
    return values


def _spelt_out(config: LCKVLlamaConfig) -> dict[str, Any]:
    """A configuration with the values that stand for others filled in."""
    assert config.head_dim is not None
    multiplier = config.head_dim**-0.5 if config.attention_multiplier is None else config.attention_multiplier
    values: dict[str, Any] = config.to_dict()
    values.pop("model_type")
    return values | {"attention_output_bias": config.has_output_bias, "attention_multiplier": multiplier}
