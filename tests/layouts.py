"""Small models whose owners keep other things than a key and a value of equal width, as a real latent attention would.

`KINDS` names them; each is a configuration with a layout of its own, and an attention that writes and reads it.
`CASES` are patterns and configurations for tests that need no model, as they give caches random streams.
"""

import torch
from torch import nn

from lckv import LCKVLlamaConfig, LCKVLlamaForCausalLM
from lckv.models.attention import LCKVAttention
from lckv.models.parts.rotary import apply_rotary
from lckv.sharing.layout import KVLayout, Stream, StreamSource, build_layout
from lckv.sharing.patterns import parse_layer_types
from tests.reference import tiny_config

LATENT = 96
KEYS, VALUES = Stream("keys", 2, 8, is_rotated=True), Stream("values", 2, 8)  # rotated as the tiny model rotates
WIDE_VALUES = Stream("values", 4, 16)


def _layout(config, streams, sources):
    is_sliding = [layer.is_sliding for layer in config.sharing_plan.layers]
    return build_layout(streams, sources, is_sliding, config.sliding_window)


class LatentConfig(LCKVLlamaConfig):
    """A single latent, from which readers make keys and values of their own; nothing is rotated."""

    latent_streams = (Stream("latent", 1, LATENT),)

    @property
    def kv_layout(self) -> KVLayout:
        streams, plan = self.latent_streams, self.sharing_plan
        sources = [[StreamSource(source, index) for index in range(len(streams))] for source, _ in plan.sources]
        return _layout(self, dict.fromkeys(plan.kv_owners, streams), sources)


class RotatedLatentConfig(LatentConfig):
    """A latent, and beside it one small rotated key for all heads."""

    latent_streams = (Stream("latent", 1, LATENT), Stream("rotated_key", 1, 8, is_rotated=True))


class CrossedConfig(LCKVLlamaConfig):
    """Keys and values of unequal heads and widths; layer 1 reads the keys of one owner and the values of another."""

    @property
    def kv_layout(self) -> KVLayout:
        above = (StreamSource(2, 0), StreamSource(2, 1))
        sources = [(StreamSource(0, 0), StreamSource(0, 1)), (StreamSource(0, 0), StreamSource(2, 1)), above, above]
        return _layout(self, {0: (KEYS, VALUES), 2: (KEYS, WIDE_VALUES)}, sources)


class HalvesConfig(LCKVLlamaConfig):
    """Owners that keep only one of the two."""

    @property
    def kv_layout(self) -> KVLayout:
        return _layout(self, {0: (KEYS,), 1: (WIDE_VALUES,)}, [(StreamSource(0, 0), StreamSource(1, 0))] * 3)


CASES = {
    "latent": ("0_1s_1s_0", LatentConfig),
    "latent-and-rotated-key": ("0s_1s_2_2", RotatedLatentConfig),
    "crossed": ("0_0_2_2", CrossedConfig),
    "halves": ("0s_1s_1s", HalvesConfig),
}


class LatentAttention(LCKVAttention):
    """Keys and values are made of the latent that another layer may have written, as in MLA without absorption."""

    stream_modules = frozenset({"down_proj", "rotated_proj"})

    def add_projections(self, kept):
        self.is_rotated = len(self.config.latent_streams) == 2
        self.k_proj, self.v_proj = (nn.Linear(LATENT, self.kv_size, bias=False) for _ in "kv")
        if kept:
            self.down_proj = nn.Linear(self.config.hidden_size, LATENT, bias=False)
            if self.is_rotated:
                self.rotated_proj = nn.Linear(self.config.hidden_size, self.head_dim, bias=False)

    def write(self, hidden_states, position_embeddings):
        latent = self.down_proj(hidden_states)[:, None]  # (batch, 1, q_len, LATENT)
        if not self.is_rotated:
            return (latent,)
        return latent, apply_rotary(self.rotated_proj(hidden_states)[:, None], position_embeddings)

    def keys_and_values(self, streams, visible_keys):
        latent, *rotated = streams
        keys = self._split_heads(self.k_proj(latent[:, 0]))
        return keys + rotated[0] if rotated else keys, self._split_heads(self.v_proj(latent[:, 0]))


KINDS = {
    "latent-and-rotated-key": (RotatedLatentConfig, LatentAttention),
}
LATENTS = {
    "joint": {"latent": 11},
    "separate": {"key_latent": 5, "value_latent": 9},
    "decoupled": {"latent": 7, "rotated_planes": [2, 0, 0]},
}
"""What owners keep in models whose attention is the package's own."""


def latent_config(kind, layer_types, **kwargs):
    """A tiny configuration whose owners keep latents of unequal sizes."""
    plan = parse_layer_types(layer_types)
    sizes = [
        {
            name: size + layer.layer_idx if isinstance(size, int) else size
            for name, size in LATENTS[kind].items()
            if {"key_latent": layer.computes_keys, "value_latent": layer.computes_values}.get(name, True)
        }
        if layer.computes_kv
        else None
        for layer in plan.layers
    ]
    return tiny_config(layer_types, kv_latents=sizes, **kwargs)


def layout_model(kind, layer_types, seed=0, **kwargs):
    """A tiny model of one of `KINDS` or `LATENTS`."""
    iteration = {"forward_passes": "converge", "converge_tolerance": 1e-9}
    torch.manual_seed(seed)
    if kind in LATENTS:
        model = LCKVLlamaForCausalLM(latent_config(kind, layer_types, **(iteration | kwargs)))
        for name, parameter in model.named_parameters():  # at which an untrained model has zeros
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=0.1)
        model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
        return model.eval()
    config_class, attention_class = KINDS[kind]
    config = tiny_config(layer_types, config_class, **(iteration | kwargs))
    model = LCKVLlamaForCausalLM(config)
    for layer_idx, layer in enumerate(model.model.layers):
        layer.self_attn = attention_class(config, layer_idx)
        for module in layer.self_attn.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=config.initializer_range)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    return model.eval()
