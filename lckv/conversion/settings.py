"""What a configuration takes from a pretrained model, and what it says about the model made from it."""

from __future__ import annotations

import logging
from dataclasses import fields, replace
from typing import Any, TypeVar

from lckv.config import DataConfig, ModelConfig, TrainConfig
from lckv.config.model import KEPT_WITH_SOURCE
from lckv.errors import UserError
from lckv.model_arguments import iteration_settings, resolve_plan
from lckv.models import LCKVLlamaConfig
from lckv.patterns import SharingPlan, join_layer_types

logger = logging.getLogger(__name__)

AnyTrainConfig = TypeVar("AnyTrainConfig", bound=TrainConfig)


def adopt_source(cfg: AnyTrainConfig, source: LCKVLlamaConfig) -> AnyTrainConfig:
    """The configuration with the sizes of a pretrained model.

    Where neither `model.layer_types` nor a sharing pattern other than Llama's is given, every layer reads itself as
    before. Windows that layers had in the source are theirs only if the pattern says so; a warning tells of those that
    lose one. A source whose layers hide a token's own key stays so; others become so where the configuration asks.

    Raises:
        UserError: if the sharing pattern does not fit the model.
    """
    sizes = {item.name: getattr(source, item.name) for item in fields(ModelConfig) if hasattr(source, item.name)}
    kept = {name: getattr(cfg.model, name) for name in KEPT_WITH_SOURCE}
    model = ModelConfig(**(sizes | kept))
    model.force_nodiag = cfg.model.force_nodiag or source.force_nodiag
    if any(layer.is_sliding for layer in source.sharing_plan.layers):
        model.sliding_window = cfg.model.sliding_window or source.sliding_window
    if model.layer_types is None and cfg.sharing.name == "llama":
        model.layer_types = source.kv_sharing
    _check_num_layers(model)
    model.validate("model.")
    cfg = replace(cfg, model=model)
    _warn_of_lost_windows(resolve_plan(cfg), source)
    return cfg


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


def _check_num_layers(model: ModelConfig) -> None:
    """Refuses a string for another number of layers, in words that do not ask to leave the source's number out."""
    num_entries = str(model.layer_types or "").count("_") + 1
    if model.layer_types is not None and num_entries != model.num_hidden_layers:
        raise UserError(
            f"model.layer_types={model.layer_types!r}: has {num_entries} entries, but the source has "
            f"{model.num_hidden_layers} layers; give one entry per layer"
        )


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
            join_layer_types(plan.kv_source, has_window),
        )
