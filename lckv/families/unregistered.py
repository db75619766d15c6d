"""Families that nobody has registered, read as Llama's by the names of their settings and tensors, if that is proven.

The proof is a tiny random model of transformers' own class, made of the same configuration with smaller sizes: read as
ours, it has to give the same logits. What settings and tensors do not say, the proof finds out by trying.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from lckv.errors import first_line
from lckv.families.configs import carried_over, no_family, windows
from lckv.families.tensors import Changes, ReadTensor, llama_tensors, read_tensors, rename_output_norms
from lckv.models.configuration_lckv import LCKVLlamaConfig
from lckv.models.modeling_lckv import LCKVLlamaForCausalLM

_TOLERANCE = 1e-4
_NUM_TOKENS = 12
_SIZES = {"vocab_size": 97, "intermediate_size": 48}
_WINDOW = 5
"""What all windows of the tiny model are, so that they hide something of its text."""

_IS_WINDOW = re.compile(r"(?!.*layers).*(window|chunk).*")
_OTHER_NAMES = {
    "rms_norm_eps": ("layer_norm_eps", "norm_eps", "norm_epsilon", "layer_norm_epsilon"),
    "hidden_act": ("hidden_activation", "activation_function"),
}
_IN_PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_MODULES = {"mlp.c_fc.": "mlp.up_proj.", "mlp.c_proj.": "mlp.down_proj.", "self_attn.dense.": "self_attn.o_proj."}


class _Misfit(Exception):
    """Why a family is not Llama's, in words that complete "this does not:"."""


def read_unregistered(original: PretrainedConfig) -> tuple[LCKVLlamaConfig, ReadTensor]:
    """How a model is read whose family is not registered.

    Args:
        original: its configuration, of transformers' own class.

    Raises:
        UserError: if it computes something else than our models do; the message says what, and what can be done.
    """
    try:
        with torch.random.fork_rng(devices=[]):  # whoever draws random numbers gets those without a proof
            settings, side_by_side = _prove(json.dumps(original.to_dict(), sort_keys=True, default=str))
        return LCKVLlamaConfig(**_arguments(original, settings)), partial(read_tensor, side_by_side=side_by_side)
    except _Misfit as error:
        raise no_family(original.model_type, str(error)) from error


def read_tensor(name: str, config: LCKVLlamaConfig, *, side_by_side: bool) -> Changes:
    """What is made of a tensor under one of the names that are common beside Llama's."""
    names = _our_names(rename_output_norms(name) if config.use_output_norms else name)
    kv_heads = config.num_key_value_heads or 1
    shares = {1: (1,), 2: (1, 1), 3: (config.num_attention_heads, kv_heads, kv_heads)}[len(names)]
    return {
        ours: partial(_part_of, shares=shares, index=index, change=change)
        for index, each in enumerate(names)
        for ours, change in llama_tensors(each, config, side_by_side=side_by_side).items()
    }


def _our_names(name: str) -> list[str]:
    """What a stored tensor is called here, or what its parts are, where several projections are in one."""
    for theirs, ours in _MODULES.items():
        name = name.replace(theirs, ours)
    fused = next((each for each in _IN_PARTS if f".{each}." in name), None)
    return [name] if fused is None else [name.replace(fused, part) for part in _IN_PARTS[fused]]


