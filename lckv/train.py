"""`python -m lckv.train`: trains a model from a configuration; see `conf/train.yaml`."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from lckv import cli
from lckv.config import TokenizerConfig, TrainConfig, validate
from lckv.console import new_console
from lckv.data.sources import check_text_files
from lckv.model_arguments import model_arguments, plan_from_source, resolve_plan
from lckv.model_files import check_model, check_tokenizer_name, keeps_latents
from lckv.processes import check_launch, is_main_process, num_processes, prepare_process
from lckv.storage import check_folder
from lckv.training.run_folder import A_MOMENT, FOREVER, RunFolder, recorded_failure


def main(cfg: TrainConfig, folder: RunFolder | None = None) -> float | None:
    """Trains what the configuration names, unless that has been done.

    Args:
        cfg: the configuration.
        folder: the run folder, where that is not simply `cfg.run_dir`.

    Returns:
        The validation loss at the end, for sweepers that look for a low one; `None` in every process but the first.
    """
    check_launch("lckv.train")
    assert cfg.run_dir is not None  # filled in with the run's name
    folder = folder or RunFolder(cfg.run_dir, cfg.trainer.save_total_limit)
    with folder, recorded_failure(folder, cfg, cli.task_overrides()):
        validate(cfg)
        results = _finished_in_a_sweep(cfg, folder) or _train(cfg, folder)
    return None if results is None else float(results["eval_loss"])


def _finished_in_a_sweep(cfg: TrainConfig, folder: RunFolder) -> dict[str, Any] | None:
    """The results of a job of a sweep that need not run again, found before anything heavy is imported or read."""
    if not (cli.is_in_a_sweep() and cfg.trainer.resume and folder.results.is_file()):
        return None
    if cfg.init.source is not None:
        from lckv.conversion.pipeline import adopt_init

        cfg, _ = adopt_init(cfg, folder)
    if not folder.holds(asdict(cfg)):
        return None
    if (results := folder.finished_results()) is not None:
        new_console().print(f"finished: skipped {folder.path}")
    return results


def _train(cfg: TrainConfig, folder: RunFolder) -> dict[str, Any] | None:
    """Builds everything that the configuration names, trains, and shows and returns the results."""
    _check_files(cfg, folder)

    # Behind the checks: importing torch and transformers takes seconds.
    from transformers import set_seed

    from lckv.building import build_model, build_teacher, choose_tokenizer
    from lckv.conversion.pipeline import adopt_init, convert_init
    from lckv.conversion.target import source_config_of
    from lckv.data.dataset import build_dataset
    from lckv.training.arguments import build_training_arguments
    from lckv.training.callbacks import build_evaluate, check_sample_prompt
    from lckv.training.loggers import check_loggers
    from lckv.training.run_summary import next_commands, show_results
    from lckv.training.session import Session

    prepare_process(cfg.trainer.num_threads)
    console = new_console(is_quiet=not is_main_process())
    cfg, source = adopt_init(cfg, folder)
    args = build_training_arguments(cfg)
    check_loggers(cfg.logger)
    if is_main_process():
        # Two jobs of a sweep may be the same run: the second one waits, and finds it finished.
        folder.claim(asdict(cfg), resume=cfg.trainer.resume, wait=FOREVER if cli.is_in_a_sweep() else A_MOMENT)
    init = convert_init(cfg, source, folder, args, console)
    tokenizer = choose_tokenizer(cfg.tokenizer if init is None else TokenizerConfig(str(init)), cfg.data)
    check_sample_prompt(tokenizer, cfg.trainer.sample_prompt)
    data = build_dataset(cfg.data, tokenizer)
    if is_main_process():
        folder.claim_data(data.fingerprint)
    if (results := folder.finished_results()) is not None:
        console.print(f"this run is finished: {folder.path}", style="bold")
    else:
        teacher = build_teacher(cfg.teacher, tokenizer)
        set_seed(cfg.seed)
        model = build_model(cfg, tokenizer, init)
        evaluate = build_evaluate(cfg, model, tokenizer, folder)
        results = Session(cfg, args, model, tokenizer, data, folder, console, teacher, evaluate).run()
    if results is not None:
        origin = None if init is None else source_config_of(init)
        plan, keeps_latents = (origin.sharing_plan, origin.kv_latents is not None) if origin else (None, False)
        show_results(results, folder, console, next_commands(results, folder, plan, keeps_latents=keeps_latents))
    return results


def _check_files(cfg: TrainConfig, folder: RunFolder) -> None:
    """Finds mistakes in folder, sizes, pattern and what the configuration names before anything slow is imported."""
    check_folder(folder.path, f"run_dir={folder.path}", folder.instead)
    cfg.trainer.cut_batch(num_processes())
    if cfg.init.source is None:
        resolve_plan(cfg)
        if cfg.latent.is_used:
            model_arguments(replace(cfg, iso=None), cfg.model.vocab_size or 1)  # which checks their sizes
        check_tokenizer_name(cfg.tokenizer.name)
    elif not (folder.holds_a_run() and folder.init.is_dir()):  # else nothing more is asked of the source
        own = check_model(cfg.init.source, revision=cfg.init.revision, key="init.source")
        if own is not None:
            plan_from_source(cfg, own)
            cfg.check_latents(own=bool(keeps_latents(cfg.init.source, key="init.source")))
    if not folder.results.is_file():
        if cfg.teacher.source is not None:
            check_model(cfg.teacher.source, revision=cfg.teacher.revision, key="teacher.source")
        check_text_files(cfg.data)


if __name__ == "__main__":
    cli.run(main, "train")
