"""`python -m lckv.evaluate`: what a model is worth, and what it costs; see `conf/evaluate.yaml`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lckv.commands import cli
from lckv.config import EvaluateConfig, validate
from lckv.config.names import NO_CACHE
from lckv.data.sources import check_text_files
from lckv.errors import UserError
from lckv.loading.model_files import check_model
from lckv.utils.console import new_console
from lckv.utils.storage import check_folder

if TYPE_CHECKING:
    from lckv.evaluation.evaluations import Subject
    from lckv.evaluation.results_file import ResultsFile
    from lckv.loading.models import Checkpoint
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
    if cfg.out is not None:
        check_folder(Path(cfg.out).expanduser(), f"out={cfg.out}")
    check_model(cfg.model, revision=cfg.revision)
    check_text_files(cfg.data)

    # Behind the checks: importing torch and transformers takes seconds.
    import torch

    from lckv.cache.base import check_offloading
    from lckv.evaluation.evaluations import Subject, run_evaluations
    from lckv.evaluation.results_file import show_results
    from lckv.evaluation.text import choose_text
    from lckv.loading.models import find_checkpoint, find_run, load_model, set_attention

    check_offloading(cfg.cache.offloading)
    if cfg.num_threads is not None:
        torch.set_num_threads(cfg.num_threads)
    checkpoint = find_checkpoint(cfg.model, revision=cfg.revision)
    run = find_run(checkpoint)
    stored = None if run is None else run.stored_text()
    cfg.data = choose_text(cfg.data, is_named=_is_text_named(cfg), stored=stored)
    file = _results_file(cfg, checkpoint, run)
    model, tokenizer = load_model(cfg.model, revision=cfg.revision, dtype=cfg.dtype, device=cfg.device)
    set_attention(model, cfg.attn_implementation)
    subject = Subject(
        model,
        tokenizer,
        cfg.data,
        _cache_maker(cfg, model),
        cfg.seed,
        trained_length=None if stored is None else stored["block_size"],
        folder=file.path.parent,
    )
    file.common.update(_common(cfg, subject, run))
    # What the figures depend on beside each evaluation's own settings.
    settings = {
        "cache": {"name": cfg.cache.name, **cfg.cache.options()},
        "attn_implementation": model.config._attn_implementation,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "num_threads": torch.get_num_threads(),
    }
    results, failures, is_new = file.write({}), [], False
    for name, outcome in run_evaluations(subject, cfg, settings):
        if isinstance(outcome, UserError):
            failures.append(f"{name}: {outcome}")
        else:
            results, is_new = file.write({name: outcome}), True
            failures += [f"{name}: {part}: {line}" for part, line in outcome.get("errors", {}).items()]
    if is_new and cfg.json:
        new_console(is_wide=True).print_json(json.dumps(results))
    elif is_new:
        show_results(results, file.path, new_console(is_wide=True))
    if failures:
        raise UserError("; ".join(failures))


def _is_text_named(cfg: EvaluateConfig) -> bool:
    """Whether the source of text was chosen, be it the default one."""
    typed = {override.lstrip("+").partition("=")[0] for override in cli.task_overrides()}
    return cfg.data.name != EvaluateConfig().data.name or bool(typed & {"data", "data.name"})


def _results_file(cfg: EvaluateConfig, checkpoint: Checkpoint, run: RunFolder | None) -> ResultsFile:
    """Where the results go, checked to be this model's."""
    from lckv.evaluation.results_file import ResultsFile
    from lckv.loading.models import evaluation_folder

    folder = evaluation_folder(checkpoint, run) if cfg.out is None else Path(cfg.out).expanduser()
    identity = {"name": checkpoint.given, "revision": checkpoint.revision, "fingerprint": checkpoint.fingerprint()}
    file = ResultsFile(folder / "results.json", identity)
    file.check()
    return file


def _cache_maker(cfg: EvaluateConfig, model: LCKVLlamaForCausalLM) -> Callable[[], Any] | None:
    """Makes empty caches, once one has been made, which shows whether the model allows it."""
    if cfg.cache.name == NO_CACHE:
        return None
    from lckv.cache import build_cache

    new_cache = partial(build_cache, cfg.cache.name, model.config, **cfg.cache.options())
    new_cache()
    return new_cache


def _common(cfg: EvaluateConfig, subject: Subject, run: RunFolder | None) -> dict[str, Any]:
    """What `results.json` holds beside the evaluations."""
    from lckv.evaluation.model_costs import cost_figures, llama_sizes_of, sharing_plan_of
    from lckv.training.run_summary import median_speed
    from lckv.utils.environment import describe_hardware, versions

    model, config = subject.model, {} if run is None else run.stored_config()
    limit = model.config.max_position_embeddings
    context_length, _ = cfg.perplexity.window_sizes(limit, subject.trained_length, "perplexity.")
    return {
        "layer_types": sharing_plan_of(model).layer_types,
        "costs": {
            **cost_figures(model, context_length, llama_sizes_of(model, config)),
            "num_parameters": model.num_parameters(),
            "train_tokens_per_second": None if run is None else median_speed(run.read_metrics()),
        },
        "settings": asdict(cfg),
        "hardware": describe_hardware(model.device),
        "versions": versions(),
    }


if __name__ == "__main__":
    cli.run(main, "evaluate")
