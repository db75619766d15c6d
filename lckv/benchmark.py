"""`python -m lckv.benchmark`: what generation costs, side by side; see `conf/benchmark.yaml`."""

from __future__ import annotations

import json
import os
from typing import Any

from lckv.benchmarking.settings import OutputFolder, build_workload, check_iteration, checkpoint_labels, random_models
from lckv.commands import cli
from lckv.config import BenchmarkConfig, validate
from lckv.loading.model_files import check_model
from lckv.utils.console import new_console

# Read once, when torch is loaded: its profiler, which counts memory, would write lines of its own to stderr.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def main(cfg: BenchmarkConfig) -> None:
    """Measures everything that the configuration names, prints tables, and writes the figures and a picture.

    Ctrl-C ends it with the figures of the rounds that were over.
    """
    validate(cfg)
    workload = build_workload(cfg)
    arguments = random_models(cfg)
    for path in cfg.checkpoints:
        check_model(path, key="checkpoints")
    folder = OutputFolder(cfg.output_dir, overwrite=cfg.overwrite, plot_format=cfg.plot_format)

    # Behind the checks: importing torch and transformers takes seconds.
    from lckv.benchmarking.measuring import choose_caches, combine, measure
    from lckv.benchmarking.results import as_dict, draw_results, environment_of, print_report
    from lckv.utils.charts import save_chart

    caches = choose_caches(cfg.caches or [cfg.cache.name], cfg.cache.options())
    models = load_models(cfg, arguments)
    configs = {label: model.config for label, model in models.items()}
    check_iteration(workload.prefill_passes, workload.prefill_tolerance, configs)
    with folder.claimed():
        results, num_rounds = measure(combine(models, caches), workload)
        environment = environment_of(next(iter(models.values())).device)
        figures = as_dict(results, workload, environment, num_rounds)
        folder.write(figures)
        save_chart(draw_results(figures), folder.plot)
    console = new_console(is_wide=True)
    if cfg.json:
        console.print_json(json.dumps(figures))
    else:
        print_report(figures, console)
        console.print(f"written: {folder.results}, {folder.plot}")
    if figures["is_interrupted"]:
        raise KeyboardInterrupt


def load_models(cfg: BenchmarkConfig, arguments: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """All models by their labels, on the device."""
    import torch

    from lckv.loading.models import find_device, load_model
    from lckv.models import LCKVLlamaConfig, LCKVLlamaForCausalLM

    if cfg.num_threads is not None:
        torch.set_num_threads(cfg.num_threads)
    device = find_device(cfg.device)
    dtype = getattr(torch, cfg.model.dtype if cfg.dtype == "auto" else cfg.dtype)
    models = {}
    for label, each in arguments.items():
        torch.manual_seed(cfg.seed)
        model = LCKVLlamaForCausalLM(LCKVLlamaConfig(**each))
        models[label] = model.to(device=device, dtype=dtype).eval()  # type: ignore[call-arg]
    for label, path in checkpoint_labels(cfg.checkpoints, taken=list(models)).items():
        models[label], _ = load_model(path, device=cfg.device, dtype=cfg.dtype, key="checkpoints")
    return models


if __name__ == "__main__":
    cli.run(main, "benchmark")
