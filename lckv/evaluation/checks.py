"""Mistakes in the settings of evaluations, found before torch is loaded."""

from __future__ import annotations

from collections.abc import Sequence

from lckv.config import (
    EvaluationConfig,
    HarnessConfig,
    NeedleConfig,
    PerplexityConfig,
    RecallConfig,
    SpeedConfig,
    TrainConfig,
)
from lckv.errors import UserError, check_choice, check_whole_number
from lckv.evaluation import MODULES

DEFAULT_CONTEXT_LENGTH = 2048
"""Tokens that a model sees at once where neither its training nor the user says how many."""

_MADE_FOR = "what the model was made for"


def check_evaluation(config: EvaluationConfig, key_prefix: str = "") -> None:
    """Finds mistakes that need no model.

    Args:
        config: the settings.
        key_prefix: what stands before their names in messages.

    Raises:
        UserError: for an evaluation that does not exist or is there twice, for values out of range, and for settings
            of evaluations that are not asked for.
    """
    for name in config.evals:
        check_choice(f"{key_prefix}evals", name, MODULES)
        if config.evals.count(name) > 1:
            raise UserError(f"{key_prefix}evals: {name!r} is there twice; leave one of them out")
    check_whole_number(f"{key_prefix}batch_size", config.batch_size)
    _check_unused(config, key_prefix)
    _check_perplexity(config.perplexity, f"{key_prefix}perplexity.")
    check_harness(config.harness, f"{key_prefix}harness.")
    check_needle(config.needle, f"{key_prefix}needle.")
    check_recall(config.recall, f"{key_prefix}recall.")
    for name, value in vars(config.speed).items():
        check_whole_number(f"{key_prefix}speed.{name}", value)


def check_training_evaluation(cfg: TrainConfig) -> None:
    """Finds mistakes in what is to be evaluated during training.

    Raises:
        UserError: as above, and for a rhythm without anything to do.
    """
    check_evaluation(cfg.evaluation, "evaluation.")
    steps = cfg.trainer.evaluation_steps
    if steps is not None and not cfg.evaluation.evals:
        raise UserError(
            f"trainer.evaluation_steps={steps}: has no effect without evaluation.evals, such as "
            "evaluation.evals=[perplexity]; leave it out, or give some"
        )
    if (chunk := cfg.evaluation.perplexity.cache_chunk) is not None:
        raise UserError(f"evaluation.perplexity.cache_chunk={chunk}: has no effect in training; leave it out")


def check_lengths(config: EvaluationConfig, limit: int, trained_length: int | None, key_prefix: str) -> None:
    """Finds texts that are too long for a model, before it is trained.

    Args:
        config: the settings.
        limit: how many tokens the model was made for.
        trained_length: tokens of the sequences that it is trained on, where that is known.
        key_prefix: what stands before the settings' names in messages.

    Raises:
        UserError: naming the setting.
    """
    if "perplexity" in config.evals:
        window_sizes(config.perplexity, limit, trained_length, f"{key_prefix}perplexity.")
    if "speed" in config.evals:
        check_speed(config.speed, limit, f"{key_prefix}speed.")
    if "harness" in config.evals:
        check_max_length(config.harness, limit, f"{key_prefix}harness.")
    longest, num_pairs = max(config.needle.lengths or [0]), max(config.recall.num_pairs)
    if "needle" in config.evals and longest > limit:
        raise UserError(f"{key_prefix}needle.lengths={longest}: allowed is {limit} or less, {_MADE_FOR}")
    num_tokens = 2 * (num_pairs + config.recall.num_queries) - 1
    if "recall" in config.evals and num_tokens > limit:
        raise UserError(
            f"{key_prefix}recall.num_pairs={num_pairs}: makes {num_tokens} tokens with its queries; allowed are "
            f"{limit} or less, {_MADE_FOR}"
        )


def _check_unused(config: EvaluationConfig, key_prefix: str) -> None:
    """Refuses settings of evaluations that are not asked for."""
    own = [name for name in config.evals if hasattr(getattr(config, name), "batch_size")]
    if own and own == config.evals and config.batch_size != EvaluationConfig().batch_size:
        keys = " and ".join(f"{key_prefix}{name}.batch_size" for name in own)
        raise UserError(f"{key_prefix}batch_size={config.batch_size}: has no effect on {', '.join(own)}; give {keys}")
    for name in MODULES:
        settings = getattr(config, name)
        default = type(settings)()
        for key, value in vars(settings).items() if name not in config.evals else ():
            if value != getattr(default, key):
                raise UserError(
                    f"{key_prefix}{name}.{key}={value}: has no effect without {name} in "
                    f"{key_prefix}evals=[{','.join(config.evals)}]; leave it out, or add {name}"
                )


