"""The folder of one training run: whose it is, what is in it, and the files that are plain to read.

config.yaml        every setting, resolved
data.json          a short name for the text, its split and its tokens
metrics.jsonl      one line per logging step and per evaluation
results.json       written last: a run folder that has it is finished
failure.json       why the run failed when it last did; gone as soon as it goes on
loss.png           training and validation loss
.lock              held by the process that trains here
checkpoints/       what an interrupted run goes on from
model/             the trained model and its tokenizer, for `from_pretrained`
adapter/           where adapters were trained: they alone, as PEFT loads them; `model/` has them merged in
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from lckv.config import RunConfig, TrainConfig
from lckv.config.model_arguments import resolve_layer_types
from lckv.errors import UserError, first_line
from lckv.training.checkpoints import CheckpointFolder
from lckv.utils.storage import locked, write_json, write_text

logger = logging.getLogger(__name__)

A_MOMENT, FOREVER = 10.0, -1.0
"""Seconds to wait: as long as the workers of a killed process may outlive it, or for as long as it takes."""

_NOT_PART_OF_THE_RUN = ("run_dir", "trainer.resume")
"""Settings that may differ when a run goes on: they say where it is and whether it may go on."""


class RunFolder(ExitStack):
    """The paths of a run and the rules about who may write there. Once closed, other processes may train here.

    Args:
        path: the folder.
        save_total_limit: how many checkpoints it keeps.
        instead: for error messages: what whoever cannot have this folder may do.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        save_total_limit: int | None = None,
        instead: str = "give another run_dir=...",
    ) -> None:
        super().__init__()
        self.path = Path(path)
        self.instead = instead
        self.config = self.path / "config.yaml"
        self.data = self.path / "data.json"
        self.metrics = self.path / "metrics.jsonl"
        self.results = self.path / "results.json"
        self.failure = self.path / "failure.json"
        self.loss_plot = self.path / "loss.png"
        self.model = self.path / "model"
        self.adapter = self.path / "adapter"
        self.tensorboard = self.path / "tensorboard"
        self.init = self.path / "init"
        self._lock = self.path / ".lock"
        self.checkpoints = CheckpointFolder(self.path / "checkpoints", save_total_limit)
        self.is_claimed = False
        self.is_in_use = False

    def claim(self, config: Mapping[str, Any], *, resume: bool = True, wait: float = A_MOMENT) -> None:
        """Makes the folder this run's own, or checks that it already is. Of many processes, the first does this.

        Until it is closed, no other process can claim it.

        Args:
            config: the resolved config, as nested plain mappings.
            resume: whether a folder that holds this run already may be gone on with.
            wait: for how many seconds, if another process trains there.

        Raises:
            UserError: if the folder holds another config or cannot be written to, `resume` is off and it holds a run,
                or another process trains there.
        """
        self._check_takes(config, resume=resume)
        self._acquire(wait)
        self._check_takes(config, resume=resume)  # once more: another process may have begun a run meanwhile
        self.checkpoints.clean()
        if not self.holds_a_run():
            shutil.rmtree(self.init, ignore_errors=True)  # perhaps of other settings
            write_text(self.config, _to_yaml(config))
        self.failure.unlink(missing_ok=True)
        self.is_claimed = True

    def withdraw(self) -> None:
        """Takes back a claim on a folder where nothing has been made."""
        if self.is_claimed:
            for path in self.config, self.data, self._lock:
                path.unlink(missing_ok=True)
            self.path.rmdir()

    def _acquire(self, wait: float) -> None:
        tell = partial(logger.info, "another process trains in %s: waiting for it", self.path)
        try:  # a process may claim what it holds already
            self.path.mkdir(parents=True, exist_ok=True)
            self.enter_context(locked(self._lock, wait=wait, on_wait=tell))
        except TimeoutError:
            self.is_in_use = True
            raise UserError(
                f"run_dir={self.path}: another process trains there; wait for it, or {self.instead}"
            ) from None
        except OSError as error:
            raise UserError(f"run_dir={self.path}: cannot be written to ({error.strerror}); {self.instead}") from error

    def _check_takes(self, config: Mapping[str, Any], *, resume: bool) -> None:
        if not self.holds_a_run():
            return
        self._check_same_config(config)
        if not resume:
            raise UserError(
                f"trainer.resume=false, but run_dir={self.path} holds this run already: {self.instead}, "
                "or leave trainer.resume out to go on with it"
            )

    def claim_data(self, fingerprint: str) -> None:
        """Notes what the run is trained on, or checks that it is what the folder's run was trained on.

        Raises:
            UserError: if the folder holds a run on other data.
        """
        text = json.dumps({"fingerprint": fingerprint}) + "\n"
        if not (self.holds_a_run() and self.data.is_file()):
            write_text(self.data, text)
        elif self.data.read_text(encoding="utf-8") != text:
            raise UserError(
                f"run_dir={self.path}: holds a run on other data: the text or its tokens have changed since; "
                f"{self.instead}, or put the data back as it was"
            )

    def finished_results(self) -> dict[str, Any] | None:
        """Returns the results if the run is finished, else `None`."""
        if not self.results.is_file():
            return None
        try:
            results: dict[str, Any] = json.loads(self.results.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(
                f"{self.results}: cannot be read ({error}); remove it, and the same command writes it again"
            ) from error
        return results

    def is_open_to(self, config: Mapping[str, Any]) -> bool:
        """Whether a run of this config may begin here, or go on."""
        if self.is_in_use or self.results.is_file():
            return False
        return self.is_claimed or not self.holds_a_run() or self.holds(config)

    def holds(self, config: Mapping[str, Any]) -> bool:
        """Whether the run in this folder is one of this config."""
        try:
            self._check_same_config(config)
        except UserError:
            return False
        return True

    def stored_config(self) -> dict[str, Any]:
        """The settings of the run in this folder.

        Raises:
            OSError, yaml.YAMLError: if they cannot be read.
        """
        return dict(yaml.safe_load(self.config.read_text(encoding="utf-8")) or {})

    def stored_text(self) -> dict[str, Any] | None:
        """The settings of the text that the run in this folder is trained on; `None`: it is on conversations."""
        data: dict[str, Any] = self.stored_config()["data"]
        return data if "block_size" in data else None

    def run_id(self) -> str:
        """A name for trackers that is the same whenever this run goes on."""
        return hashlib.sha256(str(self.path.resolve()).encode()).hexdigest()[:12]

    def truncate_metrics(self, step: int) -> None:
        """Drops the lines of `metrics.jsonl` behind `step`, which will be written again, and a torn last line."""
        kept = [line for line in self.read_metrics() if line["step"] <= step]
        write_text(self.metrics, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        """Adds one line to `metrics.jsonl`."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """Returns the lines of `metrics.jsonl`, without a last one that was cut off in writing."""
        if not self.metrics.is_file():
            return []
        lines = self.metrics.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines[:-1] if line]  # behind the last newline: empty, or torn

    def holds_a_run(self) -> bool:
        """Whether a run has begun here that can be gone on with, or looked at."""
        return self.metrics.is_file() or self.results.is_file() or self.checkpoints.latest() is not None

    def _check_same_config(self, config: Mapping[str, Any]) -> None:
        try:
            stored = self.stored_config()
        except FileNotFoundError:
            raise UserError(f"run_dir={self.path}: holds a run, but no {self.config.name}; {self.instead}") from None
        except (OSError, yaml.YAMLError) as error:
            raise UserError(
                f"run_dir={self.path}: holds a run, but {self.config.name} cannot be read "
                f"({first_line(error)}); {self.instead}"
            ) from error
        # Written and read like the stored one, so that a tuple is equal to its list.
        now = dict(flatten(yaml.safe_load(_to_yaml(config))))
        # A key that there was not yet when the config was stored has what is its default now.
        defaults = flatten(yaml.safe_load(_to_yaml(asdict(TrainConfig()))))
        before = {key: value for key, value in defaults if key in now} | dict(flatten(stored))
        different = [
            f"{key}={now.get(key)} (there: {before.get(key)})"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key) and key not in _NOT_PART_OF_THE_RUN
        ]
        if different:
            shown = ", ".join(different[:5]) + (f" and {len(different) - 5} more" if len(different) > 5 else "")
            raise UserError(
                f"run_dir={self.path}: holds a run of another config; different are {shown}: "
                f"{self.instead}, or the same settings to go on with that run"
            )


def _to_yaml(config: Mapping[str, Any]) -> str:
    return str(yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the leaves of nested mappings with dotted keys."""
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@contextmanager
def recorded_failure(
    folder: RunFolder, cfg: RunConfig, overrides: Sequence[str], *, keeps_mistakes: bool = True
) -> Iterator[None]:
    """Leaves `failure.json` in the run folder where an exception ends the run, and passes the exception on.

    A folder that holds another run, or this one finished, stays as it is.

    Args:
        folder: the run folder.
        cfg: the configuration of the run.
        overrides: what the command line says of it.
        keeps_mistakes: whether that goes for mistakes of the user, too, that are found before a run has begun; else
            these leave no trace.
    """
    try:
        yield
    except Exception as error:
        with suppress(OSError):  # a folder that cannot be written to is often the reason itself
            has_begun = folder.holds_a_run() or folder.init.exists()  # a conversion may have taken minutes
            if isinstance(error, UserError) and not keeps_mistakes and not has_begun:
                folder.withdraw()
            elif folder.is_open_to(asdict(cfg)):
                folder.path.mkdir(parents=True, exist_ok=True)
                failure = {
                    "error": " ".join(str(error).split()) or type(error).__name__,
                    "type": type(error).__name__,
                    "overrides": list(overrides),
                    "layer_types": _layer_types(cfg),
                    "run_name": cfg.run_name,
                }
                write_json(folder.failure, failure)
        raise


def _layer_types(cfg: RunConfig) -> str | None:
    """The run's pattern, where it can be known without a pretrained model, which brings the number of layers."""
    if not isinstance(cfg, TrainConfig) or (cfg.init.source is not None and cfg.model.layer_types is None):
        return None
    with suppress(UserError):
        return resolve_layer_types(cfg)
    return None
