"""What training costs, relative to a Llama of the same size."""

from __future__ import annotations

import math
from statistics import median

from lckv.config.keys import CONVERGE
from lckv.costs import Iteration, ModelSizes, count_flops, llama_plan
from lckv.model_arguments import DEFAULT_SLIDING_WINDOW
from lckv.patterns import SharingPlan
from lckv.reporting.collecting import Run
from lckv.reporting.grouping import Group

_DECIDES_SPEED = (
    *("trainer.num_threads", "trainer.micro_batch_size", "trainer.precision", "trainer.torch_compile"),
    *("trainer.gradient_checkpointing", "trainer.use_liger_kernel", "model.attn_implementation"),
)


def flops_ratio(group: Group, baseline: Group | None) -> float | None:
    """FLOPs of training on a token, relative to the baseline's; without one, to those counted for a Llama."""
    own = group.figure("train_flops_per_token")
    llama = baseline.figure("train_flops_per_token") if baseline else llama_flops(group.runs[0])
    return own / llama if own is not None and llama else None


def llama_flops(run: Run) -> float | None:
    """FLOPs of training a Llama of the run's sizes on a token.

    `None` where these sizes do not give the run's own FLOPs either: then its configuration does not hold all of them.
    """
    sizes, context_length = _sizes(run), run.figure("kv_bytes_context_length")
    own = run.figure("train_flops_per_token")
    if run.plan is None or sizes is None or context_length is None or own is None:
        return None
    counted = _train_flops(run, run.plan, sizes, int(context_length))
    if counted is None or not math.isclose(counted, own, rel_tol=1e-6):
        return None
    return _train_flops(run, llama_plan(run.plan), sizes, int(context_length))


def _train_flops(run: Run, plan: SharingPlan, sizes: ModelSizes, context_length: int) -> float | None:
    passes = run.config.get("model.forward_passes", Iteration().forward_passes)
    iteration = Iteration(
        forward_passes=None if passes == CONVERGE else passes,
        backward_passes=run.config.get("model.backward_passes", Iteration().backward_passes),
        use_sequential=run.config.get("model.use_sequential", False),
    )
    return count_flops(plan, sizes, context_length, iteration).train


def _sizes(run: Run) -> ModelSizes | None:
    model = {key.removeprefix("model."): value for key, value in run.config.items() if key[:6] == "model."}
    model["vocab_size"] = model.get("vocab_size") or run.config.get("tokenizer.vocab_size")
    model["sliding_window"] = model.get("sliding_window") or DEFAULT_SLIDING_WINDOW
    try:
        return ModelSizes.from_config(model)
    except (KeyError, TypeError):  # an earlier version's, or one that leaves sizes to a pretrained model
        return None


def time_ratio(group: Group, baseline: Group | None) -> float | None:
    """Measured time per training token, relative to the baseline's; `None` if they did not run alike."""
    own, other = speed(group), speed(baseline) if baseline else None
    if baseline is None or own is None or other is None or _way_to_run(group) != _way_to_run(baseline):
        return None
    return other / own


def speed(group: Group) -> float | None:
    """Training tokens per second, the median over seeds."""
    values = [value for run in group.runs if (value := run.figure("tokens_per_second"))]
    return median(values) if values else None


def _way_to_run(group: Group) -> set[tuple[str, ...]]:
    """What decides how fast a group trains; runs of earlier versions did not write their hardware down."""
    return {
        (
            *(str(run.config.get(key)) for key in _DECIDES_SPEED),
            *(str(run.results.get(key)) for key in ("num_processes", "hardware")),
        )
        for run in group.runs
    }


def train_flops(group: Group) -> float | None:
    """FLOPs of the whole training."""
    per_token, tokens = group.figure("train_flops_per_token"), group.figure("tokens")
    return per_token * tokens if per_token is not None and tokens is not None else None
