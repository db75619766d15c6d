"""`python -m lckv.evaluate`: what a model is worth, and what it costs; see `conf/evaluate.yaml`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lckv import cli
from lckv.config import EvaluateConfig, validate
from lckv.config.names import NO_CACHE
from lckv.costs import ModelSizes
from lckv.errors import UserError
from lckv.run_names import file_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lckv.checkpoint import Checkpoint
    from lckv.evaluation.evaluations import Subject
    from lckv.evaluation.results import ResultsFile
    from lckv.models import LCKVLlamaForCausalLM
    from lckv.training.run_folder import RunFolder

# Read once, when torch is loaded: its profiler, which counts memory, would write lines of its own to stderr.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def main(cfg: EvaluateConfig) -> None:
    """Runs the evaluations, writes the figures of each as soon as there are any, and shows them.

    Raises:
        UserError: behind all others, for evaluations that could not be done.
    """
    validate(cfg)
    assert cfg.model is not None  # checked

    # Behind the checks: importing torch and transformers takes seconds.
    import torch

    from lckv.cache.base import check_offloading
    from lckv.checkpoint import find_checkpoint
    from lckv.evaluation.evaluations import Subject
    from lckv.evaluation.running import run_evaluations
    from lckv.generation.loading import load_model

    check_offloading(cfg.cache.offloading)
    if cfg.num_threads is not None:
        torch.set_num_threads(cfg.num_threads)
    checkpoint = find_checkpoint(cfg.model, revision=cfg.revision)
    run = _find_run(checkpoint)
    file = _results_file(cfg, checkpoint, run)
    model, tokenizer = load_model(cfg.model, revision=cfg.revision, dtype=cfg.dtype, device=cfg.device)
    _set_attention(model, cfg.attn_implementation)
    subject = Subject(
        model,
        tokenizer,
        cfg.data,
        _cache_maker(cfg, model),
        cfg.seed,
        trained_length=None if run is None else _config_of(run)["data"]["block_size"],
        folder=file.path.parent,
    )
    file.common.update(_common(cfg, subject, run))
    results, failures, is_new = file.touch(), [], False
    for name, outcome in run_evaluations(subject, cfg, _settings(cfg, model)):
        if isinstance(outcome, UserError):
            failures.append(f"{name}: {outcome}")
        else:
            results, is_new = file.add(name, outcome), True
            failures += [f"{name}: {part}: {line}" for part, line in outcome.get("errors", {}).items()]
    if is_new:
        _show(results, file, as_json=cfg.json)
    if failures:
        raise UserError("; ".join(failures))


def _find_run(checkpoint: Checkpoint) -> RunFolder | None:
    """The training run that the model is of, if it was given as a run folder, or as a model or checkpoint in it."""
    from lckv.training.run_folder import RunFolder

    given = Path(checkpoint.given).expanduser().resolve()
    folders = (given.parent, given.parent.parent) if _is_of_training(given) else (given, given.parent)
    runs = [RunFolder(folder) for folder in folders] if checkpoint.is_local else []
    return next((run for run in runs if run.config.is_file() and run.metrics.is_file()), None)


def _is_of_training(folder: Path) -> bool:
    """Whether a folder is a checkpoint that a run has kept, not the model at its end."""
    return folder.parent.name == "checkpoints"


def _config_of(run: RunFolder) -> dict[str, Any]:
    """The settings of a training run."""
    config: dict[str, Any] = yaml.safe_load(run.config.read_text(encoding="utf-8"))
    return config


def _llama_sizes(run: RunFolder | None, model: PreTrainedModel) -> ModelSizes | None:
    """Those of the Llama whose KV bytes the run was given as many of by `iso`; `None`: the model's own."""
    config = {} if run is None else _config_of(run)
    if config.get("iso") is None:
        return None
    heads = config["model"]["num_key_value_heads"] or config["model"]["num_attention_heads"]
    return replace(ModelSizes.from_config(model.config), num_key_value_heads=heads)


def _results_file(cfg: EvaluateConfig, checkpoint: Checkpoint, run: RunFolder | None) -> ResultsFile:
    """Where the results go, checked to be this model's."""
    from lckv.evaluation.results import ResultsFile

    path = Path(checkpoint.given).expanduser().resolve()
    if cfg.out is not None:
        folder = Path(cfg.out).expanduser()
    elif run is not None:
        folder = run.path / "evaluation" / (path.name if _is_of_training(path) else "")
    else:
        folder = Path("runs") / "evaluation" / file_name(path.name if checkpoint.is_local else checkpoint.given)
    identity = {"name": checkpoint.given, "revision": checkpoint.revision, "fingerprint": checkpoint.fingerprint()}
    file = ResultsFile(folder / "results.json", identity)
    file.check()
    return file


def _set_attention(model: LCKVLlamaForCausalLM, attn_implementation: str | None) -> None:
    if attn_implementation is None:
        return
    try:
        model.set_attn_implementation(attn_implementation)
    except (ImportError, ValueError) as error:
        raise UserError(f"attn_implementation={attn_implementation!r}: {error}") from error


def _cache_maker(cfg: EvaluateConfig, model: LCKVLlamaForCausalLM) -> Callable[[], Any] | None:
    """Makes empty caches, once one has been made, which shows whether the model allows it."""
    if cfg.cache.name == NO_CACHE:
        return None
    from lckv.cache import build_cache

    new_cache = partial(build_cache, cfg.cache.name, model.config, **cfg.cache.options())
    new_cache()
    return new_cache


def _settings(cfg: EvaluateConfig, model: LCKVLlamaForCausalLM) -> dict[str, Any]:
    """What the figures depend on beside each evaluation's own settings."""
    import torch

    return {
        "cache": {"name": cfg.cache.name, **cfg.cache.options()},
        "attn_implementation": model.config._attn_implementation,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "num_threads": torch.get_num_threads(),
    }


def _common(cfg: EvaluateConfig, subject: Subject, run: RunFolder | None) -> dict[str, Any]:
    """What `results.json` holds beside the evaluations."""
    from lckv.training.report import cost_figures, median_speed, sharing_plan_of, versions

    limit = subject.model.config.max_position_embeddings
    context_length, _ = cfg.perplexity.window_sizes(limit, subject.trained_length, "perplexity.")
    speed = None if run is None else median_speed(run.read_metrics())
    return {
        "layer_types": sharing_plan_of(subject.model).layer_types,
        "costs": {
            **cost_figures(subject.model, context_length, _llama_sizes(run, subject.model)),
            "num_parameters": subject.model.num_parameters(),
            "train_tokens_per_second": speed,
        },
        "settings": asdict(cfg),
        "versions": versions(),
    }


def _show(results: dict[str, Any], file: ResultsFile, *, as_json: bool) -> None:
    from lckv.benchmarking.report import new_console
    from lckv.evaluation.report import show_results

    console = new_console()
    if as_json:
        console.print_json(json.dumps(results))
    else:
        show_results(results, console)
        console.print(f"written: {file.path}", markup=False)


if __name__ == "__main__":
    cli.run(main, "evaluate")
