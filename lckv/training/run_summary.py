"""What a finished run amounts to: `results.json` and the table at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from statistics import median_high
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from lckv.config import RunConfig, TrainerConfig
from lckv.config.names import LOSS_PARTS, PREFERENCES
from lckv.data.dataset import RunData
from lckv.evaluation.model_costs import cost_figures, llama_sizes_of, sharing_plan_of
from lckv.evaluation.results_file import scalar_figures
from lckv.sharing.iteration import CONVERGE
from lckv.sharing.patterns import SharingPlan, build_layer_types, parse_layer_types
from lckv.training.callbacks import SAMPLING, SAMPLING_SEED, describe_loss_parts, format_duration
from lckv.training.run_folder import RunFolder
from lckv.training.trainer import RunMixin
from lckv.utils.console import arguments_of_this_run, command
from lckv.utils.environment import describe_hardware, versions

_OF_CONVERT = {"source": "init.source", "revision": "init.revision", "method": "init.method"}
"""Settings of `lckv.convert` by what `lckv.train` calls them."""

_ONLY_OF_CONVERT = ("out", "max_shard_size", "device")
_GROUPS_OF_CONVERT = {"trainer": "distill", "optim": "uptrain"}
"""What `lckv.convert` trains with where nothing else is given."""

_OF_ONE_RUN = ("sharing", "latent", "model.layer_types", "model.num_hidden_layers", "run_name", "run_dir")
"""Settings that another pattern's run cannot take over."""


def median_speed(lines: Sequence[dict[str, Any]]) -> float | None:
    """Tokens per second of training, from the lines of `metrics.jsonl`; `None` if nothing was trained."""
    speeds = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    return median_high(speeds) if speeds else None


def build_results(
    cfg: RunConfig, model: PreTrainedModel, data: RunData, folder: RunFolder, trainer: RunMixin, num_trained: int
) -> dict[str, Any]:
    """Gathers the results of a run from the last lines of its metrics; `num_trained` parameters had a gradient."""
    lines = folder.read_metrics()
    train = [line for line in lines if "loss" in line]
    evaluation = [line for line in lines if "eval_loss" in line][-1]
    samples = [line["sample"] for line in train if "sample" in line]
    results = {
        "run_name": cfg.run_name or folder.path.name,
        "layer_types": sharing_plan_of(model).layer_types,
        "is_for_all_patterns": cfg.draws_patterns,
        "num_parameters": model.num_parameters(),
        "num_trained_parameters": num_trained,
        "steps": evaluation["step"],
        "tokens": evaluation["tokens"],
        "train_loss": train[-1]["loss"],
        "eval_loss": evaluation["eval_loss"],
        "eval_perplexity": evaluation["eval_perplexity"],
        "eval_bits_per_byte": evaluation.get("eval_bits_per_byte"),
        "unigram_loss": data.unigram_loss,
        "unigram_perplexity": data.unigram_perplexity,
        **cost_figures(model, data.block_size, llama_sizes_of(model, asdict(cfg))),
        "seconds": train[-1]["seconds"],
        "tokens_per_second": median_speed(train),
        "peak_memory_bytes": max(line["peak_memory_bytes"] for line in train),
        "sample_prompt": cfg.trainer.sample_prompt,
        "sample": samples[-1] if samples else None,
        "data_fingerprint": data.fingerprint,
        "num_processes": trainer.args.world_size,
        "hardware": describe_hardware(model.device),
        "versions": versions(),
    }
    if sharing_plan_of(model).has_cycles:
        results["eval_forward_passes"] = trainer.eval_forward_passes
    results |= {name: evaluation[name] for name in PREFERENCES if name in evaluation}
    where_measured = ("mfu", "kv_residual", "stiefel_deviation", *(f"loss_{name}" for name in LOSS_PARTS))
    return results | {name: train[-1][name] for name in where_measured if name in train[-1]}


