"""The pretrained model that a training run starts from: found, adopted and converted into the run's folder."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from transformers import TrainingArguments

from lckv.config import TrainConfig
from lckv.conversion.methods import METHODS, TRAINED
from lckv.conversion.pipeline import convert
from lckv.conversion.settings import adopt_source, check_calibration
from lckv.conversion.source import Source
from lckv.conversion.target import source_config_of
from lckv.data.tokenizer import check_tokenizer
from lckv.errors import check_choice
from lckv.processes import is_main_process
from lckv.training.run_folder import RunFolder


def adopt_init(cfg: TrainConfig, folder: RunFolder) -> tuple[TrainConfig, Source | None]:
    """The configuration with the sizes of the pretrained model to start from, and the model, if it is still needed.

    A run that has begun needs only what it has made of the model, and goes on where that is no longer there.

    Raises:
        UserError: if there is no such model, or the settings do not fit it.
    """
    name, revision = cfg.init.source, cfg.init.revision
    if name is None:
        return cfg, None
    check_choice("init.method", cfg.init.method, METHODS)
    check_calibration(cfg.init)
    if cfg.init.method in TRAINED and cfg.teacher.source is None:
        cfg = replace(cfg, teacher=replace(cfg.teacher, source=name, revision=revision))
    if folder.holds_a_run() and folder.init.is_dir():
        return adopt_source(cfg, source_config_of(folder.init)), None
    source = Source.find(name, revision=revision, key="init.source")
    check_tokenizer(source.load_tokenizer(), str(source.checkpoint))
    return adopt_source(cfg, source.config), source


def convert_init(
    cfg: TrainConfig, source: Source | None, folder: RunFolder, args: TrainingArguments, console: Console
) -> Path | None:
    """Where the converted model is that the run starts from, written now unless it is there; `None`: at random.

    One process converts; the others wait for it, and end if there is nothing then.
    """
    if source is not None:
        with args.main_process_first(local=False):
            if is_main_process():
                convert(cfg, source, folder.init, console, device=str(args.device))
        if not folder.init.is_dir():
            sys.exit(2)  # the first process has said why
    return None if cfg.init.source is None else folder.init
