"""What a finished run amounts to: `results.json` and the table at the end."""

from __future__ import annotations

import json
import platform
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

import lckv
from lckv.costs import Costs, Iteration, ModelSizes, count_costs, count_kv_bytes, llama_plan
from lckv.data import TokenizedData
from lckv.environment import describe_hardware
from lckv.evaluation.running import scalar_figures
from lckv.patterns import SharingPlan, build_layer_types, parse_layer_types
from lckv.training.callbacks import describe_loss_parts, format_duration
from lckv.training.run_folder import RunFolder

_OF_CONVERT = {"source": "init.source", "revision": "init.revision", "method": "init.method"}
"""Settings of `lckv.convert` by what `lckv.train` calls them."""

_ONLY_OF_CONVERT = ("out", "max_shard_size", "device")
_GROUPS_OF_CONVERT = {"trainer": "distill", "optim": "uptrain"}
"""What `lckv.convert` trains with where nothing else is given."""

_OF_ONE_RUN = ("sharing", "model.layer_types", "model.num_hidden_layers", "run_name", "run_dir")
"""Settings that another pattern's run cannot take over."""


def sharing_plan_of(model: PreTrainedModel) -> SharingPlan:
    """The model's sharing plan; a model of another family shares nothing."""
    plan = getattr(model.config, "sharing_plan", None)
    return plan or parse_layer_types(build_layer_types("llama", model.config.num_hidden_layers))


def costs_of(model: PreTrainedModel, context_length: int) -> Costs:
    """KV bytes (16-bit), parameters and FLOPs per token of a model."""
    config = model.config
    passes = getattr(config, "forward_passes", 0)
    iteration = Iteration(
        forward_passes=passes if isinstance(passes, int) else None,
        backward_passes=getattr(config, "backward_passes", 1),
        use_sequential=getattr(config, "use_sequential", False),
    )
    return count_costs(sharing_plan_of(model), ModelSizes.from_config(config), context_length, iteration=iteration)


def cost_figures(model: PreTrainedModel, context_length: int, llama_sizes: ModelSizes | None = None) -> dict[str, Any]:
    """What stands beside the quality of a model in `results.json`: KV bytes, a Llama's beside them, and FLOPs."""
    costs, plan = costs_of(model, context_length), sharing_plan_of(model)
    llama = count_kv_bytes(llama_plan(plan), llama_sizes or ModelSizes.from_config(model.config), context_length)
    return {
        "kv_bytes_context_length": context_length,
        "kv_bytes": asdict(costs.kv_bytes),
        "kv_bytes_llama": asdict(llama),
        "train_flops_per_token": costs.flops_per_token.train,
    }


