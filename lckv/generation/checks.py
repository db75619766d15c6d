"""Mistakes in what `lckv.generate` is asked for, found before anything is loaded, and what the model rules out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lckv.config import CacheConfig, GenerateConfig
from lckv.errors import UserError, check_choice, check_positive, check_whole_number
from lckv.model_arguments import CONVERGE, check_passes_value

if TYPE_CHECKING:
    from lckv.models import LCKVLlamaForCausalLM

CONTINUOUS, STATIC = BATCHINGS = ("continuous", "static")
"""How many prompts share the model: joining and leaving at any step, or batch after batch."""

TOKENS, OFF, ENDLESS = STREAMS = ("tokens", "off", "endless")
"""How text may be printed: as it comes, at its end, or without one."""


def check_config(cfg: GenerateConfig) -> str:
    """Finds mistakes that need no model, and says how the text is to be printed.

    Raises:
        UserError: for values out of range, and options that have no effect beside others.
    """
    if cfg.model is None:
        raise UserError("model: give one: model=FOLDER (a run folder or a checkpoint), or a name on the Hub")
    for name in ("batch_size", "num_threads", "prefill_chunk"):
        if (value := getattr(cfg, name)) is not None:
            check_whole_number(name, value)
    if cfg.prefill_passes is not None:
        check_passes_value("prefill_passes", cfg.prefill_passes)
    if cfg.prefill_tolerance is not None:
        check_positive("prefill_tolerance", cfg.prefill_tolerance)
    if cfg.batch_size is not None and cfg.prompts_file is None:
        raise UserError(f"batch_size={cfg.batch_size}: has no effect without prompts_file; leave it out")
    if cfg.compile and cfg.cache.name != "static":
        raise UserError(f"compile=true: has no effect with cache={cfg.cache.name}; choose cache=static")
    _check_batching(cfg)
    return _check_stream(cfg)


def _check_batching(cfg: GenerateConfig) -> None:
    if cfg.batching is None:
        return
    check_choice("batching", cfg.batching, BATCHINGS)
    if cfg.prompts_file is None:
        raise UserError(f"batching={cfg.batching}: has no effect without prompts_file; leave it out")
    if cfg.batching == CONTINUOUS and not _has_pages(cfg.cache):
        raise UserError(
            f"batching=continuous: cannot be had with cache={cfg.cache.name}; "
            "choose cache=paged, or cache=quantized with cache.layout=paged"
        )
    if cfg.batching == CONTINUOUS and cfg.num_beams > 1:
        raise UserError(f"batching=continuous: cannot be had with num_beams={cfg.num_beams}; leave one of them out")


def choose_batching(cfg: GenerateConfig) -> str:
    """What a checked `batching` stands for: continuous wherever it can be had, unless the user wants otherwise."""
    if cfg.batching is not None:
        return cfg.batching
    return CONTINUOUS if cfg.prompts_file is not None and _has_pages(cfg.cache) and cfg.num_beams == 1 else STATIC


def _has_pages(cache: CacheConfig) -> bool:
    return cache.name == "paged" or (cache.name == "quantized" and cache.layout == "paged")


def _check_stream(cfg: GenerateConfig) -> str:
    unstreamed = {"json": cfg.json, "num_beams": cfg.num_beams > 1, "prompts_file": cfg.prompts_file is not None}
    reasons = [f"{key}={getattr(cfg, key)}" for key, holds in unstreamed.items() if holds]
    stream = cfg.stream
    if stream is None:
        return OFF if reasons else TOKENS
    check_choice("stream", stream, STREAMS)
    if stream != OFF and reasons:
        raise UserError(f"stream={stream}: cannot be had with {reasons[0]}; leave one of them out")
    if stream == ENDLESS and cfg.cache.name != "sink":
        raise UserError(f"stream=endless: cannot be had with cache={cfg.cache.name}, which grows; choose cache=sink")
    return stream


def check_cache(cache: CacheConfig) -> None:
    """Finds mistakes in the cache's options before gigabytes are loaded: makes one for the smallest of models.

    Raises:
        UserError: for an unknown name or option, and values that no model allows.
    """
    from lckv.cache import build_cache  # not at the top: other mistakes are found before torch is loaded
    from lckv.models import LCKVLlamaConfig

    options = cache.options()
    if cache.name == "static":
        options.setdefault("max_length", 1)
    config = LCKVLlamaConfig(layer_types="0", vocab_size=8, hidden_size=8, intermediate_size=8, num_attention_heads=1)
    build_cache(cache.name, config, **options)


def check_passes(cfg: GenerateConfig, model: LCKVLlamaForCausalLM) -> None:
    """Refuses settings for iterating over the prompt where nothing iterates, or not until it converges.

    Raises:
        UserError: naming the setting.
    """
    plan, config = model.config.sharing_plan, model.config
    for name in ("prefill_passes", "prefill_tolerance"):
        value = getattr(cfg, name)
        if value is None:
            continue
        if not plan.has_cycles or config.use_sequential:
            reason = "its layers run token by token" if plan.has_cycles else "none of its layers reads upward"
            raise UserError(f"{name}={value}: has no effect on model={cfg.model}: {reason}; leave it out")
        default = CONVERGE if choose_batching(cfg) == CONTINUOUS else config.forward_passes
        passes = default if cfg.prefill_passes is None else cfg.prefill_passes
        if name == "prefill_tolerance" and passes != CONVERGE:
            raise UserError(f"{name}={value}: has no effect without prefill_passes={CONVERGE}")
