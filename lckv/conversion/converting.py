"""One conversion from the configuration to the folder, with calibration text where the method looks at it."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from lckv.config import TrainConfig
from lckv.config.names import CALIBRATED
from lckv.conversion.calibration import calibrate
from lckv.conversion.converted import converted_config, write_converted
from lckv.conversion.methods import groups_of
from lckv.conversion.moments import InputMoments
from lckv.conversion.progress import showing_progress
from lckv.conversion.settings import check_block_size, model_settings, plan_of
from lckv.conversion.source import Source
from lckv.data import build_dataset
from lckv.data.tokenizer import check_tokenizer
from lckv.generation.loading import find_device
from lckv.patterns import SharingPlan


def convert(
    cfg: TrainConfig,
    source: Source,
    out: Path,
    console: Console,
    *,
    device: str = "auto",
    max_shard_size: int = 5 * 10**9,
) -> None:
    """Converts a pretrained model as the configuration says, and writes it into a folder that appears at once.

    Args:
        cfg: the configuration, with the source's sizes; see [`lckv.conversion.settings.adopt_source`].
        source: the model.
        out: the folder.
        console: where to show progress.
        device: where calibration text runs.
        max_shard_size: bytes of a file of weights.

    Raises:
        UserError: for wrong settings, text or weights.
    """
    find_device(device)
    plan, method = plan_of(cfg), cfg.init.method
    config = converted_config(source.config, plan, **model_settings(cfg))
    moments, record = None, {}
    if method in CALIBRATED and groups_of(plan):
        moments, fingerprint = _calibrate(cfg, source, plan, console, device)
        tokens = {"calibration_tokens": moments.num_tokens, "ridge": cfg.init.ridge}
        record = {"data": cfg.data.name, "data_fingerprint": fingerprint, **tokens}
    with showing_progress(console, "writing", "bytes") as advance:
        write_converted(
            source,
            config,
            method,
            out,
            moments=moments,
            ridge=cfg.init.ridge,
            max_shard_size=max_shard_size,
            record=record,
            on_bytes=advance,
        )


def _calibrate(
    cfg: TrainConfig, source: Source, plan: SharingPlan, console: Console, device: str
) -> tuple[InputMoments, str]:
    """The moments of the layers' inputs, and the fingerprint of the text."""
    tokenizer = check_tokenizer(source.load_tokenizer(), str(source.checkpoint))
    check_block_size(cfg.data, source.config)
    data = build_dataset(cfg.data, tokenizer)
    with showing_progress(console, "calibrating", "tokens") as advance:
        moments = calibrate(source, plan, data.train, cfg.init.calibration_tokens, device=device, on_tokens=advance)
    return moments, data.fingerprint
