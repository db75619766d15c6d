"""Reads run folders, those of earlier versions and those that never finished too. What is missing stays missing."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from lckv.errors import UserError, near_miss
from lckv.model_arguments import DEFAULT_SLIDING_WINDOW
from lckv.patterns import SharingPlan, build_layer_types, parse_layer_types
from lckv.training.run_folder import flatten

# Of a run folder, no more than these is looked into; it holds no other runs.
_SIGNS_OF_A_RUN = ("config.yaml", "failure.json")


@dataclass(frozen=True)
class Run:
    """What a run folder says.

    Attributes:
        name: the folder, seen from the one that was searched.
        config: every setting, by dotted keys.
        results: `results.json`; empty if the run did not finish.
        lines: `metrics.jsonl`.
        failure: `failure.json`; empty if there is none.
        evaluations: the figures of evaluations, by their names.
        problems: files that cannot be read, one sentence each.
    """

    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    results: Mapping[str, Any] = field(default_factory=dict)
    lines: tuple[Mapping[str, Any], ...] = ()
    failure: Mapping[str, Any] = field(default_factory=dict)
    evaluations: Mapping[str, Any] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    @property
    def seed(self) -> Any:
        """Where its random numbers started; `None` if it does not say."""
        return scalar(self.config.get("seed"))

    @cached_property
    def layer_types(self) -> str | None:
        """Its pattern, as `layer_types`; `None` if it cannot be found out."""
        given = (
            self.results.get("layer_types") or self.failure.get("layer_types") or self.config.get("model.layer_types")
        )
        try:
            return parse_layer_types(str(given)).layer_types if given else self._built_layer_types()
        except UserError:
            return None

    def _built_layer_types(self) -> str:
        layers = self.config.get("model.num_hidden_layers") or self.config.get("model.default_num_hidden_layers")
        return build_layer_types(str(self.config.get("sharing.name")), layers or 0, **self.sharing_parameters)

    @property
    def sharing_parameters(self) -> dict[str, Any]:
        """The parameters that were given to its family of patterns."""
        group = {key.removeprefix("sharing."): value for key, value in self.config.items() if key[:8] == "sharing."}
        return {name: value for name, value in group.items() if name != "name" and value is not None}

    @cached_property
    def plan(self) -> SharingPlan | None:
        """Its pattern."""
        return None if self.layer_types is None else parse_layer_types(self.layer_types)

    @property
    def family(self) -> str | None:
        """The family that its pattern was taken from, with its parameters; `None` where a string was given."""
        name = self.family_name
        if name is None or name == "llama":
            return name
        parameters = ", ".join(f"{key}={value}" for key, value in self.sharing_parameters.items())
        return name + (f" ({parameters})" if parameters else "")

    @property
    def family_name(self) -> str | None:
        """The family without its parameters."""
        if self.plan is not None and self.layer_types == build_layer_types("llama", self.plan.num_hidden_layers):
            return "llama"
        if self.config.get("model.layer_types") is not None or self.config.get("sharing.name") is None:
            return None
        return str(self.config["sharing.name"])

    @property
    def sliding_window(self) -> Any:
        """Tokens that an entry with the suffix `s` sees."""
        return self.config.get("model.sliding_window") or DEFAULT_SLIDING_WINDOW

    def figure(self, *keys: str) -> float | None:
        """A number of the results, such as `figure("kv_bytes", "written")`; `None` where it is missing."""
        value: Any = self.results
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return number(value)


def number(value: Any) -> float | None:
    """A finite number as it is; anything else as `None`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        return None
    return value


def scalar(value: Any) -> str | int | float | bool | None:
    """A value that can be compared as it is; anything else, which only damaged files hold, as text."""
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def read_runs(folder: Path) -> list[Run]:
    """Reads all run folders in `folder`, at any depth; it may be one itself.

    Raises:
        UserError: if there is no such folder, or no run in it.
    """
    _check_folder(folder)
    paths = sorted(set(_run_folders(folder, set())))
    if not paths:
        raise UserError(
            f"folder={folder}: holds no run; a run folder has a config.yaml, which python -m lckv.train writes"
        )
    return [_read_run(path, folder) for path in paths]


def _check_folder(folder: Path) -> None:
    if folder.is_dir():
        return
    if folder.exists():
        raise UserError(f"folder={folder}: is a file; give the folder that holds the runs")
    siblings = [path.name for path in folder.parent.iterdir() if path.is_dir()] if folder.parent.is_dir() else []
    hint = near_miss(folder.name, siblings)
    raise UserError(f"folder={folder}: there is no such folder{hint}")


def _run_folders(folder: Path, seen: set[Path]) -> Iterator[Path]:
    """Yields run folders, and follows links: a folder of links is a way to choose among runs."""
    if (real := folder.resolve()) in seen:
        return
    seen.add(real)
    if any((folder / name).is_file() for name in _SIGNS_OF_A_RUN):
        yield folder
        return
    with os.scandir(folder) as entries:
        folders = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    for name in folders:
        yield from _run_folders(folder / name, seen)


def _read_run(path: Path, folder: Path) -> Run:
    problems: list[str] = []
    config = _read_mapping(path / "config.yaml", problems)
    results = _read_mapping(path / "results.json", problems)
    evaluated = _read_mapping(path / "evaluation" / "results.json", problems)
    return Run(
        name=path.name if path == folder else path.relative_to(folder).as_posix(),
        config=dict(flatten(config)),
        results=results,
        lines=tuple(_read_lines(path / "metrics.jsonl")),
        failure=_read_mapping(path / "failure.json", problems),
        evaluations={**_mapping(results.get("evaluations")), **_mapping(evaluated.get("evaluations"))},
        problems=tuple(problems),
    )


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _read_mapping(file: Path, problems: list[str]) -> dict[str, Any]:
    """The file's mapping; an empty one where it is missing or, which is noted, cannot be read."""
    if not file.is_file():
        return {}
    try:
        text = file.read_text(encoding="utf-8")
        value = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        problems.append(f"{file.name} cannot be read: {type(error).__name__}")
        return {}
    if not isinstance(value, dict):
        problems.append(f"{file.name} holds no settings or figures")
        return {}
    return value


def _read_lines(file: Path) -> Iterator[dict[str, Any]]:
    """The lines of the metrics, without those that a kill has torn."""
    if not file.is_file():
        return
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            yield value