def _check_perplexity(config: PerplexityConfig, key_prefix: str) -> None:
    for name, value in vars(config).items():
        if value is not None:
            check_whole_number(f"{key_prefix}{name}", value)
    if config.context_length is not None:
        window_sizes(config, config.context_length, None, key_prefix)


def default_context_length(limit: int, trained_length: int | None) -> int:
    """Tokens that a model sees at once where nothing else is asked for: no positions that are new to it."""
    return min(limit, trained_length or DEFAULT_CONTEXT_LENGTH)


def window_sizes(config: PerplexityConfig, limit: int, trained_length: int | None, key_prefix: str) -> tuple[int, int]:
    """Length and stride of the window; the arguments are those of `check_lengths`.

    Raises:
        UserError: for a window that is longer than that, or would jump over tokens.
    """
    context_length = config.context_length or default_context_length(limit, trained_length)
    if context_length > limit:
        raise UserError(f"{key_prefix}context_length={context_length}: allowed is {limit} or less, {_MADE_FOR}")
    if config.stride is not None and config.stride > context_length:
        raise UserError(
            f"{key_prefix}stride={config.stride}: allowed is {key_prefix}context_length={context_length} or less, so "
            "that no token is left out"
        )
    return context_length, config.stride or max(1, context_length // 2)


def check_speed(config: SpeedConfig, limit: int, key_prefix: str) -> None:
    """Refuses sequences that are longer than the `limit` tokens that the model was made for.

    Raises:
        UserError: naming the settings.
    """
    length = config.prompt_length + config.new_tokens
    if length > limit:
        raise UserError(
            f"{key_prefix}prompt_length={config.prompt_length} and {key_prefix}new_tokens={config.new_tokens}: make "
            f"{length} tokens, and the model was made for {limit}; lower them"
        )


def check_harness(options: HarnessConfig, key_prefix: str) -> None:
    """Refuses what lm-eval would ignore, or fail on after the model has run.

    Raises:
        UserError: naming the key.
    """
    batch_size, limit = options.batch_size, options.limit
    if not options.tasks:
        raise UserError(f"{key_prefix}tasks=[]: name at least one task or group, such as lckv_local")
    if batch_size != "auto":
        if isinstance(batch_size, str):
            raise UserError(f"{key_prefix}batch_size={batch_size!r}: allowed is a whole number, 1 or more, or 'auto'")
        check_whole_number(f"{key_prefix}batch_size", batch_size)
    if options.num_fewshot is not None:
        check_whole_number(f"{key_prefix}num_fewshot", options.num_fewshot, 0)
    if limit is not None and not (0 < limit < 1 or (limit >= 1 and float(limit).is_integer())):
        allowed = "a whole number, 1 or more, or a part between 0 and 1"
        raise UserError(f"{key_prefix}limit={limit!r}: allowed is {allowed}")
    if options.max_length is not None:
        check_whole_number(f"{key_prefix}max_length", options.max_length)
    check_whole_number(f"{key_prefix}bootstrap_iters", options.bootstrap_iters, 0)


def check_max_length(options: HarnessConfig, limit: int, key_prefix: str) -> None:
    """Refuses more tokens at once than the `limit` that the model was made for.

    Raises:
        UserError: naming the key.
    """
    if options.max_length is not None and options.max_length > limit:
        raise UserError(f"{key_prefix}max_length={options.max_length}: allowed is {limit} or less, {_MADE_FOR}")


def check_needle(config: NeedleConfig, key_prefix: str) -> None:
    """Refuses an empty grid, places outside of the text, and samples that are none.

    Raises:
        UserError: naming the key.
    """
    _check_list(f"{key_prefix}depths", config.depths)
    for depth in config.depths:
        if not 0 <= depth <= 1:
            raise UserError(f"{key_prefix}depths={depth!r}: allowed are numbers from 0 (first) to 1 (last)")
    if config.lengths is not None:
        _check_list(f"{key_prefix}lengths", config.lengths)
        for length in config.lengths:
            check_whole_number(f"{key_prefix}lengths", length)
    check_whole_number(f"{key_prefix}num_samples", config.num_samples)


def check_recall(config: RecallConfig, key_prefix: str) -> None:
    """Refuses sequences without pairs, and more queries than pairs.

    Raises:
        UserError: naming the key.
    """
    _check_list(f"{key_prefix}num_pairs", config.num_pairs)
    for name in ("num_pairs", "num_queries", "num_samples"):
        value = getattr(config, name)
        for number in value if name == "num_pairs" else [value]:
            check_whole_number(f"{key_prefix}{name}", number)
    if config.num_queries > min(config.num_pairs):
        raise UserError(
            f"{key_prefix}num_queries={config.num_queries}: allowed is at most {min(config.num_pairs)}, the least of "
            f"{key_prefix}num_pairs"
        )


def _check_list(key: str, values: Sequence[float]) -> None:
    if not values or len(set(values)) < len(values):
        raise UserError(f"{key}={list(values)!r}: allowed are one or more numbers, each of them once")
