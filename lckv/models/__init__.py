"""Models, registered with transformers' Auto classes as soon as this package is imported."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from lckv.models.configuration_lckv import LCKVLlamaConfig
from lckv.models.modeling_lckv import LCKVLlamaForCausalLM, LCKVLlamaModel

AutoConfig.register(LCKVLlamaConfig.model_type, LCKVLlamaConfig)
AutoModel.register(LCKVLlamaConfig, LCKVLlamaModel)
AutoModelForCausalLM.register(LCKVLlamaConfig, LCKVLlamaForCausalLM)

__all__ = ["LCKVLlamaConfig", "LCKVLlamaForCausalLM", "LCKVLlamaModel"]
