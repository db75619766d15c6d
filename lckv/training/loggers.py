"""Trackers that a run can log to, by name: TensorBoard, Weights & Biases and trackio."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from lckv.config import LoggerConfig, RunConfig
from lckv.errors import UserError
from lckv.training.run_folder import RunFolder
from lckv.utils.registry import Registry

LOGGERS: Registry[Callable[[RunConfig, RunFolder, int], TrainerCallback]] = Registry("logger")
"""Builders of tracker callbacks by name: `builder(cfg, folder, first_step)`; the session logs what is behind that."""


def check_loggers(cfg: LoggerConfig) -> None:
    """Raises a UserError that says what to install, where a tracker is missing."""
    for name in cfg.names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"logger.names={name}: is not installed; pip install 'lckv[track]'")


@LOGGERS.register("tensorboard")
def tensorboard(cfg: RunConfig, folder: RunFolder, first_step: int) -> TrainerCallback:
    """Event files in the run folder: `tensorboard --logdir <run folder>`."""
    from torch.utils.tensorboard import SummaryWriter

    # What an interrupted session logged behind its last checkpoint is logged again: hide the first version.
    return TensorBoardCallback(SummaryWriter(str(folder.tensorboard), purge_step=first_step + 1))


@LOGGERS.register("wandb")
def wandb(cfg: RunConfig, folder: RunFolder, first_step: int) -> TrainerCallback:
    """Weights & Biases; offline data lies in the run folder until `wandb sync` uploads it."""
    import wandb as wandb_package

    os.environ.setdefault("WANDB_SILENT", "true")
    wandb_package.init(
        project=cfg.logger.project,
        name=cfg.run_name or folder.path.name,
        id=folder.run_id(),
        resume="allow",
        mode=cfg.logger.mode,
        dir=str(folder.path),
        config=asdict(cfg),
    )

    class Callback(WandbCallback):
        """Ends the tracker's run with ours: a sweep's next job in this process starts its own."""

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            super().on_train_end(*args, **kwargs)
            wandb_package.finish()

    return Callback()


@LOGGERS.register("trackio")
def trackio(cfg: RunConfig, folder: RunFolder, first_step: int) -> TrainerCallback:
    """trackio, on this machine: `trackio show --project lckv`; a run that goes on is the same one there."""
    import trackio as trackio_package

    class Callback(TrackioCallback):
        """Begins the tracker's run with what ours is called, and its configuration."""

        def setup(self, *args: Any, **kwargs: Any) -> None:
            name = cfg.run_name or folder.path.name
            trackio_package.init(project=cfg.logger.project, name=name, resume="allow", config=asdict(cfg))
            self._initialized = True

    return Callback()
