"""Which model a configuration asks for: its sharing pattern and its sizes, checked before anything is built."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from lckv.config import TrainConfig
from lckv.config.latent_sizes import group_layers, latent_budget
from lckv.config.names import XKV
from lckv.errors import UserError
from lckv.sharing.costs import ModelSizes
from lckv.sharing.iso import match_llama
from lckv.sharing.iteration import Iteration, check_iteration
from lckv.sharing.layout import check_latents
from lckv.sharing.patterns import SharingPlan, build_layer_types, parse_layer_types
from lckv.sharing.random_sharing import RandomSharing

DEFAULT_SLIDING_WINDOW = 4096
ITERATION = (
    *("forward_passes", "backward_passes", "cyclic_groups", "converge_tolerance", "use_sequential", "force_nodiag"),
)
"""Names of the settings that say how layers which read upward are run."""


def resolve_layer_types(cfg: TrainConfig) -> str:
    """The `layer_types` string that the configuration asks for, checked: its own, or the sharing pattern's.

    Where patterns are drawn, it is Llama's, which has all that they may need.

    Raises:
        UserError: if the string or the pattern's parameters are wrong, or the layer counts disagree.
    """
    model = cfg.model
    if model.layer_types is not None:
        try:
            return parse_layer_types(model.layer_types, model.num_hidden_layers).layer_types
        except UserError as error:
            raise UserError(f"model.{error}") from None
    num_hidden_layers = model.num_hidden_layers
    if num_hidden_layers is None:
        num_hidden_layers = model.default_num_hidden_layers
    try:
        if cfg.sharing.is_random:
            layer_types = build_layer_types("llama", num_hidden_layers)
            random_sharing(cfg, parse_layer_types(layer_types))
            return layer_types
        return build_layer_types(cfg.sharing.name, num_hidden_layers, **cfg.sharing.options())
    except UserError as error:  # names a parameter without its group
        name = str(error).partition("=")[0]
        group = "sharing." if hasattr(cfg.sharing, name) else "model." if name == "num_hidden_layers" else ""
        raise UserError(f"{group}{error}") from None


def random_sharing(cfg: TrainConfig, plan: SharingPlan) -> RandomSharing | None:
    """What draws whom the layers of a model with the pattern `plan` read in training, if that is asked for.

    Raises:
        UserError: if there is nothing to choose from.
    """
    return RandomSharing(plan, cfg.seed, **cfg.sharing.options()) if cfg.sharing.is_random else None


def resolve_plan(cfg: TrainConfig) -> SharingPlan:
    """The sharing pattern that the configuration asks for, and can be trained as it says.

    Raises:
        UserError: for the reasons of `resolve_layer_types`, and for too few passes over a cycle.
    """
    plan = parse_layer_types(resolve_layer_types(cfg))
    check_iteration(Iteration.from_config(cfg.model), plan.has_cycles, "model.")
    return plan


def plan_from_source(cfg: TrainConfig, own: SharingPlan) -> SharingPlan:
    """The sharing pattern that the configuration asks for of a pretrained model, which has the pattern `own`.

    Where neither `model.layer_types` nor a sharing pattern other than Llama's is given, it is the model's, or that of
    latents which several layers share. It is the model's, too, where patterns are drawn.

    Raises:
        UserError: for the reasons of `resolve_plan`, and if a layer is to be read that computes no keys and values.
    """
    model, num_layers = cfg.model, own.num_hidden_layers
    if cfg.given_pattern is None:
        random_sharing(cfg, own)
        return group_layers(cfg.latent, own) if cfg.latent.name == XKV else own
    num_entries = str(model.layer_types or "").count("_") + 1
    if model.layer_types is not None and num_entries != num_layers:
        raise UserError(
            f"model.layer_types={model.layer_types!r}: has {num_entries} entries, but the source has {num_layers} "
            "layers; give one entry per layer"
        )
    plan = resolve_plan(replace(cfg, model=replace(model, num_hidden_layers=num_layers)))
    check_owners(plan, own, str(cfg.given_pattern), "the source")
    return plan


def check_owners(plan: SharingPlan, own: SharingPlan, given: str, model: str) -> None:
    """Refuses a pattern that needs keys and values of layers that compute none.

    Args:
        plan: the pattern.
        own: that of the model which it is for.
        given: the pattern as the user gave it.
        model: what the model is called.

    Raises:
        UserError: naming the first of these layers.
    """
    for stream, now, before in zip(("keys", "values"), plan.owners_by_stream, own.owners_by_stream, strict=True):
        if added := [owner for owner in now if owner not in before]:
            what = stream if added[0] in own.kv_owners else "keys and values"
            raise UserError(
                f"{given}: lets layers read layer {added[0]}, which computes no {what} in {model} "
                f"({own.layer_types}); allowed are {', '.join(map(str, before))}"
            )


def model_arguments(cfg: TrainConfig, vocab_size: int) -> dict[str, Any]:
    """The keyword arguments of `LCKVLlamaConfig` for this configuration.

    Args:
        cfg: the configuration.
        vocab_size: size of the tokenizer's vocabulary; the model's own may be larger.

    Raises:
        UserError: if the sizes do not fit together; the message names the key.
    """
    plan = resolve_plan(cfg)
    if cfg.model.vocab_size is not None and cfg.model.vocab_size < vocab_size:
        raise UserError(
            f"model.vocab_size={cfg.model.vocab_size}: is smaller than the tokenizer's {vocab_size}; "
            "leave it out to take the tokenizer's, or make it larger"
        )
    left_out = ("name", "default_num_hidden_layers")
    arguments = {item.name: getattr(cfg.model, item.name) for item in fields(cfg.model) if item.name not in left_out}
    arguments.update(
        layer_types=plan.layer_types,
        num_hidden_layers=plan.num_hidden_layers,
        vocab_size=cfg.model.vocab_size or vocab_size,
        num_key_value_heads=cfg.model.num_key_value_heads or cfg.model.num_attention_heads,
        rope_parameters=cfg.model.rope_parameters or None,
        sliding_window=cfg.model.sliding_window or DEFAULT_SLIDING_WINDOW,
    )
    if cfg.iso is not None:
        sizes = match_llama(cfg.iso, plan, ModelSizes.from_config(arguments), cfg.iso_multiple)
        arguments.update(intermediate_size=sizes.intermediate_size, num_key_value_heads=sizes.num_key_value_heads)
    if cfg.model.kv_latents is not None:
        check_latents(cfg.model.kv_latents, plan)
    if cfg.latent.is_used:
        arguments["kv_latents"] = latent_budget(cfg.latent, plan, ModelSizes.from_config(arguments)).uniform
    return {name: value for name, value in arguments.items() if value is not None}


def iteration_settings(cfg: Any) -> dict[str, Any]:
    """Those of [`ITERATION`] that a group of a configuration has: arguments of `LCKVLlamaConfig`."""
    return {name: getattr(cfg, name) for name in ITERATION if hasattr(cfg, name)}
