"""Trackers that a run can log to, by name: TensorBoard and Weights & Biases."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, WandbCallback

from lckv.config import LoggerConfig
from lckv.errors import UserError
from lckv.registry import Registry
from lckv.training.run_folder import RunFolder

Builder = Callable[[LoggerConfig, RunFolder, str, Mapping[str, Any], int], TrainerCallback]

LOGGERS: Registry[Builder] = Registry("logger")
"""Builders of tracker callbacks by name: `builder(cfg, folder, run_name, config, first_step)`."""

register_logger = LOGGERS.register


def check_loggers(cfg: LoggerConfig) -> None:
    """Raises a UserError that says what to install, where a tracker is missing."""
    for name in cfg.names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"logger.names={name}: is not installed; pip install 'lckv[track]'")


def build_loggers(
    cfg: LoggerConfig, folder: RunFolder, run_name: str, config: Mapping[str, Any], first_step: int
) -> list[TrainerCallback]:
    """Builds the callbacks of the trackers that `cfg` names.

    Args:
        cfg: which trackers.
        folder: of the run; offline data goes there.
        run_name: what the trackers call the run.
        config: the resolved config, shown beside the curves.
        first_step: the step behind which this session logs.
    """
    return [LOGGERS[name](cfg, folder, run_name, config, first_step) for name in cfg.names]


@register_logger("tensorboard")
def tensorboard(
    cfg: LoggerConfig, folder: RunFolder, run_name: str, config: Mapping[str, Any], first_step: int
) -> TrainerCallback:
    """Event files in the run folder: `tensorboard --logdir <run folder>`."""
    from torch.utils.tensorboard import SummaryWriter

    # What an interrupted session logged behind its last checkpoint is logged again: hide the first version.
    return TensorBoardCallback(SummaryWriter(str(folder.tensorboard), purge_step=first_step + 1))


@register_logger("wandb")
def wandb(
    cfg: LoggerConfig, folder: RunFolder, run_name: str, config: Mapping[str, Any], first_step: int
) -> TrainerCallback:
    """Weights & Biases; offline data lies in the run folder until `wandb sync` uploads it."""
    import wandb as wandb_package

    os.environ.setdefault("WANDB_SILENT", "true")
    wandb_package.init(
        project=cfg.project,
        name=run_name,
        id=folder.run_id(),
        resume="allow",
        mode=cfg.mode,
        dir=str(folder.path),
        config=dict(config),
    )

    class Callback(WandbCallback):
        """Ends the tracker's run with ours: a sweep's next job in this process starts its own."""

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            super().on_train_end(*args, **kwargs)
            wandb_package.finish()

    return Callback()
