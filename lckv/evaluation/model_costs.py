"""What a built model costs: keys and values, parameters and FLOPs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from transformers import PreTrainedModel

from lckv.sharing.costs import Costs, ModelSizes, count_costs, count_kv_bytes, llama_plan
from lckv.sharing.iteration import Iteration
from lckv.sharing.patterns import SharingPlan, build_layer_types, parse_layer_types


def sharing_plan_of(model: PreTrainedModel) -> SharingPlan:
    """The model's sharing plan; a model of another family shares nothing."""
    plan = getattr(model.config, "sharing_plan", None)
    return plan or parse_layer_types(build_layer_types("llama", model.config.num_hidden_layers))


def costs_of(model: PreTrainedModel, context_length: int) -> Costs:
    """KV bytes (16-bit), parameters and FLOPs per token of a model."""
    config = model.config
    return count_costs(
        sharing_plan_of(model), ModelSizes.from_config(config), context_length, iteration=Iteration.from_config(config)
    )


def llama_sizes_of(model: PreTrainedModel, config: Mapping[str, Any]) -> ModelSizes | None:
    """Those of the Llama whose KV bytes a run was given as many of by `iso`; `None`: the model's own.

    Args:
        model: the model.
        config: the settings of the run that trained it; empty where there was none.
    """
    if config.get("iso") is None:
        return None
    heads = config["model"]["num_key_value_heads"] or config["model"]["num_attention_heads"]
    return replace(ModelSizes.from_config(model.config), num_key_value_heads=heads)


def cost_figures(model: PreTrainedModel, context_length: int, llama_sizes: ModelSizes | None = None) -> dict[str, Any]:
    """What stands beside the quality of a model in `results.json`: KV bytes, a Llama's beside them, and FLOPs."""
    costs, plan = costs_of(model, context_length), sharing_plan_of(model)
    llama = count_kv_bytes(
        llama_plan(plan), (llama_sizes or ModelSizes.from_config(model.config)).of_llama, context_length
    )
    return {
        "kv_bytes_context_length": context_length,
        "kv_bytes": asdict(costs.kv_bytes),
        "kv_bytes_llama": asdict(llama),
        "train_flops_per_token": costs.flops_per_token.train,
    }
