"""What a configuration takes from a pretrained model, and what it says about the model made from it."""

from __future__ import annotations

import logging
from dataclasses import fields, replace
from typing import Any, TypeVar

from lckv.config import DataConfig, ModelConfig, TrainConfig
from lckv.config.latent_sizes import refuse_latents, suit_source
from lckv.config.model import KEPT_WITH_SOURCE
from lckv.config.model_arguments import iteration_settings, plan_from_source
from lckv.config.names import AUTO_LATENT, RANDOM, XKV
from lckv.errors import UserError
from lckv.models import LCKVLlamaConfig
from lckv.sharing.patterns import SharingPlan, join_layer_types

logger = logging.getLogger(__name__)

AnyTrainConfig = TypeVar("AnyTrainConfig", bound=TrainConfig)


def adopt_source(cfg: AnyTrainConfig, source: LCKVLlamaConfig) -> AnyTrainConfig:
    """The configuration with the sizes of a pretrained model, and with its pattern where no other one is given.

    Windows that layers had in the source are theirs only if the pattern says so; a warning tells of those that lose
    one. A source whose layers hide a token's own key stays so; others become so where the configuration asks. One
    whose layers read upward is iterated as it was, but for settings that are not at their defaults.

    Raises:
        UserError: if the sharing pattern does not fit the model.
    """
    own = source.sharing_plan
    if cfg.latent.is_used:
        refuse_latents(cfg.latent, source)
    if cfg.latent.name == AUTO_LATENT:
        cfg = replace(cfg, latent=suit_source(cfg.latent, own, source, may_group=cfg.given_pattern is None))
        groups = f" latent.warmup_layers={cfg.latent.warmup_layers}" if cfg.latent.name == XKV else ""
        logger.info("latent=%s: takes latent=%s%s", AUTO_LATENT, cfg.latent.name, groups)
    plan = plan_from_source(cfg, own)
    _check_pattern_of_latents(cfg, source, plan)
    sizes = {item.name: getattr(source, item.name) for item in fields(ModelConfig) if hasattr(source, item.name)}
    kept = {name: getattr(cfg.model, name) for name in KEPT_WITH_SOURCE}
    if own.has_cycles:
        kept |= _iteration_of(source, cfg.model)
    model = ModelConfig(**(sizes | kept))
    model.force_nodiag = cfg.model.force_nodiag or source.force_nodiag
    if own.has_windows:
        model.sliding_window = cfg.model.sliding_window or source.sliding_window
    if cfg.given_pattern is None:
        model.layer_types = plan.layer_types
    try:
        # What the user gives was checked before; how a source rotates, with names and keys of its own, works as it is.
        replace(model, rope_parameters={}).validate()
    except UserError as error:
        raise UserError(f"the source says {error}") from error
    _warn_of_lost_windows(plan, source)
    return replace(cfg, model=model)


def _check_pattern_of_latents(cfg: TrainConfig, source: LCKVLlamaConfig, plan: SharingPlan) -> None:
    """Refuses another pattern for the latents that there are."""
    if source.kv_latents is not None and (plan != source.sharing_plan or cfg.sharing.is_random):
        given = cfg.given_pattern or f"sharing={RANDOM}"
        raise UserError(
            f"{given}: the source keeps latents already, which can be trained, but not shared otherwise; "
            "leave it out, or give the model that it was made from"
        )


def _iteration_of(source: LCKVLlamaConfig, asked: ModelConfig) -> dict[str, Any]:
    """How a source was iterated, where the configuration does not ask for something else."""
    asked_for, default, before = (iteration_settings(each) for each in (asked, ModelConfig(), source))
    taken = {name: value for name, value in before.items() if asked_for[name] == default[name] != value}
    if taken:
        shown = ", ".join(f"{name}={value}" for name, value in taken.items())
        logger.info("layers that read upward are iterated as in the source: %s", shown)
    return taken


def check_block_size(data: DataConfig, source: LCKVLlamaConfig) -> None:
    """Refuses text that is longer than what a pretrained model was made for.

    Raises:
        UserError: naming the setting.
    """
    limit = source.max_position_embeddings
    if data.block_size > limit:
        raise UserError(f"data.block_size={data.block_size}: allowed is {limit} or less, what the source was made for")


def model_settings(cfg: TrainConfig) -> dict[str, Any]:
    """What the configuration says of a converted model beside its pattern: arguments of `LCKVLlamaConfig`."""
    settings = iteration_settings(cfg.model)
    return settings if cfg.model.sliding_window is None else settings | {"sliding_window": cfg.model.sliding_window}


def _warn_of_lost_windows(plan: SharingPlan, source: LCKVLlamaConfig) -> None:
    pairs = list(zip(plan.layers, source.sharing_plan.layers, strict=True))
    lost = [layer.layer_idx for layer, before in pairs if before.is_sliding and not layer.is_sliding]
    if lost:
        has_window = [layer.is_sliding or before.is_sliding for layer, before in pairs]
        logger.warning(
            "%d layers see a window of %d tokens in the source and all tokens in this pattern, such as layer %d; "
            "an s keeps the window: model.layer_types=%s",
            len(lost),
            source.sliding_window,
            lost[0],
            join_layer_types(plan.sources, has_window),
        )
