"""Why a run failed, in its folder, so that a report over many runs can say so. No torch: mistakes come before it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import Any

from lckv.config import TrainConfig
from lckv.errors import UserError
from lckv.model_arguments import resolve_layer_types
from lckv.storage import write_json
from lckv.training.run_folder import RunFolder


@contextmanager
def recorded_failure(folder: RunFolder, cfg: TrainConfig, overrides: Sequence[str]) -> Iterator[None]:
    """Leaves `failure.json` in the run folder where an exception ends the run, and passes the exception on.

    A folder that holds another run, or this one finished, stays as it is.

    Args:
        folder: the run folder.
        cfg: the configuration of the run.
        overrides: what the command line says of it.
    """
    try:
        yield
    except Exception as error:
        with suppress(OSError):  # a folder that cannot be written to is often the reason itself
            if folder.is_open_to(asdict(cfg)):
                folder.path.mkdir(parents=True, exist_ok=True)
                write_json(folder.failure, _describe(error, cfg, overrides))
        raise


def _describe(error: Exception, cfg: TrainConfig, overrides: Sequence[str]) -> dict[str, Any]:
    name = type(error).__name__
    return {
        "error": " ".join(str(error).split()) or name,
        "type": name,
        "overrides": list(overrides),
        "layer_types": _layer_types(cfg),
        "run_name": cfg.run_name,
    }


def _layer_types(cfg: TrainConfig) -> str | None:
    """The run's pattern, where it can be known without a pretrained model, which brings the number of layers."""
    if cfg.init.source is not None and cfg.model.layer_types is None:
        return None
    try:
        return resolve_layer_types(cfg)
    except UserError:
        return None
