"""What a model and its cache allow, for whoever writes text with them."""

from __future__ import annotations

import logging

from lckv.cache import KVCache, SinkKVCache
from lckv.config import ChatConfig, GenerateConfig
from lckv.errors import UserError
from lckv.generation.prefill import PrefillOptions
from lckv.models import LCKVLlamaConfig
from lckv.sharing.iteration import CONVERGE

logger = logging.getLogger(__name__)


def prefill_options(cfg: ChatConfig | GenerateConfig, config: LCKVLlamaConfig) -> PrefillOptions:
    """How prompts go through a model of this configuration.

    Raises:
        UserError: for settings of an iteration where nothing iterates, or not until it converges.
    """
    plan = config.sharing_plan
    for name in ("prefill_passes", "prefill_tolerance"):
        value = getattr(cfg, name)
        if value is None:
            continue
        if not plan.has_cycles or config.use_sequential:
            reason = "its layers run token by token" if plan.has_cycles else "none of its layers reads upward"
            raise UserError(f"{name}={value}: has no effect on model={cfg.model}: {reason}; leave it out")
        if name == "prefill_tolerance" and cfg.prefill_passes not in (None, CONVERGE):
            raise UserError(f"{name}={value}: has no effect without prefill_passes={CONVERGE}")
    return PrefillOptions(cfg.prefill_chunk, cfg.prefill_passes, cfg.prefill_tolerance)


def check_span(cache: KVCache, length: float) -> None:
    """Warns of a window with more positions than the model was made for, if a text of this length fills it."""
    limit = cache.config.max_position_embeddings
    if isinstance(cache, SinkKVCache) and min(length, cache.num_sinks + cache.window) > limit:
        logger.warning(
            "cache.window=%d: with cache.num_sinks=%d that is more than the %d positions that the model was made "
            "for: text beyond them is likely to be bad",
            *(cache.window, cache.num_sinks, limit),
        )
