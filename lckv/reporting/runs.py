"""Run folders as a table with a row for each, those of earlier versions and those that never finished too.

What is missing stays missing. Columns hold plain Python objects: a count stays a whole number, and nothing is NaN.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pandas import DataFrame

from lckv.config.names import RANDOM
from lckv.errors import UserError, near_miss
from lckv.reporting.metrics import metrics_of, number, scalar
from lckv.sharing.patterns import SharingPlan, build_layer_types, parse_layer_types
from lckv.training.run_folder import flatten

# Of a run folder, no more than these is looked into; it holds no other runs.
_SIGNS_OF_A_RUN = ("config.yaml", "failure.json")

FIGURES = {
    "written": "kv_bytes.written",
    "resident": "kv_bytes.resident",
    "read": "kv_bytes.read",
    "llama_written": "kv_bytes_llama.written",
    "context_length": "kv_bytes_context_length",
    "num_parameters": "num_parameters",
    "steps": "steps",
    "tokens": "tokens",
    "tokens_per_second": "tokens_per_second",
    "train_flops_per_token": "train_flops_per_token",
}
"""Columns with numbers of `results.json`, by their dotted keys there; none depends on the seed but the speed."""


def table(records: Iterable[Mapping[Any, Any]]) -> DataFrame:
    """A table of these rows, in which numbers keep their types and what is missing is `None`."""
    frame = DataFrame(list(records), dtype=object)
    return frame.where(frame.notna(), None)


def first_known(values: Iterable[Any]) -> Any:
    """The first of a figure's values that is known; `None` of none."""
    return next((value for value in values if value is not None), None)


def read_runs(folder: Path) -> DataFrame:
    """Reads all run folders in `folder`, at any depth; it may be one itself.

    Returns:
        A row for each, with `name` (the folder, seen from the one that was searched), `state` ("finished", "failed",
        "diverged", "unreadable" or "unfinished") with its `reason`, `problems` (files that cannot be read, a sentence
        each), `seed`, the `plan` with its `layer_types`, `family` (with its parameters; `None` where a string was
        given), `family_name`, the files themselves (`config` by dotted keys, `results`, `lines`, `failure`,
        `evaluations`), `versions` and `metrics` by name, and the `FIGURES`.

    Raises:
        UserError: if there is no such folder, or no run in it.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"folder={folder}: is a file; give the folder that holds the runs")
    if not folder.is_dir():
        siblings = [path.name for path in folder.parent.iterdir() if path.is_dir()] if folder.parent.is_dir() else []
        raise UserError(f"folder={folder}: there is no such folder{near_miss(folder.name, siblings)}")
    if not (paths := sorted(_run_folders(folder, set()))):
        raise UserError(
            f"folder={folder}: holds no run; a run folder has a config.yaml, which python -m lckv.train writes"
        )
    return table(
        {"name": path.name if path == folder else path.relative_to(folder).as_posix(), **_read_run(path)}
        for path in paths
    )


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


def _read_run(path: Path) -> dict[str, Any]:
    problems: list[str] = []
    names = ("config.yaml", "results.json", "evaluation/results.json", "failure.json")
    config, results, evaluated, failure = (_read_mapping(path, name, problems) for name in names)
    evaluations = {**_mapping(results.get("evaluations")), **_mapping(evaluated.get("evaluations"))}
    leaves = dict(flatten(results))
    run = {
        **{column: number(leaves.get(key)) for column, key in FIGURES.items()},
        "problems": problems,
        "config": dict(flatten(config)),
        "results": results,
        "versions": _mapping(results.get("versions")),
        "failure": failure,
        "lines": list(_read_lines(path / "metrics.jsonl")),
        "evaluations": evaluations,
        "metrics": metrics_of(results, evaluations),
    }
    run["seed"] = scalar(run["config"].get("seed"))
    run["state"], run["reason"] = _state(run)
    run["plan"], run["family_name"], run["family"] = _pattern(run)
    run["layer_types"] = None if run["plan"] is None else run["plan"].layer_types
    return run


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _read_mapping(run: Path, name: str, problems: list[str]) -> dict[str, Any]:
    """The mapping in a file of a run; an empty one where it is missing or, which is noted, cannot be read."""
    file = run / name
    if not file.is_file():
        return {}
    try:
        text = file.read_text(encoding="utf-8")
        value = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        problems.append(f"{name} cannot be read: {type(error).__name__}")
        return {}
    if not isinstance(value, dict):
        problems.append(f"{name} holds no settings or figures")
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


def _state(run: Mapping[str, Any]) -> tuple[str, str]:
    """What became of a run and, where no figure is taken from it, why."""
    if run["results"]:
        loss = run["results"].get("eval_loss")
        is_finite = loss is None or number(loss) is not None
        return ("finished", "") if is_finite else ("diverged", f"the validation loss is {loss}")
    if failure := run["failure"]:
        error = " ".join(str(failure.get("error") or "no reason is given").split())
        kind = str(failure.get("type") or "")
        return "failed", error if not kind or error.startswith(kind) else f"{kind}: {error}"
    if run["problems"]:
        return "unreadable", "; ".join(run["problems"])
    steps = [step for line in run["lines"] if (step := number(line.get("step"))) is not None]
    max_steps = number(run["config"].get("trainer.max_steps"))
    total = "" if max_steps is None else f" of {max_steps:,}"
    return "unfinished", f"step {max(steps):,.0f}{total}" if steps else f"no step{total} is logged yet"


def _pattern(run: Mapping[str, Any]) -> tuple[SharingPlan | None, str | None, str | None]:
    """The plan, its family, and the family with its parameters; `None` where it is not known."""
    config = run["config"]
    group = {key.removeprefix("sharing."): value for key, value in config.items() if key.startswith("sharing.")}
    parameters = {name: value for name, value in group.items() if name != "name" and value is not None}
    given = run["results"].get("layer_types") or run["failure"].get("layer_types") or config.get("model.layer_types")
    layers = config.get("model.num_hidden_layers") or config.get("model.default_num_hidden_layers")
    try:
        layer_types = str(given) if given else build_layer_types(str(group.get("name")), layers or 0, **parameters)
        plan = parse_layer_types(layer_types)
    except UserError:
        plan = None
    is_random = group.get("name") == RANDOM
    if plan is not None and plan.layer_types == build_layer_types("llama", plan.num_hidden_layers) and not is_random:
        return plan, "llama", "llama"
    is_typed = config.get("model.layer_types") is not None and not is_random
    name = None if is_typed or group.get("name") is None else str(group["name"])
    shown = ", ".join(f"{key}={value}" for key, value in parameters.items())
    return plan, name, f"{name} ({shown})" if name not in (None, "llama") and shown else name
