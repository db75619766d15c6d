"""What the architectures of llama.cpp have in common: a model without multipliers, its rotations, its sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from lckv.errors import UserError
from lckv.loading.gguf_weights import gguf_names
from lckv.models import LCKVLlamaConfig, LCKVLlamaForCausalLM
from lckv.models.parts.rotary import rotary_embedding, rotary_frequencies

Weights = dict[str, torch.Tensor]
"""Tensors by name."""

ROPE_DIVISORS = "rope_freqs.weight"
"""The tensor that says what the frequency of each rotary plane is divided by."""

_STANDING = 1e30
"""What divides the frequency of a plane that does not turn, as in Gemma 4's own files."""


@dataclass(frozen=True)
class Description:
    """What a GGUF file says of a model, its tokenizer aside.

    Attributes:
        architecture: llama.cpp's name for what the layers compute.
        settings: by GGUF's names, without the architecture before them.
        tensors: by GGUF's names.
    """

    architecture: str
    settings: dict[str, Any]
    tensors: Weights


@dataclass(frozen=True)
class Rotation:
    """A rotary embedding as GGUF says it.

    Attributes:
        theta: the base of the frequencies.
        divisors: of each plane's frequency, `(head_dim / 2,)`; all ones if none is scaled.
        scaling: of cosines and sines (YaRN).
    """

    theta: float
    divisors: torch.Tensor
    scaling: float

    @property
    def is_plain(self) -> bool:
        """Whether the base says all of it."""
        return bool((self.divisors == 1).all())


def check_parts(config: LCKVLlamaConfig) -> None:
    """Refuses what a model may have and none of the architectures that are used here.

    Raises:
        UserError: naming the setting.
    """
    wanted = {
        "kv_latents": None,
        "force_nodiag": False,
        "learned_positions": False,
        "norm_type": "rms_norm",
        "use_output_norms": False,
        "gated_mlp": True,
    }
    for name, value in wanted.items():
        if getattr(config, name) != value:
            given = "" if name == "kv_latents" else f"={getattr(config, name)}"
            raise UserError(f"{name}{given}: no architecture of llama.cpp that is used here has this")
    for parameters in config.rotations.values():
        is_longrope = parameters.get("short_factor") != parameters.get("long_factor")
        if (kind := parameters["rope_type"]) == "dynamic" or is_longrope:
            raise UserError(f"rope_type={kind}: rotates by the length of the text, which a GGUF file cannot say here")


def find_rotation(config: LCKVLlamaConfig, label: str | None) -> Rotation:
    """How the entry `label` of `rope_parameters` rotates."""
    theta, width = float(config.rotations[label]["rope_theta"]), config.head_dim
    assert width is not None
    standard = 1.0 / theta ** (torch.arange(0, width, 2, dtype=torch.float) / width)  # to the last bit as transformers
    frequencies = rotary_frequencies(config, label)
    divisors = torch.where(frequencies > 0, standard / frequencies, _STANDING)
    return Rotation(theta, divisors, float(rotary_embedding(config, label).attention_scaling))


def plain_weights(model: LCKVLlamaForCausalLM) -> Weights:
    """The weights of a Llama that computes the same and has no multipliers: they are in the weights.

    Returns:
        By our names; without a head if that is the embedding, as it is.
    """
    config = model.config
    weights = dict(model.state_dict())
    is_tied = config.tie_word_embeddings
    if is_tied:
        del weights["lm_head.weight"]
    assert config.head_dim is not None
    plain = config.head_dim**-0.5
    scores = plain if config.attention_multiplier is None else config.attention_multiplier
    factors = {
        "embed_tokens": config.embedding_multiplier,
        # The head is linear; where it is the embedding, what that was multiplied by is taken back here.
        "model.norm": 1 / config.logits_scaling / (config.embedding_multiplier if is_tied else 1.0),
        "o_proj": config.residual_multiplier,
        "down_proj": config.residual_multiplier,
    }
    queries = "q_norm" if config.use_qk_norm else "q_proj"
    for name, tensor in weights.items():
        part = name.rpartition(".")[0]
        factor = next((factor for end, factor in factors.items() if part.endswith(end)), 1.0)
        if part.endswith(queries):
            scaling = find_rotation(config, config.query_label(int(name.split(".")[2]))).scaling
            factor = scores / plain * scaling**2
        weights[name] = tensor if factor == 1.0 else tensor * factor
    return weights


def check_finite(tensors: Weights, where: str) -> None:
    """Refuses numbers that are none, as training may leave them or a narrow type makes them; `where` they are."""
    if found := next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None):
        raise UserError(f"{found}: has numbers that are not finite {where}")


def check_no_biases(config: LCKVLlamaConfig, architecture: str) -> None:
    """Refuses biases for an architecture that has none."""
    biases = {
        "attention_bias": config.attention_bias,
        "attention_output_bias": config.has_output_bias,
        "mlp_bias": config.mlp_bias,
    }
    if found := next((name for name, has_bias in biases.items() if has_bias), None):
        raise UserError(f"{found}=True: llama.cpp's {architecture} has no biases")


def common_settings(config: LCKVLlamaConfig) -> dict[str, Any]:
    """What every architecture is told."""
    return {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.dimension_count": config.head_dim,
    }


def named(architecture: str, weights: Weights) -> Weights:
    """Tensors by GGUF's names for those that transformers has in an architecture."""
    num_layers = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("model.layers."))
    return dict(zip(gguf_names(architecture, num_layers, weights), weights.values(), strict=True))
