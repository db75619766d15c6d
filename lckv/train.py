"""`python -m lckv.train`: trains a model from a configuration; see `conf/train.yaml`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lckv.commands import cli
from lckv.commands.runs import claim, claim_data, in_run_folder
from lckv.config import TokenizerConfig, TrainConfig
from lckv.config.model_arguments import model_arguments, plan_from_source, resolve_plan
from lckv.data.sources import check_text_files
from lckv.loading.model_files import check_model, check_tokenizer_name, keeps_latents
from lckv.training.run_folder import RunFolder
from lckv.utils.console import new_console
from lckv.utils.processes import is_main_process, num_processes, prepare_process
from lckv.utils.storage import check_folder


def main(cfg: TrainConfig, folder: RunFolder | None = None) -> float | None:
    """Trains what the configuration names, unless that has been done.

    Args:
        cfg: the configuration.
        folder: the run folder, where that is not simply `cfg.run_dir`.

    Returns:
        The validation loss at the end, for sweepers that look for a low one; `None` in every process but the first.
    """
    return in_run_folder("lckv.train", cfg, folder, _train, _adopt)


def _adopt(cfg: TrainConfig, folder: RunFolder) -> TrainConfig:
    """The configuration with the sizes of the model that the run starts from, if there is one."""
    if cfg.init.source is None:
        return cfg
    from lckv.conversion.pipeline import adopt_init

    return adopt_init(cfg, folder)[0]


def _train(cfg: TrainConfig, folder: RunFolder) -> dict[str, Any] | None:
    """Builds everything that the configuration names, trains, and shows and returns the results."""
    _check_files(cfg, folder)

    # Behind the checks: importing torch and transformers takes seconds.
    from transformers import set_seed

    from lckv.conversion.pipeline import adopt_init, convert_init
    from lckv.conversion.target import source_config_of
    from lckv.data.dataset import build_dataset
    from lckv.loading.building import build_model, build_teacher, choose_tokenizer
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
    claim(folder, cfg)
    init = convert_init(cfg, source, folder, args, console)
    tokenizer = choose_tokenizer(cfg.tokenizer if init is None else TokenizerConfig(str(init)), cfg.data)
    check_sample_prompt(tokenizer, cfg.trainer.sample_prompt)
    data = build_dataset(cfg.data, tokenizer)
    if (results := claim_data(folder, data.fingerprint, console)) is None:
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
