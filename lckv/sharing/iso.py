"""Equal means for every sharing pattern, by arithmetic alone: as many parameters as Llama's, or as many KV bytes."""

from __future__ import annotations

import logging
from dataclasses import replace

from lckv.sharing.costs import ModelSizes, count_kv_bytes, count_parameters, llama_plan
from lckv.sharing.patterns import SharingPlan

logger = logging.getLogger(__name__)


def match_llama(iso: str, plan: SharingPlan, sizes: ModelSizes, multiple: int) -> ModelSizes:
    """The sizes with which `plan` costs what Llama does with `sizes`, or what comes nearest, which is then said.

    Args:
        iso: "params" widens the MLP; "kv" takes more heads of keys and values.
        plan: the pattern that the sizes are for.
        sizes: Llama's.
        multiple: with "params", what the width of the MLP is rounded to.
    """
    if iso == "params":
        matched = replace(sizes, intermediate_size=matching_intermediate_size(plan, sizes, multiple))
        ours, llamas = count_parameters(plan, matched), count_parameters(llama_plan(plan), sizes)
        chosen, unit = f"model.intermediate_size={matched.intermediate_size}, in steps of {multiple}", "parameters"
    else:
        matched = replace(sizes, num_key_value_heads=matching_kv_heads(plan, sizes))
        ours, llamas = _written(plan, matched), _written(llama_plan(plan), sizes)
        chosen = f"model.num_key_value_heads={matched.num_key_value_heads}, of {sizes.num_attention_heads} heads"
        unit = "bytes of KV per token, in 16 bits"
    if ours != llamas:
        logger.warning("iso=%s: nearest is %s: %s %s; Llama has %s", iso, chosen, f"{ours:,}", unit, f"{llamas:,}")
    return matched


def matching_intermediate_size(plan: SharingPlan, sizes: ModelSizes, multiple: int) -> int:
    """The width of the MLP, a multiple, at which the parameters of `plan` come nearest to Llama's with `sizes`."""
    target = count_parameters(llama_plan(plan), sizes)
    if count_parameters(plan, sizes) == target:
        return sizes.intermediate_size
    narrowest, wider = (count_parameters(plan, replace(sizes, intermediate_size=size)) for size in (0, multiple))
    steps = (target - narrowest) // (wider - narrowest)
    candidates = [max(1, steps) * multiple, (steps + 1) * multiple]
    return min(
        candidates, key=lambda size: abs(count_parameters(plan, replace(sizes, intermediate_size=size)) - target)
    )


def matching_kv_heads(plan: SharingPlan, sizes: ModelSizes) -> int:
    """The most heads of keys and values with which `plan` writes no more KV per token than Llama does with `sizes`."""
    budget = _written(llama_plan(plan), sizes)
    heads = sizes.num_attention_heads
    divisors = [count for count in range(1, heads + 1) if heads % count == 0]
    return max(count for count in divisors if _written(plan, replace(sizes, num_key_value_heads=count)) <= budget)


def _written(plan: SharingPlan, sizes: ModelSizes) -> int:
    return count_kv_bytes(plan, sizes, context_length=1).written
