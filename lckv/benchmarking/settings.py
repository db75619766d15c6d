"""Checks a benchmark's configuration, before anything is loaded, and turns it into what is measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from lckv.benchmarking.measurements import Workload
from lckv.byte_sizes import parse_bytes
from lckv.config import BenchmarkConfig, ModelConfig, SharingConfig, TokenizerConfig, TrainConfig
from lckv.errors import UserError, near_miss
from lckv.iteration import CONVERGE
from lckv.model_arguments import model_arguments
from lckv.patterns import PATTERNS

if TYPE_CHECKING:  # importing it takes seconds, and most mistakes are found without
    from lckv.models import LCKVLlamaConfig

DEFAULT_PATTERNS = ("llama", "cla", "yoco", "lckv", "sandwich_middle")


def build_workload(cfg: BenchmarkConfig) -> Workload:
    """What every contender has to do."""
    given = {item.name: getattr(cfg, item.name) for item in fields(Workload)}
    given["batch_sizes"] = tuple(dict.fromkeys(cfg.batch_sizes))
    if cfg.kv_budget is not None:
        given["kv_budget"] = parse_bytes(cfg.kv_budget, "kv_budget")
    return Workload(**given)


def random_models(cfg: BenchmarkConfig) -> dict[str, dict[str, Any]]:
    """The arguments of `LCKVLlamaConfig` for every pattern, by its label.

    Raises:
        UserError: for a wrong pattern.
    """
    patterns = cfg.patterns if cfg.patterns or cfg.checkpoints else DEFAULT_PATTERNS
    arguments = {}
    for index, pattern in enumerate(patterns):
        if pattern in arguments:
            raise UserError(f"patterns[{index}]={pattern}: is there twice; leave one of them out")
        arguments[pattern] = _arguments(cfg.model, pattern, f"patterns[{index}]")
    return arguments


def check_iteration(passes: Any, tolerance: float | None, configs: Mapping[str, LCKVLlamaConfig]) -> None:
    """Refuses settings for iterating over the prompt where no model does, or not until it converges.

    Args:
        passes: `prefill_passes`.
        tolerance: `prefill_tolerance`.
        configs: of all models, by label.

    Raises:
        UserError: naming the setting.
    """
    iterating = [each for each in configs.values() if each.sharing_plan.has_cycles and not each.use_sequential]
    for name, value in (("prefill_passes", passes), ("prefill_tolerance", tolerance)):
        if value is not None and not iterating:
            raise UserError(
                f"{name}={value}: has no effect on {', '.join(configs)}: none iterates over a prompt, for which "
                "layers must read upward; leave it out"
            )
    ways = [each.forward_passes if passes is None else passes for each in iterating]
    if tolerance is not None and CONVERGE not in ways:
        raise UserError(f"prefill_tolerance={tolerance}: has no effect without prefill_passes={CONVERGE}")


def _arguments(model: ModelConfig, pattern: Any, key: str) -> dict[str, Any]:
    """For a `layer_types` string, or the name of a sharing pattern."""
    if not isinstance(pattern, str):
        raise UserError(
            f"{key}={pattern!r}: must be text, but the configuration holds a {type(pattern).__name__} (YAML reads "
            'unquoted digits and underscores as a number); write it in quotes, such as "0_0_2_2"'
        )
    if pattern[:1].isdigit():
        cfg = TrainConfig(model=replace(model, layer_types=pattern))
    elif pattern in PATTERNS:
        cfg = TrainConfig(model=model, sharing=SharingConfig(name=pattern))
    else:
        raise UserError(
            f"{key}={pattern}: allowed are layer_types such as 0_0_2_2 and the names {', '.join(PATTERNS)}"
            f"{near_miss(pattern, PATTERNS)}"
        )
    try:
        return model_arguments(cfg, model.vocab_size or TokenizerConfig().vocab_size)
    except UserError as error:
        raise UserError(str(error).replace("model.layer_types", key, 1)) from None
