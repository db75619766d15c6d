"""Which runs are the same but for their seed, what groups of them are called, and which groups can be compared."""

from __future__ import annotations

import json
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pandas import DataFrame

from lckv.config import TrainConfig
from lckv.config.model_arguments import DEFAULT_SLIDING_WINDOW
from lckv.reporting.metrics import scalar
from lckv.reporting.runs import FIGURES, first_known
from lckv.training.run_folder import flatten

_DEFAULTS = dict(flatten(asdict(TrainConfig()))) | {"model.cyclic_groups": 1}
"""What a run of an earlier version, which did not know a setting, did."""

_CHANGES_NO_RESULT = (
    *("seed", "run_name", "run_dir", "logger.", "data.cache_dir", "trainer.resume", "trainer.num_threads"),
    *("trainer.dataloader_num_workers", "trainer.micro_batch_size", "trainer.eval_batch_size", "trainer.eval_steps"),
    *("trainer.save_", "trainer.logging_steps", "trainer.sample_", "trainer.evaluation_steps"),
    "evaluation.batch_size",
)
_OF_WINDOWS = ("model.sliding_window",)
_OF_CYCLES = ("forward_passes", "backward_passes", "cyclic_groups", "converge_tolerance", "use_sequential")
_OF_PATTERN = (
    *("sharing.", "model.layer_types", "model.num_hidden_layers", "model.default_num_hidden_layers"),
    *(*_OF_WINDOWS, *(f"model.{name}" for name in _OF_CYCLES)),
)
_SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
_UNKNOWN = "unknown"
_WORDS = {
    "lckv": "the version of lckv",
    "torch": "the version of torch",
    "data": "the text",
    "steps": "the number of steps",
    "tokens": "the number of tokens",
    "layers": "the number of layers",
    "vocab_size": "the vocabulary's size",
}
_MAX_LABEL, _MAX_VALUE, _MAX_NAMES = 26, 14, 3
_PARTS = ("pattern", "settings", "provenance")

Row = Any
"""A run or a group, as `DataFrame.itertuples` gives it: its columns are attributes."""

Group = dict[str, Any]


def group_runs(runs: DataFrame) -> tuple[list[Group], list[str]]:
    """Puts finished runs that differ in no more than their seed together.

    Returns:
        The groups, and a sentence about every run that is left out because the same one is there already.

        Groups that can be compared stand together (with a letter as their `set`, if not all can), Llamas first, then
        from many KV bytes to few. They have a `label` that no other one has, their `runs`, one for each seed, the
        columns of the first run, the first of the figures that are known, their KV bytes as a `fraction` of Llama's,
        and what was set as JSON texts: of the `pattern`, the other `settings`, and the `provenance`, which must be
        equal for figures to be comparable.
    """
    parts = [_parts(run) for run in runs.itertuples()]
    runs = runs.assign(**{name: [each[name] for each in parts] for name in _PARTS}, key=[*map(json.dumps, parts)])
    kept = runs.drop_duplicates(["key", "seed"])
    first = {(run.key, run.seed): run for run in kept.itertuples()}
    notes = [_repeated(run, first[run.key, run.seed]) for run in runs.drop(kept.index).itertuples()]
    groups = [_group(alike) for _, alike in kept.groupby("key", sort=False)]
    groups.sort(
        key=lambda each: (not each["is_llama"], -(each["written"] or 0), each["layer_types"] or "", each["label"])
    )
    return _in_sets(_with_labels(groups)), notes


def _repeated(run: Row, first: Row) -> str:
    lost = [name for name in run.evaluations if name not in first.evaluations]
    figures = f", with its figures of {', '.join(lost)}, which {first.name} has not" if lost else ""
    return f"{run.name} repeats {first.name} (same pattern, same settings, same seed) and is left out{figures}"


def _parts(run: Row) -> dict[str, dict[str, str]]:
    """What was set: of the pattern, of the rest, and what must be equal for figures to be comparable."""
    config, plan = {**_DEFAULTS, **run.config}, run.plan
    pattern = {"layer_types": run.layer_types}  # and of what says how it is run, only what it reads
    if plan is not None and plan.has_cycles:
        pattern |= {name: config[f"model.{name}"] for name in _OF_CYCLES}
    if plan is not None and plan.has_windows:
        pattern |= {"sliding_window": run.config.get("model.sliding_window") or DEFAULT_SLIDING_WINDOW}
    others = {key: value for key, value in config.items() if not key.startswith((*_CHANGES_NO_RESULT, *_OF_PATTERN))}
    return {"pattern": _as_text(pattern), "settings": _as_text(others), "provenance": _as_text(_provenance(run))}


def _as_text(settings: Mapping[str, Any]) -> dict[str, str]:
    """Values as JSON text, so that they can be compared whatever they are."""
    return {
        key: json.dumps(settings[key], sort_keys=True, default=str, ensure_ascii=False) for key in sorted(settings)
    }