def _part_of(tensor: Tensor, shares: tuple[int, ...], index: int, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Of rows that lie one behind another in these proportions, those of one part."""
    unit = len(tensor) // sum(shares)
    return change(tensor.split([unit * share for share in shares])[index] if len(shares) > 1 else tensor)


def _arguments(config: PretrainedConfig, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Our arguments for a configuration: fields that are called as ours or nearly so, windows, and other settings."""
    values, arguments = config.to_dict(), carried_over(config)
    for ours, others in _OTHER_NAMES.items():
        if found := [values[name] for name in (ours, *others) if name in values]:
            arguments[ours] = found[0]
    is_sliding = None if values.get("layer_types") else [bool(values.get("sliding_window"))] * config.num_hidden_layers
    return {**arguments, **windows(config, is_sliding), **settings}


@cache
def _prove(values: str) -> tuple[dict[str, Any], bool]:
    """What the tensors of such a model say of its settings, and whether rotations mix numbers side by side.

    Args:
        values: the whole configuration as JSON, by which what was found is kept.

    Raises:
        _Misfit: if there is no reading with the same logits.
    """
    config = _shrunk(json.loads(values))
    try:
        original = _random_model(config)
    except Exception as error:  # such as for models that have no language modelling head
        raise _Misfit(f"no tiny model of it can be made ({first_line(error)})") from error
    stored = original.state_dict()
    settings = _settings(stored)
    differences = []
    for side_by_side in False, True:
        difference = _difference(original, _read(config, settings, stored, side_by_side))
        if difference <= _TOLERANCE:
            return settings, side_by_side
        differences.append(difference)
    raise _Misfit(f"the logits of a tiny model differ by {min(differences):.1e} of the largest")


@torch.no_grad()
def _difference(original: Any, ours: LCKVLlamaForCausalLM) -> float:
    """How far logits are apart, relative to the largest, at the first positions and all over those there are."""
    input_ids = torch.arange(3, 3 + _NUM_TOKENS)[None]
    far = torch.linspace(0, ours.config.max_position_embeddings - 1, _NUM_TOKENS).long()
    found = []
    for positions in torch.arange(_NUM_TOKENS), far:
        # The mask says that it is one document, though positions jump.
        arguments = {"position_ids": positions[None], "attention_mask": torch.ones_like(input_ids), "use_cache": False}
        expected, actual = (model(input_ids, **arguments).logits for model in (original, ours))
        found.append((actual - expected).abs().max() / expected.abs().max())
    return float(torch.stack(found).max())  # not a number, if one is


def _shrunk(values: dict[str, Any]) -> PretrainedConfig:
    """The same configuration with few small layers, among them one of every kind; heads keep their width."""
    heads, num_layers = values.get("num_attention_heads"), values.get("num_hidden_layers")
    if not heads or not num_layers or "hidden_size" not in values:
        raise _Misfit("its configuration does not say num_attention_heads, num_hidden_layers and hidden_size")
    kv_heads = values.get("num_key_value_heads") or heads
    values |= {name: size for name, size in _SIZES.items() if values.get(name)}
    values |= {name: _WINDOW for name, size in values.items() if _IS_WINDOW.fullmatch(name) and type(size) is int}
    values["hidden_size"] = 4 * (values["hidden_size"] // heads)
    values["num_attention_heads"] = 4
    if "num_key_value_heads" in values:
        values["num_key_value_heads"] = 4 if kv_heads == heads else 2 if kv_heads > 1 else 1
    by_layer = {name: each for name, each in values.items() if isinstance(each, list) and len(each) == num_layers}
    kept = next(
        count
        for count in range(min(2, num_layers), num_layers + 1)
        if all({*map(str, each[:count])} == {*map(str, each)} for each in by_layer.values())
    )
    values |= {name: each[:kept] for name, each in by_layer.items()} | {"num_hidden_layers": kept}
    values |= {name: 0 for name in values if name.endswith("_token_id") and values[name] is not None}
    values.pop("dtype", None)
    return AutoConfig.for_model(**values)


def _random_model(config: PretrainedConfig) -> Any:
    """A model of transformers' own whose norms and biases matter, in float32."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        spread = 0.2 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
        parameter.data.add_(torch.randn_like(parameter) * spread)
    return model


def _settings(stored: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the names of tensors say of the model."""
    names = {name for stored_name in stored for name in _our_names(stored_name)}

    def has(pattern: str) -> bool:
        return any(re.fullmatch(rf"model\.layers\.0\.{pattern}", name) for name in names)

    return {
        "attention_bias": has(r"self_attn\.q_proj\.bias"),
        "attention_output_bias": has(r"self_attn\.o_proj\.bias"),
        "mlp_bias": has(r"mlp\.up_proj\.bias"),
        "gated_mlp": has(r"mlp\.gate_proj\.weight"),
        "use_qk_norm": has(r"self_attn\.q_norm\.weight"),
        "use_output_norms": has(r"pre_feedforward_layernorm\.weight"),
        "norm_type": "layer_norm" if has(r"input_layernorm\.bias") else "rms_norm",
    }


def _read(
    config: PretrainedConfig, settings: Mapping[str, Any], stored: Mapping[str, Tensor], side_by_side: bool
) -> LCKVLlamaForCausalLM:
    """The tiny model as one of ours.

    Raises:
        _Misfit: naming a tensor that the one has and the other has not, or a setting.
    """
    try:
        ours = LCKVLlamaForCausalLM(LCKVLlamaConfig(**_arguments(config, settings))).eval()
    except Exception as error:  # whatever foreign settings may mean here
        raise _Misfit(f"its settings are not ours ({first_line(error)})") from error
    tensors = dict(read_tensors(stored, ours.config, partial(read_tensor, side_by_side=side_by_side)))
    expected = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    for name in sorted(expected.keys() ^ tensors.keys()):
        raise _Misfit(f"{name} is {'missing' if name in expected else 'a tensor that ours has not'}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name]:
            raise _Misfit(f"{name} is {list(tensor.shape)}, not {list(expected[name])}")
    ours.load_state_dict(tensors)
    return ours


__all__ = ["read_unregistered"]
