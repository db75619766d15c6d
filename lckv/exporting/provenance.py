"""What is known of a model beside its weights: what it was made of, how it was trained, and how good it is."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lckv.config.run_names import source_name
from lckv.conversion.target import RECORD
from lckv.errors import UserError
from lckv.evaluation.results_file import scalar_figures
from lckv.loading.model_files import is_of_training
from lckv.loading.models import Checkpoint, evaluation_folder, find_run
from lckv.training.run_folder import RunFolder, flatten

logger = logging.getLogger(__name__)

_SETTINGS = (
    *("teacher.source", "data.name", "data.dataset", "data.block_size"),
    *("optim.name", "optim.learning_rate", "optim.schedule", "optim.weight_decay", "trainer.max_steps"),
    *("trainer.global_batch_size", "trainer.precision", "trainer.trainable", "seed"),
)
"""What is told of a run: nothing that names files or folders of the machine it ran on."""

_MADE = ("source", "revision", "method", "calibration_tokens", "lckv_version")
"""What is told of a conversion."""

_HELD_OUT = ("eval_perplexity", "eval_bits_per_byte", "unigram_perplexity")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Provenance:
    """Where a model comes from.

    Attributes:
        base_model: the name on the Hub of the pretrained model that it was made of, if it was of one.
        training: settings of the run that trained it, by name.
        conversion: what was done with the pretrained model, by name.
        figures: what was measured: the evaluation, the figure and its value.
    """

    base_model: str | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    conversion: Mapping[str, Any] = field(default_factory=dict)
    figures: tuple[tuple[str, str, float], ...] = ()


def find_provenance(checkpoint: Checkpoint) -> Provenance:
    """Reads what lies beside a model, which may be nothing.

    Raises:
        UserError: if a file cannot be read.
    """
    run, given = find_run(checkpoint), Path(checkpoint.given).expanduser().resolve()
    record = _read(Path(checkpoint.path if run is None else run.init, RECORD)) if checkpoint.is_folder else {}
    finished = {} if run is None or is_of_training(given) else _read(run.results)
    held_out = [("held-out text", name, finished[name]) for name in _HELD_OUT if finished.get(name) is not None]
    source = record.get("source")
    return Provenance(
        source if source is not None and public_name(source) == source and "/" in source else None,
        {} if run is None else _settings(run, finished),
        {name: _told(name, record[name]) for name in _MADE if record.get(name) is not None},
        (*held_out, *_evaluations(checkpoint, run)),
    )


def public_name(source: str) -> str:
    """What a model or a text is called elsewhere: its name on the Hub, or that of a folder without where it is."""
    is_on_the_hub = _HUB_NAME.fullmatch(source) and not Path(source).exists()
    return source if is_on_the_hub else source_name(source)


def _told(name: str, value: Any) -> Any:
    return public_name(value) if name.rpartition(".")[2] in ("source", "dataset") else value


def _settings(run: RunFolder, finished: Mapping[str, Any]) -> dict[str, Any]:
    stored = dict(flatten(run.stored_config()))
    settings = {name: _told(name, stored[name]) for name in _SETTINGS if stored.get(name) is not None}
    return settings | {name: finished[name] for name in ("tokens", "seconds") if name in finished}


def _evaluations(checkpoint: Checkpoint, run: RunFolder | None) -> Iterator[tuple[str, str, float]]:
    """What `lckv.evaluate` has found out about these weights; of others, nothing."""
    folders = [evaluation_folder(checkpoint, run), *([Path(checkpoint.path)] if checkpoint.is_folder else [])]
    for file in (folder / "results.json" for folder in folders):
        results = _read(file)
        if "evaluations" not in results:
            continue
        if results.get("model", {}).get("fingerprint") != checkpoint.fingerprint():
            logger.warning("%s: is of other weights, and left out", file)
            continue
        for evaluation, figures in results["evaluations"].items():
            yield from ((evaluation, name, value) for name, value in scalar_figures(figures))
        return


def _read(file: Path) -> dict[str, Any]:
    """What a JSON file holds; nothing, if it is not there.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file}: cannot be read ({error}); mend it, or move it away") from error
