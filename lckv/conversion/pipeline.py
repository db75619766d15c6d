"""From the configuration to a converted model, in any folder or in that of a run that starts from it."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import TrainingArguments

from lckv.config import TrainConfig
from lckv.config.model_arguments import resolve_plan
from lckv.config.names import CALIBRATED, TRAINED
from lckv.conversion.calibration import batches_of, calibrate, choose_blocks
from lckv.conversion.latent_models import budget_of, fit_latents, measure
from lckv.conversion.latents import sources_of
from lckv.conversion.methods import changed_owners, needed_pairs
from lckv.conversion.sensitivity import assume_sensitivity
from lckv.conversion.settings import adopt_source, check_block_size, model_settings
from lckv.conversion.source import Source
from lckv.conversion.target import Make, converted_config, source_config_of, write_converted
from lckv.data.dataset import TokenizedData, build_dataset
from lckv.errors import UserError
from lckv.loading.models import find_device
from lckv.models import LCKVLlamaConfig
from lckv.training.run_folder import RunFolder
from lckv.utils.console import Bar
from lckv.utils.environment import describe_hardware
from lckv.utils.processes import is_main_process


def convert(
    cfg: TrainConfig,
    source: Source,
    out: Path,
    console: Console,
    *,
    device: str = "auto",
    max_shard_size: int = 5 * 10**9,
) -> None:
    """Converts a pretrained model, whose sizes `cfg` has, and writes it into a folder that appears at once.

    Raises:
        UserError: for wrong settings, text or weights.
    """
    hardware = describe_hardware(find_device(device))
    plan, own, method, ridge = resolve_plan(cfg), source.config.sharing_plan, cfg.init.method, cfg.init.ridge
    config = converted_config(source.config, plan, **model_settings(cfg))
    make, moments, record = None, None, dict[str, Any]()
    if cfg.latent.is_used:
        method = cfg.latent.name
        config, make, record = _fit_latents(cfg, source, config, console, device)
    elif method in CALIBRATED and changed_owners(plan, own):
        data, chosen, record = _calibration_text(cfg, source)
        moments = calibrate(source.load_for_text(device), data.train, chosen, needed_pairs(plan, own), console)
        record |= {"calibration_tokens": moments.num_tokens, "ridge": ridge}
    with Bar(console, "writing", "parameters") as bar:
        write_converted(
            source,
            config,
            method,
            out,
            make=make,
            moments=moments,
            ridge=ridge,
            max_shard_size=max_shard_size,
            record=record | {"hardware": hardware},
            on_parameters=bar.update,
        )


def _calibration_text(cfg: TrainConfig, source: Source) -> tuple[TokenizedData, list[int], dict[str, Any]]:
    """The text, the numbers of the blocks of it that are looked at, and what is noted of it."""
    check_block_size(cfg.data, source.config)
    data = build_dataset(cfg.data, source.load_tokenizer())
    chosen = choose_blocks(data.train, cfg.init.calibration_tokens)
    return data, chosen, {"data": cfg.data.name, "data_fingerprint": data.fingerprint}


def _fit_latents(
    cfg: TrainConfig, source: Source, config: LCKVLlamaConfig, console: Console, device: str
) -> tuple[LCKVLlamaConfig, Make, dict[str, Any]]:
    """For a model whose configuration without latents is `config`: that with them, what makes them, and a record."""
    latent, budget = cfg.latent, budget_of(cfg.latent, config)
    if 0 < cfg.init.calibration_tokens < config.hidden_size:
        raise UserError(
            f"init.calibration_tokens={cfg.init.calibration_tokens}: latents need as many as a layer's input has "
            f"numbers, {config.hidden_size}, better ten times that; 0 does without text"
        )
    tensors = source.tensors
    record: dict[str, Any] = {"latent": {"name": latent.name, "ratio": None if budget.dims else latent.ratio}}
    if cfg.init.calibration_tokens:
        data, chosen, of_text = _calibration_text(cfg, source)
        with Bar(console, "calibrating", "tokens", len(chosen) * data.train.block_size) as bar:
            batches = batches_of(data.train, chosen, num_tokens=1)  # activations are most of what the way back takes
            sensitivity = measure(source.load_for_text(device), budget, batches, bar.advance)
        record |= of_text
    else:
        groups = sources_of(budget.plan, source.config.sharing_plan, budget.owners)
        sensitivity = assume_sensitivity(tensors, source.config, groups)
    record |= {"calibration_tokens": sensitivity.num_tokens, "ridge": cfg.init.ridge}
    return *fit_latents(tensors, source.config, config, budget, sensitivity, cfg.init.ridge), record


def adopt_init(cfg: TrainConfig, folder: RunFolder) -> tuple[TrainConfig, Source | None]:
    """The configuration with the sizes of the pretrained model to start from, and the model, if it is still needed.

    A run that has begun needs only what it has made of the model, and goes on where that is no longer there.

    Raises:
        UserError: if there is no such model, or the settings do not fit it.
    """
    name, revision = cfg.init.source, cfg.init.revision
    if name is None:
        return cfg, None
    if cfg.init.method in TRAINED and cfg.teacher.source is None:
        cfg = replace(cfg, teacher=replace(cfg.teacher, source=name, revision=revision))
    if folder.holds_a_run() and folder.init.is_dir():
        return adopt_source(cfg, source_config_of(folder.init)), None
    source = Source.find(name, revision=revision, key="init.source")
    source.load_tokenizer()  # whose faults are to be known before anything takes time
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
