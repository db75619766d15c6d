"""`python -m lckv.plan`: what a sharing pattern means and what it costs, without building a model."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from operator import attrgetter
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lckv.commands import cli
from lckv.config import PlanConfig, validate
from lckv.config.model_arguments import model_arguments, plan_from_source
from lckv.errors import UserError
from lckv.loading.model_files import check_model
from lckv.sharing.costs import Costs, ModelSizes, count_costs, llama_plan
from lckv.sharing.drawing import describe_layer, draw_in_terminal, save_drawing
from lckv.sharing.iteration import CONVERGE, Iteration
from lckv.sharing.patterns import LayerPlan, SharingPlan, advice_on, parse_layer_types
from lckv.utils.console import new_console

_COSTS = {
    "KV bytes written per new token": "kv_bytes.written",
    "KV bytes resident per token": "kv_bytes.resident",
    "KV bytes read per decoded token": "kv_bytes.read",
    "parameters": "num_parameters",
    "FLOPs per token, decoding": "flops_per_token.decode",
    "FLOPs per token, prefill": "flops_per_token.prefill",
    "FLOPs per token, forward": "flops_per_token.forward",
    "FLOPs per token, training": "flops_per_token.train",
}
"""Which of the `Costs` the table shows."""


@dataclass(frozen=True)
class PlanReport:
    """A sharing plan with what it costs, and what a Llama of the configured sizes costs."""

    plan: SharingPlan
    sizes: ModelSizes
    iteration: Iteration
    context_length: int
    dtype: str
    costs: Costs
    llama_costs: Costs


def main(cfg: PlanConfig) -> None:
    """Prints the report that `cfg` asks for, and draws it into a file if asked."""
    validate(cfg)
    report = build_report(cfg)
    if cfg.draw is not None:
        save_drawing(report.plan, cfg.draw)
    console = new_console()
    if cfg.json:
        console.print_json(json.dumps(as_dict(report)))
        return
    print_report(report, console)
    if cfg.draw is not None:
        console.print(f"\ndrawn into {cfg.draw}")


def build_report(cfg: PlanConfig) -> PlanReport:
    """Resolves the plan and counts its costs.

    Raises:
        UserError: if the configuration is wrong, or does not say how large the vocabulary is.
    """
    if cfg.init.source is not None:
        own = check_model(cfg.init.source, revision=cfg.init.revision, key="init.source", needs_tokenizer=False)
        if own is not None:
            plan_from_source(cfg, own)
        from lckv.conversion.settings import adopt_source  # takes transformers along, which nothing else here needs
        from lckv.conversion.source import Source

        cfg = adopt_source(cfg, Source.find(cfg.init.source, revision=cfg.init.revision, key="init.source").config)
    vocab_size = _vocab_size(cfg)
    arguments = model_arguments(cfg, vocab_size)
    plan = parse_layer_types(arguments["layer_types"])
    sizes = ModelSizes.from_config(arguments)
    llama_sizes = (
        sizes if cfg.iso is None else ModelSizes.from_config(model_arguments(replace(cfg, iso=None), vocab_size))
    )
    forward_passes = cfg.converge_passes if cfg.model.forward_passes == CONVERGE else cfg.model.forward_passes
    iteration = replace(Iteration.from_config(cfg.model), forward_passes=forward_passes)
    context_length = cfg.model.max_position_embeddings if cfg.context_length is None else cfg.context_length
    costs, llama_costs = (
        count_costs(each, its_sizes, context_length, iteration=iteration, dtype=cfg.kv_dtype)
        for each, its_sizes in ((plan, sizes), (llama_plan(plan), llama_sizes.of_llama))
    )
    return PlanReport(plan, sizes, iteration, context_length, cfg.kv_dtype, costs, llama_costs)


def _vocab_size(cfg: PlanConfig) -> int:
    if cfg.model.vocab_size is not None:
        return cfg.model.vocab_size
    if cfg.tokenizer.name == "bpe":
        return cfg.tokenizer.vocab_size
    raise UserError(
        f"model.vocab_size=null: the vocabulary of tokenizer.name={cfg.tokenizer.name} is known only once it is "
        "loaded; give model.vocab_size"
    )


def as_dict(report: PlanReport) -> dict[str, Any]:
    """The report as JSON-able data."""
    plan = report.plan
    return {
        "layer_types": plan.layer_types,
        "layers": [
            {**asdict(layer), "computes_kv": layer.computes_kv, "is_upward": layer.is_upward} for layer in plan.layers
        ],
        "kv_owners": list(plan.kv_owners),
        "segments": [asdict(segment) for segment in plan.segments],
        "iteration": asdict(report.iteration),
        "sizes": asdict(report.sizes),
        "context_length": report.context_length,
        "kv_dtype": report.dtype,
        "costs": asdict(report.costs),
        "llama_costs": asdict(report.llama_costs),
    }


def print_report(report: PlanReport, console: Console) -> None:
    """Prints the drawing, the layers, the iteration and the costs."""
    console.print(Text(report.plan.layer_types, style="bold"), "\n", sep="")
    console.print(draw_in_terminal(report.plan), end="")
    advice = advice_on(report.plan)
    console.print("\n".join(["", *_describe_iteration(report), *([f"Note: {advice}."] if advice else []), ""]))
    console.print(_layer_table(report))
    console.print()
    console.print(_cost_table(report))
    console.print(
        f"Costs for {report.context_length} tokens of context, {report.dtype} KV and a window of "
        f"{report.sizes.sliding_window}.\n"
        "Sharing saves what is written and kept, not what is read: every layer still reads KV."
        + (" Latents save that, too." if report.sizes.kv_latents else "")
    )
    if report.costs.flops_per_token.train is None:
        console.print("converge_passes=N counts the FLOPs of N passes without gradient.")


def _describe_iteration(report: PlanReport) -> list[str]:
    """The cycles and how they are run, in words."""
    if not report.plan.has_cycles:
        return ["No layer reads upward: every layer runs once."]
    lines, iteration = [], report.iteration
    for segment in report.plan.segments:
        first, last = segment.start, segment.stop - 1
        layers = f"layer {first}" if first == last else f"layers {first} to {last}"
        lines.append(f"{layers}: a cycle" if segment.is_cycle else f"{layers}: once")
    if iteration.use_sequential:
        return [*lines, "Cycles run token by token, which is exact and needs no iteration."]
    ungraded = "until the KV stops changing"
    if isinstance(iteration.forward_passes, int):
        ungraded = f"{_times(iteration.forward_passes)} without gradient"
    return [
        *lines,
        f"A cycle runs {ungraded}, then {_times(iteration.backward_passes)} with gradient.",
        *_describe_groups(iteration.cyclic_groups),
        "In every pass but the last, the top layer of a cycle only computes KV. Decoding",
        "never iterates.",
    ]


def _describe_groups(num_groups: int) -> list[str]:
    if num_groups == 1:
        return ["Each pass reads the KV of the one before; the first reads none."]
    return [
        f"In each pass tokens take turns in {num_groups} groups, which read the KV of the groups",
        "before them in the same pass, and of the others in the one before.",
    ]


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _layer_table(report: PlanReport) -> Table:
    table = Table("layer", "attends to", "computes KV", "window", "reads upward", "in cycle", title="Layers")
    cycles = [segment for segment in report.plan.segments if segment.is_cycle]
    for layer in report.plan.layers:
        cycle = next((f"{c.start} to {c.stop - 1}" for c in cycles if c.start <= layer.layer_idx < c.stop), "")
        table.add_row(
            str(layer.layer_idx),
            describe_layer(replace(layer, is_sliding=False)).removeprefix("reads "),
            _shown_streams(report, layer) if layer.computes_kv else "-",
            str(report.sizes.sliding_window) if layer.is_sliding else "-",
            "yes" if layer.is_upward else "-",
            cycle or "-",
        )
    return table


def _shown_streams(report: PlanReport, layer: LayerPlan) -> str:
    """What an owner keeps, if that is not keys and values."""
    latents = report.sizes.kv_latents[layer.layer_idx] if report.sizes.kv_latents else None
    if latents is None:
        return "yes" if layer.computes_keys and layer.computes_values else "keys" if layer.computes_keys else "values"
    return ", ".join(
        f"{name.replace('_', ' ')} {size if isinstance(size, int) else len(size)}" for name, size in latents.items()
    )


def _cost_table(report: PlanReport) -> Table:
    table = Table("", title="Costs")
    for heading in ("this", "Llama", "ratio"):
        table.add_column(heading, justify="right")
    for name, cost in _COSTS.items():
        value, llama = (attrgetter(cost)(costs) for costs in (report.costs, report.llama_costs))
        assert llama is not None  # a model without cycles has a fixed number of passes
        shown = "depends on the data" if value is None else _rounded(value)
        ratio = "-" if value is None or not llama else f"{value / llama:.3f}"
        table.add_row(name, shown, _rounded(llama), ratio, end_section=cost in ("kv_bytes.read", "num_parameters"))
    return table


def _rounded(value: float) -> str:
    """Up to a million in full, above with four digits and a unit."""
    if value < 1e6:
        return f"{value:,.0f}"
    unit, size = next(unit for unit in (("T", 1e12), ("G", 1e9), ("M", 1e6)) if value >= unit[1])
    return f"{value / size:.4g} {unit}"


if __name__ == "__main__":
    cli.run(main, "plan")