def _provenance(run: Row) -> dict[str, Any]:
    """Versions, text, length of the training and sizes of a run; "unknown" where it does not say."""
    values = {
        "lckv": run.versions.get("lckv"),
        "torch": run.versions.get("torch"),
        "data": run.results.get("data_fingerprint"),
        "steps": run.steps,
        "tokens": run.tokens,
        "layers": None if run.plan is None else run.plan.num_hidden_layers,
        "vocab_size": run.config.get("model.vocab_size") or run.config.get("tokenizer.vocab_size"),
        # A run of lckv.sft names a model, and none of its sizes.
        **{name: None if "model" in run.config else run.config.get(f"model.{name}") or "default" for name in _SIZES},
    }
    return {name: _UNKNOWN if value is None else scalar(value) for name, value in values.items()}


def _group(runs: DataFrame) -> Group:
    group = {**runs.iloc[0].to_dict(), "runs": runs}
    group |= {name: first_known(runs[name]) for name in FIGURES}
    written, llama = group["written"], group["llama_written"]
    group["written"] = written = written if written is not None and written > 0 else None  # no pattern needs none
    group["fraction"] = written / llama if written is not None and llama is not None and llama > 0 else None
    group["is_llama"] = group["family"] == "llama"
    group["family_name"] = group["family_name"] or group["layer_types"]
    group["label"] = group["family"] or _shorten(group["layer_types"] or "unknown pattern")
    return group


def _shorten(text: str, max_length: int = _MAX_LABEL) -> str:
    """A long text without its middle."""
    return text if len(text) <= max_length else f"{text[: max_length // 2]}…{text[-max_length // 2 + 1 :]}"


def _with_labels(groups: Sequence[Group]) -> list[Group]:
    """The groups with labels of which no two are alike: of equal ones, each also says what sets it apart."""
    alike = {group["label"]: [other for other in groups if other["label"] == group["label"]] for group in groups}
    labels = [" ".join([group["label"], *_differences(group, alike[group["label"]])]) for group in groups]
    times: Counter[str] = Counter()
    for place, label in enumerate(labels):
        times[label] += 1
        labels[place] = label if times[label] == 1 else f"{label} ({times[label]})"
    return [{**group, "label": label} for group, label in zip(groups, labels, strict=True)]


def _differences(group: Group, others: Sequence[Group]) -> list[str]:
    """What sets groups apart from each other, as this one has it: no more settings than it takes."""
    found = []
    apart: list[tuple[str | None, ...]] = [()] * len(others)
    for part in _PARTS:
        for key in sorted({key for other in others for key in other[part]} - {"layer_types"}):
            further = [(*before, other[part].get(key)) for before, other in zip(apart, others, strict=True)]
            if len(set(further)) > len(set(apart)):
                apart = further
                value = group[part].get(key, "–").strip('"')
                setting = key.removesuffix(".name").rpartition(".")[2]  # what `group=option` says is the group's name
                found.append(f"{setting}={_shorten(value, _MAX_VALUE)}")
    return found


def _in_sets(groups: Sequence[Group]) -> list[Group]:
    """The groups, those that can be compared together."""
    sets: dict[str, list[Group]] = {}
    for group in groups:
        sets.setdefault(json.dumps(group["provenance"]), []).append(group)
    names = [_letters(number) if len(sets) > 1 else "" for number in range(len(sets))]
    return [{**group, "set": name} for name, members in zip(names, sets.values(), strict=True) for group in members]


def _letters(number: int) -> str:
    """A, B, ..., Z, AA, AB, ..."""
    rest, last = divmod(number, 26)
    return (_letters(rest - 1) if rest else "") + string.ascii_uppercase[last]


def warnings_of(runs: DataFrame) -> list[str]:
    """One sentence for each thing in which finished runs differ so that they cannot be compared."""
    holders: dict[str, dict[Any, list[str]]] = {}
    for run in runs.itertuples():
        for name, value in _provenance(run).items():
            holders.setdefault(name, {}).setdefault(value, []).append(run.name)
    return [
        f"not comparable: {_WORDS.get(name, name)} differs: "
        + "; ".join(f"{_show(name, value)} in {list_names(runs)}" for value, runs in names.items())
        for name, names in holders.items()
        if len(names) > 1
    ]


def _show(name: str, value: Any) -> str:
    if name == "data":
        return str(value)[:12]
    return f"{value:,}" if isinstance(value, int) else str(value)


def list_names(names: Sequence[str]) -> str:
    """The first few names of runs, and how many more there are."""
    shown = ", ".join(names[:_MAX_NAMES])
    return shown if len(names) <= _MAX_NAMES else f"{shown} and {len(names) - _MAX_NAMES} more"
