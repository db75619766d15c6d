"""What training costs, relative to a Llama of the same size."""

from __future__ import annotations

import math
from statistics import median

from pandas import DataFrame

from lckv.costs import ModelSizes, count_flops, llama_plan
from lckv.iteration import Iteration
from lckv.model_arguments import DEFAULT_SLIDING_WINDOW
from lckv.patterns import parse_layer_types
from lckv.reporting.grouping import Row

_DECIDES_SPEED = (
    *("trainer.num_threads", "trainer.micro_batch_size", "trainer.precision", "trainer.torch_compile"),
    *("trainer.gradient_checkpointing", "trainer.use_liger_kernel", "model.attn_implementation"),
)


def speed(runs: DataFrame) -> float | None:
    """Training tokens per second, the median over seeds."""
    values = [value for value in runs["tokens_per_second"] if value]
    return median(values) if values else None


def ways_to_run(runs: DataFrame) -> set[tuple[str, ...]]:
    """What decides how fast a group trains; runs of earlier versions did not write their hardware down."""
    return {
        (
            *(str(run.config.get(key)) for key in _DECIDES_SPEED),
            *(str(run.results.get(key)) for key in ("num_processes", "hardware")),
        )
        for run in runs.itertuples()
    }


def llama_flops(run: Row) -> float | None:
    """FLOPs of training a Llama of the run's sizes on a token.

    `None` where these sizes do not give the run's own FLOPs either: then its configuration does not hold all of them.
    """
    sizes, own = _sizes(run), run.train_flops_per_token
    if run.layer_types is None or sizes is None or run.context_length is None or own is None:
        return None
    names = ("forward_passes", "backward_passes", "use_sequential")
    set_there = {name: run.config[key] for name in names if (key := f"model.{name}") in run.config}
    plan, length, iteration = parse_layer_types(run.layer_types), int(run.context_length), Iteration(**set_there)
    counted = count_flops(plan, sizes, length, iteration).train
    if counted is None or not math.isclose(counted, own, rel_tol=1e-6):
        return None
    return count_flops(llama_plan(plan), sizes, length, iteration).train


def _sizes(run: Row) -> ModelSizes | None:
    model = {key.removeprefix("model."): value for key, value in run.config.items() if key.startswith("model.")}
    model["vocab_size"] = model.get("vocab_size") or run.config.get("tokenizer.vocab_size")
    model["sliding_window"] = model.get("sliding_window") or DEFAULT_SLIDING_WINDOW
    try:
        return ModelSizes.from_config(model)
    except (KeyError, TypeError):  # an earlier version's, or one that leaves sizes to a pretrained model
        return None
