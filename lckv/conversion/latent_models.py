"""Models of latents: what is measured and fitted for one, in memory or on the way to a folder."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lckv.config.latent_sizes import LatentBudget, group_layers, latent_budget, refuse_latents, suit_source
from lckv.config.model import LatentConfig
from lckv.config.names import AUTO_LATENT, LATENTS, XKV
from lckv.conversion.heads import Tensors
from lckv.conversion.latents import LatentFit, sources_of, stream_sources
from lckv.conversion.methods import Group, make_tensors, refuse_not_finite
from lckv.conversion.sensitivity import Sensitivity, assume_sensitivity, measure_sensitivity
from lckv.conversion.source import HEAD, expected_shapes
from lckv.conversion.target import Make, converted_config, converted_tensors
from lckv.errors import UserError, check_choice
from lckv.families import read_model
from lckv.models import LCKVLlamaConfig, LCKVLlamaForCausalLM
from lckv.models.parts.rotary import fastest_frequencies
from lckv.sharing.layout import PLANES
from lckv.sharing.patterns import SharingPlan, parse_layer_types

_MOST_TURNED = 2.0
"""By how many radians a rotary plane may turn over a text whose keys are made as if it did not."""


def budget_of(latent: LatentConfig, config: LCKVLlamaConfig) -> LatentBudget:
    """What the `latent` group asks for in a model of this configuration, which has the pattern to make.

    Raises:
        UserError: if that cannot be.
    """
    refuse_latents(latent, config)
    return latent_budget(latent, config.sharing_plan, config)


def measure(
    model: LCKVLlamaForCausalLM,
    budget: LatentBudget,
    batches: Iterable[dict[str, Tensor]],
    on_batch: Callable[[int], Any] | None = None,
) -> Sensitivity:
    """What a fit needs to know of the model that latents are made for.

    Raises:
        UserError: for too little text, and numbers that are not finite.
    """
    groups = sources_of(budget.plan, model.config.sharing_plan, budget.owners)
    sensitivity = measure_sensitivity(model, batches, groups, on_batch=on_batch)
    check_num_tokens(sensitivity, model)
    return sensitivity


def check_num_tokens(sensitivity: Sensitivity, model: LCKVLlamaForCausalLM) -> None:
    """Refuses too little text.

    Raises:
        UserError: saying how much there was, and is needed.
    """
    if sensitivity.num_tokens < model.config.hidden_size:
        raise UserError(
            f"the calibration text has {sensitivity.num_tokens} tokens: latents need as many as a layer's input has "
            f"numbers, {model.config.hidden_size}, better ten times that; give more text, or more of it"
        )


def fit_latents(
    tensors: Tensors,
    source: LCKVLlamaConfig,
    target: LCKVLlamaConfig,
    budget: LatentBudget,
    sensitivity: Sensitivity,
    ridge: float,
    known: dict[Any, Any] | None = None,
) -> tuple[LCKVLlamaConfig, Make]:
    """The configuration of the model with latents, and what makes its tensors.

    Args:
        tensors: of the source.
        source: its configuration.
        target: the same with the pattern to make, without latents.
        budget: what owners may keep.
        sensitivity: see [`measure`].
        ridge: a penalty on large weights where a layer's input is predicted from another's.
        known: see [`LatentFit`].
    """
    groups = stream_sources(budget.plan, source.sharing_plan, budget.owners)
    num_unturned = num_unturned_planes(budget, sensitivity, source)
    fit = LatentFit(budget, tensors, source, groups, sensitivity, ridge, num_unturned, known)
    kv_latents = fit.sizes()

    def make(owner: int) -> dict[str, Tensor]:
        if kv_latents[owner] is None:  # skipped
            return make_tensors("average", Group(owner, budget.plan, tensors, source))
        return refuse_not_finite(f"latent={budget.kind}", fit.make(kv_latents, owner))

    labels = rope_labels(source, budget.plan, kv_latents)
    return converted_config(target, budget.plan, kv_latents=kv_latents, rope_layer_types=labels), make


def rope_labels(
    source: LCKVLlamaConfig, plan: SharingPlan, kv_latents: Sequence[Mapping[str, Any] | None]
) -> list[str] | None:
    """Which rotary embedding each layer has: that of the keys that it has read so far, where it makes them now."""
    if source.rope_layer_types is None:
        return None
    read = [kv_latents[layer.key_source] for layer in plan.layers]
    makes_keys = [latents is not None and PLANES not in latents for latents in read]
    own = source.sharing_plan.layers
    return [
        source.rope_layer_types[own[layer].key_source if makes else layer] for layer, makes in enumerate(makes_keys)
    ]


def num_unturned_planes(budget: LatentBudget, sensitivity: Sensitivity, source: LCKVLlamaConfig) -> int:
    """How many rotary planes do not turn far over a text as long as the calibration's, or as the source reads.

    Where nothing is to be lost, all turn.
    """
    if budget.dims is None and budget.ratio == 1:
        return 0
    seq_length = sensitivity.seq_length or source.max_position_embeddings
    return int((fastest_frequencies(source) * seq_length < _MOST_TURNED).sum())


def to_latents(
    model: PreTrainedModel,
    batches: Iterable[Tensor] | Sensitivity | None,
    kind: str = "joint",
    *,
    ratio: float = 4.0,
    dim: int | list[int] | None = None,
    layer_types: str | None = None,
    ridge: float = 1e-2,
    **groups: int,
) -> LCKVLlamaForCausalLM:
    """Makes a model that keeps latents from a loaded one, in memory.

    Args:
        model: of a family that can be read as ours, or one of ours.
        batches: calibration text, each `(batch, q_len)`; a few thousand tokens will do. Or what [`measure`] found in
            some, for several kinds and ratios of one pattern. `None`: the weights alone have to say what matters,
            which is far worse.
        kind: a name of the `latent` group of the configuration; other arguments are its keys.
        ratio: how many times fewer numbers owners keep.
        dim: instead, the size of each latent.
        layer_types: a sharing pattern on top; by default the model's own.
        ridge: see [`fit_latents`].
        groups: `skip_layers` and other keys about layers.

    Returns:
        The model in evaluation mode, of the types that the given one has.

    Raises:
        UserError: for another family, and settings or text that do not allow it.
    """
    latent = LatentConfig(kind, ratio, dim, **groups)
    latent.validate("latent.")
    check_choice("kind", kind, (*LATENTS, AUTO_LATENT))
    reading = read_model(model.config)
    refuse_latents(latent, reading.config)
    source, stored = reading.config, {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    tensors = dict(reading.tensors(stored))
    if source.tie_word_embeddings:
        tensors.pop(HEAD, None)
    ours = load_tensors(source, tensors, model)
    plan = source.sharing_plan if layer_types is None else parse_layer_types(layer_types, source.num_hidden_layers)
    latent = suit_source(latent, source.sharing_plan, source, may_group=layer_types is None)
    if latent.name == XKV:
        plan = group_layers(latent, plan)
    target = converted_config(source, plan)
    budget = budget_of(latent, target)
    if batches is None:
        sensitivity = assume_sensitivity(tensors, source, sources_of(plan, source.sharing_plan, budget.owners))
    elif isinstance(batches, Sensitivity):
        sensitivity = batches
    else:
        text = ({"input_ids": ids, "position_ids": torch.arange(ids.shape[1]).expand_as(ids)} for ids in batches)
        sensitivity = measure(ours, budget, text)
    config, make = fit_latents(tensors, source, target, budget, sensitivity, ridge)
    made = converted_tensors(tensors, source.sharing_plan, plan, expected_shapes(config), kind, make)
    return load_tensors(config, dict(made), model)


def load_tensors(config: LCKVLlamaConfig, tensors: Tensors, like: PreTrainedModel) -> LCKVLlamaForCausalLM:
    """A model with copies of these tensors, where another one is, with its types, backend and way to generate."""
    config._attn_implementation = like.config._attn_implementation
    model: Any = LCKVLlamaForCausalLM(config)
    model.to(like.dtype).load_state_dict(tensors, strict=not config.tie_word_embeddings)
    model.generation_config = copy.deepcopy(like.generation_config)
    loaded: LCKVLlamaForCausalLM = model.to(like.device).eval()
    return loaded