def median_speed(lines: Sequence[dict[str, Any]]) -> float | None:
    """Tokens per second of training, from the lines of `metrics.jsonl`; `None` if nothing was trained."""
    speeds = sorted(line["tokens_per_second"] for line in lines if "tokens_per_second" in line)
    return speeds[len(speeds) // 2] if speeds else None


def versions() -> dict[str, str]:
    """What the figures were made with."""
    return {
        "lckv": lckv.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def build_results(
    model: PreTrainedModel,
    data: TokenizedData,
    lines: Sequence[dict[str, Any]],
    *,
    run_name: str,
    num_processes: int,
    sample_prompt: str,
    llama_sizes: ModelSizes | None = None,
) -> dict[str, Any]:
    """Gathers the results of a run from the last lines of its metrics.

    Args:
        model: the trained model.
        data: what it was trained and evaluated on.
        lines: the lines of `metrics.jsonl`.
        run_name: name of the run.
        num_processes: how many processes trained together.
        sample_prompt: what the samples start with.
        llama_sizes: of the Llama that KV bytes are compared with; None: the model's own.
    """
    train = [line for line in lines if "loss" in line]
    evaluation = [line for line in lines if "eval_loss" in line][-1]
    samples = [line["sample"] for line in train if "sample" in line]
    results = {
        "run_name": run_name,
        "layer_types": sharing_plan_of(model).layer_types,
        "num_parameters": model.num_parameters(),
        "num_trained_parameters": model.num_parameters(only_trainable=True),
        "steps": evaluation["step"],
        "tokens": evaluation["tokens"],
        "train_loss": train[-1]["loss"],
        "eval_loss": evaluation["eval_loss"],
        "eval_perplexity": evaluation["eval_perplexity"],
        "eval_bits_per_byte": evaluation.get("eval_bits_per_byte"),
        "unigram_loss": data.unigram_loss,
        "unigram_perplexity": data.unigram_perplexity,
        **cost_figures(model, data.train.block_size, llama_sizes),
        "seconds": train[-1]["seconds"],
        "tokens_per_second": median_speed(train),
        "peak_memory_bytes": max(line["peak_memory_bytes"] for line in train),
        "sample_prompt": sample_prompt,
        "sample": samples[-1] if samples else None,
        "data_fingerprint": data.fingerprint,
        "num_processes": num_processes,
        "hardware": describe_hardware(model.device),
        "versions": versions(),
    }
    for name in ("mfu", "kv_residual", "loss_logits", "loss_attention", "loss_labels"):
        if name in train[-1]:
            results[name] = train[-1][name]
    return results


def show_results(results: dict[str, Any], folder: RunFolder, console: Console) -> None:
    """Prints the results as a table, where the files are, and what to type next."""
    table = Table(title=f"{results['run_name']}  {results['layer_types']}", title_justify="left", show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _rows(results):
        table.add_row(name, value)
    console.print(table)
    paths = [("loss curve", folder.loss_plot), ("results", folder.results), ("metrics", folder.metrics)]
    paths += [("checkpoints", folder.checkpoints.path), ("model", folder.model)]
    for name, path in paths:
        console.print(f"{name:<12} {path}", markup=False, highlight=False, soft_wrap=True)
    console.print("\nnext:", style="bold")
    for command in _next_commands(results, folder):
        console.print(f"  {command}", markup=False, highlight=False, soft_wrap=True)


def _rows(results: dict[str, Any]) -> list[tuple[str, str]]:
    kv, llama = results["kv_bytes"], results["kv_bytes_llama"]
    bits = results["eval_bits_per_byte"]
    context = f"at {results['kv_bytes_context_length']} tokens"
    rows = [
        (
            "validation perplexity",
            f"{results['eval_perplexity']:,.2f}  (unigram {results['unigram_perplexity']:,.2f})",
        ),
        ("validation loss", f"{results['eval_loss']:.4f}  (unigram {results['unigram_loss']:.4f}; nats per token)"),
        ("bits per byte", "unknown" if bits is None else f"{bits:.4f}"),
        ("parameters", _parameters(results)),
        (
            "KV bytes per token",
            f"written {kv['written']:,}, resident {kv['resident']:,.0f} {context}, in 16 bits  (Llama: "
            f"{llama['written']:,}, {llama['resident']:,.0f})",
        ),
        ("KV bytes read to decode a token", f"{kv['read']:,} {context}  (Llama: {llama['read']:,})"),
        (
            "trained",
            f"{results['steps']:,} steps, {results['tokens']:,} tokens in {format_duration(results['seconds'])}",
        ),
        ("speed", _speed(results)),
        ("peak memory", f"{results['peak_memory_bytes'] / 2**20:,.0f} MiB"),
    ]
    if "loss_labels" in results:
        rows.insert(2, ("training loss", f"{results['train_loss']:.4f}  ({describe_loss_parts(results)})"))
    if "kv_residual" in results:
        rows.append(("KV residual of the last pass", f"{results['kv_residual']:.2e}"))
    rows += [(name, _evaluation(figures)) for name, figures in results.get("evaluations", {}).items()]
    if results["sample"] is not None:
        rows.append(("sample", " ".join(results["sample"].split())))
    return rows


def _evaluation(figures: dict[str, Any]) -> str:
    """The qualities among an evaluation's figures, all but its counts; or why there are none."""
    if "error" in figures:
        return str(figures["error"])
    return ", ".join(f"{name} {value:,.4f}" for name, value in scalar_figures(figures) if isinstance(value, float))


def _parameters(results: dict[str, Any]) -> str:
    # Results of earlier versions do not say how many were trained: all of them.
    num_parameters = results["num_parameters"]
    num_trained = results.get("num_trained_parameters", num_parameters)
    return f"{num_parameters:,}" + (f", {num_trained:,} of them trained" if num_trained != num_parameters else "")


def _speed(results: dict[str, Any]) -> str:
    mfu = f", MFU {results['mfu']:.1%}" if "mfu" in results else ""
    return f"{results['tokens_per_second']:,.0f} tokens/s{mfu}"


def _next_commands(results: dict[str, Any], folder: RunFolder) -> list[str]:
    layer_types = results["layer_types"]
    num_layers = parse_layer_types(layer_types).num_hidden_layers
    llama = build_layer_types("llama", num_layers)
    python = shlex.quote(_interpreter())
    given = _as_train_takes_them(_arguments())
    source = [item for item in given if item.lstrip("+").startswith(("init.source=", "init.revision="))]
    commands = [f"{python} -m lckv.plan {shlex.join([*source, f'model.layer_types={layer_types}'])}"]
    if num_layers > 1:  # a single layer has nothing to share
        other, name = (llama, "llama") if layer_types != llama else (build_layer_types("cla", num_layers), "cla")
        again = [item for item in given if not item.lstrip("+").startswith(_OF_ONE_RUN)]
        again += [f"model.layer_types={other}", f"run_name={results['run_name']}_{name}"]
        commands.append(f"{python} -m lckv.train {shlex.join(again)}")
    path, prompt = (json.dumps(text, ensure_ascii=False) for text in (str(folder.model), results["sample_prompt"]))
    generate = (
        f'import lckv.models; from transformers import pipeline; print(pipeline("text-generation", {path})({prompt}))'
    )
    return [*commands, f"{python} -c {shlex.quote(generate)}"]


def _as_train_takes_them(arguments: list[str]) -> list[str]:
    """Settings of `lckv.convert` as those of `lckv.train` that do the same; others stay."""
    if not any(item.startswith("out=") for item in arguments):
        return arguments
    pairs = [item.partition("=") for item in arguments]
    keys = [key for key, _, _ in pairs]
    groups = [f"{group}={name}" for group, name in _GROUPS_OF_CONVERT.items() if group not in keys]
    return groups + [
        f"{_OF_CONVERT.get(key, key)}{equals}{value}" for key, equals, value in pairs if key not in _ONLY_OF_CONVERT
    ]


def _interpreter() -> str:
    """What to type for this Python: `python` where the shell finds the same, else its path."""
    executable = Path(sys.executable)
    found = shutil.which("python")
    if found is not None and Path(found).absolute().parent == executable.parent:
        return "python"
    return str(executable.relative_to(Path.cwd()) if executable.is_relative_to(Path.cwd()) else executable)


def _arguments() -> list[str]:
    """The command line of this run; for a job of a sweep, what runs this job alone."""
    given = sys.argv[1:]
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return given
    flags = [item for item in given if (item.startswith("-") or "=" not in item) and item not in ("-m", "--multirun")]
    return [*flags, *HydraConfig.get().overrides.task]