def show_results(results: dict[str, Any], folder: RunFolder, console: Console, next_commands: Sequence[str]) -> None:
    """Prints the results as a table, where the files are, and what to type next."""
    table = Table(title=f"{results['run_name']}  {results['layer_types']}", title_justify="left", show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _rows(results):
        table.add_row(name, value)
    console.print(table, soft_wrap=False)
    paths = [("loss curve", folder.loss_plot), ("results", folder.results), ("metrics", folder.metrics)]
    paths += [("checkpoints", folder.checkpoints.path), ("model", folder.model)]
    for name, path in paths:
        console.print(f"{name:<12} {path}")
    console.print("\nnext:", style="bold")
    for line in next_commands:
        console.print(f"  {line}")


def _rows(results: dict[str, Any]) -> list[tuple[str, str]]:
    kv, llama = results["kv_bytes"], results["kv_bytes_llama"]
    bits = results["eval_bits_per_byte"]
    context = f"at {results['kv_bytes_context_length']} tokens"
    # Results of earlier versions do not say how many were trained: all of them.
    num_parameters = results["num_parameters"]
    num_trained = results.get("num_trained_parameters", num_parameters)
    trained = f", {num_trained:,} of them trained" if num_trained != num_parameters else ""
    eval_passes = results.get("eval_forward_passes", CONVERGE)
    passes = "" if eval_passes == CONVERGE else f"; after {eval_passes} passes and the model's last"
    mfu = f", MFU {results['mfu']:.1%}" if "mfu" in results else ""
    rows = [
        (
            "validation perplexity",
            f"{results['eval_perplexity']:,.2f}  (unigram {results['unigram_perplexity']:,.2f})",
        ),
        (
            "validation loss",
            f"{results['eval_loss']:.4f}  (unigram {results['unigram_loss']:.4f}; nats per token{passes})",
        ),
        *([] if bits is None else [("bits per byte", f"{bits:.4f}")]),
        ("parameters", f"{num_parameters:,}{trained}"),
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
        ("speed", f"{results['tokens_per_second']:,.0f} tokens/s{mfu}"),
        ("peak memory", f"{results['peak_memory_bytes'] / 2**20:,.0f} MiB"),
    ]
    if PREFERENCES[0] in results:
        rows[:2] = [(f"{name} of better answers", value) for name, value in rows[:2]]
        loss, accuracy, margin = (results[name] for name in PREFERENCES)
        ranked = f"{accuracy:.1%}  (mean margin {margin:.3f}, loss {loss:.4f})"
        rows.insert(2, ("pairs ranked right", ranked))
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


def next_commands(
    results: dict[str, Any], folder: RunFolder, source: SharingPlan | None = None, *, keeps_latents: bool = False
) -> list[str]:
    """What to type next: look at the model's costs, train another pattern for comparison, generate text.

    Args:
        results: of the run.
        folder: the run's.
        source: the pattern of the pretrained model that the run has started from, if it has.
        keeps_latents: whether that model keeps latents, so that it can start no other pattern.
    """
    given = _as_train_takes_them(arguments_of_this_run())
    commands = [command("lckv.plan", [f"init.source={folder.path}"])]  # its sizes as well as its pattern
    if results.get("is_for_all_patterns"):
        chosen = ["sharing=cla", "method=inherit", f"out={folder.path}-cla"]
        commands.append(command("lckv.convert", [f"source={folder.path}", *chosen]))
    others = [] if keeps_latents or len(commands) > 1 else _other_patterns(results["layer_types"], source)
    for name, other in others[:1]:
        again = [item for item in given if not item.lstrip("+").startswith(_OF_ONE_RUN)]
        again += [f"model.layer_types={other}", f"run_name={results['run_name']}_{name}"]
        commands.append(command("lckv.train", again))
    return [*commands, command("lckv.generate", _generation(results["sample_prompt"], folder))]


def _other_patterns(layer_types: str, source: SharingPlan | None) -> list[tuple[str, str]]:
    """Names and patterns to compare with, the best first; those that the source can start, if there is one."""
    num_layers = parse_layer_types(layer_types).num_hidden_layers
    patterns = {"source": source.layer_types} if source else {"llama": build_layer_types("llama", num_layers)}
    if num_layers > 1:  # a single layer has nothing to share
        patterns["cla"] = build_layer_types("cla", num_layers)
    before = source.owners_by_stream if source else [range(num_layers)] * 2
    return [
        (name, pattern)
        for name, pattern in patterns.items()
        for now in [parse_layer_types(pattern).owners_by_stream]
        if pattern != layer_types and all(set(own).issuperset(each) for own, each in zip(before, now, strict=True))
    ]


def _generation(prompt: str, folder: RunFolder) -> list[str]:
    """Settings that continue the prompt as the samples of the training do."""
    if not prompt.strip():  # only a sample can begin with nothing
        prompt = TrainerConfig.sample_prompt
    sampling = SAMPLING | {"seed": SAMPLING_SEED}
    return [f"model={folder.path}", f"prompt={prompt}", *(f"{name}={value}" for name, value in sampling.items())]


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
