"""What `lckv.train` and `lckv.sft` have around their work: the run folder, and what a sweep asks of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, TypeVar

from rich.console import Console

from lckv.commands import cli
from lckv.config import RunConfig, validate
from lckv.config.names import PREFERENCES
from lckv.training.run_folder import A_MOMENT, FOREVER, RunFolder, recorded_failure
from lckv.utils.console import new_console
from lckv.utils.processes import check_launch, is_main_process

Config = TypeVar("Config", bound=RunConfig)
Results = dict[str, Any]


def in_run_folder(
    command: str,
    cfg: Config,
    folder: RunFolder | None,
    work: Callable[[Config, RunFolder], Results | None],
    adopt: Callable[[Config, RunFolder], Config] = lambda cfg, folder: cfg,
) -> float | None:
    """Does a command's work in its run folder, unless that is a job of a sweep that is done.

    Args:
        command: the name of the entry point.
        cfg: the configuration.
        folder: the run folder, where that is not simply `cfg.run_dir`.
        work: trains, and returns the results; `None` in every process but the first.
        adopt: what makes of the configuration the one that is stored.

    Returns:
        The validation loss at the end, of pairs where these are trained on, for sweepers that look for a low one;
        `None` in every process but the first.
    """
    check_launch(command)
    assert cfg.run_dir is not None  # filled in with the run's name
    folder = folder or RunFolder(cfg.run_dir, cfg.trainer.save_total_limit)
    with folder, recorded_failure(folder, cfg, cli.task_overrides(), keeps_mistakes=cli.is_in_a_sweep()):
        validate(cfg)
        results = _finished_in_a_sweep(cfg, folder, adopt) or work(cfg, folder)
    if results is None:
        return None
    return float(results[PREFERENCES[0] if PREFERENCES[0] in results else "eval_loss"])


def _finished_in_a_sweep(
    cfg: Config, folder: RunFolder, adopt: Callable[[Config, RunFolder], Config]
) -> Results | None:
    """The results of a job of a sweep that need not run again, found before anything heavy is imported or read."""
    if not (cli.is_in_a_sweep() and cfg.trainer.resume and folder.results.is_file()):
        return None
    if not folder.holds(asdict(adopt(cfg, folder))):
        return None
    if (results := folder.finished_results()) is not None:
        new_console().print(f"finished: skipped {folder.path}")
    return results


def claim(folder: RunFolder, cfg: RunConfig) -> None:
    """Has the first process claim the folder."""
    if is_main_process():
        # Two jobs of a sweep may be the same run: the second one waits, and finds it finished.
        folder.claim(asdict(cfg), resume=cfg.trainer.resume, wait=FOREVER if cli.is_in_a_sweep() else A_MOMENT)


def claim_data(folder: RunFolder, fingerprint: str, console: Console) -> Results | None:
    """Has it claim the data too; returns the results of a run that is finished, which is said."""
    if is_main_process():
        folder.claim_data(fingerprint)
    if (results := folder.finished_results()) is not None:
        console.print(f"this run is finished: {folder.path}", style="bold")
    return results
